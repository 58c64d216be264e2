// In: as for `backward_kernel`, for 3 x 3 kernels with stride and dilation 1 and group widths of 16 and 32. Out:
// `window_backward_kernel`, which sums the gradient of the input in a window of shared memory before it adds to global memory.
// benchmarks/sass_count.py counts its instructions, accesses to shared memory, and additions to global memory.

#pragma once

#include "gradient_sums.h"
#include "locations.h"
#include "window.h"

namespace dcnv3 {

DCNV3_DEVICE bool is_any_not_zero(const Four<float>& values) {
  const uint32_t bits = bits_of_float(values.of[0]) | bits_of_float(values.of[1]) | bits_of_float(values.of[2]);
  return ((bits | bits_of_float(values.of[3])) & 0x7fffffffu) != 0;
}

// A lane's share of a unit: it adds four channels of one corner of all points to the window. A: adds to global memory.
template <class T, int D, int POINTS, class A>
struct WindowLane {
  static constexpr int quads = D / 4;
  // The dot products of 16-bit numbers are products of matrices. A row is one corner of one point, and four lanes hold its
  // channels. With 32 channels there are two lanes for the same channels of a corner; each of them takes half of the points.
  static constexpr bool matrices = has_matrices && sizeof(T) == 2;

  int member, worker;  // the lane's number in its worker, and its worker
  const char* image;   // the first pixel, at the lane's corner and the channels that it loads
  char* window;        // the first cell, at the lane's corner and the channels that it adds
  int element;         // the same in the image: the number of elements from its beginning
  A add;               // to the image

  // The corner of a lane, the first of the channels that it adds, and how many and which channels it loads.
  static DCNV3_DEVICE int corner_of(int member) { return matrices ? member / 4 % 4 : member / quads; }
  static DCNV3_DEVICE int channel_of(int member) {
    if constexpr (!matrices || D == 16) return member % quads * 4;
    // Lanes 4 to 7 have another corner than lanes 0 to 3. They take other channels, too, or banks would conflict.
    return member % 4 * 8 + (member / 16 ^ member / 4 % 2) * 4;
  }
  static constexpr int loaded = matrices ? D / 4 : 4;
  static DCNV3_DEVICE int loaded_channel_of(int member) { return matrices ? member % 4 * loaded : channel_of(member); }

  DCNV3_DEVICE int corner() const { return corner_of(member); }
  static DCNV3_DEVICE bool has(uint32_t bits, int i) { return (bits >> i & 1u) != 0; }

