// In: input, offset, mask, and the layout of the work. Out: `forward_kernel`, which writes the output.

#pragma once

#include "locations.h"
#include "modulation.h"

namespace dcnv3 {

// Adds V channels of all points of a unit to `sum`. `image`: the image's first pixel, at these channels. `has_all`: every
// corner is inside the image, and no check is needed.
template <bool has_all, int V, int POINTS, class T, class C, class Index>
DCNV3_DEVICE void sum_points(const T* image, const Shared<C, Index>& shared, int points, int units, C (&sum)[V]) {
  [[maybe_unused]] constexpr int at_once = POINTS ? (POINTS + 2) / 3 : 1;
#pragma unroll at_once
  for (int i = 0; i < points; ++i) {
    const Four<Index> corners = shared.corners[i * units];
    const Four<C> weights = shared.weights[i * units];
    C values[4][V];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if constexpr (has_all) {
        load<V>(at_corner(image, corners.of[corner]), values[corner]);
      } else {
        load_if<V>(corners.of[corner] >= 0, at_corner(image, corners.of[corner]), values[corner]);
      }
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weights.of[corner] * values[corner][v];
    }
  }
}

// LANES and POINTS are 0 if they are known at run time only. If LANES is not 0, the group width D is LANES * V.
template <class T, int V, int LANES, int POINTS, class Index>
DCNV3_KERNEL(256, sizeof(T) == 8 ? 2 : sizeof(T) == 4 || sizeof(Index) == 8 ? 3 : 4) forward_kernel(
    const Problem<Compute<T>> q, const T* __restrict__ input, const T* __restrict__ offset, const T* __restrict__ mask,
    T* __restrict__ output) {
  typedef Compute<T> C;
  const int lanes = LANES ? LANES : q.lanes, points = POINTS ? POINTS : q.points, units = 32 / lanes;
  const int channels = LANES ? LANES * V : q.group_channels;
  const int member = static_cast<int>(thread_number()) % lanes;
  const Shared<C, Index> shared(lanes, points, false);

  for_units<Index>(q, lanes, [&](const Origins& origins, const Unit<Index>& unit) {
    // the lane's first point
    const T* own_offset = offset + origins.units * points * 2 + (unit.number * points + member) * 2;
    const T* own_mask = mask + origins.units * points + (unit.number * points + member);
    // Load the offsets before the softmax, so that their latency overlaps with it, where there are enough registers.
    constexpr bool early = LANES != 0 && (LANES == 2 || sizeof(T) == 4);
    [[maybe_unused]] Pair<T> offsets[own_points<LANES, POINTS>];
    if constexpr (early) {
      for_own_points<LANES, POINTS>(lanes, points, member, [&](int i) {
        offsets[i / LANES] = *reinterpret_cast<const Pair<T>*>(own_offset + 2 * i);
      });
    }
    const Modulation<T, LANES, POINTS> modulation(q, lanes, points, member, own_mask);
    bool has_all = true;
    for_own_points<LANES, POINTS>(lanes, points, member, [&](int i) {
      const T* pair = own_offset + 2 * i;
      if constexpr (early) pair = &offsets[i / LANES].first;
      const auto at = locate<V, POINTS>(q, unit, member + i, pair);
      has_all = has_all && at.has_all();
      Four<C> weights = weights_of(at, modulation(i));
      shared.corners[(member + i) * units] = corners_of<T, C, Index>(q, at, unit.group, weights);
      shared.weights[(member + i) * units] = weights;
    });
    has_all = all_lanes(has_all);  // also makes the writes to shared memory visible to all lanes
    if (unit.active) {
      for (int channel = member * V; channel < channels; channel += lanes * V) {
        const T* from = input + origins.input + channel;
        C sum[V] = {};
        if (POINTS != 0 && has_all) {
          sum_points<true, V, POINTS>(from, shared, points, units, sum);
        } else {
          sum_points<false, V, POINTS>(from, shared, points, units, sum);
        }
        store<V>(sum, output + origins.units * channels + (unit.number * channels + channel));
      }
    }
    sync_warp();
  });
}

}  // namespace dcnv3
