// In: the shape of a call. Out: blocks, the parts of the work that are computed together, and the arrays that one block needs.

#pragma once

#include "dcnv3_cpu.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// 9 points of 16 groups fill whole registers, and all arrays of a block stay in the first-level cache.
constexpr int64_t points_per_block = 144;

// The number of pixels in a block with `groups` groups: the block has about `points_per_block` points.
inline int64_t pixels_of_block(const Shape& s, int64_t groups) {
  const int64_t fitting = points_per_block / (groups * s.points);
  return fitting < 1 ? 1 : fitting;
}
// The largest number of points in a block with at most `groups` groups.
inline int64_t block_capacity(const Shape& s, int64_t groups) {
  return groups * s.points > points_per_block ? groups * s.points : points_per_block;
}
// The number of groups in a block: the groups of one pixel have about `points_per_block` points.
inline int64_t groups_of_block(const Shape& s) {
  const int64_t fitting = points_per_block / s.points;
  return fitting < 1 ? 1 : fitting < s.groups ? fitting : s.groups;
}

// Consecutive output pixels of one image and some of their groups, whose points are computed together.
struct Block {
  int64_t pixel, count;   // first pixel, counted over all images, and number of pixels
  int64_t x, y;           // column and row of the first pixel
  int64_t group, groups;  // the first group and their number
};

// The data of a block's points as a structure of arrays, each for `capacity` points and up to a full register more.
template <class T>
struct Points {
  T *x, *y, *mask;         // positions and modulation; the softmax is applied in place
  int32_t* index;          // upper left pixel of the four pixels that a point samples
  T* weight[4];            // bilinear weights times modulation: upper left, upper right, lower left, lower right
  T *from_x, *from_y;      // position relative to the upper left pixel, in [-1, 2]
  T *kernel_x, *kernel_y;  // the regular grid relative to its centre, dilated and scaled, repeated for each group
  T* factor;               // normalising factor of each group's softmax
  T *by_mask, *by_offset;  // gradients: (capacity), (capacity, 2)
  T* dots;                 // dot products of the four pixels with grad_output, (capacity, 4)

  static int64_t round_up(int64_t n) { return (n + 15) / 16 * 16 + 16; }
  static size_t bytes(int64_t capacity) { return round_up(capacity) * (20 * sizeof(T) + 4); }

  Points(char* memory, int64_t capacity) {
    const int64_t n = round_up(capacity);
    T* values = reinterpret_cast<T*>(memory);
    const auto take = [&](int64_t size) {
      T* taken = values;
      values += size;
      return taken;
    };
    x = take(n), y = take(n), mask = take(n), kernel_x = take(n), kernel_y = take(n), factor = take(n);
    for (int k = 0; k < 4; ++k) weight[k] = take(n);
    from_x = take(n), from_y = take(n), by_mask = take(n), by_offset = take(2 * n), dots = take(4 * n);
    index = reinterpret_cast<int32_t*>(values);
    for (int64_t i = 0; i < n; ++i) kernel_x[i] = kernel_y[i] = 0;
  }

  void set_kernel(const Shape& s, int64_t repeats) {
    const T scale = T(s.offset_scale);
    const int64_t half_w = s.dilation_w * (s.kernel_w - 1) / 2, half_h = s.dilation_h * (s.kernel_h - 1) / 2;
    int64_t i = 0;
    for (int64_t r = 0; r < repeats; ++r) {
      for (int64_t column = 0; column < s.kernel_w; ++column) {
        for (int64_t row = 0; row < s.kernel_h; ++row) {
          if (s.remove_center && column == s.kernel_w / 2 && row == s.kernel_h / 2) continue;
          kernel_x[i] = T(column * s.dilation_w - half_w) * scale;
          kernel_y[i] = T(row * s.dilation_h - half_h) * scale;
          ++i;
        }
      }
    }
  }
};

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
