// In: the instruction set (macros of kernel_table.h). Out: vector types of its register width, and functions of whole vectors.

#pragma once

#include "dcnv3_cpu.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

#define DCNV3_INLINE inline __attribute__((always_inline))

template <class T, int B>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * B)));
  typedef T unaligned __attribute__((vector_size(sizeof(T) * B), aligned(alignof(T)), may_alias));
};
template <class T, int B>
using Vector = typename VectorOf<T, B>::type;

// Vectors of the register width, and the integer vectors of the same number of elements that hold comparison results.
template <class T>
constexpr int lanes = DCNV3_VECTOR_BYTES / sizeof(T);
template <class T>
using Register = Vector<T, lanes<T>>;
template <class T>
struct MaskOf {
  typedef int32_t type;
};
template <>
struct MaskOf<double> {
  typedef int64_t type;
};
template <class T>
using MaskRegister = Vector<typename MaskOf<T>::type, lanes<T>>;

// Selects elements by their indices in the concatenation of `a` and `b`.
template <class V, class M>
DCNV3_INLINE V shuffle(V a, V b, M numbers) {
#if defined(__clang__)
  V result;
  constexpr int n = sizeof(V) / sizeof(a[0]);
  for (int i = 0; i < n; ++i) result[i] = numbers[i] < n ? a[numbers[i]] : b[numbers[i] - n];
  return result;
#else
  return __builtin_shuffle(a, b, numbers);
#endif
}

// Whether any element of a comparison result is true.
template <class M>
DCNV3_INLINE bool any(M flags) {
#if DCNV3_VECTOR_BYTES == 64
  if constexpr (sizeof(M) == 64) {
    const __m512i bits = reinterpret_cast<__m512i>(flags);
    return _mm512_test_epi32_mask(bits, bits) != 0;
  }
#endif
#if DCNV3_VECTOR_BYTES >= 32
  if constexpr (sizeof(M) == 32) {
    const __m256i bits = reinterpret_cast<__m256i>(flags);
    return !_mm256_testz_si256(bits, bits);
  }
#endif
  constexpr int n = sizeof(M) / sizeof(flags[0]);
  decltype(flags[0] | flags[0]) all = flags[0];
  for (int i = 1; i < n; ++i) all |= flags[i];
  return all != 0;
}

// Elementwise `a < b ? a : b`, `a > b ? a : b` (both give b if either is NaN) and rounding down to an integer.
#if DCNV3_VECTOR_BYTES == 64
DCNV3_INLINE Register<float> least(Register<float> a, Register<float> b) { return _mm512_min_ps(a, b); }
DCNV3_INLINE Register<double> least(Register<double> a, Register<double> b) { return _mm512_min_pd(a, b); }
DCNV3_INLINE Register<float> greatest(Register<float> a, Register<float> b) { return _mm512_max_ps(a, b); }
DCNV3_INLINE Register<double> greatest(Register<double> a, Register<double> b) { return _mm512_max_pd(a, b); }
DCNV3_INLINE Register<float> round_down(Register<float> v) { return _mm512_roundscale_ps(v, _MM_FROUND_FLOOR); }
DCNV3_INLINE Register<double> round_down(Register<double> v) { return _mm512_roundscale_pd(v, _MM_FROUND_FLOOR); }
#elif DCNV3_VECTOR_BYTES == 32
DCNV3_INLINE Register<float> least(Register<float> a, Register<float> b) { return _mm256_min_ps(a, b); }
DCNV3_INLINE Register<double> least(Register<double> a, Register<double> b) { return _mm256_min_pd(a, b); }
DCNV3_INLINE Register<float> greatest(Register<float> a, Register<float> b) { return _mm256_max_ps(a, b); }
DCNV3_INLINE Register<double> greatest(Register<double> a, Register<double> b) { return _mm256_max_pd(a, b); }
DCNV3_INLINE Register<float> round_down(Register<float> v) { return _mm256_floor_ps(v); }
DCNV3_INLINE Register<double> round_down(Register<double> v) { return _mm256_floor_pd(v); }
#else
template <class V>
DCNV3_INLINE V least(V a, V b) {
  return a < b ? a : b;
}
template <class V>
DCNV3_INLINE V greatest(V a, V b) {
  return a > b ? a : b;
}
template <class V>  // for values that int32_t can hold
DCNV3_INLINE V round_down(V v) {
  typedef Vector<int32_t, sizeof(V) / sizeof(v[0])> Int;
  const V truncated = __builtin_convertvector(__builtin_convertvector(v, Int), V);
  return truncated > v ? truncated - 1 : truncated;
}
#endif

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
