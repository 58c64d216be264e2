// In: nothing. Out: `Problem`, which a kernel launch passes by value: the sizes of a call and the layout of its work.

#pragma once

#include "dcnv3_platform.h"

namespace dcnv3 {

// Divides numbers below 2^31 by a divisor known on the host: one multiplication and one shift instead of a division.
struct Divisor {
  uint32_t divisor, factor, shift;

  Divisor() = default;
  explicit Divisor(uint32_t by) : divisor(by), shift(0) {
    while ((uint64_t(1) << shift) < by) ++shift;
    factor = static_cast<uint32_t>((((uint64_t(1) << shift) - by) << 32) / by + 1);
  }
  DCNV3_DEVICE uint32_t operator()(uint32_t number) const { return (multiply_high(number, factor) + number) >> shift; }
};

// The sizes of a call and the layout of its work. C: the compute type.
template <class C>
struct Problem {
  int64_t tiles;
  Divisor by_tiles_per_image, by_tiles_x, by_groups;
  int tiles_x, tiles_per_image, tile_width_log2, tile_height_log2, tile_units;
  Divisor by_tile_width;  // this and the next line: only for `window_backward_kernel`
  int tile_width, tile_height;
  int lanes, points;
  int64_t input_of_image, pixels_of_image, units_of_image;  // elements of the input, output pixels, and units
  int height, width, height_out, width_out, channels, groups, group_channels;
  int offset_pitch, mask_pitch;  // elements from one output pixel to the next one
  int kernel_h, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int centre;          // index of the removed point; `points`, which no point has, if none is removed
  int start_h, start_w;  // input pixel under the kernel's centre at the output's first pixel
  int half_h, half_w;  // pixels from the kernel's first point to its centre; `locate` measures positions from the centre
  C offset_scale;
  C grid_x[3], grid_y[3];  // the scaled positions of a 3 x 3 kernel's points; only for the kernels with `NearAxis`
  bool softmax;
};

}  // namespace dcnv3
