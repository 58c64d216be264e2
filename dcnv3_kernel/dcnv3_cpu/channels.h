// In: the channels of a pixel and group, as elements of the tensors' dtype. Out: vectors of the compute type, in pieces whose
// size is a compile-time constant; and the way back.

#pragma once

#include "numbers.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// Forces a value into a register. Otherwise the compiler loads it from memory once for each use.
#if DCNV3_VECTOR_BYTES == 64
#define DCNV3_IN_REGISTER(value) __asm__("" : "+v"(value))
#elif defined(__x86_64__)
#define DCNV3_IN_REGISTER(value) __asm__("" : "+x"(value))
#else
#define DCNV3_IN_REGISTER(value)
#endif

// Sums over the points use vectors of 32 bytes along the channels, with AVX-512 too. Vectors of 64 bytes would have to be
// folded for the dot products of the backward pass, and made the forward pass only 3 % faster on a Zen 4.
template <class T>
constexpr int channel_lanes = (DCNV3_VECTOR_BYTES < 32 ? DCNV3_VECTOR_BYTES : 32) / sizeof(T);

template <bool>
struct EnableIf {};
template <>
struct EnableIf<true> {
  typedef void type;
};

// B channels of a row of elements S as vectors of T. The order of the channels in the vectors depends only on the types and B,
// so products of two such pieces pair the same channels.
template <class T, class S, int B, class = void>
struct Piece {
  static constexpr int width = B < channel_lanes<T> ? B : channel_lanes<T>, count = B / width;
  typedef Vector<T, width> V;
  static DCNV3_INLINE void read(const S* from, V (&to)[count]) {
    for (int c = 0; c < count; ++c) to[c] = load<T, width>(from + c * width);
  }
  static DCNV3_INLINE void write(const V (&from)[count], S* to) {
    if constexpr (sizeof(S) == sizeof(T)) {
      for (int c = 0; c < count; ++c) store<T, width>(to + c * width, from[c]);
    } else {
      T row[B];
      for (int c = 0; c < count; ++c) store<T, width>(row + c * width, from[c]);
      narrow_row(row, to, B);
    }
  }
};

// bfloat16 is read and written as 32-bit elements that hold two channels: the even one in the lower half, the odd one in the
// upper half. This order needs no shuffles.
template <class V>
DCNV3_INLINE auto rounded_to_bfloat16(V value) {  // result in the upper half
  typedef Vector<uint32_t, sizeof(V) / 4> U;
  const U bits = reinterpret_cast<U>(value), none = {};
  const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value == value ? rounded : none + 0x7fc00000u;
}
template <class V>
DCNV3_INLINE auto pairs_of_bfloat16(V even, V odd) {
  return (rounded_to_bfloat16(even) >> 16) | (rounded_to_bfloat16(odd) & 0xffff0000u);
}
template <class T, int B>
struct Piece<T, BFloat16, B, typename EnableIf<(B >= 8)>::type> {
  static constexpr int width = B / 2 < channel_lanes<T> ? B / 2 : channel_lanes<T>, count = B / width;
  typedef Vector<T, width> V;
  typedef typename VectorOf<uint32_t, width>::unaligned Pairs;
  static DCNV3_INLINE void read(const BFloat16* from, V (&to)[count]) {
    for (int c = 0; c < count; c += 2) {
      Vector<uint32_t, width> pairs = *reinterpret_cast<const Pairs*>(from + c * width);
      DCNV3_IN_REGISTER(pairs);
      to[c] = reinterpret_cast<V>(pairs << 16);
      to[c + 1] = reinterpret_cast<V>(pairs & 0xffff0000u);
    }
  }
  static DCNV3_INLINE void write(const V (&from)[count], BFloat16* to) {
    for (int c = 0; c < count; c += 2) {
      *reinterpret_cast<Pairs*>(to + c * width) = pairs_of_bfloat16(from[c], from[c + 1]);
    }
  }
};

// Calls `function.template operator()<B>(c)` for pieces of B channels that begin at channel c. If D is not 0, there is one
// piece of D channels.
template <int D, class F>
DCNV3_INLINE void for_pieces(int64_t channels, F&& function) {
  if constexpr (D != 0) {
    function.template operator()<D>(0);
  } else {
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) function.template operator()<16>(c);
    for (; c + 4 <= channels; c += 4) function.template operator()<4>(c);
    for (; c < channels; ++c) function.template operator()<1>(c);
  }
}

}  // namespace
}  // namespace DCNV3_ISA
}  // namespace dcnv3
