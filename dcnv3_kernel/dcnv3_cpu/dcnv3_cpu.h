// In: the arguments of a call. Out: a table of functions for each instruction set. dcnv3_cpu.cpp calls them, dcnv3_cpu_*.cpp
// compile them.

#pragma once

#include "../torch-ext/dcnv3_shape.h"

namespace dcnv3 {

struct ForwardArguments {
  Shape shape;
  Dtype dtype;
  const void *input, *offset, *mask;
  void* output;
};

// The gradient of the input is summed separately for each slice of an image's output rows. The number of slices, and with it
// the order of every sum, depends only on the shape. The result is therefore the same for any number of threads.
constexpr int64_t max_slices = 8;
struct BackwardArguments {
  Shape shape;
  Dtype dtype;
  const void *grad_output, *input, *offset, *mask;
  void *grad_input, *grad_offset, *grad_mask;
  int64_t slices;          // at most max_slices
  int64_t groups_at_once;  // groups per task; a task is these groups of one slice of one image
  bool in_place;           // the first slice's sums are in grad_input; needs equal dtypes and all groups in one task
  void* partial;           // if slices > 1: (other slices, N, tasks' groups, H, W, groups_at_once * D) float or double
  int64_t* ranges;         // if slices > 1: (tasks, 2), the first row of the sums in use and the row after the last
};

// Bytes per element of the compute type: double for float64, float for all other dtypes.
inline size_t compute_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// The kernels for one instruction set. `scratch` is 64-byte aligned memory for one thread; `forward_scratch` and
// `backward_scratch` return its size in bytes.
struct Kernels {
  const char* name;
  size_t (*forward_scratch)(const ForwardArguments&);
  // output pixels [begin, end) of N * H_out * W_out
  void (*forward)(const ForwardArguments&, int64_t begin, int64_t end, void* scratch);
  size_t (*backward_scratch)(const BackwardArguments&);
  // tasks [begin, end) of N * ceil(G / groups_at_once) * slices
  void (*backward)(const BackwardArguments&, int64_t begin, int64_t end, void* scratch);
  // rows [begin, end) of N * H: sums the slices
  void (*backward_reduce)(const BackwardArguments&, int64_t begin, int64_t end);
};

#if defined(__x86_64__) && defined(__GNUC__)
#define DCNV3_X86_VARIANTS 1
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif
extern const Kernels baseline_kernels;

}  // namespace dcnv3
