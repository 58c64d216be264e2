// In: input, offset and mask (or logits). Out: a range of output pixels.

#pragma once

#include "channels.h"
#include "locations.h"
#include "softmax.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// Computes B channels of one unit: one group of one output pixel. Returns zeros if all are finite, otherwise NaN in some
// elements.
template <class T, class S, int P, int B>
DCNV3_INLINE typename Piece<T, S, B>::V gather(
    const Points<T>& p, int64_t at, int64_t dynamic_points, T factor, int64_t pixel_stride, const S* base, int64_t right,
    int64_t down, S* to) {
  typedef Piece<T, S, B> Channels;
  typedef typename Channels::V V;
  constexpr int N = Channels::count, A = N >= 4 ? 2 : 4;  // A independent sums, to hide the latency of additions
  const int64_t points = P ? P : dynamic_points;
  const S* const corners[4] = {base, base + right, base + down, base + down + right};
  V sum[A][N] = {};
#pragma GCC unroll 9
  for (int64_t i = at; i < at + points; ++i) {
    const int64_t index = p.index[i] * pixel_stride;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      V row[N];
      Channels::read(corners[k] + index, row);
      const T weight = p.weight[k][i];
      for (int c = 0; c < N; ++c) sum[k % A][c] += weight * row[c];
    }
  }
  V check = {};
  for (int c = 0; c < N; ++c) {
    if (A == 4) sum[0][c] = (sum[0][c] + sum[1 % A][c]) + (sum[2 % A][c] + sum[3 % A][c]);
    if (A == 2) sum[0][c] += sum[1 % A][c];
    sum[0][c] *= factor;
    check += sum[0][c] - sum[0][c];
  }
  Channels::write(sum[0], to);
  return check;
}

// Computes one unit by branches: it does not read pixels outside the image.
template <class T, class S>
__attribute__((noinline)) void gather_exactly(
    const Points<T>& p, int64_t at, const Shape& s, int64_t channels, T factor, const S* base, S* to) {
  for (int64_t c = 0; c < channels; ++c) {
    T total = 0;
    for (int64_t i = at; i < at + s.points; ++i) {
      const Corners<T> corners(p.x[i], p.y[i], s.height, s.width);
      for (int k = 0; k < 4; ++k) {
        if (!corners.inside[k]) continue;
        total += corners.weight[k] * (p.mask[i] * factor) * T(widen(base[corners.index[k] * s.channels + c]));
      }
    }
    narrow(total, to + c);
  }
}

// Computes the output pixels [begin, end) of all images, block by block.
template <class T, class S, int P, int D>
void forward_pixels(const ForwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  const Shape& s = a.shape;
  const int64_t points = P ? P : s.points, channels = D ? D : s.group_channels;
  const int64_t groups_at_once = groups_of_block(s), pixels_at_once = pixels_of_block(s, groups_at_once);
  Points<T> p(static_cast<char*>(scratch), block_capacity(s, groups_at_once));
  p.set_kernel(s, groups_at_once);
  const T scale = T(s.offset_scale);
  const Origin<T> origins_x(s.stride_w, s.padding_w, s.dilation_w, s.kernel_w);
  const Origin<T> origins_y(s.stride_h, s.padding_h, s.dilation_h, s.kernel_h);
  const Axis<T> columns(s.width), rows(s.height);
  const int64_t right = s.width > 1 ? s.channels : 0, down = s.height > 1 ? s.width * s.channels : 0;
  const int64_t pixels = s.height_out * s.width_out;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t image = pixel / pixels, place_in_image = pixel % pixels;
    int64_t count = pixels - place_in_image < end - pixel ? pixels - place_in_image : end - pixel;
    if (count > pixels_at_once) count = pixels_at_once;
    const S* input = static_cast<const S*>(a.input) + image * s.height * s.width * s.channels;
    for (int64_t group = 0; group < s.groups; group += groups_at_once) {
      const int64_t groups = group + groups_at_once <= s.groups ? groups_at_once : s.groups - group;
      const Block block{pixel, count, place_in_image % s.width_out, place_in_image / s.width_out, group, groups};
      place<T, S, P>(
          p, s, block, static_cast<const S*>(a.offset), static_cast<const S*>(a.mask), origins_x, origins_y, scale);
      const int64_t units = count * groups;
      if (s.softmax) softmax<T, P>(p.mask, units, points, p.factor);
      locate<false>(p, units * points, columns, rows, s.width);
      const S* base = input + group * channels;
      S* output = static_cast<S*>(a.output) + pixel * s.channels + group * channels;
      bool finite = true;
      typename Piece<T, S, D ? D : 16>::V check = {};
      int64_t unit = 0;
      for (int64_t q = 0; q < count; ++q) {
        for (int64_t g = 0; g < groups; ++g, ++unit) {
          const T factor = s.softmax ? p.factor[unit] : T(1);
          S* to = output + q * s.channels + g * channels;
          for_pieces<D>(channels, [&]<int B>(int64_t c) __attribute__((always_inline)) {
            const S* from = base + g * channels + c;
            const auto bad = gather<T, S, P, B>(p, unit * points, points, factor, s.channels, from, right, down, to + c);
            if constexpr (sizeof(bad) == sizeof(check)) {
              check += bad;
            } else {
              finite &= !any(bad != bad);
            }
          });
        }
      }
      if (__builtin_expect(!finite || any(check != check), 0)) {
        for (unit = 0; unit < units; ++unit) {
          S* to = output + unit / groups * s.channels + unit % groups * channels;
          bool unit_is_finite = true;
          for (int64_t c = 0; c < channels; ++c) unit_is_finite &= is_finite(widen(to[c]));
          if (unit_is_finite) continue;
          const T factor = s.softmax ? p.factor[unit] : T(1);
          gather_exactly(p, unit * points, s, channels, factor, base + unit % groups * channels, to);
        }
      }
    }
    pixel += count;
  }
}

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
