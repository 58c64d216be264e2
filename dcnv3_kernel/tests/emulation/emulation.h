// Runs the GPU kernels on a CPU, lane by lane, so that their arithmetic and their exchange between lanes can be tested where
// there is no GPU: it replaces what dcnv3_platform.h offers on one. The lanes of a warp are fibers that take turns at every
// exchange, forwards and backwards, so that one that relies on what another has not yet been waited for goes wrong; warps and
// blocks run one after another. It says nothing of speed, of memory ordering beyond a warp's exchanges, and of what a compiler
// for GPUs does.

#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

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

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

struct Lane {
  ucontext_t start;
  jmp_buf place;  // where it waits; much faster to go to than a ucontext_t, which costs a call of the system
  std::unique_ptr<char[]> stack;
  bool finished;
  int exchanges;            // how many it has come to
  unsigned char value[2][8];  // what it offers in the last two
};

struct State {
  unsigned grid, block, block_number, warp;
  int lane;
  std::vector<unsigned char> shared;
  Lane lanes[32];
  jmp_buf scheduler;
  std::function<void()> kernel;
};

inline State& state() {
  static thread_local State* value = new State();
  return *value;
}

inline void lane_main() {
  State& s = state();
  s.kernel();
  s.lanes[s.lane].finished = true;
  _longjmp(s.scheduler, 1);
}

inline void resume(bool first) {
  State& s = state();
  if (_setjmp(s.scheduler) != 0) return;
  if (first) setcontext(&s.lanes[s.lane].start);
  _longjmp(s.lanes[s.lane].place, 1);
}

// All lanes of a warp come here before any goes on.
inline void wait_for_warp() {
  State& s = state();
  Lane& lane = s.lanes[s.lane];
  ++lane.exchanges;
  if (_setjmp(lane.place) == 0) _longjmp(s.scheduler, 1);
}

inline void run_warp() {
  State& s = state();
  constexpr size_t stack_bytes = 256 * 1024;
  for (Lane& lane : s.lanes) {
    if (!lane.stack) lane.stack.reset(new char[stack_bytes]);
    getcontext(&lane.start);
    lane.start.uc_stack.ss_sp = lane.stack.get();
    lane.start.uc_stack.ss_size = stack_bytes;
    lane.start.uc_link = nullptr;
    lane.finished = false;
    lane.exchanges = 0;
    makecontext(&lane.start, lane_main, 0);
  }
  for (int turn = 0; !s.lanes[0].finished; ++turn) {
    const bool backwards = (static_cast<unsigned>(turn) + s.warp + s.block_number) % 2 != 0;
    for (int i = 0; i < 32; ++i) {
      s.lane = backwards ? 31 - i : i;
      resume(turn == 0);
    }
    for (const Lane& lane : s.lanes) {
      if (lane.finished != s.lanes[0].finished || lane.exchanges != s.lanes[0].exchanges) {
        fail("the lanes of a warp do not come to the same exchanges");
      }
    }
  }
}

inline void launch(unsigned grid, unsigned block, unsigned shared_bytes, std::function<void()> kernel) {
  State& s = state();
  if (grid == 0 || block == 0 || block % 32 != 0 || block > 256 || shared_bytes > 48 * 1024) fail("a launch that no GPU takes");
  s.grid = grid, s.block = block, s.kernel = std::move(kernel);
  for (s.block_number = 0; s.block_number < grid; ++s.block_number) {
    s.shared.assign(shared_bytes + 16, 0xff);
    for (s.warp = 0; s.warp < block / 32; ++s.warp) run_warp();
    for (unsigned i = 0; i < 16; ++i) {
      if (s.shared[shared_bytes + i] != 0xff) fail("shared memory was written behind its end");
    }
  }
}

}  // namespace emulation

inline unsigned thread_number() { return emulation::state().warp * 32 + emulation::state().lane; }
inline unsigned block_size() { return emulation::state().block; }
inline unsigned block_number() { return emulation::state().block_number; }
inline unsigned grid_size() { return emulation::state().grid; }
inline void* shared_memory() { return emulation::state().shared.data(); }

template <class T>
T shuffle_xor(T value, int difference) {
  static_assert(sizeof(T) <= 8);
  emulation::State& s = emulation::state();
  const int which = s.lanes[s.lane].exchanges % 2, lane = s.lane;
  std::memcpy(s.lanes[lane].value[which], &value, sizeof(T));
  emulation::wait_for_warp();
  std::memcpy(&value, s.lanes[lane ^ difference].value[which], sizeof(T));
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
void store_16_bytes(void* to, const Bytes& bytes) {
  static_assert(sizeof(Bytes) == 16);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::fail("a store of 16 bytes that is not aligned");
  std::memcpy(to, &bytes, 16);
}

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

inline void atomic_add(float* at, float value) { *at += value; }
inline void atomic_add(double* at, double value) { *at += value; }
inline void atomic_add(unsigned long long* at, unsigned long long value) { *at += value; }
inline void atomic_max(unsigned long long* at, unsigned long long value) { *at = *at < value ? value : *at; }
inline void atomic_or(unsigned* at, unsigned value) { *at |= value; }
inline void atomic_add_4(float* at, const float* value) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) emulation::fail("an addition to 16 bytes that are not aligned");
  for (int i = 0; i < 4; ++i) at[i] += value[i];
}

}  // namespace dcnv3
