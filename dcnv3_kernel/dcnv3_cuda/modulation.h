// In: the mask (or logits) of a unit, whose points are distributed over its lanes. Out: the modulation of each lane's own
// points.

#pragma once

#include "numbers.h"
#include "problem.h"

namespace dcnv3 {

// Calls `work(i)` for the lane's points member + i, with i = 0, lanes, 2 * lanes ... `member`: the lane's number in its unit.
template <class Work>
DCNV3_DEVICE void for_own_points(int lanes, int points, int member, Work work) {
  for (int i = 0; i < points - member; i += lanes) work(i);
}

// The modulation of the lane's points; with a softmax over all points of the unit if the call asks for it. `mask`: the address
// of the lane's first point.
template <class T>
struct Modulation {
  typedef Compute<T> C;
  const T* mask;
  bool softmax;
  C largest, scale;

  DCNV3_DEVICE Modulation(const Problem<C>& q, int lanes, int points, int member, const T* own_mask)
      : mask(own_mask), softmax(q.softmax), largest(C(0)), scale(C(1)) {
    if (!softmax) return;
    largest = C(-INFINITY);
    for_own_points(lanes, points, member, [&](int i) { largest = fmax(largest, widen(mask[i])); });
    for (int d = lanes / 2; d > 0; d /= 2) largest = fmax(largest, shuffle_xor(largest, d));
    C sum = C(0);
    for_own_points(lanes, points, member, [&](int i) { sum += exponential(widen(mask[i]) - largest); });
    scale = reciprocal(sum_of_lanes(sum, lanes));
  }

  DCNV3_DEVICE C operator()(int i) const {
    const C value = widen(mask[i]);
    return softmax ? exponential(value - largest) * scale : value;
  }
};

}  // namespace dcnv3
