// In: a launch. Out: its execution with the lanes of a warp as fibers. Fibers switch at every exchange, in ascending and
// descending order by turns. A lane that reads data of another lane without synchronisation then gets wrong results. Warps and
// blocks run sequentially.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "checks.h"

namespace dcnv3 {
namespace emulation {

struct Lane {
  ucontext_t start;
  jmp_buf place;  // where it waits; much faster to resume than a ucontext_t, which costs a system call
  std::unique_ptr<char[]> stack;
  bool finished;
  int exchanges;      // number of exchanges so far
  uint64_t value[2];  // the values it offers in the last two
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

// A barrier for the lanes of a warp.
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
        fail("the lanes of a warp do not reach the same exchanges");
      }
    }
  }
}

inline void launch(unsigned grid, unsigned block, unsigned shared_bytes, std::function<void()> kernel) {
  State& s = state();
  check_launch(grid, block, shared_bytes);
  s.grid = grid, s.block = block, s.kernel = std::move(kernel);
  for (s.block_number = 0; s.block_number < grid; ++s.block_number) {
    s.shared.assign(shared_bytes + 16, 0xff);
    for (s.warp = 0; s.warp < block / 32; ++s.warp) run_warp();
    for (unsigned i = 0; i < 16; ++i) {
      if (s.shared[shared_bytes + i] != 0xff) fail("shared memory was written behind its end");
    }
  }
}

// Offers a value to the other lanes and returns the value of one of them.
inline uint64_t exchange(uint64_t value, int difference) {
  State& s = state();
  const int which = s.lanes[s.lane].exchanges % 2, lane = s.lane;
  s.lanes[lane].value[which] = value;
  wait_for_warp();
  return s.lanes[lane ^ difference].value[which];
}

inline unsigned thread_number() { return state().warp * 32 + state().lane; }
inline unsigned block_size() { return state().block; }
inline unsigned block_number() { return state().block_number; }
inline unsigned grid_size() { return state().grid; }
inline void* shared_memory() { return state().shared.data(); }

}  // namespace emulation
}  // namespace dcnv3
