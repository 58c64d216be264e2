// In: the mask (or logits) of a unit, whose points are distributed over its lanes. Out: the modulation of each lane's own
// points.

#pragma once

#include "numbers.h"
#include "problem.h"

namespace dcnv3 {

// The largest number of points that one lane has, if it is a compile-time constant; otherwise 1.
template <int LANES, int POINTS>
constexpr int own_points = LANES != 0 && POINTS != 0 ? (POINTS + LANES - 1) / LANES : 1;

// Calls `work(i)` for the lane's points member + i, with i = 0, lanes, 2 * lanes ... `member`: the lane's number in its unit.
template <int LANES, int POINTS, class Work>
DCNV3_DEVICE void for_own_points(int lanes, int points, int member, Work work) {
  if constexpr (LANES != 0 && POINTS != 0) {
#pragma unroll
    for (int i = 0; i < POINTS; i += LANES) {
      if (i + LANES <= POINTS || member + i < POINTS) work(i);
    }
  } else {
    for (int i = 0; i < points - member; i += lanes) work(i);
  }
}

// The modulation of the lane's points; with a softmax over all points of the unit if the call asks for it. `mask`: the address
// of the lane's first point. `kept`: the values in registers, if the number of points is a compile-time constant.
template <class T, int LANES, int POINTS>
struct Modulation {
  typedef Compute<T> C;
  static constexpr bool keeps = LANES != 0 && POINTS != 0;
  const T* mask;
  bool softmax;
  C largest, scale;
  C kept[own_points<LANES, POINTS>];

  DCNV3_DEVICE Modulation(const Problem<C>& q, int lanes, int points, int member, const T* own_mask)
      : mask(own_mask), softmax(q.softmax), largest(C(0)), scale(C(1)) {
    const auto for_own = [&](auto work) { for_own_points<LANES, POINTS>(lanes, points, member, work); };
    if constexpr (keeps) {
      for_own([&](int i) { kept[i / LANES] = widen(mask[i]); });
    }
    if (!softmax) return;
    largest = C(-INFINITY);
    for_own([&](int i) { largest = fmax(largest, logit(i)); });
    for (int d = lanes / 2; d > 0; d /= 2) largest = fmax(largest, shuffle_xor(largest, d));
    C sum = C(0);
    for_own([&](int i) {
      const C power = exponential(logit(i) - largest);
      if constexpr (keeps) kept[i / LANES] = power;
      sum += power;
    });
    scale = reciprocal(sum_of_lanes(sum, lanes));
  }

  DCNV3_DEVICE C operator()(int i) const {
    if constexpr (keeps) return kept[i / LANES] * scale;
    const C value = widen(mask[i]);
    return softmax ? exponential(value - largest) * scale : value;
  }

 private:
  DCNV3_DEVICE C logit(int i) const {
    if constexpr (keeps) return kept[i / LANES];
    return widen(mask[i]);
  }
};

}  // namespace dcnv3
