// In: the GPU kernels. Out: their execution on a CPU, lane by lane, to test their arithmetic and the exchange between lanes
// without a GPU. This header defines the names of dcnv3_platform.h. Lanes are fibers, which are fast, or threads, which are
// slow but let ThreadSanitizer find races between lanes, warps and blocks (sanitize.cpp). The emulation does not test speed or
// GPU compilers.

#pragma once

#include <math.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(DCNV3_EMULATION_THREADS)
#include "threads.h"
#else
#include "fibers.h"
#endif

#define DCNV3_DEVICE inline
#define DCNV3_KERNEL(max_threads, min_blocks) void
#define DCNV3_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  dcnv3::emulation::launch((grid), (block), (shared_bytes), [&] { (kernel)(__VA_ARGS__); })

namespace dcnv3 {

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};

using emulation::block_number;
using emulation::block_size;
using emulation::grid_size;
using emulation::shared_memory;
using emulation::thread_number;

template <class T>
T shuffle_xor(T value, int difference) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::exchange(bits, difference);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void sync_warp() { emulation::wait_for_warp(); }

inline bool all_lanes(bool value) {
  for (int d = 16; d > 0; d /= 2) value = shuffle_xor(value, d) && value;
  return value;
}

template <class Words>
Words load_words(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Words) != 0) emulation::fail("a load of words that is not aligned");
  return *static_cast<const Words*>(from);
}

template <class Bytes>
void store_16_bytes_if(bool condition, void* to, const Bytes& bytes) {
  static_assert(sizeof(Bytes) == 16);
  if (!condition) return;
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::fail("a store of 16 bytes that is not aligned");
  std::memcpy(to, &bytes, 16);
}

template <class T>
void keep(T&) {}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline float float_of_bits(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t bits_of_float(float value) { return bits_as<uint32_t>(value); }
inline double double_of_bits(uint32_t low, uint32_t high) { return bits_as<double>(uint64_t(high) << 32 | low); }
inline uint64_t bits_of_double(double value) { return bits_as<uint64_t>(value); }
template <class T>
int floor_to_int(T value) {  // saturating, as on a GPU
  return value >= T(INT32_MAX) ? INT32_MAX : value <= T(INT32_MIN) ? INT32_MIN : value == value ? int(floor(value)) : 0;
}
inline float biased_floor(float value) { return floorf(value) + floor_bias; }
inline long long nearest_integer(float value) { return llrintf(value); }
inline long long nearest_integer(double value) { return llrint(value); }
inline float float_of_half(uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
inline uint16_t half_of_float(float value) { return bits_as<uint16_t>(static_cast<_Float16>(value)); }

inline uint16_t bfloat16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a) * b >> 32); }
inline float exponential(float value) { return expf(value); }
inline double exponential(double value) { return exp(value); }
template <class T>
T reciprocal(T value) {
  return T(1) / value;
}

constexpr bool has_matrices = true;
template <bool bfloat16>
void multiply_matrices(float (&sums)[4], uint32_t a, uint32_t a_below, uint32_t b) {
  const int lane = thread_number() % 32;
  uint32_t rows[2][4], columns[32];  // of a: by lane % 4; of b: by lane
  for (int d = 0; d < 32; ++d) {
    columns[lane ^ d] = shuffle_xor(b, d);
    if (d < 4) rows[0][lane % 4 ^ d] = shuffle_xor(a, d), rows[1][lane % 4 ^ d] = shuffle_xor(a_below, d);
  }
  const auto number = [](uint32_t word, int half) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
    return bfloat16 ? float_of_bits(static_cast<uint32_t>(bits) << 16) : float_of_half(bits);
  };
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 8; ++k) {
      const uint32_t column = columns[(lane % 4 * 2 + i % 2) * 4 + k / 2];
      sums[i] += number(rows[i / 2][k / 2], k % 2) * number(column, k % 2);
    }
  }
}

template <class T>
void atomic_add(T* at, T value) {
  std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}
inline void atomic_or(unsigned* at, unsigned value) { std::atomic_ref<unsigned>(*at).fetch_or(value, std::memory_order_relaxed); }
inline void atomic_max(unsigned long long* at, unsigned long long value) {
  std::atomic_ref<unsigned long long> place(*at);
  unsigned long long found = place.load(std::memory_order_relaxed);
  while (found < value && !place.compare_exchange_weak(found, value, std::memory_order_relaxed)) {
  }
}
inline void atomic_add_4(float* at, const float* value) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) emulation::fail("an addition to 16 bytes that are not aligned");
  for (int i = 0; i < 4; ++i) atomic_add(at + i, value[i]);
}

}  // namespace dcnv3