  // Adds to the gradient of the input, and replaces the weights of the unit with the dot products of grad_output with the
  // corners. `plain`: all corners are inside the image and the window.
  template <bool plain>
  DCNV3_DEVICE void process(WindowUnit& unit, const Words<loaded, T>& grad_words) const {
    // The points that this lane loads: half of them, all of them, or all of them in the order that `sum_products` needs.
    constexpr int own = matrices && D == 32 ? POINTS - 4 : POINTS;
    const int first = own < 8 ? member / 16 : matrices ? 0 : member % quads / (quads / 2);
    WindowCorner& corner = unit.corners[this->corner()];
    const uint32_t outside = plain || unit.special == 0 ? 0u : corner.outside[0] | corner.outside[1];
    const uint32_t outside_first = outside >> (4 * first), outside_other = outside >> (4 - 4 * first);
    const auto is_outside = [&](int i) {
      return !plain && (i < 4 ? has(outside_first, i) : i < own / 8 * 8 ? has(outside_other, i - 4) : has(outside, 8));
    };
    const Four<uint32_t> four = unit.place[first];
    Four<uint32_t> other{};
    if constexpr (own >= 8) other = unit.place[1 - first];
    Words<loaded, T> values[own];
#pragma unroll
    for (int i = 0; i < own; ++i) {
      const uint32_t place = i < 4 ? four.of[i] : i < own / 8 * 8 ? other.of[i % 4] : unit.last_place;
      values[i] = Words<loaded, T>{};
      if (!is_outside(i)) values[i] = load_words<Words<loaded, T>>(at_place<plain>(place));
    }

    // While the loads are under way: each sum waits for the one before.
    float grads[4];
    unpack_words<T>(own_words(grad_words), grads);
    add_to_window<plain>(unit, outside, grads);

    float products[own];
    if constexpr (matrices) {
      multiply(values, grad_words, products);
    } else {
#pragma unroll
      for (int i = 0; i < own; ++i) {
        float numbers[4];
        unpack_words<T>(values[i], numbers);
        products[i] = grads[0] * numbers[0];
#pragma unroll
        for (int v = 1; v < 4; ++v) products[i] += grads[v] * numbers[v];
      }
    }
    if constexpr (!plain) {  // zero times a number that is not finite is not zero
#pragma unroll
      for (int i = 0; i < own; ++i) products[i] = is_outside(i) ? 0.0f : products[i];
    }
    if constexpr (matrices) {
      if (D == 16 ? member % 4 == 2 * worker : member % 4 == 0) {
        corner.values[first] = {{products[0], products[1], products[2], products[3]}};
        if (D == 16) corner.values[1] = {{products[4], products[5], products[6], products[7]}};
        if (POINTS == 9 && first == 0) corner.last = products[own - 1];
      }
    } else {
      sum_products(products);
      const int quad = member % quads;
      float* eight = corner.values->of;
      if constexpr (quads == 4) {
        eight[2 * quad] = products[0], eight[2 * quad + 1] = products[1];
      } else {
        eight[quad] = products[0];
      }
      if (POINTS == 9 && quad == 0) corner.last = products[8];
    }
  }

  // Of the words that the lane has loaded those of the channels that it adds.
  DCNV3_DEVICE Words<4, T> own_words(const Words<loaded, T>& words) const {
    if constexpr (loaded == 4) {
      return words;
    } else {
      return channel_of(member) % 8 == 0 ? Words<4, T>{words.x, words.y} : Words<4, T>{words.z, words.w};
    }
  }

  // The address of a place, which lies before the image if the upper left corner does and this one does not.
  template <bool plain>
  DCNV3_DEVICE const char* at_place(uint32_t place) const {
    return plain ? image + uint64_t(16) * place : image + int64_t(16) * static_cast<int32_t>(place);
  }

  template <bool plain>
  DCNV3_DEVICE void add_to_window(const WindowUnit& unit, uint32_t outside, const float (&grads)[4]) const {
    const WindowCorner& corner = unit.corners[this->corner()];
    const Four<uint32_t> cells[3] = {unit.cell[0], unit.cell[1], {{unit.last_cell}}};
    const Four<float> weights[3] = {corner.values[0], corner.values[1], {{POINTS == 9 ? corner.last : 0.0f}}};
#pragma unroll
    for (int i = 0; i < POINTS; ++i) {
      if (!has(outside, 16 + i)) {
        auto& sums = *reinterpret_cast<Four<float>*>(window + static_cast<int32_t>(cells[i / 4].of[i % 4]));
        Four<float> changed = sums;
#pragma unroll
        for (int v = 0; v < 4; ++v) changed.of[v] += weights[i / 4].of[i % 4] * grads[v];
        sums = changed;
      }
      sync_warp();
    }
    if constexpr (!plain) {
      const uint32_t beyond = outside >> 16 & ~outside;  // inside the image, but outside the window
      if (beyond == 0) return;
#pragma unroll
      for (int i = 0; i < POINTS; ++i) {
        if (!has(beyond, i)) continue;
        const int32_t place = static_cast<int32_t>(i < 8 ? unit.place[i / 4].of[i % 4] : unit.last_place);
        constexpr int step = 16 / static_cast<int>(sizeof(T));
        add.template operator()<4>(element + place * step, weights[i / 4].of[i % 4], grads);
      }
    }
  }

