// DCNv3 on GPUs: what the entry points (dcnv3_cuda.cu) and the kernels (dcnv3_cuda_forward.cu, dcnv3_cuda_backward.cu) share.
// Pointers are to memory of the current device, tensors contiguous. Functions return nullptr, or what went wrong.

#pragma once

#include "../torch-ext/dcnv3_shape.h"

namespace dcnv3 {

struct Device {
  void* stream;
  int multiprocessors;
};

const char* launch_forward(
    const Shape& shape, Dtype dtype, const void* input, const void* offset, const void* mask, void* output, Device device);

// Where the gradient of the input is summed, all of it zero at the beginning. The sums of floating-point numbers depend on
// their order, which differs from run to run. Integers have no such sums: in `fixed_point`, a number is a multiple of a power
// of two that leaves the largest possible sum room.
struct Sums {
  void* floating;     // (N, H, W, C) double for float64, float for all other dtypes; nullptr for fixed point
  void* fixed_point;  // (N, H, W, C) of 64 bits
  void* not_finite;   // a bit for each of the sums, in words of 32
  void* largest;      // two numbers of 64 bits
};

// With fixed point, the gradient of the input is written to `grad_input` in the tensors' dtype; else the caller converts.
const char* launch_backward(
    const Shape& shape, Dtype dtype, const void* grad_output, const void* input, const void* offset, const void* mask,
    Sums sums, void* grad_input, void* grad_offset, void* grad_mask, Device device);

}  // namespace dcnv3
