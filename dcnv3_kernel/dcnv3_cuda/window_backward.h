// In: as for `backward_kernel`, for 3 x 3 kernels with stride and dilation 1 and group widths of 16 and 32. Out:
// `window_backward_kernel`, which sums the gradient of the input in a window of shared memory before it adds to global memory.

#pragma once

#include "gradient_sums.h"
#include "locations.h"
#include "window.h"

namespace dcnv3 {

// D is 16 or 32. A worker is D lanes: D / 4 for each of the four corners of a point, 4 channels each. Only one worker writes
// to a window, so its sums have a fixed order. A block has one warp. The warp may use many registers, because shared memory
// limits the number of resident blocks to a few.
template <class T, int D, int POINTS, class S>
DCNV3_KERNEL(32, 1) window_backward_kernel(
    const Problem<float> q, const T* __restrict__ grad_output, const T* __restrict__ input, const T* __restrict__ offset,
    const T* __restrict__ mask, const S grad_input, T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  static_assert(sizeof(Compute<T>) == 4 && POINTS <= 16);
  constexpr int workers = 32 / D, quads = D / 4, at_once = D / 16, all_units = window_rounds * at_once;
  constexpr int cell_bytes = D * static_cast<int>(sizeof(float));
  const int member = static_cast<int>(thread_number()) % D, worker = static_cast<int>(thread_number()) / D;
  const int corner = member / quads, channel = member % quads * 4;
  const bool has_point = member % 16 < POINTS;
  const int point = has_point ? member % 16 : 0, first_unit = member / 16;
  const auto add = grad_input.adder();

  const int width = q.tile_width + 2 * window_margin, height = q.tile_height + 2 * window_margin, cells = width * height;
  char* memory = static_cast<char*>(shared_memory()) + worker * window_bytes(cells, D, POINTS);
  char* window = memory + channel * sizeof(float);
  WindowCorner* corners = reinterpret_cast<WindowCorner*>(memory + (cells + 8) * cell_bytes);  // [unit, corner, point]
  const auto sums_of = [&](int cell) -> Four<float>& { return *reinterpret_cast<Four<float>*>(window + cell); };
  for (int cell = corner; cell < cells + 8; cell += 4) sums_of(cell * cell_bytes) = {};

  // Adjacent workers have adjacent groups of the same tile.
  const int64_t task = static_cast<int64_t>(block_number()) * workers + worker;
  const bool active = task < q.tiles * q.groups;
  const uint32_t number = active ? static_cast<uint32_t>(task) : 0u;
  const uint32_t tile_number = q.by_groups(number);
  const int group = static_cast<int>(number - tile_number * static_cast<uint32_t>(q.groups));
  const Tile tile = tile_of(q, tile_number);
  const int first_x = tile.x * q.tile_width, first_y = tile.y * q.tile_height;
  const int window_x = first_x + 1 - q.padding_w - window_margin, window_y = first_y + 1 - q.padding_h - window_margin;
  const int pixels = active ? q.tile_width * q.tile_height : 0;
  const auto unit_of = [&](int pixel) {
    const int row = static_cast<int>(q.by_tile_width(static_cast<uint32_t>(pixel)));
    Unit<int32_t> unit{false, 0, 0, group, first_x + pixel - row * q.tile_width, first_y + row};
    unit.active = pixel < pixels && unit.x < q.width_out && unit.y < q.height_out;
    if (unit.active) unit.pixel = unit.y * q.width_out + unit.x, unit.number = unit.pixel * q.groups + group;
    return unit;
  };

  // at this lane's channels and point
  const Origins origins(q, tile.image);
  const T* values_of_image = input + origins.input + channel;
  const T* own_grad_output = grad_output + origins.units * D + channel;
  const int64_t at_point = origins.units * POINTS + point;
  const T* own_mask = mask + origins.mask + (group * POINTS + point);
  const Pair<T>* own_offset = reinterpret_cast<const Pair<T>*>(offset + origins.offset) + (group * POINTS + point);
  T* own_grad_mask = grad_mask + at_point;
  Pair<T>* own_grad_offset = reinterpret_cast<Pair<T>*>(grad_offset) + at_point;

  for (int first = 0; first < q.tile_width * q.tile_height; first += all_units) {
    Unit<int32_t> unit[window_rounds];
    Pair<T> offsets[window_rounds];
    float modulation[window_rounds], largest[window_rounds], sum[window_rounds];
#pragma unroll
    for (int r = 0; r < window_rounds; ++r) {
      unit[r] = unit_of(first + r * at_once + first_unit);
      modulation[r] = widen(own_mask[unit[r].pixel * q.mask_pitch]);
      offsets[r] = own_offset[unit[r].pixel * (q.offset_pitch / 2)];
      largest[r] = modulation[r];
    }
    if (q.softmax) {
      for (int d = 8; d > 0; d /= 2) {
#pragma unroll
        for (int r = 0; r < window_rounds; ++r) largest[r] = fmax(largest[r], shuffle_xor(largest[r], d));
      }
#pragma unroll
      for (int r = 0; r < window_rounds; ++r) {
        modulation[r] = exponential(modulation[r] - largest[r]);
        sum[r] = has_point ? modulation[r] : 0.0f;
      }
      sum_of_lanes(sum, 16);
#pragma unroll
      for (int r = 0; r < window_rounds; ++r) modulation[r] *= reciprocal(sum[r]);
    }
    Fractions<float> fraction[window_rounds];
    int inside[window_rounds];  // one bit for each corner: it is inside the image
    bool all_in_window = true;
#pragma unroll
    for (int r = 0; r < window_rounds; ++r) {
      const auto at = locate<4, POINTS>(q, unit[r], point, &offsets[r].first);
      Four<float> weights = weights_of(at, modulation[r]);
      fraction[r] = {at.x.fraction, at.y.fraction};
      inside[r] = 15;
      const unsigned x = static_cast<unsigned>(at.x.low) - static_cast<unsigned>(window_x);
      const unsigned y = static_cast<unsigned>(at.y.low) - static_cast<unsigned>(window_y);
      const unsigned cell = y * static_cast<unsigned>(width) + x, below = cell + static_cast<unsigned>(width);
      Four<int32_t> places = corners_of<T, float, int32_t>(q, at, group, weights);
      Four<unsigned> in_window{{cell, cell + 1, below, below + 1}};
      const bool in_whole = x < static_cast<unsigned>(width - 1) && y < static_cast<unsigned>(height - 1);
      if (!unit[r].active || !at.has_all() || !in_whole) [[unlikely]] {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (!unit[r].active || places.of[c] < 0) {
            places.of[c] = 0, in_window.of[c] = static_cast<unsigned>(cells + 4 + c), inside[r] &= ~(1 << c);
          } else if (x + c % 2 >= static_cast<unsigned>(width) || y + c / 2 >= static_cast<unsigned>(height)) {
            in_window.of[c] = static_cast<unsigned>(cells + c), all_in_window = false;
          }
        }
      }
      if (!has_point) continue;
      WindowCorner* own = corners + ((r * at_once + first_unit) * 4 * POINTS + point);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        own[c * POINTS] = {places.of[c], static_cast<int32_t>(in_window.of[c] * cell_bytes), weights.of[c], 0.0f};
      }
    }
    sync_warp();
    all_in_window = all_lanes(all_in_window);

