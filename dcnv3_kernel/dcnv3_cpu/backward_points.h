// In: grad_output and the located points of a block. Out: contributions to the sums of the input's gradient, and the gradients
// of the block's offsets and modulations.

#pragma once

#include "channels.h"
#include "locations.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// The sum of the elements of each of four vectors, as one vector of four elements.
template <class T>
DCNV3_INLINE Vector<T, 4> four_sums(Vector<T, 8> a, Vector<T, 8> b, Vector<T, 8> c, Vector<T, 8> d) {
  typedef Vector<typename MaskOf<T>::type, 8> M;
  const M low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
  const Vector<T, 8> ab = shuffle(a, b, low) + shuffle(a, b, high);
  const Vector<T, 8> cd = shuffle(c, d, low) + shuffle(c, d, high);
  union {
    Vector<T, 8> whole;
    Vector<T, 4> halves[2];
  } u;
  u.whole = shuffle(ab, cd, M{0, 1, 8, 9, 4, 5, 12, 13}) + shuffle(ab, cd, M{2, 3, 10, 11, 6, 7, 14, 15});
  return u.halves[0] + u.halves[1];
}
template <class T>
DCNV3_INLINE Vector<T, 4> four_sums(Vector<T, 4> a, Vector<T, 4> b, Vector<T, 4> c, Vector<T, 4> d) {
  typedef Vector<typename MaskOf<T>::type, 4> M;
  const M low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  const Vector<T, 4> ab = shuffle(a, b, low) + shuffle(a, b, high);
  const Vector<T, 4> cd = shuffle(c, d, low) + shuffle(c, d, high);
  return shuffle(ab, cd, M{0, 1, 4, 5}) + shuffle(ab, cd, M{2, 3, 6, 7});
}
template <class T>
DCNV3_INLINE Vector<T, 4> four_sums(Vector<T, 2> a, Vector<T, 2> b, Vector<T, 2> c, Vector<T, 2> d) {
  return Vector<T, 4>{a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]};
}
template <class T>
DCNV3_INLINE Vector<T, 4> four_sums(Vector<T, 1> a, Vector<T, 1> b, Vector<T, 1> c, Vector<T, 1> d) {
  return Vector<T, 4>{a[0], b[0], c[0], d[0]};
}

// For one unit (one group of one output pixel) and B channels: the dot products of grad_output with the four pixels of each
// point.
template <class T, class S, int P, int B>
DCNV3_INLINE void multiply(
    const Points<T>& p, int64_t at, int64_t dynamic_points, int64_t pixel_stride, const S* gradient, const S* input,
    int64_t right, int64_t down, bool first) {
  typedef Piece<T, S, B> Channels;
  typedef typename Channels::V V;
  constexpr int N = Channels::count;
  const int64_t points = P ? P : dynamic_points;
  const S* const corners[4] = {input, input + right, input + down, input + down + right};
  V grad[N];
  Channels::read(gradient, grad);
#pragma GCC unroll 3
  for (int64_t i = at; i < at + points; ++i) {
    const int64_t index = p.index[i] * pixel_stride;
    V product[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      V row[N];
      Channels::read(corners[k] + index, row);
      product[k] = grad[0] * row[0];
      for (int c = 1; c < N; ++c) product[k] += grad[c] * row[c];
    }
    Vector<T, 4> dots = four_sums<T>(product[0], product[1], product[2], product[3]);
    if (!first) dots += load<T, 4>(p.dots + 4 * i);
    store<T, 4>(p.dots + 4 * i, dots);
  }
}

// For one unit and B channels: adds grad_output times its weights to the sums of the four pixels of each point.
template <class T, class S, int P, int B>
DCNV3_INLINE void scatter(
    const Points<T>& p, int64_t at, int64_t dynamic_points, int64_t pixel_stride, const S* gradient, T* sums,
    int64_t right, int64_t down) {
  typedef Piece<T, S, B> Channels;
  typedef typename Channels::V V;
  constexpr int N = Channels::count, width = Channels::width;
  const int64_t points = P ? P : dynamic_points;
  T* const corners[4] = {sums, sums + right, sums + down, sums + down + right};
  V grad[N];
  Channels::read(gradient, grad);
#pragma GCC unroll 3
  for (int64_t i = at; i < at + points; ++i) {
    const int64_t index = p.index[i] * pixel_stride;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const T weight = p.weight[k][i];
      T* to = corners[k] + index;
      for (int c = 0; c < N; ++c) store<T, width>(to + c * width, load<T, width>(to + c * width) + weight * grad[c]);
    }
  }
}

// `multiply` and `scatter` by branches: neither reads nor writes pixels outside the image. The channels of `sums` have the
// order of `scatter`.
template <class T, class S, int D>
__attribute__((noinline)) void scatter_exactly(
    const Points<T>& p, int64_t at, const Shape& s, int64_t channels, const S* gradient, const S* input, T* sums,
    int64_t pixel_stride) {
  for (int64_t i = at; i < at + s.points; ++i) {
    const Corners<T> corners(p.x[i], p.y[i], s.height, s.width);
    for (int k = 0; k < 4; ++k) p.dots[4 * i + k] = 0;
    for (int k = 0; k < 4; ++k) {
      if (!corners.inside[k]) continue;
      const T weight = corners.weight[k] * p.mask[i];
      T* to = sums + corners.index[k] * pixel_stride;
      for_pieces<D>(channels, [&]<int B>(int64_t c) {
        typedef Piece<T, S, B> Channels;
        typename Channels::V grad[Channels::count];
        Channels::read(gradient + c, grad);
        for (int j = 0; j < Channels::count; ++j) {
          T* sum = to + c + j * Channels::width;
          store<T, Channels::width>(sum, load<T, Channels::width>(sum) + weight * grad[j]);
        }
      });
      T dot = 0;
      for (int64_t c = 0; c < channels; ++c) {
        dot += T(widen(gradient[c])) * T(widen(input[corners.index[k] * s.channels + c]));
      }
      p.dots[4 * i + corners.order[k]] = dot;
    }
  }
}

