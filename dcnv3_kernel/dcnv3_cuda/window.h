// In: the size of a tile, the group width and the number of points. Out: the layout of the shared memory of
// window_backward.h, which the launch plan needs as well.

#pragma once

#include "dcnv3_platform.h"

namespace dcnv3 {

// A window covers the input pixels under the kernel centres of a tile of output pixels, and `window_margin` pixels around
// them. It has a cell for each pixel. Eight more cells follow, for contributions outside the window: one for each of the four
// corners if it is inside the image, and one if it is outside. All contributions are then added by the same code, and no two
// lanes write to the same address.
constexpr int window_margin = 3;
// How many units 16 lanes locate together. Several at once hide the latency of the shuffles.
constexpr int window_rounds = 4;

// One corner of a point, which the lanes of a worker exchange through shared memory.
struct alignas(16) WindowCorner {
  int32_t at;    // byte offset from the beginning of the image; 0 if the corner is outside the image
  int32_t cell;  // byte offset in the window
  float weight;
  float product;  // dot product of grad_output with the corner
};

constexpr int window_bytes(int cells, int group_channels, int points) {
  return (cells + 8) * group_channels * static_cast<int>(sizeof(float)) +
      window_rounds * group_channels / 16 * 4 * points * static_cast<int>(sizeof(WindowCorner));
}

}  // namespace dcnv3
