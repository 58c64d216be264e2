// In: grad_output, input, offset and mask (or logits). Out: all three gradients, for a range of tasks. A task is some groups
// of one slice of one image; the sums of several slices are added at the end.

#pragma once

#include "backward_points.h"
#include "softmax.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// Zeroes the rows [from, to) of (H, W, channels) sums.
template <class T>
DCNV3_INLINE void clear_rows(const Shape& s, T* sums, int64_t channels, int64_t from, int64_t to) {
  if (from < to) __builtin_memset(sums + from * s.width * channels, 0, (to - from) * s.width * channels * sizeof(T));
}

// Computes the gradients of some groups of one image for the output rows [first_row, last_row). `sums` is (H, W, groups * D).
// Its rows [range[0], range[1]) are initialised; the function extends this range as needed.
template <class T, class S, int P, int D>
DCNV3_INLINE void backward_rows(
    const BackwardArguments& a, const Points<T>& p, int64_t image, int64_t group, int64_t groups, int64_t first_row,
    int64_t last_row, T* sums, int64_t* range) {
  const Shape& s = a.shape;
  const int64_t points = P ? P : s.points, channels = D ? D : s.group_channels;
  const T scale = T(s.offset_scale);
  const S* input = static_cast<const S*>(a.input) + image * s.height * s.width * s.channels + group * channels;
  const Origin<T> origins_x(s.stride_w, s.padding_w, s.dilation_w, s.kernel_w);
  const Origin<T> origins_y(s.stride_h, s.padding_h, s.dilation_h, s.kernel_h);
  const Axis<T> columns(s.width), rows(s.height);
  const int64_t right = s.width > 1 ? 1 : 0, down = s.height > 1 ? s.width : 0, pixel_stride = groups * channels;
  const int64_t pixels_at_once = pixels_of_block(s, groups), end = last_row * s.width_out;
  for (int64_t start = first_row * s.width_out; start < end; start += pixels_at_once) {
    const int64_t count = start + pixels_at_once <= end ? pixels_at_once : end - start;
    const int64_t units = count * groups, n = units * points, pixel = image * s.height_out * s.width_out + start;
    const Block block{pixel, count, start % s.width_out, start / s.width_out, group, groups};
    place<T, S, P>(
        p, s, block, static_cast<const S*>(a.offset), static_cast<const S*>(a.mask), origins_x, origins_y, scale);
    if (s.softmax) softmax<T, P>(p.mask, units, points);
    // the elements up to a full register repeat the last point, with modulation 0
    for (int64_t i = n; i < n + lanes<T>; ++i) p.x[i] = p.x[n - 1], p.y[i] = p.y[n - 1], p.mask[i] = 0;
    int64_t low = s.height, high = 0;
    locate<true>(p, n, columns, rows, s.width, &low, &high);
    high = high + 2 < s.height ? high + 2 : s.height;
    if (range[0] == range[1]) {
      clear_rows(s, sums, pixel_stride, low, high);
      range[0] = low, range[1] = high;
    } else {
      if (low < range[0]) clear_rows(s, sums, pixel_stride, low, range[0]), range[0] = low;
      if (high > range[1]) clear_rows(s, sums, pixel_stride, range[1], high), range[1] = high;
    }

    const S* gradients = static_cast<const S*>(a.grad_output) + pixel * s.channels + group * channels;
    int64_t unit = 0;
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t g = 0; g < groups; ++g, ++unit) {
        const S* gradient = gradients + q * s.channels + g * channels;
        for_pieces<D>(channels, [&]<int B>(int64_t c) __attribute__((always_inline)) {
          multiply<T, S, P, B>(
              p, unit * points, points, s.channels, gradient + c, input + g * channels + c, right * s.channels,
              down * s.channels, c == 0);
        });
      }
    }
    for (int64_t i = 4 * n; i < 4 * n + 4 * lanes<T>; ++i) p.dots[i] = 0;
    const bool finite = all_finite(p.dots, 4 * n) && all_finite(p.mask, n);
    unit = 0;
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t g = 0; g < groups; ++g, ++unit) {
        const S* gradient = gradients + q * s.channels + g * channels;
        T* group_sums = sums + g * channels;
        if (__builtin_expect(!finite, 0)) {
          bool unit_is_finite = true;
          for (int64_t i = 4 * unit * points; i < 4 * (unit + 1) * points; ++i) unit_is_finite &= is_finite(p.dots[i]);
          for (int64_t i = unit * points; i < (unit + 1) * points; ++i) unit_is_finite &= is_finite(p.mask[i]);
          if (!unit_is_finite) {
            scatter_exactly<T, S, D>(
                p, unit * points, s, channels, gradient, input + g * channels, group_sums, pixel_stride);
            continue;
          }
        }
        for_pieces<D>(channels, [&]<int B>(int64_t c) __attribute__((always_inline)) {
          scatter<T, S, P, B>(
              p, unit * points, points, pixel_stride, gradient + c, group_sums + c, right * pixel_stride,
              down * pixel_stride);
        });
      }
    }
    differentiate<T, S, P>(a, p, block, columns, rows, finite);
  }
}

