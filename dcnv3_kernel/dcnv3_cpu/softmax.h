// In: the logits of the points of several units. Out: their softmax over the points of each unit.

#pragma once

#include "numbers.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// exp(x) for x <= 16, accurate to about one unit in the last place. Gives 0 where the result is below the normal range, NaN
// for NaN.
template <class T>
DCNV3_INLINE Register<T> exponential(Register<T> x) {
  constexpr bool is_double = sizeof(T) == 8;
  typedef Register<T> V;
  typedef MaskRegister<T> M;
  const V zero = {};
  const T magic = is_double ? T(6755399441055744.0) : T(12582912.0);  // 1.5 * 2^52, 1.5 * 2^23
  const T lowest = is_double ? T(-708) : T(-87);
  const V clamped = x > lowest ? x : zero + lowest;
  const V shifted = clamped * T(1.4426950408889634) + magic;
  const V k = shifted - magic;
  const T high = is_double ? T(0.693147180369123816490) : T(0.693359375);
  const T low = is_double ? T(1.90821492927058770002e-10) : T(-2.12194440e-4);
  const V r = (clamped - k * high) - k * low;
  V p = zero;
  if constexpr (is_double) {
    p = p + T(1.6059043836821613e-10);  // 1 / 13!
    p = p * r + T(2.08767569878681e-09);
    p = p * r + T(2.505210838544172e-08);
    p = p * r + T(2.755731922398589e-07);
    p = p * r + T(2.7557319223985893e-06);
    p = p * r + T(2.48015873015873e-05);
    p = p * r + T(0.0001984126984126984);
  } else {
    p = p + T(0.0001984126984126984);  // 1 / 7!
  }
  p = p * r + T(0.001388888888888889);
  p = p * r + T(0.008333333333333333);
  p = p * r + T(0.041666666666666664);
  p = p * r + T(0.16666666666666666);
  p = p * r + T(0.5);
  p = p * r + T(1);
  p = p * r + T(1);
  const M exponent = reinterpret_cast<M>(shifted) << (is_double ? 52 : 23);  // k in the low bits of `shifted`
  V result = p * reinterpret_cast<V>(exponent + reinterpret_cast<M>(zero + T(1)));
  result = x < lowest ? zero : result;
  return x == x ? result : x;
}

// Softmax over each `points` consecutive values (a group), in place. Overwrites memory after them up to a full register. If
// `inverse` is given, the values are left unnormalised and each group's normalising factor is written to `inverse`. The result
// of a group does not depend on the other groups.
template <class T, int P>
DCNV3_INLINE void softmax(T* values, int64_t count, int64_t dynamic_points, T* inverse = nullptr) {
  constexpr int L = lanes<T>;
  typedef Register<T> V;
  const int64_t points = P ? P : dynamic_points;
  const int64_t n = count * points;
  // If all absolute values are below it, the maximum is not subtracted: exponentials and sums neither overflow nor underflow.
  const T limit = 16;
  for (int64_t i = n; i < (n + L - 1) / L * L; ++i) values[i] = 0;
  V largest = {};
  for (int64_t i = 0; i < n; i += L) {
    const V v = load<T, L>(values + i);
    largest = greatest(greatest(v, -v), largest);
    largest = v == v ? largest : v;
  }
  if (__builtin_expect(any(~(largest < limit)), 0)) {
    for (int64_t g = 0; g < count; ++g) {
      T* group = values + g * points;
      T maximum = group[0];
      bool small = true;
      for (int64_t i = 0; i < points; ++i) {
        maximum = group[i] > maximum ? group[i] : maximum;
        small &= group[i] < limit && group[i] > -limit;
      }
      for (int64_t i = 0; i < points && !small; ++i) group[i] -= maximum;
    }
  }
  for (int64_t i = 0; i < n; i += L) store<T, L>(values + i, exponential<T>(load<T, L>(values + i)));
  for (int64_t g = 0; g < count; ++g) {
    T* group = values + g * points;
    T sum = 0;
#pragma GCC unroll 9
    for (int64_t i = 0; i < points; ++i) sum += group[i];
    const T factor = T(1) / sum;
    if (inverse != nullptr) {
      inverse[g] = factor;
    } else {
      for (int64_t i = 0; i < points; ++i) group[i] *= factor;
    }
  }
}

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
