// In: a launch. Out: its execution with one thread for each lane, all at the same time, under a sanitizer. As on a GPU, only
// `sync_warp` orders the memory accesses of a warp's lanes. A shuffle transfers its value and orders nothing else, so code
// that relies on a shuffle for ordering has a race.

#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "checks.h"

namespace dcnv3 {
namespace emulation {

struct Warp {
  std::atomic<unsigned> arrived{0}, generation{0};
  std::atomic<uint64_t> values[2][32] = {};  // the values that the lanes offer in the last two exchanges
};

struct Place {
  unsigned grid, block, block_number, number;
  unsigned char* shared;
  Warp* warp;
  unsigned exchanges = 0;
};
inline thread_local Place place;

// A barrier for the lanes of a warp, with these memory orders.
inline void come_together(std::memory_order arriving, std::memory_order waiting, std::memory_order leaving) {
  Warp& warp = *place.warp;
  ++place.exchanges;
  const unsigned generation = warp.generation.load(std::memory_order_relaxed);
  if (warp.arrived.fetch_add(1, arriving) == 31) {
    warp.arrived.store(0, std::memory_order_relaxed);
    warp.generation.store(generation + 1, leaving);
    return;
  }
  const auto started = std::chrono::steady_clock::now();
  while (warp.generation.load(waiting) == generation) {
    sched_yield();
    if (std::chrono::steady_clock::now() - started > std::chrono::minutes(2)) {
      fail("the lanes of a warp do not reach the same exchanges");
    }
  }
}

inline void wait_for_warp() {
  come_together(std::memory_order_acq_rel, std::memory_order_acquire, std::memory_order_release);
}

// Offers a value to the other lanes and returns the value of one of them.
inline uint64_t exchange(uint64_t value, int difference) {
  std::atomic<uint64_t>* values = place.warp->values[place.exchanges % 2];
  const unsigned lane = place.number % 32;
  values[lane].store(value, std::memory_order_relaxed);
  come_together(std::memory_order_relaxed, std::memory_order_relaxed, std::memory_order_relaxed);
  return values[lane ^ static_cast<unsigned>(difference)].load(std::memory_order_relaxed);
}

inline unsigned thread_number() { return place.number; }
inline unsigned block_size() { return place.block; }
inline unsigned block_number() { return place.block_number; }
inline unsigned grid_size() { return place.grid; }
inline void* shared_memory() { return place.shared; }

inline void launch(unsigned grid, unsigned block, unsigned shared_bytes, std::function<void()> kernel) {
  check_launch(grid, block, shared_bytes);
  if (grid > 4096 / block) fail("more threads than this emulation should start: take a smaller shape");
  std::vector<Warp> warps(grid * block / 32);
  std::vector<std::unique_ptr<unsigned char[]>> shared;
  std::vector<std::thread> threads;
  for (unsigned b = 0; b < grid; ++b) {
    shared.emplace_back(new unsigned char[shared_bytes]);
    for (unsigned i = 0; i < shared_bytes; ++i) shared[b][i] = 0xff;
  }
  for (unsigned i = 0; i < grid * block; ++i) {
    threads.emplace_back([&, i] {
      place = {grid, block, i / block, i % block, shared[i / block].get(), &warps[i / 32]};
      kernel();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace emulation
}  // namespace dcnv3
