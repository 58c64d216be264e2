// In: the offsets and modulations of a block. Out: for each of its points the four pixels that it samples and their weights,
// in the arrays of `Points`.

#pragma once

#include "blocks.h"
#include "numbers.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// The position of the kernel's centre along one axis for the output index `out`. Exact: `start` and `stride` are integers.
template <class T>
struct Origin {
  T start, stride;
  Origin(int64_t step, int64_t padding, int64_t dilation, int64_t kernel)
      : start(T(dilation * (kernel - 1) / 2 - padding)), stride(T(step)) {}
  T operator()(int64_t out) const { return T(out) * stride + start; }
};

// Reads 2 * lanes interleaved offsets and separates x from y.
template <class T, class S>
DCNV3_INLINE void read_offsets(const S* from, Register<T>& x, Register<T>& y) {
  constexpr int L = lanes<T>;
  if constexpr (__is_same(S, BFloat16)) {
    const Vector<uint32_t, L> pairs = *reinterpret_cast<const typename VectorOf<uint32_t, L>::unaligned*>(from);
    x = reinterpret_cast<Register<T>>(pairs << 16), y = reinterpret_cast<Register<T>>(pairs & 0xffff0000u);
  } else {
    MaskRegister<T> even, odd;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const Register<T> first = load<T, L>(from), second = load<T, L>(from + L);
    x = shuffle(first, second, even), y = shuffle(first, second, odd);
  }
}

// Reads the offsets and modulations of a block. Fills `x`, `y` and `mask`.
template <class T, class S, int P>
DCNV3_INLINE void place(
    const Points<T>& p, const Shape& s, const Block& block, const S* offsets, const S* masks, const Origin<T>& origins_x,
    const Origin<T>& origins_y, T scale) {
  constexpr int L = lanes<T>;
  const int64_t points = P ? P : s.points, n = block.groups * points;
  // the elements up to the end of the last pixel
  const int64_t last_pixel = s.batch * s.height_out * s.width_out - 1;
  const int64_t all_masks = last_pixel * s.mask_pitch + s.groups * points;
  const int64_t all_offsets = last_pixel * s.offset_pitch + 2 * s.groups * points;
  int64_t x_out = block.x, y_out = block.y;
  for (int64_t q = 0; q < block.count; ++q) {
    const T origin_x = origins_x(x_out), origin_y = origins_y(y_out);
    if (++x_out == s.width_out) x_out = 0, ++y_out;
    const int64_t first_mask = (block.pixel + q) * s.mask_pitch + block.group * points;
    const int64_t first_offset = (block.pixel + q) * s.offset_pitch + 2 * block.group * points, at = q * n;
    for (int64_t i = 0; i < n; i += L) {
      const S *offset = offsets + first_offset + 2 * i, *mask = masks + first_mask + i;
      S offset_end[2 * L], mask_end[L];
      // never reads beyond the end of the tensors
      const int64_t rest_of_masks = all_masks - first_mask - i, rest_of_offsets = all_offsets - first_offset - 2 * i;
      if (__builtin_expect(rest_of_masks < L, 0)) {
        __builtin_memset(mask_end, 0, sizeof(mask_end));
        __builtin_memcpy(mask_end, mask, rest_of_masks * sizeof(S));
        mask = mask_end;
      }
      if (__builtin_expect(rest_of_offsets < 2 * L, 0)) {
        __builtin_memset(offset_end, 0, sizeof(offset_end));
        __builtin_memcpy(offset_end, offset, rest_of_offsets * sizeof(S));
        offset = offset_end;
      }
      Register<T> x, y;
      read_offsets<T>(offset, x, y);
      store<T, L>(p.x + at + i, (load<T, L>(p.kernel_x + i) + origin_x) + x * scale);
      store<T, L>(p.y + at + i, (load<T, L>(p.kernel_y + i) + origin_y) + y * scale);
      store<T, L>(p.mask + at + i, load<T, L>(mask));
    }
  }
}

