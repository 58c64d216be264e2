// In: nothing. Out: the layout of the shared memory of team_forward.h, which the launch plan needs as well.

#pragma once

#include "dcnv3_platform.h"

namespace dcnv3 {

// Where the points of a column of the kernel are: the upper left corner in units of 16 bytes from the beginning of the image.
// The four upper bits tell which corners are outside the image.
struct alignas(16) TeamPlaces {
  uint32_t of[3];
  int32_t unit;  // first column: the unit's number, or -1 if the lane has none; last column: 1 if any corner is outside, or 0
};

// The size for one warp.
constexpr int team_bytes(int points) { return 32 * (points * 16 + (points + 2) / 3 * static_cast<int>(sizeof(TeamPlaces))); }

}  // namespace dcnv3
