// In: elements of the tensors' dtypes in memory. Out: values of the compute type (double for float64, else float) in
// registers; and the way back. Also sums over the lanes of a unit.

#pragma once

#include <type_traits>

#include "dcnv3_platform.h"

namespace dcnv3 {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

DCNV3_DEVICE float widen(float value) { return value; }
DCNV3_DEVICE double widen(double value) { return value; }
DCNV3_DEVICE float widen(Half value) { return float_of_half(value.bits); }
DCNV3_DEVICE float widen(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

DCNV3_DEVICE void narrow(float value, float* to) { *to = value; }
DCNV3_DEVICE void narrow(double value, double* to) { *to = value; }
DCNV3_DEVICE void narrow(float value, Half* to) { to->bits = half_of_float(value); }
DCNV3_DEVICE void narrow(float value, BFloat16* to) { to->bits = bfloat16_of_float(value); }

template <int N>
DCNV3_DEVICE void unpack(const uint32_t (&words)[N], const float*, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = float_of_bits(words[i]);
}
template <int N>
DCNV3_DEVICE void unpack(const uint32_t (&words)[N], const double*, double* to) {
#pragma unroll
  for (int i = 0; i < N; i += 2) to[i / 2] = double_of_bits(words[i], words[i + 1]);
}
template <int N>
DCNV3_DEVICE void unpack(const uint32_t (&words)[N], const BFloat16*, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[2 * i] = float_of_bits(words[i] << 16);
    to[2 * i + 1] = float_of_bits(words[i] & 0xffff0000u);
  }
}
template <int N>
DCNV3_DEVICE void unpack(const uint32_t (&words)[N], const Half*, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    to[2 * i] = float_of_half(static_cast<uint16_t>(words[i]));
    to[2 * i + 1] = float_of_half(static_cast<uint16_t>(words[i] >> 16));
  }
}

// V adjacent channels as words: 16 bytes of them, or 8 bytes of 16-bit numbers.
template <int V, class T>
using Words = std::conditional_t<V * sizeof(T) == 8, uint2, uint4>;

template <class T, int V>
DCNV3_DEVICE void unpack_words(const Words<V, T>& from, Compute<T> (&to)[V]) {
  static_assert(sizeof(from) == V * sizeof(T));
  uint32_t words[sizeof(from) / 4];
  __builtin_memcpy(words, &from, sizeof(from));
  unpack(words, static_cast<const T*>(nullptr), to);
}

// Loads V adjacent channels: one, or 16 bytes of them, or 8 bytes of 16-bit numbers. If `inside` is false, reads nothing and
// returns zeros.
template <int V, class T>
DCNV3_DEVICE void load_if(bool inside, const T* from, Compute<T> (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = inside ? widen(*from) : Compute<T>(0);
  } else {
    Words<V, T> loaded{};
    if (inside) loaded = load_words<Words<V, T>>(from);
    unpack_words<T>(loaded, to);
  }
}

template <int V, class T>
DCNV3_DEVICE void load(const T* from, Compute<T> (&to)[V]) {
  load_if<V>(true, from, to);
}

// Stores V adjacent channels: one, or 16 bytes of them. If `condition` is false, does nothing.
template <int V, class T>
DCNV3_DEVICE void store_if(bool condition, const Compute<T> (&values)[V], T* to) {
  if constexpr (V == 1) {
    if (condition) narrow(values[0], to);
  } else {
    static_assert(V * sizeof(T) == 16);
    struct {
      T values[V];
    } packed;
#pragma unroll
    for (int i = 0; i < V; ++i) narrow(values[i], &packed.values[i]);
    store_16_bytes_if(condition, to, packed);
  }
}

// The sum over the lanes of a unit; every lane gets it.
template <class C>
DCNV3_DEVICE C sum_of_lanes(C value, int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) value += shuffle_xor(value, d);
  return value;
}

// The sums of several values. Their shuffles are independent, so that the latencies overlap.
template <class C, int N>
DCNV3_DEVICE void sum_of_lanes(C (&values)[N], int lanes) {
  for (int d = lanes / 2; d > 0; d /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += shuffle_xor(values[i], d);
  }
}

// Loads two adjacent elements, whose address is aligned to both, at once.
template <class T>
DCNV3_DEVICE void load_pair(const T* from, Compute<T> (&to)[2]) {
  typedef std::conditional_t<sizeof(T) == 2, uint32_t, uint2> Words;
  const Words loaded = load_words<Words>(from);
  uint32_t words[sizeof(T) / 2];
  __builtin_memcpy(words, &loaded, sizeof(loaded));
  unpack(words, from, to);
}

// Two adjacent elements, for one load or store. Their address is aligned to the pair where V is not 1.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

}  // namespace dcnv3
