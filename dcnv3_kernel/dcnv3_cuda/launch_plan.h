// In: the shape of a call, the alignment of its tensors, the number of multiprocessors. Out: `Plan`, the `Problem` with the
// grid, block and shared memory of the launch.

#pragma once

#include "../torch-ext/dcnv3_shape.h"
#include "locations.h"
#include "team.h"
#include "window.h"

namespace dcnv3 {

constexpr int shared_limit = 48 * 1024;

template <class C>
struct Plan {
  Problem<C> problem;
  int vector;         // channels per lane: 1, or 16 bytes of them (backward: 16 bytes of the sums)
  bool wide;          // 64-bit element indices within an image
  bool small_kernel;  // 3 x 3
  bool teams;         // for `team_forward_kernel`
  bool windows;       // for `window_backward_kernel`
  unsigned grid, block, shared_bytes;
  const char* error;  // nullptr, or why there is no kernel for the call
};

inline int log2_ceil(int64_t value) {
  int log2 = 0;
  while ((int64_t(1) << log2) < value) ++log2;
  return log2;
}

// Returns false if an image has more tiles than an int can count.
template <class C>
bool set_tiles(const Shape& s, int64_t tiles_x, int64_t tiles_y, Problem<C>& q) {
  if (tiles_x * tiles_y > INT32_MAX) return false;
  q.tiles_x = static_cast<int>(tiles_x), q.tiles_per_image = static_cast<int>(tiles_x * tiles_y);
  q.tiles = s.batch * q.tiles_per_image;
  q.by_tiles_per_image = Divisor(static_cast<uint32_t>(q.tiles_per_image));
  q.by_tiles_x = Divisor(static_cast<uint32_t>(q.tiles_x));
  return true;
}

// Plans a call for `window_backward_kernel`: the largest tiles with which every multiprocessor still gets several. Returns
// false if there are too many tiles.
template <class C>
bool plan_windows(const Shape& s, int multiprocessors, Plan<C>& plan) {
  Problem<C>& q = plan.problem;
  const int64_t workers = 32 / s.group_channels;
  int most_wide = 8, most_high = 8;
  const auto tiles = [](int64_t size, int most) { return (size + most - 1) / most; };
  const auto all_tiles = [&] { return s.batch * tiles(s.height_out, most_high) * tiles(s.width_out, most_wide); };
  while (all_tiles() * s.groups < 4 * workers * multiprocessors && most_wide > 2) {
    if (most_high >= most_wide) {
      most_high /= 2;
    } else {
      most_wide /= 2;
    }
  }
  // the same number of tiles, with equal sizes
  const auto balanced = [&](int64_t size, int most) {
    return static_cast<int>(tiles(size, static_cast<int>(tiles(size, most))));
  };
  q.tile_width = balanced(s.width_out, most_wide), q.tile_height = balanced(s.height_out, most_high);
  q.by_tile_width = Divisor(static_cast<uint32_t>(q.tile_width));
  const int64_t tiles_x = tiles(s.width_out, q.tile_width), tiles_y = tiles(s.height_out, q.tile_height);
  if (!set_tiles(s, tiles_x, tiles_y, q) || q.tiles * s.groups > INT32_MAX) return false;
  plan.grid = static_cast<unsigned>((q.tiles * s.groups + workers - 1) / workers);
  plan.block = 32;
  const int cells = (q.tile_width + 2 * window_margin) * (q.tile_height + 2 * window_margin);
  plan.shared_bytes = static_cast<unsigned>(workers * window_bytes(cells, q.group_channels));
  return plan.windows = true;
}

// Plans a call whose tensors have the element type T. `aligned`: the tensors allow loads of 16 bytes.
template <class T>
Plan<Compute<T>> plan_call(const Shape& s, bool backward, bool aligned, int multiprocessors) {
  typedef Compute<T> C;
  Plan<C> plan{};
  Problem<C>& q = plan.problem;
  const int64_t limit = int64_t(1) << 29;
  if (s.height + 2 * s.padding_h > limit || s.width + 2 * s.padding_w > limit || s.channels > limit ||
      s.points > limit || s.dilation_h > limit || s.dilation_w > limit || s.stride_h > limit || s.stride_w > limit) {
    plan.error = "a height, a width, the number of channels or a hyper-parameter is above 2^29";
    return plan;
  }
  if (s.groups * s.points >= int64_t(1) << 30) {  // the pitches are ints
    plan.error = "an output pixel has 2^30 points or more";
    return plan;
  }
  q.points = static_cast<int>(s.points);
  q.height = static_cast<int>(s.height), q.width = static_cast<int>(s.width);
  q.height_out = static_cast<int>(s.height_out), q.width_out = static_cast<int>(s.width_out);
  q.channels = static_cast<int>(s.channels), q.groups = static_cast<int>(s.groups);
  q.group_channels = static_cast<int>(s.group_channels);
  q.input_of_image = s.height * s.width * s.channels;
  q.pixels_of_image = s.height_out * s.width_out, q.units_of_image = q.pixels_of_image * s.groups;
  q.offset_pitch = static_cast<int>(s.offset_pitch), q.mask_pitch = static_cast<int>(s.mask_pitch);
  q.kernel_h = static_cast<int>(s.kernel_h);
  q.stride_h = static_cast<int>(s.stride_h), q.stride_w = static_cast<int>(s.stride_w);
  q.padding_h = static_cast<int>(s.padding_h), q.padding_w = static_cast<int>(s.padding_w);
  q.dilation_h = static_cast<int>(s.dilation_h), q.dilation_w = static_cast<int>(s.dilation_w);
  q.centre = s.remove_center ? q.points / 2 : q.points;
  q.half_h = static_cast<int>(s.dilation_h * (s.kernel_h - 1) / 2);
  q.half_w = static_cast<int>(s.dilation_w * (s.kernel_w - 1) / 2);
  q.start_h = q.half_h - q.padding_h, q.start_w = q.half_w - q.padding_w;
  q.offset_scale = static_cast<C>(s.offset_scale);
  q.softmax = s.softmax;
  for (int i = 0; i < 3; ++i) {
    q.grid_x[i] = (static_cast<C>(i * s.dilation_w) - static_cast<C>(q.half_w)) * q.offset_scale;
    q.grid_y[i] = (static_cast<C>(i * s.dilation_h) - static_cast<C>(q.half_h)) * q.offset_scale;
  }

  const int full = backward ? 16 / sizeof(C) : 16 / sizeof(T);
  const int64_t pixels_out = q.pixels_of_image;
  plan.wide = s.height * s.width * s.channels * static_cast<int64_t>(sizeof(T)) > INT32_MAX ||
      s.batch * pixels_out > INT32_MAX || pixels_out * s.channels > INT32_MAX ||
      pixels_out * s.offset_pitch > INT32_MAX || pixels_out * s.mask_pitch > INT32_MAX;
  plan.vector = aligned && !plan.wide && s.group_channels % full == 0 ? full : 1;
  plan.small_kernel = s.kernel_h == 3 && s.kernel_w == 3;
  q.by_groups = Divisor(static_cast<uint32_t>(q.groups));
  const auto is_near = [](int64_t size, int64_t padding) { return size <= near_limit && padding <= near_limit; };
  const bool all_near = is_near(s.height, s.padding_h) && is_near(s.width, s.padding_w);
  const bool is_close = all_near && plan.small_kernel && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
      s.dilation_w == 1;
  if (backward && plan.vector == 4 && is_close && (s.group_channels == 16 || s.group_channels == 32) &&
      plan_windows(s, multiprocessors, plan)) {
    return plan;
  }

  plan.teams = !backward && sizeof(T) < 8 && plan.vector == full && plan.small_kernel &&
      (s.group_channels == 16 || s.group_channels == 32) && all_near;
  q.lanes = plan.teams ? 1 : 1 << log2_ceil((s.group_channels + plan.vector - 1) / plan.vector);
  if (q.lanes > 32) q.lanes = 32;

  // The shared memory of a warp holds the points of its units.
  int warps = 8;
  const auto shared = [&]() -> int64_t {
    if (plan.teams) return warps * team_bytes(q.points);
    const int64_t count = s.points * (32 / q.lanes);
    return warps * (plan.wide ? Shared<C, int64_t>::bytes(count, backward) : Shared<C, int32_t>::bytes(count, backward));
  };
  while (warps > 1 && shared() > shared_limit) warps /= 2;
  while (q.lanes < 32 && shared() > shared_limit) q.lanes *= 2;
  if (shared() > shared_limit) {
    plan.error = "kernel_size has more points than shared memory holds";
    return plan;
  }

  // The largest tiles with which every multiprocessor still gets several.
  const int units = 32 / q.lanes;
  int width_log2 = 3, height_log2 = 3;
  const auto tiles = [&](int64_t size, int log2) { return (size + (int64_t(1) << log2) - 1) >> log2; };
  const auto all_tiles = [&] { return s.batch * tiles(s.height_out, height_log2) * tiles(s.width_out, width_log2); };
  const auto is_too_large = [&] {
    const int64_t tile = s.groups << (width_log2 + height_log2);
    if (tile > 4 * warps * units || all_tiles() < 4 * multiprocessors) return true;
    return !backward && s.group_channels <= 16 && tile > warps * units && all_tiles() < 8 * multiprocessors;
  };
  while (width_log2 + height_log2 > 0 && is_too_large()) {
    if (height_log2 >= width_log2) {
      --height_log2;
    } else {
      --width_log2;
    }
  }
  while (warps > 1 && (s.groups << (width_log2 + height_log2)) <= warps / 2 * units) warps /= 2;
  q.tile_width_log2 = width_log2, q.tile_height_log2 = height_log2;
  q.tile_units = static_cast<int>(s.groups << (width_log2 + height_log2));
  if (!set_tiles(s, tiles(s.width_out, width_log2), tiles(s.height_out, height_log2), q)) {
    plan.error = "the output has too many pixels";
    return plan;
  }
  plan.grid = static_cast<unsigned>(q.tiles < INT32_MAX ? q.tiles : INT32_MAX);
  plan.block = static_cast<unsigned>(32 * warps);
  plan.shared_bytes = static_cast<unsigned>(shared());
  return plan;
}

}  // namespace dcnv3