// The sizes of one thread's scratch memory: points, and (H, W, groups * D) sums unless they are kept elsewhere.
template <class T>
struct BackwardScratch {
  int64_t capacity;
  size_t points, sums;
  explicit BackwardScratch(const BackwardArguments& a) {
    const Shape& s = a.shape;
    capacity = block_capacity(s, a.groups_at_once);
    points = (Points<T>::bytes(capacity) + 63) / 64 * 64;
    sums = a.in_place || a.slices > 1 ? 0 : a.groups_at_once * s.height * s.width * s.group_channels * sizeof(T);
  }
  size_t bytes() const { return points + sums; }
};

// The (H, W, groups * D) sums of some groups of a slice of an image. If `in_place`, the first slice's sums are in the result.
template <class T>
DCNV3_INLINE T* sums_of_slice(const BackwardArguments& a, int64_t slice, int64_t image, int64_t group) {
  const Shape& s = a.shape;
  const bool in_result = a.in_place && slice == 0;
  T* first = static_cast<T*>(in_result ? a.grad_input : a.partial);
  const int64_t buffer = in_result ? 0 : slice - (a.in_place ? 1 : 0);
  return first + ((buffer * s.batch + image) * s.groups + group) * s.height * s.width * s.group_channels;
}

// Writes `groups` groups of one row: the sum over `count` slices, zeros if there are none.
template <class T, class S, int D>
DCNV3_INLINE void finish_row(const Shape& s, const T* const* slices, int64_t count, int64_t groups, S* to) {
  const int64_t channels = D ? D : s.group_channels;
  for (int64_t x = 0; x < s.width; ++x) {
    for (int64_t g = 0; g < groups; ++g) {
      for_pieces<D>(channels, [&]<int B>(int64_t c) __attribute__((always_inline)) {
        typedef Piece<T, S, B> Channels;
        typename Channels::V sum[Channels::count] = {};
        for (int64_t slice = 0; slice < count; ++slice) {
          const T* from = slices[slice] + (x * groups + g) * channels + c;
          for (int j = 0; j < Channels::count; ++j) sum[j] += load<T, Channels::width>(from + j * Channels::width);
        }
        Channels::write(sum, to + x * s.channels + g * channels + c);
      });
    }
  }
}

// Computes the tasks [begin, end).
template <class T, class S, int P, int D>
void backward_tasks(const BackwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  const Shape& s = a.shape;
  const BackwardScratch<T> sizes(a);
  char* memory = static_cast<char*>(scratch);
  Points<T> p(memory, sizes.capacity);
  p.set_kernel(s, a.groups_at_once);
  T* own_sums = reinterpret_cast<T*>(memory + sizes.points);
  const bool own = !a.in_place && a.slices == 1;
  const int64_t channels = D ? D : s.group_channels;
  const int64_t chunks = (s.groups + a.groups_at_once - 1) / a.groups_at_once;
  for (int64_t task = begin; task < end; ++task) {
    // Slices are outermost: adjacent groups of a pixel share cache lines, which should not be written by two threads.
    const int64_t chunk = task % chunks, image = task / chunks % s.batch, slice = task / chunks / s.batch;
    const int64_t group = chunk * a.groups_at_once;
    const int64_t groups = group + a.groups_at_once <= s.groups ? a.groups_at_once : s.groups - group;
    T* sums = own ? own_sums : sums_of_slice<T>(a, slice, image, group);
    int64_t own_range[2];
    int64_t* range = a.slices > 1 ? a.ranges + 2 * task : own_range;
    range[0] = range[1] = 0;
    backward_rows<T, S, P, D>(
        a, p, image, group, groups, s.height_out * slice / a.slices, s.height_out * (slice + 1) / a.slices, sums, range);
    if (a.in_place && slice == 0) {
      clear_rows(s, sums, s.channels, 0, range[0]);
      clear_rows(s, sums, s.channels, range[1], s.height);
    }
    if (!own) continue;
    S* to = static_cast<S*>(a.grad_input) + image * s.height * s.width * s.channels + group * channels;
    for (int64_t y = 0; y < s.height; ++y) {
      const T* const from[1] = {sums + y * s.width * groups * channels};
      finish_row<T, S, D>(s, from, y >= range[0] && y < range[1], groups, to + y * s.width * s.channels);
    }
  }
}

// Sums the slices for the rows [begin, end) of all images.
template <class T, class S, int P, int D>
void reduce_slices(const BackwardArguments& a, int64_t begin, int64_t end) {
  const Shape& s = a.shape;
  const int64_t channels = D ? D : s.group_channels;
  const int64_t chunks = (s.groups + a.groups_at_once - 1) / a.groups_at_once;
  for (int64_t image_row = begin; image_row < end; ++image_row) {
    const int64_t image = image_row / s.height, y = image_row % s.height;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t group = chunk * a.groups_at_once;
      const int64_t groups = group + a.groups_at_once <= s.groups ? a.groups_at_once : s.groups - group;
      const T* used[max_slices];
      int64_t count = 0;
      for (int64_t slice = 0; slice < a.slices; ++slice) {
        const int64_t* range = a.ranges + 2 * ((slice * s.batch + image) * chunks + chunk);
        const bool in_range = y >= range[0] && y < range[1], in_result = a.in_place && slice == 0;
        if (in_range || in_result) used[count++] = sums_of_slice<T>(a, slice, image, group) + y * s.width * groups * channels;
      }
      if (a.in_place && count == 1) continue;
      S* to = static_cast<S*>(a.grad_input) + image_row * s.width * s.channels + group * channels;
      finish_row<T, S, D>(s, used, count, groups, to);
    }
  }
}

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