  // The dot products of grad_output with the rows that the lanes hold, each lane one or two pairs of words of a row. The first
  // words of the pairs are a row of the left matrix, the second words are the row 8 below. The right matrix has the first words
  // of grad_output in its even columns and the second words in its odd columns. So a lane's first and last sum are the two
  // parts of its dot product. With width 16, columns 0 to 3 belong to the first worker and columns 4 to 7 to the second: only
  // two of the four lanes of a row get products with their own worker's grad_output.
  template <int own>
  DCNV3_DEVICE void multiply(
      const Words<loaded, T> (&values)[own], const Words<loaded, T>& grads, float (&products)[own]) const {
    constexpr bool bfloat16 = std::is_same_v<T, BFloat16>;
    const bool even = member / 4 % 2 == 0;
#pragma unroll
    for (int i = 0; i < own; ++i) {
      float sums[4] = {};
      multiply_matrices<bfloat16>(sums, values[i].x, values[i].y, even ? grads.x : grads.y);
      if constexpr (loaded == 8) multiply_matrices<bfloat16>(sums, values[i].z, values[i].w, even ? grads.z : grads.w);
      products[i] = sums[0] + sums[3];
    }
  }

  // The sums over all channels. Of the points 0 to 7, a lane gets the sums of two (`quads` 4) or of one (`quads` 8). This saves
  // shuffles: at each step it gives half of its sums to another lane, which gives it its sums of the points that it keeps.
  // Before the first step, the two lanes have loaded the points 0 to 3 and 4 to 7 in opposite orders.
  DCNV3_DEVICE void sum_products(float (&products)[POINTS]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[i] += shuffle_xor(products[i + 4], quads / 2);
#pragma unroll
    for (int d = quads / 4, kept = 2; d > 0; d /= 2, kept /= 2) {
      const bool second = (member & d) != 0;
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        const float given = second ? products[i] : products[i + kept];
        products[i] = (second ? products[i + kept] : products[i]) + shuffle_xor(given, d);
      }
    }
    if constexpr (POINTS == 9) products[8] = sum_of_lanes(products[8], quads);
  }
};

