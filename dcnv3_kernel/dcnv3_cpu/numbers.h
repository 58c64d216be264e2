// In: rows of float32, float64, float16 or bfloat16 in memory. Out: vectors of the compute type (double for float64, else
// float); and the way back.

#pragma once

#include "vectors.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

DCNV3_INLINE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
DCNV3_INLINE uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

DCNV3_INLINE float widen(float value) { return value; }
DCNV3_INLINE double widen(double value) { return value; }
DCNV3_INLINE float widen(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }
DCNV3_INLINE float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = uint32_t(value.bits & 0x8000u) << 16;
  uint32_t bits = bits_of(float_of(magnitude << 13) * 0x1p112f);  // corrects the exponent; exact for subnormals too
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_of(bits | sign);
}

DCNV3_INLINE void narrow(float value, float* to) { *to = value; }
DCNV3_INLINE void narrow(double value, double* to) { *to = value; }
DCNV3_INLINE void narrow(float value, BFloat16* to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
DCNV3_INLINE void narrow(float value, Half* to) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the addition rounds to multiples of 2^-24
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  to->bits = uint16_t(result | ((bits >> 16) & 0x8000u));
}

template <class T, int B>
DCNV3_INLINE Vector<T, B> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T, B>::unaligned*>(from);
}

template <class T, int B>
DCNV3_INLINE Vector<T, B> load(const BFloat16* from) {
  typedef typename VectorOf<uint16_t, B>::unaligned Bits;
  const auto wide = __builtin_convertvector(*reinterpret_cast<const Bits*>(from), Vector<uint32_t, B>) << 16;
  return reinterpret_cast<Vector<float, B>>(wide);
}

template <class T, int B>
DCNV3_INLINE Vector<T, B> load(const Half* from) {
#if DCNV3_F16C
#if DCNV3_VECTOR_BYTES == 64
  if constexpr (B == 16) {
    return reinterpret_cast<Vector<float, 16>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
#endif
  if constexpr (B == 8) {
    return reinterpret_cast<Vector<float, 8>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  if constexpr (B >= 16) {
    union {
      Vector<float, B / 2> halves[2];
      Vector<float, B> whole;
    } both;
    both.halves[0] = load<T, B / 2>(from);
    both.halves[1] = load<T, B / 2>(from + B / 2);
    return both.whole;
  }
#endif
  Vector<float, B> result;
  for (int i = 0; i < B; ++i) result[i] = widen(from[i]);
  return result;
}

template <class T, int B>
DCNV3_INLINE void store(T* to, Vector<T, B> value) {
  *reinterpret_cast<typename VectorOf<T, B>::unaligned*>(to) = value;
}

template <class T>
DCNV3_INLINE void narrow_row(const T* __restrict from, T* __restrict to, int64_t n) {
  if (from != to) __builtin_memcpy(to, from, n * sizeof(T));
}
DCNV3_INLINE void narrow_row(const float* __restrict from, BFloat16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(from[i], to + i);
}
DCNV3_INLINE void narrow_row(const float* __restrict from, Half* __restrict to, int64_t n) {
  int64_t i = 0;
#if DCNV3_F16C
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
  }
#endif
  for (; i < n; ++i) narrow(from[i], to + i);
}

template <class T>
DCNV3_INLINE bool is_finite(T value) {
  return value - value == T(0);
}

// Whether n values are finite. Also tests the elements after them up to a full register.
template <class T>
DCNV3_INLINE bool all_finite(const T* values, int64_t n) {
  constexpr int L = lanes<T>;
  Register<T> check = {};
  for (int64_t i = 0; i < n; i += L) {
    const Register<T> v = load<T, L>(values + i);
    check += v - v;
  }
  return !any(check != check);
}

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
