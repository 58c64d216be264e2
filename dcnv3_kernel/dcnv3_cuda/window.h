// In: the size of a tile and the group width. Out: the layout of the shared memory of window_backward.h, which the launch plan
// needs as well.

#pragma once

#include "locations.h"

namespace dcnv3 {

// A window covers the input pixels under the kernel centres of a tile of output pixels, and `window_margin` pixels around
// them. It has a cell for each pixel.
constexpr int window_margin = 3;

// One corner of a unit's points 0 to 7, and of point 8. Bits of `outside`: i for a corner of point i outside the image, 16 + i
// for one outside the image or the window. Each of the two lanes that locate the points has a word for its own points.
struct alignas(16) WindowCorner {
  Four<float> values[2];  // weights; then dot products of grad_output with the corner
  float last;
  uint32_t outside[2];  // only if the unit is special
};

// What the lanes of a worker exchange about a unit: the points 0 to 7, 16 bytes for four of them, and point 8.
struct alignas(16) WindowUnit {
  Four<uint32_t> place[2];  // of the upper left corner, in units of 16 bytes from the image's beginning; modulo 2^32
  Four<uint32_t> cell[2];   // byte offset of the upper left corner in the window; modulo 2^32
  uint32_t last_place, last_cell;
  int32_t number;           // of the unit in its image; 0 if there is no such unit
  int special;              // 0: all corners are inside; 1: not all are; 2: there is no such unit, and all count as outside
  WindowCorner corners[4];  // at the end their first three are gradients of the points: x and y of the offset, mask
};

// Two lanes locate the points of a unit, so all lanes of a worker locate those of this many units.
constexpr int window_batch(int group_channels) { return group_channels / 2; }

constexpr int window_bytes(int cells, int group_channels) {
  return cells * group_channels * static_cast<int>(sizeof(float)) +
      window_batch(group_channels) * static_cast<int>(sizeof(WindowUnit));
}

}  // namespace dcnv3