// An axis of the image. A point samples two adjacent indices, `base` and `base + 1`. Both are inside the image unless its size
// is 1: a point between -1 and 0 has base 0, and the weight of index 1 is 0.
template <class T>
struct Axis {
  T end, last, reach;
  explicit Axis(int64_t size) : end(T(size)), last(size > 2 ? T(size - 2) : T(0)), reach(size > 1 ? 2 : 0) {}
  // The bases of positions, and the positions relative to them. Positions outside (-1, size) get values whose weights are both
  // 0.
  DCNV3_INLINE Register<T> base(Register<T> position, Register<T>& relative) const {
    const Register<T> zero = {};
    const Register<T> clamped = greatest(least(position, zero + end), zero - T(1));  // NaN becomes `end`
    const Register<T> low = least(greatest(round_down(clamped), zero), zero + last);
    relative = clamped - low;
    return low;
  }
  DCNV3_INLINE void weights(Register<T> relative, Register<T>& first, Register<T>& second) const {
    const Register<T> zero = {};
    first = greatest(T(1) - greatest(relative, -relative), zero);
    second = greatest(least(relative, reach - relative), zero);
  }
  // The derivatives of the weights by the position.
  DCNV3_INLINE void slopes(Register<T> relative, Register<T>& first, Register<T>& second) const {
    const Register<T> zero = {}, one = zero + T(1);
    first = relative < one ? (relative < zero ? (relative > -one ? one : zero) : -one) : zero;
    second = relative < one ? one : -one;
    second = ((relative >= zero) & (relative < zero + reach)) ? second : zero;
  }
};

// Fills `index` and `weight` of n points, and of the elements after them up to a full register. A position that is not
// strictly inside (-1, size), NaN included, gets weights of 0. If `Backward`, also fills `from_x` and `from_y` and extends
// [*low, *high] to the base rows of these points.
template <bool Backward, class T>
DCNV3_INLINE void locate(
    const Points<T>& p, int64_t n, const Axis<T>& columns, const Axis<T>& rows, int64_t width,
    int64_t* low = nullptr, int64_t* high = nullptr) {
  constexpr int L = lanes<T>;
  typedef Register<T> V;
  typedef Vector<int32_t, L> Int;
  V lowest = V{} + rows.end, highest = {};
  for (int64_t i = 0; i < n; i += L) {
    V from_x, from_y, left, right, top, bottom;
    const V x = columns.base(load<T, L>(p.x + i), from_x), y = rows.base(load<T, L>(p.y + i), from_y);
    columns.weights(from_x, left, right);
    rows.weights(from_y, top, bottom);
    store<int32_t, L>(p.index + i, __builtin_convertvector(y, Int) * int32_t(width) + __builtin_convertvector(x, Int));
    const V mask = load<T, L>(p.mask + i);  // a modulation that is not finite makes the weights NaN, even if they would be 0
    top *= mask, bottom *= mask;
    store<T, L>(p.weight[0] + i, top * left);
    store<T, L>(p.weight[1] + i, top * right);
    store<T, L>(p.weight[2] + i, bottom * left);
    store<T, L>(p.weight[3] + i, bottom * right);
    if (Backward) {
      store<T, L>(p.from_x + i, from_x);
      store<T, L>(p.from_y + i, from_y);
      lowest = least(y, lowest), highest = greatest(y, highest);
    }
  }
  if (Backward) {
    for (int i = 0; i < L; ++i) {
      *low = int64_t(lowest[i]) < *low ? int64_t(lowest[i]) : *low;
      *high = int64_t(highest[i]) > *high ? int64_t(highest[i]) : *high;
    }
  }
}

// The four pixels around one point, and whether each is inside the image. Used where a pixel with weight 0 may be infinite, so
// that it must be left out instead of multiplied.
template <class T>
struct Corners {
  bool within;  // at least one pixel is inside the image
  bool inside[4];
  int64_t index[4];  // index of the pixel
  T weight[4];       // bilinear weight
  int order[4];      // position of the pixel among the four that `locate` chose

  Corners(T x, T y, int64_t height, int64_t width) {
    within = x > T(-1) && x < T(width) && y > T(-1) && y < T(height);
    const T px = within ? x : 0, py = within ? y : 0;
    int64_t x0 = int64_t(px), y0 = int64_t(py);
    x0 -= px < T(x0), y0 -= py < T(y0);
    const T fx = px - T(x0), fy = py - T(y0);
    const int64_t last_x = width > 2 ? width - 2 : 0, last_y = height > 2 ? height - 2 : 0;
    const int64_t base_x = x0 < 0 ? 0 : x0 < last_x ? x0 : last_x, base_y = y0 < 0 ? 0 : y0 < last_y ? y0 : last_y;
    for (int k = 0; k < 4; ++k) {
      const int64_t column = x0 + k % 2, row = y0 + k / 2;
      inside[k] = within && column >= 0 && column < width && row >= 0 && row < height;
      index[k] = row * width + column;
      weight[k] = (k % 2 ? fx : 1 - fx) * (k / 2 ? fy : 1 - fy);
      order[k] = int(column - base_x + 2 * (row - base_y));
    }
  }
};

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