// Writes the gradients of offsets, x and y interleaved.
template <class T, class S>
DCNV3_INLINE void write_offsets(Register<T> x, Register<T> y, S* to) {
  constexpr int L = lanes<T>;
  if constexpr (__is_same(S, BFloat16)) {
    *reinterpret_cast<typename VectorOf<uint32_t, L>::unaligned*>(to) = pairs_of_bfloat16(x, y);
  } else {
    MaskRegister<T> in_turns;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) in_turns[i] = i / 2 + i % 2 * L;
    T values[2 * L];
    store<T, L>(values, shuffle(x, y, in_turns));
    store<T, L>(values + L, shuffle(x, y, in_turns + L / 2));
    narrow_row(values, to, 2 * L);
  }
}

template <class S>
DCNV3_INLINE void copy_row(const S* from, S* to, int64_t n) {
  constexpr int L = 32 / sizeof(S);
  typedef typename VectorOf<uint8_t, 32>::unaligned Bytes;
  int64_t i = 0;
  for (; i + L <= n; i += L) *reinterpret_cast<Bytes*>(to + i) = *reinterpret_cast<const Bytes*>(from + i);
  for (; i < n; ++i) to[i] = from[i];
}

// Computes the gradients of a block's offsets and modulations from the dot products. `finite`: dot products and modulations
// are finite.
template <class T, class S, int P>
DCNV3_INLINE void differentiate(
    const BackwardArguments& a, const Points<T>& p, const Block& block, const Axis<T>& columns, const Axis<T>& rows,
    bool finite) {
  constexpr int L = lanes<T>;
  typedef Register<T> V;
  typedef MaskRegister<T> M;
  const Shape& s = a.shape;
  const int64_t points = P ? P : s.points, units = block.count * block.groups, n = units * points;
  const T scale = T(s.offset_scale);
  S* const by_offset = reinterpret_cast<S*>(p.by_offset);
  M by_corner, halves;
#pragma GCC unroll 16
  for (int j = 0; j < L / 2; ++j) {
    by_corner[j] = 4 * j, by_corner[L / 2 + j] = 4 * j + 1;
    halves[j] = j, halves[L / 2 + j] = L + j;
  }
  for (int64_t i = 0; i < n; i += L) {
    V d[4], from[4];
    for (int k = 0; k < 4; ++k) from[k] = load<T, L>(p.dots + 4 * i + k * L);
    for (int k = 0; k < 4; k += 2) {  // transposes (points, corners) to (corners, points)
      const V one = shuffle(from[0], from[1], by_corner + k), other = shuffle(from[2], from[3], by_corner + k);
      d[k] = shuffle(one, other, halves);
      d[k + 1] = shuffle(one, other, halves + L / 2);
    }
    const V x = load<T, L>(p.from_x + i), y = load<T, L>(p.from_y + i), factor = load<T, L>(p.mask + i) * scale;
    V left, right, top, bottom, left_slope, right_slope, top_slope, bottom_slope;
    columns.weights(x, left, right);
    rows.weights(y, top, bottom);
    columns.slopes(x, left_slope, right_slope);
    rows.slopes(y, top_slope, bottom_slope);
    store<T, L>(p.by_mask + i, top * (left * d[0] + right * d[1]) + bottom * (left * d[2] + right * d[3]));
    const V by_x = top * (left_slope * d[0] + right_slope * d[1]) + bottom * (left_slope * d[2] + right_slope * d[3]);
    const V by_y = left * (top_slope * d[0] + bottom_slope * d[2]) + right * (top_slope * d[1] + bottom_slope * d[3]);
    write_offsets<T>(by_x * factor, by_y * factor, by_offset + 2 * i);
  }
  for (int64_t i = 0; !finite && i < n; ++i) {  // a point outside the image has no gradient, even if its product is 0 * inf
    if (!Corners<T>(p.x[i], p.y[i], s.height, s.width).within) by_offset[2 * i] = by_offset[2 * i + 1] = S{};
  }
  for (int64_t unit = 0; s.softmax && unit < units; ++unit) {
    T* by_mask = p.by_mask + unit * points;
    const T* mask = p.mask + unit * points;
    T mean = 0;
#pragma GCC unroll 9
    for (int64_t i = 0; i < points; ++i) mean += mask[i] * by_mask[i];
#pragma GCC unroll 9
    for (int64_t i = 0; i < points; ++i) by_mask[i] = mask[i] * (by_mask[i] - mean);
  }
  const int64_t length = block.groups * points;
  for (int64_t q = 0; q < block.count; ++q) {
    const int64_t first = ((block.pixel + q) * s.groups + block.group) * points;
    copy_row(by_offset + 2 * q * length, static_cast<S*>(a.grad_offset) + 2 * first, 2 * length);
    narrow_row(p.by_mask + q * length, static_cast<S*>(a.grad_mask) + first, length);
  }
}

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
