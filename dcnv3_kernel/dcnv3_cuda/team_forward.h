// In: as for `forward_kernel`, for 3 x 3 kernels and group widths of 16 and 32. Out: `team_forward_kernel`. A team has a lane
// for each 16 bytes of a unit's channels. Each lane locates all points of a unit of its own. Then the team sums the points of
// its lanes' units, one unit after another, so that adjacent lanes load adjacent channels. The number of instructions is what
// bounds this kernel; benchmarks/sass_count.py counts them.

#pragma once

#include "locations.h"
#include "team.h"

namespace dcnv3 {

// The modulation of all points of a unit, with a softmax if the call asks for it.
template <int POINTS, class T>
DCNV3_DEVICE void modulate(bool softmax, const T* mask, float (&modulation)[POINTS]) {
#pragma unroll
  for (int i = 0; i < POINTS; ++i) modulation[i] = widen(mask[i]);
  if (!softmax) return;
  float largest = modulation[0], sum;
#pragma unroll
  for (int i = 1; i < POINTS; ++i) largest = fmax(largest, modulation[i]);
#pragma unroll
  for (int i = 0; i < POINTS; ++i) {
    modulation[i] = exponential(modulation[i] - largest);
    sum = i == 0 ? modulation[i] : sum + modulation[i];
  }
  const float scale = reciprocal(sum);
#pragma unroll
  for (int i = 0; i < POINTS; ++i) modulation[i] *= scale;
}

// The addresses of the corners of a location at the beginning of an image: those of other locations have the same distances.
struct Corners {
  const uint4 *upper, *lower;  // left
  int right;                   // distance, in units of 16 bytes

  DCNV3_DEVICE Corners(const void* image, int right, int below)
      : upper(static_cast<const uint4*>(image)), right(right) {
    keep(upper);
    lower = upper + below;
    keep(lower);
  }
  // place: of the location, in units of 16 bytes.
  template <class Place>
  DCNV3_DEVICE const uint4* at(Place place, int corner) const {
    const uint4* left = (corner < 2 ? upper : lower) + place;
    return corner % 2 == 0 ? left : left + right;
  }
};

// Adds 16 bytes of channels of all points of a unit to `sum`. `inside`: every corner is inside the image.
template <bool inside, int POINTS, class T, int V>
DCNV3_DEVICE void add_points(const Corners& corners, const TeamPlaces* places, const Four<float>* weights, float (&sum)[V]) {
  [[maybe_unused]] constexpr int at_once = inside ? 3 : 1;
#pragma unroll at_once
  for (int first = 0; first < POINTS; first += 3) {
    const TeamPlaces three = places[first / 3 * 32];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (first + i >= POINTS) break;
      const uint32_t place = three.of[i];
      const Four<float> weight = weights[(first + i) * 32];
      float values[4][V];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        uint4 loaded{};
        if constexpr (inside) {
          loaded = load_words<uint4>(corners.at(place, corner));
        } else if ((place >> (28 + corner) & 1u) == 0) {
          // negative if the upper left corner lies before the image and this one does not
          const int32_t signed_place = static_cast<int32_t>(place << 4) / 16;
          loaded = load_words<uint4>(corners.at(signed_place, corner));
        }
        unpack_words<T>(loaded, values[corner]);
      }
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += weight.of[corner] * values[corner][v];
      }
    }
  }
}

// D: the group width.
template <class T, int D, int POINTS>
DCNV3_KERNEL(256, sizeof(T) == 4 ? 3 : 4) team_forward_kernel(
    const Problem<float> q, const T* __restrict__ input, const T* __restrict__ offset, const T* __restrict__ mask,
    T* __restrict__ output) {
  constexpr int V = 16 / sizeof(T), team = D / V;
  const unsigned lane = thread_number() % 32, member = lane % team;
  char* memory = static_cast<char*>(shared_memory()) + thread_number() / 32 * team_bytes(POINTS);
  Four<float>* weights = reinterpret_cast<Four<float>*>(memory);  // [point, lane]
  TeamPlaces* places = reinterpret_cast<TeamPlaces*>(memory + POINTS * 32 * sizeof(Four<float>));  // [column, lane]
  const int right = q.channels / V, below = q.width * right;

  for_units<int32_t>(q, 1, [&](const Origins& origins, const Unit<int32_t>& unit) {
    const T* own_offset = offset_of(q, offset, unit, POINTS);
    float modulation[POINTS];
    modulate(q.softmax, mask_of(q, mask, unit, POINTS), modulation);
    const int start_x = unit.x * q.stride_w + q.start_w, start_y = unit.y * q.stride_h + q.start_h;
    int outside = 0;  // 1 if any corner of any point is outside
#pragma unroll
    for (int first = 0; first < POINTS; first += 3) {
      const int count = first + 3 <= POINTS ? 3 : POINTS - first;
      TeamPlaces three{};
      Location<NearAxis> at[3];
      Four<float> weight[3];
      bool has_all = true;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int cell = POINTS == 8 && first + i >= 4 ? first + i + 1 : first + i;
        float pair[2];
        load_pair(own_offset + 2 * (first + i), pair);
        at[i].x = NearAxis(pair[0] * q.offset_scale + q.grid_x[cell / 3], start_x, q.width);
        at[i].y = NearAxis(pair[1] * q.offset_scale + q.grid_y[cell % 3], start_y, q.height);
        weight[i] = weights_of(at[i], modulation[first + i]);
        const uint32_t pixel = static_cast<uint32_t>(at[i].y.low) * q.width + static_cast<uint32_t>(at[i].x.low);
        three.of[i] = pixel * right + static_cast<uint32_t>(unit.group) * team;
        has_all &= at[i].has_all();
      }
      if (!has_all) [[unlikely]] {
        outside = 1;
#pragma unroll
        for (int i = 0; i < count; ++i) {
          const bool columns[2] = {at[i].x.has_low(), at[i].x.has_high()}, rows[2] = {at[i].y.has_low(), at[i].y.has_high()};
          three.of[i] &= 0x0fffffffu;
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const bool inside = columns[corner % 2] & rows[corner / 2];
            three.of[i] |= inside ? 0u : 1u << (28 + corner);
            weight[i].of[corner] = inside ? weight[i].of[corner] : 0.0f;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < count; ++i) weights[(first + i) * 32 + lane] = weight[i];
      if (first == 0) three.unit = unit.active ? unit.number : -1;
      if (first + 3 >= POINTS) three.unit = outside;
      places[first / 3 * 32 + lane] = three;
    }
    sync_warp();

    const Corners corners(input + origins.input + member * V, right, below);
    T* to = output + origins.units * D + member * V;
    keep(to);
    const Four<float>* theirs = weights + (lane - member);
#pragma unroll 1
    for (int i = 0; i < team; ++i, ++theirs) {
      const TeamPlaces* their_places = reinterpret_cast<const TeamPlaces*>(theirs + POINTS * 32);
      float sum[V] = {};
      if (all_lanes(their_places[(POINTS - 1) / 3 * 32].unit == 0)) {
        add_points<true, POINTS, T>(corners, their_places, theirs, sum);
      } else {
        add_points<false, POINTS, T>(corners, their_places, theirs, sum);
      }
      const int32_t number = their_places->unit;
      store_if<V>(number != -1, sum, to + number * D);
    }
    sync_warp();
  });
}

}  // namespace dcnv3
