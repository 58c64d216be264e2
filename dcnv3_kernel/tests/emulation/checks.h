// In: a launch or an error. Out: the end of the process if a GPU would reject it. For both kinds of lanes (fibers.h,
// threads.h).

#pragma once

#include <cstdio>
#include <cstdlib>

namespace dcnv3 {
namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline void check_launch(unsigned grid, unsigned block, unsigned shared_bytes) {
  if (grid == 0 || block == 0 || block % 32 != 0 || block > 256 || shared_bytes > 48 * 1024) fail("a GPU would reject this launch");
}

}  // namespace emulation
}  // namespace dcnv3
