// DCNv3 on CPUs: what the dispatcher (dcnv3_cpu.cpp) and the kernels for each instruction set (dcnv3_cpu_*.cpp) share.

#pragma once

#include "../torch-ext/dcnv3_shape.h"

namespace dcnv3 {

struct ForwardArguments {
  Shape shape;
  Dtype dtype;
  const void *input, *offset, *mask;
  void* output;
};

// The gradient of the input is summed for each slice of an image's output rows by itself. The number of slices depends on
// the shape alone, and so the order of every sum: the result is the same for any number of threads.
constexpr int64_t max_slices = 8;
struct BackwardArguments {
  Shape shape;
  Dtype dtype;
  const void *grad_output, *input, *offset, *mask;
  void *grad_input, *grad_offset, *grad_mask;
  int64_t slices;          // at most max_slices
  int64_t groups_at_once;  // a task is so many groups of a slice of an image
  bool in_place;           // the first slice's sums are in grad_input: it has their dtype, and a task has all groups
  void* partial;           // (other slices, N, tasks' groups, H, W, groups_at_once * D) float or double if slices > 1
  int64_t* ranges;         // (tasks, 2) if slices > 1: which rows of the sums are in use, the first and that after the last
};

// Bytes per element of the arithmetic: double for float64, float for all others.
inline size_t compute_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// One set of kernels, compiled for one instruction set. `scratch` is 64-byte aligned memory of the size that the function
// of that name returns, for one thread.
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
