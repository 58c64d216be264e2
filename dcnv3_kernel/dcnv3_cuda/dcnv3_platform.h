// In: CUDA, HIP or the tests' emulation on a CPU (tests/emulation). Out: one set of names for all three: language extensions,
// exchange between the lanes of a warp, conversions of 16-bit numbers, atomic additions. A warp always has 32 lanes here; on
// AMD GPUs with wavefronts of 64 it is half a wavefront.

#pragma once

#include <cmath>
#include <cstdint>

namespace dcnv3 {

constexpr float floor_bias = 12582912.0f;  // 1.5 * 2^23

}

#if defined(DCNV3_EMULATION)
#include "emulation.h"
#else

#if defined(USE_ROCM) || defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define DCNV3_HIP 1
#else
#include <cuda_runtime.h>
#endif

#define DCNV3_DEVICE __device__ __forceinline__
#define DCNV3_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define DCNV3_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (kernel)<<<(grid), (block), (shared_bytes), static_cast<dcnv3::Stream>(stream)>>>(__VA_ARGS__)

namespace dcnv3 {

#if DCNV3_HIP
typedef hipStream_t Stream;
#else
typedef cudaStream_t Stream;
#endif

DCNV3_DEVICE unsigned thread_number() { return threadIdx.x; }
DCNV3_DEVICE unsigned block_size() { return blockDim.x; }
DCNV3_DEVICE unsigned block_number() { return blockIdx.x; }
DCNV3_DEVICE unsigned grid_size() { return gridDim.x; }

DCNV3_DEVICE void* shared_memory() {
  extern __shared__ __align__(16) unsigned char dcnv3_shared_memory[];
  return dcnv3_shared_memory;
}

// The value of the lane whose number is this lane's number xor `difference`. All lanes of a warp must call it.
template <class T>
DCNV3_DEVICE T shuffle_xor(T value, int difference) {
#if DCNV3_HIP
  return __shfl_xor(value, difference, 32);
#else
  return __shfl_xor_sync(0xffffffffu, value, difference);
#endif
}

// Makes earlier writes to shared memory by the lanes of a warp visible to all of them.
DCNV3_DEVICE void sync_warp() {
#if DCNV3_HIP
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
#else
  __syncwarp();
#endif
}

// Whether `value` is true in all lanes of a warp (in all 64 lanes of an AMD wavefront). Does not synchronise memory.
DCNV3_DEVICE bool all_lanes(bool value) {
#if DCNV3_HIP
  return __all(value);
#else
  return __all_sync(0xffffffffu, value);
#endif
}

// Loads a uint2 or uint4. The address must be aligned, the data read-only.
template <class Words>
DCNV3_DEVICE Words load_words(const void* from) {
#if DCNV3_HIP
  return *static_cast<const Words*>(from);
#else
  return __ldg(static_cast<const Words*>(from));
#endif
}

template <class Bytes>
DCNV3_DEVICE void store_16_bytes_if(bool condition, void* to, const Bytes& bytes) {
  static_assert(sizeof(Bytes) == 16);
  uint32_t words[4];
  __builtin_memcpy(words, &bytes, 16);
#if DCNV3_HIP
  if (condition) *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
#else  // nvcc would make a branch, and may split a store of a uint4
  asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]),
                 "r"(static_cast<unsigned>(condition))
               : "memory");
#endif
}