    // Now each lane has one corner and four channels, for all points.
#pragma unroll 1
    for (int u = 0; u < all_units; ++u) {
      WindowCorner* own = corners + (u * 4 + corner) * POINTS;
      const Unit<int32_t> own_unit = unit_of(first + u);
      float grads[4] = {};
      if (own_unit.active) load<4>(own_grad_output + own_unit.number * D, grads);
      // First all loads, then all shuffles: both overlap. The sums come last, because each waits for the one before.
      WindowCorner at[POINTS];
      float values[POINTS][4], products[POINTS];
#pragma unroll
      for (int i = 0; i < POINTS; ++i) {
        at[i] = own[i];
        load<4>(at_corner(values_of_image, at[i].at), values[i]);
      }
#pragma unroll
      for (int i = 0; i < POINTS; ++i) {
        products[i] = grads[0] * values[i][0];
#pragma unroll
        for (int v = 1; v < 4; ++v) products[i] += grads[v] * values[i][v];
      }
      sum_of_lanes(products, quads);
      sync_warp();  // all lanes have read their corners, which the products now overwrite
      if (channel == 0) {
#pragma unroll
        for (int i = 0; i < POINTS; ++i) own[i].product = products[i];
      }
#pragma unroll
      for (int i = 0; i < POINTS; ++i) {
        Four<float> sums = sums_of(at[i].cell);
#pragma unroll
        for (int v = 0; v < 4; ++v) sums.of[v] += at[i].weight * grads[v];
        sums_of(at[i].cell) = sums;
        sync_warp();
      }
      if (!all_in_window) {
#pragma unroll
        for (int i = 0; i < POINTS; ++i) {
          if (at[i].cell == (cells + corner) * cell_bytes) {
            add.template operator()<4>(
                origins.input + channel + at[i].at / static_cast<int>(sizeof(T)), at[i].weight, grads);
          }
        }
      }
    }

    // Now each lane has one point again. The `sync_warp` of the loop above made the products visible.
#pragma unroll
    for (int r = 0; r < window_rounds; ++r) {
      const WindowCorner* own = corners + ((r * at_once + first_unit) * 4 * POINTS + point);
      float products[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) products[c] = (inside[r] >> c & 1) != 0 ? own[c * POINTS].product : 0.0f;
      const Sample<float> sample(products, fraction[r]);
      const float grad_modulation = inside[r] != 0 ? sample.value : 0.0f, scaled = modulation[r] * q.offset_scale;
      float grad_of_mask = grad_modulation;
      if (q.softmax) {
        const float dot = sum_of_lanes(has_point ? modulation[r] * grad_modulation : 0.0f, 16);
        grad_of_mask = modulation[r] * (grad_modulation - dot);
      }
      if (unit[r].active && has_point) {
        Pair<T> pair;
        narrow(inside[r] != 0 ? scaled * sample.change_x : 0.0f, &pair.first);
        narrow(inside[r] != 0 ? scaled * sample.change_y : 0.0f, &pair.second);
        own_grad_offset[unit[r].number * POINTS] = pair;
        narrow(grad_of_mask, own_grad_mask + unit[r].number * POINTS);
      }
    }
    sync_warp();
  }

  for (int y = 0; y < height; ++y) {
    for (int x = corner; x < width; x += 4) {
      const Four<float> sums = sums_of((y * width + x) * cell_bytes);
      if (sums.of[0] != 0.0f || sums.of[1] != 0.0f || sums.of[2] != 0.0f || sums.of[3] != 0.0f) {
        const int element = ((window_y + y) * q.width + window_x + x) * q.channels + group * D + channel;
        add.template operator()<4>(origins.input + element, 1.0f, sums.of);
      }
    }
  }
}

}  // namespace dcnv3
