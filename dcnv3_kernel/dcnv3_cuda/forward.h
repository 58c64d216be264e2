// In: input, offset, mask, and the layout of the work. Out: `forward_kernel`, which writes the output. It serves every call;
// team_forward.h is faster for some.

#pragma once

#include "locations.h"
#include "modulation.h"

namespace dcnv3 {

template <class T, int V, class Index>
DCNV3_KERNEL(256, sizeof(T) == 8 ? 2 : sizeof(T) == 4 || sizeof(Index) == 8 ? 3 : 4) forward_kernel(
    const Problem<Compute<T>> q, const T* __restrict__ input, const T* __restrict__ offset, const T* __restrict__ mask,
    T* __restrict__ output) {
  typedef Compute<T> C;
  const int lanes = q.lanes, points = q.points, units = 32 / lanes, channels = q.group_channels;
  const int member = static_cast<int>(thread_number()) % lanes;
  const Shared<C, Index> shared(lanes, points, false);

  for_units<Index>(q, lanes, [&](const Origins& origins, const Unit<Index>& unit) {
    // the lane's first point
    const T* own_offset = offset_of(q, offset, unit, points) + 2 * member;
    const Modulation<T> modulation(q, lanes, points, member, mask_of(q, mask, unit, points) + member);
    for_own_points(lanes, points, member, [&](int i) {
      const auto at = locate<V, 0>(q, unit, member + i, own_offset + 2 * i);
      Four<C> weights = weights_of(at, modulation(i));
      shared.corners[(member + i) * units] = corners_of<T, C, Index>(q, at, unit.group, weights);
      shared.weights[(member + i) * units] = weights;
    });
    sync_warp();
    if (unit.active) {
      for (int channel = member * V; channel < channels; channel += lanes * V) {
        const T* from = input + origins.input + channel;
        C sum[V] = {};
        for (int i = 0; i < points; ++i) {
          const Four<Index> corners = shared.corners[i * units];
          const Four<C> weights = shared.weights[i * units];
          C values[4][V];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            load_if<V>(corners.of[corner] >= 0, at_corner(from, corners.of[corner]), values[corner]);
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += weights.of[corner] * values[corner][v];
          }
        }
        store_if<V>(true, sum, output + origins.units * channels + (unit.number * channels + channel));
      }
    }
    sync_warp();
  });
}

}  // namespace dcnv3