// D is 16 or 32. A worker is D lanes. They locate the points of D / 2 units, two lanes a unit. Then they process these units
// one after another: D / 4 lanes for each of the four corners of a point, 4 channels each. Only one worker writes to a window,
// so its sums have a fixed order. A block has one warp. The warp may use many registers, because shared memory limits the
// number of resident blocks to a few.
template <class T, int D, int POINTS, class S>
DCNV3_KERNEL(32, 1) window_backward_kernel(
    const Problem<float> q, const T* __restrict__ grad_output, const T* __restrict__ input, const T* __restrict__ offset,
    const T* __restrict__ mask, const S grad_input, T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  static_assert(sizeof(Compute<T>) == 4 && (POINTS == 8 || POINTS == 9));
  constexpr int workers = 32 / D, batch = window_batch(D), own_points = (POINTS + 1) / 2;
  constexpr int cell_bytes = D * static_cast<int>(sizeof(float));
  const int member = static_cast<int>(thread_number()) % D, worker = static_cast<int>(thread_number()) / D;
  typedef WindowLane<T, D, POINTS, decltype(grad_input.adder(0))> Lane;
  const int corner = Lane::corner_of(member), channel = Lane::channel_of(member);

  const int width = q.tile_width + 2 * window_margin, height = q.tile_height + 2 * window_margin, cells = width * height;
  char* memory = static_cast<char*>(shared_memory()) + worker * window_bytes(cells, D);
  char* window = memory + channel * sizeof(float);
  WindowUnit* units = reinterpret_cast<WindowUnit*>(memory + cells * cell_bytes);
  const auto sums_of = [&](int cell) -> Four<float>& { return *reinterpret_cast<Four<float>*>(window + cell * cell_bytes); };
  for (int cell = corner; cell < cells; cell += 4) sums_of(cell) = {};

  // Adjacent workers have adjacent groups of the same tile.
  const int64_t task = static_cast<int64_t>(block_number()) * workers + worker;
  const bool active = task < q.tiles * q.groups;
  const uint32_t task_number = active ? static_cast<uint32_t>(task) : 0u;
  const uint32_t tile_number = q.by_groups(task_number);
  const int group = static_cast<int>(task_number - tile_number * static_cast<uint32_t>(q.groups));
  const Tile tile = tile_of(q, tile_number);
  const Origins origins(q, tile.image);
  const int first_x = tile.x * q.tile_width, first_y = tile.y * q.tile_height, pixels = q.tile_width * q.tile_height;
  const int window_x = first_x + q.start_w - window_margin, window_y = first_y + q.start_h - window_margin;
  // the upper left corners of points whose corners are all inside the image and the window
  const int plain_x = window_x < 0 ? 0 : window_x, plain_y = window_y < 0 ? 0 : window_y;
  const auto count_of = [](int first, int size, int window_end) {
    const int count = (size < window_end ? size : window_end) - 1 - first;
    return static_cast<unsigned>(count < 0 ? 0 : count);
  };
  const unsigned plain_columns = count_of(plain_x, q.width, window_x + width);
  const unsigned plain_rows = count_of(plain_y, q.height, window_y + height);

  // This lane locates the points of unit `slot`, from `first_point` on.
  const int slot = member % batch, half = member / batch, first_point = 4 * half;
  const bool has_last = POINTS == 8 || half == 1;  // if false, the lane's last point is not its own
  float grid_x[own_points], grid_y[own_points];
#pragma unroll
  for (int i = 0; i < own_points; ++i) {
    const int cell = 4 + i + (POINTS == 8);
    grid_x[i] = half == 0 ? q.grid_x[i / 3] : q.grid_x[cell / 3];
    grid_y[i] = half == 0 ? q.grid_y[i % 3] : q.grid_y[cell % 3];
  }
  const int64_t first_pixel = tile.image * q.pixels_of_image;
  const T* masks = mask + first_pixel * q.mask_pitch + (group * POINTS + first_point);
  const T* first_offset = offset + first_pixel * q.offset_pitch;
  const Pair<T>* offsets = reinterpret_cast<const Pair<T>*>(first_offset) + (group * POINTS + first_point);
  // Adjacent lanes write the gradients of adjacent points, 16 lanes a unit.
  const int written_point = member % 16;
  T* grad_masks = grad_mask + origins.units * POINTS + written_point;
  Pair<T>* grad_offsets = reinterpret_cast<Pair<T>*>(grad_offset) + origins.units * POINTS + written_point;
  const int right = q.channels * static_cast<int>(sizeof(T)) / 16, below_cell = width * cell_bytes;
  // unsigned: with much padding, numbers of pixels far outside exceed an int, and are only right modulo 2^32
  const uint32_t left = static_cast<uint32_t>(window_x), top = static_cast<uint32_t>(window_y);
  const uint32_t first_cell = 0u - top * below_cell - left * cell_bytes;

  const int element = (corner / 2 * q.width + corner % 2) * q.channels + channel;
  const int loaded_channel = Lane::loaded_channel_of(member);
  const auto* image = reinterpret_cast<const char*>(input + origins.input + (element - channel + loaded_channel));
  const auto* grad_outputs = reinterpret_cast<const char*>(grad_output + origins.units * D + loaded_channel);
  char* corner_of_window = window + (corner / 2 * width + corner % 2) * cell_bytes;
  Lane lane{member, worker, image, corner_of_window, element, grad_input.adder(origins.input)};

  keep(lane.image), keep(grad_outputs), keep(masks), keep(offsets), keep(grad_masks), keep(grad_offsets);
#pragma unroll
  for (int i = 0; i < own_points; ++i) keep(grid_x[i]), keep(grid_y[i]);
  for (int first = 0; first < pixels; first += batch) {
    const int of_tile = first + slot, row = static_cast<int>(q.by_tile_width(static_cast<uint32_t>(of_tile)));
    int x = first_x + of_tile - row * q.tile_width, y = first_y + row;
    const bool has_unit = active && of_tile < pixels && x < q.width_out && y < q.height_out;
    if (!has_unit) x = y = 0;
    const int32_t pixel = y * q.width_out + x, number = has_unit ? pixel * q.groups + group : 0;
    float modulation[own_points];
    Pair<T> pairs[own_points];
#pragma unroll
    for (int i = 0; i < own_points; ++i) {
      modulation[i] = widen(masks[pixel * q.mask_pitch + i]);
      pairs[i] = offsets[pixel * (q.offset_pitch / 2) + i];
    }
    if (q.softmax) {
      float largest = modulation[0], sum = 0.0f;
#pragma unroll
      for (int i = 1; i < own_points; ++i) largest = fmax(largest, modulation[i]);
      largest = fmax(largest, shuffle_xor(largest, batch));
#pragma unroll
      for (int i = 0; i < own_points; ++i) {
        modulation[i] = exponential(modulation[i] - largest);
        sum += i < 4 || has_last ? modulation[i] : 0.0f;
      }
      const float scale = reciprocal(sum + shuffle_xor(sum, batch));
#pragma unroll
      for (int i = 0; i < own_points; ++i) modulation[i] *= scale;
    }

    Location<NearAxis> at[own_points];
    uint32_t places[own_points], in_window[own_points];
    bool is_plain = has_unit;
    float scaled[own_points];  // modulation times the offset's scale
#pragma unroll
    for (int i = 0; i < own_points; ++i) {
      at[i].x = NearAxis(widen(pairs[i].first) * q.offset_scale + grid_x[i], x + q.start_w, q.width);
      at[i].y = NearAxis(widen(pairs[i].second) * q.offset_scale + grid_y[i], y + q.start_h, q.height);
      const uint32_t low_x = static_cast<uint32_t>(at[i].x.low), low_y = static_cast<uint32_t>(at[i].y.low);
      places[i] = (low_y * q.width + low_x) * right + static_cast<uint32_t>(group) * (D * sizeof(T) / 16);
      in_window[i] = low_y * below_cell + (low_x * cell_bytes + first_cell);
      scaled[i] = modulation[i] * q.offset_scale;
      is_plain &= low_x - plain_x < plain_columns && low_y - plain_y < plain_rows;
    }
    int special = 0;
    uint32_t outside_x[2] = {}, outside_y[2] = {};  // bits as in `WindowCorner`: left, right; upper, lower
    if (!is_plain) [[unlikely]] {
      special = has_unit ? 1 : 2;
#pragma unroll
      for (int i = 0; i < own_points; ++i) {
        const uint32_t columns = static_cast<uint32_t>(width), rows = static_cast<uint32_t>(height);
        const uint32_t column = static_cast<uint32_t>(at[i].x.low) - left, row = static_cast<uint32_t>(at[i].y.low) - top;
        const auto bits = [&](bool in_image, bool in_window) {
          return (has_unit && in_image ? 0u : 0x10001u << i) | (in_window ? 0u : 0x10000u << i);
        };
        outside_x[0] |= bits(at[i].x.has_low(), column < columns);
        outside_x[1] |= bits(at[i].x.has_high(), column + 1 < columns);
        outside_y[0] |= bits(at[i].y.has_low(), row < rows);
        outside_y[1] |= bits(at[i].y.has_high(), row + 1 < rows);
        const bool is_inside = (((outside_x[0] & outside_x[1]) | (outside_y[0] & outside_y[1])) >> i & 1u) == 0;
        if (!is_inside) at[i].x.fraction = at[i].y.fraction = scaled[i] = 0.0f;  // they may be NaN or infinite
      }
    }
    special |= shuffle_xor(special, batch);

    WindowUnit& own = units[slot];
    own.place[half] = {{places[0], places[1], places[2], places[3]}};
    own.cell[half] = {{in_window[0], in_window[1], in_window[2], in_window[3]}};
    Four<float> weights[own_points];
#pragma unroll
    for (int i = 0; i < own_points; ++i) weights[i] = weights_of(at[i], modulation[i]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      own.corners[c].values[half] = {{weights[0].of[c], weights[1].of[c], weights[2].of[c], weights[3].of[c]}};
    }
    if (half == 1) {
      own.number = number, own.special = special;
      if constexpr (POINTS == 9) {
        own.last_place = places[4], own.last_cell = in_window[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) own.corners[c].last = weights[4].of[c];
      }
    }
    if (special != 0) [[unlikely]] {
      const uint32_t points = (half == 0 ? 0xfu : 0x1fu) * 0x10001u;  // the lane's own points
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        own.corners[c].outside[half] = ((outside_x[c % 2] | outside_y[c / 2]) & points) << first_point;
      }
    }
    sync_warp();

    // Each unit's grad_output is loaded while the unit before is processed.
    const auto grads_of = [&](const WindowUnit& unit) {
      return load_words<Words<Lane::loaded, T>>(grad_outputs + static_cast<int64_t>(unit.number) * (D * sizeof(T)));
    };
    auto next = grads_of(*units);
    WindowUnit* unit = units;
#pragma unroll 1
    for (int count = pixels - first < batch ? pixels - first : batch; count > 0; --count, ++unit) {
      const auto grads = next;
      if (count > 1) next = grads_of(unit[1]);
      if (all_lanes(unit->special == 0)) {
        lane.template process<true>(*unit, grads);
      } else {
        lane.template process<false>(*unit, grads);
      }
    }
    sync_warp();

    // Each lane has the points again that it has located.
    float grad_modulation[own_points], grad_x[own_points], grad_y[own_points], dot = 0.0f;
    Four<float> products[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) products[c] = own.corners[c].values[half];
#pragma unroll
    for (int i = 0; i < own_points; ++i) {
      float of_point[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) of_point[c] = i < 4 ? products[c].of[i] : own.corners[c].last;
      const Sample<float> sample(of_point, {at[i].x.fraction, at[i].y.fraction});
      grad_modulation[i] = sample.value;
      grad_x[i] = scaled[i] * sample.change_x, grad_y[i] = scaled[i] * sample.change_y;
      if (i < 4 || has_last) dot += modulation[i] * grad_modulation[i];
    }
    if (q.softmax) {
      dot += shuffle_xor(dot, batch);
#pragma unroll
      for (int i = 0; i < own_points; ++i) grad_modulation[i] = modulation[i] * (grad_modulation[i] - dot);
    }
    sync_warp();
    const auto give = [&](WindowCorner& to, const float (&grads)[own_points]) {
      to.values[half] = {{grads[0], grads[1], grads[2], grads[3]}};
      if (POINTS == 9 && half == 1) to.last = grads[own_points - 1];
    };
    give(own.corners[0], grad_x), give(own.corners[1], grad_y), give(own.corners[2], grad_modulation);
    sync_warp();

#pragma unroll
    for (int u = 0; u < batch; u += D / 16) {
      const WindowUnit& done = units[u + member / 16];
      if (written_point < POINTS && done.special <= 1) {
        const auto grad_of = [&](int which) { return reinterpret_cast<const float*>(done.corners + which)[written_point]; };
        const int32_t to = done.number * POINTS;
        Pair<T> pair;
        narrow(grad_of(0), &pair.first), narrow(grad_of(1), &pair.second);
        grad_offsets[to] = pair;
        narrow(grad_of(2), grad_masks + to);
      }
    }
    sync_warp();
  }

  // The lanes of a worker take four cells at a time. Cells outside the image, which no unit adds to, are zero.
  const uint32_t channels = q.channels, to_right = 4 * channels, to_next_row = (q.width - width + 4) * channels;
  uint32_t at = (top * q.width + left + corner) * channels + group * D + channel;
  for (int cell = corner, x = corner; cell < cells; cell += 4) {
    const Four<float> sums = sums_of(cell);
    if (is_any_not_zero(sums)) lane.add.template operator()<4>(static_cast<int32_t>(at), 1.0f, sums.of);
    x += 4;
    const bool is_next_row = x >= width;
    at += is_next_row ? to_next_row : to_right;
    if (is_next_row) x -= width;
  }
}

}  // namespace dcnv3
