// In: contributions to the gradient of the input, in any order. Out: their sums, in floating point or, if results must be
// deterministic, in fixed point; and the kernels that convert fixed-point sums to the tensors' dtype.

#pragma once

#include "numbers.h"

namespace dcnv3 {

// Floating-point sums. Their rounding depends on the order of the additions, which differs from run to run.
template <class C>
struct FloatingSums {
  C* sums;

  // What adds to elements that are counted from `origin`.
  DCNV3_DEVICE FloatingSums adder(int64_t origin = 0) const {
    FloatingSums from_origin{sums + origin};
    keep(from_origin.sums);
    return from_origin;
  }

  template <int V>
  DCNV3_DEVICE void operator()(int64_t at, C weight, const C (&values)[V]) const {
    C products[V];
#pragma unroll
    for (int v = 0; v < V; ++v) products[v] = weight * values[v];
    if constexpr (V % 4 == 0 && sizeof(C) == 4) {
#pragma unroll
      for (int v = 0; v < V; v += 4) atomic_add_4(sums + at + v, products + v);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) atomic_add(sums + at + v, products[v]);
    }
  }
};

// e such that the finite number with these bits is below 2^e.
DCNV3_DEVICE int exponent_of_double(uint64_t bits) { return static_cast<int>((bits >> 52) & 0x7ff) - 1022; }

// Fixed-point sums: 64-bit integers that count multiples of a power of two. It is chosen such that the largest possible sum is
// below 2^62 multiples. Integer sums do not depend on the order.
template <class C>
struct FixedPointSums {
  unsigned long long* sums;
  unsigned* not_finite;
  const unsigned long long* largest;  // the largest absolute values of grad_output and of the mask, as the bits of doubles
  int64_t terms;                      // the largest number of terms of one sum
  bool softmax;

  DCNV3_DEVICE int exponent() const {
    int bits_of_terms = 0;
    while (bits_of_terms < 62 && (terms >> bits_of_terms) != 0) ++bits_of_terms;
    const int largest_exponent = sizeof(C) == 4 ? 129 : 1025;  // larger products are not finite
    const int exponent = exponent_of_double(largest[0]) + (softmax ? 1 : exponent_of_double(largest[1]));
    const int wanted = 62 - (exponent < largest_exponent ? exponent : largest_exponent) - bits_of_terms;
    const int most = sizeof(C) == 4 ? 126 : 1022;  // 2^-e is a normal number
    return wanted < most ? wanted : most;
  }
  DCNV3_DEVICE C power_of_two(int e) const {
    if constexpr (sizeof(C) == 4) {
      return float_of_bits(static_cast<uint32_t>(e + 127) << 23);
    } else {
      return double_of_bits(0u, static_cast<uint32_t>(e + 1023) << 20);
    }
  }

  struct Adder {
    unsigned long long* sums;
    unsigned* not_finite;
    int64_t origin;
    C scale;

    template <int V>
    DCNV3_DEVICE void operator()(int64_t at, C weight, const C (&values)[V]) const {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C product = weight * values[v];
        const int64_t element = origin + at + v;
        if (product - product == C(0)) {
          atomic_add(sums + element, static_cast<unsigned long long>(nearest_integer(product * scale)));
        } else {
          atomic_or(not_finite + element / 32, 1u << (element % 32));
        }
      }
    }
  };
  DCNV3_DEVICE Adder adder(int64_t origin = 0) const { return {sums, not_finite, origin, power_of_two(exponent())}; }
};

// Writes the largest finite absolute value, as the bits of a double, to `result`.
template <class T>
DCNV3_KERNEL(256, 4) largest_kernel(const T* __restrict__ values, int64_t count, unsigned long long* result) {
  typedef Compute<T> C;
  C largest = C(0);
  for (int64_t i = static_cast<int64_t>(block_number()) * block_size() + thread_number(); i < count;
       i += static_cast<int64_t>(grid_size()) * block_size()) {
    const C value = fabs(widen(values[i]));
    if (value - value == C(0)) largest = fmax(largest, value);
  }
  for (int d = 16; d > 0; d /= 2) largest = fmax(largest, shuffle_xor(largest, d));
  if (thread_number() % 32 == 0) atomic_max(result, bits_of_double(static_cast<double>(largest)));
}

// Converts the sums to T. A sum with a term that is not finite becomes NaN.
template <class T>
DCNV3_KERNEL(256, 4) fixed_point_to_floating_kernel(FixedPointSums<Compute<T>> from, int64_t count, T* __restrict__ to) {
  typedef Compute<T> C;
  const int exponent = -from.exponent();
  for (int64_t i = static_cast<int64_t>(block_number()) * block_size() + thread_number(); i < count;
       i += static_cast<int64_t>(grid_size()) * block_size()) {
    const bool finite = (from.not_finite[i / 32] >> (i % 32) & 1u) == 0;
    const double value = ldexp(static_cast<double>(static_cast<long long>(from.sums[i])), exponent);
    narrow(finite ? static_cast<C>(value) : C(NAN), to + i);
  }
}

}  // namespace dcnv3
