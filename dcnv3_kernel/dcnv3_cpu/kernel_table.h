// In: macros that choose an instruction set. Out: `<instruction set>_kernels`, the functions of dcnv3_cpu.h compiled for it.
//
// The same code is compiled once for each instruction set. The including file defines
//   DCNV3_ISA            the name of the instruction set, which is also the namespace
//   DCNV3_VECTOR_BYTES   the width of its vector registers
//   DCNV3_F16C           whether it converts float16 in hardware
// It includes the standard headers first, then selects the instruction set (`#pragma GCC target`), then includes this header.
// These headers instantiate nothing of the standard library. Otherwise the linker could merge a function compiled for an
// instruction set that the machine lacks with the same function of other code.
//
// A unit of work is one group of one output pixel: a weighted sum of 4 * P rows of the input with D channels each. Locations,
// bilinear weights and softmax do not depend on the channel. They are computed once, vectorised over the points. The sums are
// vectorised over the channels. The four pixels that a point samples are always two adjacent pixels in each of two adjacent
// rows inside the image; at the border some of their weights are zero. Because 0 * inf is NaN, a unit whose result is not
// finite is computed again by branches. The result of a unit does not depend on its block or thread.
//
// A header includes only headers of lines above it:
//   dcnv3_cpu.h
//   vectors.h, blocks.h
//   numbers.h
//   channels.h, softmax.h, locations.h
//   forward.h, backward_points.h
//   backward.h
//   kernel_table.h

#pragma once

#include "backward.h"
#include "forward.h"

namespace dcnv3 {
namespace DCNV3_ISA {
namespace {

// Calls `function<P, D>` with constants for the number of points P and the group width D if there is a specialisation for
// them, otherwise with zeros: then both are read at run time.
#define DCNV3_SPECIALISED(function, T, S, shape, ...)                     \
  do {                                                                    \
    if ((shape).points == 9 && (shape).group_channels == 16) {            \
      function<T, S, 9, 16>(__VA_ARGS__);                                 \
    } else if ((shape).points == 9 && (shape).group_channels == 32) {     \
      function<T, S, 9, 32>(__VA_ARGS__);                                 \
    } else if ((shape).points == 9 && (shape).group_channels == 8) {      \
      function<T, S, 9, 8>(__VA_ARGS__);                                  \
    } else {                                                              \
      function<T, S, 0, 0>(__VA_ARGS__);                                  \
    }                                                                     \
  } while (0)

// Calls `function<T, S, P, D>(arguments, ...)` with the types of computation and of storage that belong to the dtype.
#define DCNV3_FOR_DTYPE(function, arguments, ...)                                                           \
  switch ((arguments).dtype) {                                                                              \
    case Dtype::float32:                                                                                    \
      DCNV3_SPECIALISED(function, float, float, (arguments).shape, arguments, __VA_ARGS__);                 \
      break;                                                                                                \
    case Dtype::bfloat16:                                                                                   \
      DCNV3_SPECIALISED(function, float, BFloat16, (arguments).shape, arguments, __VA_ARGS__);              \
      break;                                                                                                \
    case Dtype::float16:                                                                                    \
      DCNV3_SPECIALISED(function, float, Half, (arguments).shape, arguments, __VA_ARGS__);                  \
      break;                                                                                                \
    case Dtype::float64:                                                                                    \
      function<double, double, 0, 0>(arguments, __VA_ARGS__);                                               \
      break;                                                                                                \
  }

size_t forward_scratch(const ForwardArguments& a) {
  return Points<double>::bytes(block_capacity(a.shape, groups_of_block(a.shape)));
}

void forward(const ForwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  DCNV3_FOR_DTYPE(forward_pixels, a, begin, end, scratch)
}

size_t backward_scratch(const BackwardArguments& a) {
  return a.dtype == Dtype::float64 ? BackwardScratch<double>(a).bytes() : BackwardScratch<float>(a).bytes();
}

void backward(const BackwardArguments& a, int64_t begin, int64_t end, void* scratch) {
  DCNV3_FOR_DTYPE(backward_tasks, a, begin, end, scratch)
}

void backward_reduce(const BackwardArguments& a, int64_t begin, int64_t end) {
  DCNV3_FOR_DTYPE(reduce_slices, a, begin, end)
}

}  // namespace
}  // namespace DCNV3_ISA

#define DCNV3_STRING_(name) #name
#define DCNV3_STRING(name) DCNV3_STRING_(name)
#define DCNV3_JOIN_(name) name##_kernels
#define DCNV3_JOIN(name) DCNV3_JOIN_(name)
extern const Kernels DCNV3_JOIN(DCNV3_ISA);
const Kernels DCNV3_JOIN(DCNV3_ISA) = {
    DCNV3_STRING(DCNV3_ISA),     DCNV3_ISA::forward_scratch, DCNV3_ISA::forward,
    DCNV3_ISA::backward_scratch, DCNV3_ISA::backward,        DCNV3_ISA::backward_reduce,
};

}  // namespace dcnv3
