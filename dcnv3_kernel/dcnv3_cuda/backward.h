// In: grad_output, input, offset, mask, and the layout of the work. Out: `backward_kernel`, which adds to the sums of the
// input's gradient and writes the gradients of offset and mask. It serves every call; window_backward.h is faster for some.

#pragma once

#include "gradient_sums.h"
#include "locations.h"
#include "modulation.h"

namespace dcnv3 {

// Whether any corner of a point is inside the image. If none is, its fractions may be NaN.
template <class Index>
DCNV3_DEVICE bool has_any(const Four<Index>& corners) {
  return (corners.of[0] & corners.of[1] & corners.of[2] & corners.of[3]) >= 0;
}

// S: the sums of the input's gradient, `FloatingSums` or `FixedPointSums`.
template <class T, int V, class Index, class S>
DCNV3_KERNEL(256, 2) backward_kernel(
    const Problem<Compute<T>> q, const T* __restrict__ grad_output, const T* __restrict__ input, const T* __restrict__ offset,
    const T* __restrict__ mask, const S grad_input, T* __restrict__ grad_offset, T* __restrict__ grad_mask) {
  typedef Compute<T> C;
  const int lanes = q.lanes, points = q.points, units = 32 / lanes, channels = q.group_channels;
  const int member = static_cast<int>(thread_number()) % lanes;
  const Shared<C, Index> shared(lanes, points, true);
  const auto add = grad_input.adder();

  for_units<Index>(q, lanes, [&](const Origins& origins, const Unit<Index>& unit) {
    // the lane's first point
    const int64_t at_grad_mask = origins.units * points + (unit.number * points + member);
    const T* own_offset = offset_of(q, offset, unit, points) + 2 * member;
    T* own_grad_offset = grad_offset + at_grad_mask * 2;
    T* own_grad_mask = grad_mask + at_grad_mask;
    const Modulation<T> modulation(q, lanes, points, member, mask_of(q, mask, unit, points) + member);
    for_own_points(lanes, points, member, [&](int i) {
      const auto at = locate<V, 0>(q, unit, member + i, own_offset + 2 * i);
      Four<C> weights = weights_of(at, modulation(i));
      shared.corners[(member + i) * units] = corners_of<T, C, Index>(q, at, unit.group, weights);
      shared.weights[(member + i) * units] = weights;
      shared.fractions[(member + i) * units] = {at.x.fraction, at.y.fraction};
    });
    sync_warp();

    // The samples' products and derivatives replace the weights in shared memory.
    const T* grad = grad_output + origins.units * channels + unit.number * channels;
    for (int i = 0; i < points; ++i) {
      C products[4] = {};
      if (unit.active) {
        const Four<Index> corners = shared.corners[i * units];
        const Four<C> weights = shared.weights[i * units];
        for (int channel = member * V; channel < channels; channel += lanes * V) {
          C grads[V];
          load<V>(grad + channel, grads);
          const T* from = input + origins.input + channel;
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (corners.of[corner] < 0) continue;
            C values[V];
            load<V>(at_corner(from, corners.of[corner]), values);
#pragma unroll
            for (int v = 0; v < V; ++v) products[corner] += grads[v] * values[v];
            const Index element = corners.of[corner] / static_cast<Index>(sizeof(T));
            add.template operator()<V>(origins.input + channel + element, weights.of[corner], grads);
          }
        }
      }
      Sample<C> sample(products, shared.fractions[i * units]);
      sample.value = sum_of_lanes(sample.value, lanes);
      sample.change_x = sum_of_lanes(sample.change_x, lanes);
      sample.change_y = sum_of_lanes(sample.change_y, lanes);
      sync_warp();
      if (member == 0) shared.weights[i * units] = {{sample.value, sample.change_x, sample.change_y, C(0)}};
    }
    sync_warp();

    // No synchronisation until the next unit: each lane reads and writes only its own points.
    C dot = C(0);
    for_own_points(lanes, points, member, [&](int i) {
      Four<C>& sample = shared.weights[(member + i) * units];
      const bool inside = has_any(shared.corners[(member + i) * units]);
      const C grad_modulation = inside ? sample.of[0] : C(0);
      const C scaled = modulation(i) * q.offset_scale;
      if (unit.active) {
        narrow(inside ? scaled * sample.of[1] : C(0), own_grad_offset + 2 * i);
        narrow(inside ? scaled * sample.of[2] : C(0), own_grad_offset + 2 * i + 1);
        if (!q.softmax) narrow(grad_modulation, own_grad_mask + i);
      }
      sample.of[0] = grad_modulation;
      dot += modulation(i) * grad_modulation;
    });
    if (q.softmax) {
      dot = sum_of_lanes(dot, lanes);
      for_own_points(lanes, points, member, [&](int i) {
        const C grad_logit = modulation(i) * (shared.weights[(member + i) * units].of[0] - dot);
        if (unit.active) narrow(grad_logit, own_grad_mask + i);
      });
    }
  });
}

}  // namespace dcnv3