// Keeps a value in registers. Otherwise nvcc may compute it again at each use. An address must be one of global memory.
template <class T>
DCNV3_DEVICE void keep(T*& address) {
#if !DCNV3_HIP
  asm("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
#endif
}
DCNV3_DEVICE void keep(float& value) {
#if !DCNV3_HIP
  asm("" : "+f"(value));
#endif
}
DCNV3_DEVICE void keep(uint32_t& value) {
#if !DCNV3_HIP
  asm("" : "+r"(value));
#endif
}

DCNV3_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DCNV3_DEVICE uint32_t bits_of_float(float value) { return __float_as_uint(value); }
DCNV3_DEVICE uint16_t bfloat16_by_rounding(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
DCNV3_DEVICE double double_of_bits(uint32_t low, uint32_t high) { return __hiloint2double(high, low); }
DCNV3_DEVICE uint64_t bits_of_double(double value) { return __double_as_longlong(value); }
// The result is arbitrary for values beyond the range of an int.
DCNV3_DEVICE int floor_to_int(float value) { return __float2int_rd(value); }
DCNV3_DEVICE int floor_to_int(double value) { return __double2int_rd(value); }
// The floor plus `floor_bias`. For values in [-2^22, 2^22) the difference of their bits is the floor, too. For all others, and
// for NaN, that difference modulo 2^32 lies in [2^22, 2^32 - 2^22).
DCNV3_DEVICE float biased_floor(float value) {
#if DCNV3_HIP
  return floorf(value) + floor_bias;
#else
  return __fadd_rd(value, floor_bias);
#endif
}
DCNV3_DEVICE long long nearest_integer(float value) { return __float2ll_rn(value); }
DCNV3_DEVICE long long nearest_integer(double value) { return __double2ll_rn(value); }

DCNV3_DEVICE float float_of_half(uint16_t bits) {
#if DCNV3_HIP
  return static_cast<float>(__builtin_bit_cast(_Float16, bits));
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

DCNV3_DEVICE uint16_t half_of_float(float value) {
#if DCNV3_HIP
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#endif
}

DCNV3_DEVICE uint16_t bfloat16_of_float(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  return bfloat16_by_rounding(value);
#endif
}

DCNV3_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// Accurate to a few units in the last place.
DCNV3_DEVICE float exponential(float value) {
#if DCNV3_HIP
  return __expf(value);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value * 1.4426950408889634f));
  return power;
#endif
}
DCNV3_DEVICE double exponential(double value) { return exp(value); }
DCNV3_DEVICE float reciprocal(float value) {
#if DCNV3_HIP
  return __frcp_rn(value);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}
DCNV3_DEVICE double reciprocal(double value) { return 1.0 / value; }

// Whether `multiply_matrices` exists: products of matrices of 16-bit numbers in one instruction of the warp.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool has_matrices = true;
#else
constexpr bool has_matrices = false;
#endif
// Adds the product of a (16 x 8) and b (8 x 8) to `sums` (16 x 8). With row = lane / 4 and column = lane % 4 * 2, a lane has of
// `sums` [row, column], [row, column + 1], [row + 8, column], [row + 8, column + 1]. Its words have two numbers each: of a
// [row, column and column + 1] and the same of row + 8, of b [column and column + 1, row]. All lanes of a warp must call it.
template <bool bfloat16>
DCNV3_DEVICE void multiply_matrices(float (&sums)[4], uint32_t a, uint32_t a_below, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a), "r"(a_below), "r"(b));
  } else {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a), "r"(a_below), "r"(b));
  }
#endif
}

DCNV3_DEVICE void atomic_add(float* at, float value) { atomicAdd(at, value); }
DCNV3_DEVICE void atomic_add(double* at, double value) { atomicAdd(at, value); }
DCNV3_DEVICE void atomic_add(unsigned long long* at, unsigned long long value) { atomicAdd(at, value); }
DCNV3_DEVICE void atomic_max(unsigned long long* at, unsigned long long value) { atomicMax(at, value); }
DCNV3_DEVICE void atomic_or(unsigned* at, unsigned value) { atomicOr(at, value); }

// Adds to four adjacent floats. The address must be aligned to 16 bytes. One transaction from compute capability 9.0 on.
DCNV3_DEVICE void atomic_add_4(float* at, const float* value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(at)), "f"(value[0]), "f"(value[1]), "f"(value[2]), "f"(value[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(at + i, value[i]);
#endif
}

}  // namespace dcnv3

#endif
