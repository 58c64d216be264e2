// In: contiguous tensors on the current device, as pointers, and the shape of a call. Out: launches of the GPU kernels. The
// entry points (dcnv3_cuda.cu) call these functions; dcnv3_cuda_forward.cu and dcnv3_cuda_backward.cu implement them. They
// return nullptr or an error message.
//
// How the kernels work. A unit of work is one group of one output pixel: P points, a softmax over them, and a weighted sum of
// 4 * P rows of the input with D channels each. A unit belongs to `lanes` adjacent lanes of a warp. First the lanes share the
// points of the unit among them: the four corners of each point and their weights are computed once and written to shared
// memory. Then each lane sums V channels, 16 bytes of the input, over all points. Lanes exchange data only within their warp,
// so no block-wide barrier is needed.
//
// Blocks process two-dimensional tiles of output pixels, because the points of adjacent pixels overlap in the first-level
// cache. Within a tile the group is the fastest index, so the lanes of a warp write adjacent memory.
//
// A corner outside the image is neither read nor added to: its byte offset is -1. A warp whose corners are all inside the
// image, as in the middle of an image, skips the checks.
//
// The backward pass is limited by additions to the gradient of the input in global memory: 4 * P rows a unit, most of them to
// the same pixels. Where the points are close together (3 x 3, stride and dilation 1), a worker therefore takes all units of
// one group in a tile and sums them in shared memory first (window_backward.h). benchmarks/backward_bounds.py works out what
// bounds it then.
//
// A header includes only headers of lines above it:
//   dcnv3_platform.h
//   problem.h, numbers.h, team.h
//   units.h, modulation.h, gradient_sums.h
//   locations.h
//   window.h
//   forward.h, backward.h, team_forward.h, window_backward.h, launch_plan.h
//   launch.h

#pragma once

#include "../torch-ext/dcnv3_shape.h"

namespace dcnv3 {

struct Device {
  void* stream;
  int multiprocessors;
};

const char* launch_forward(
    const Shape& shape, Dtype dtype, const void* input, const void* offset, const void* mask, void* output, Device device);

// The sums of the input's gradient. The caller sets all of them to zero. Floating-point sums depend on the order of the
// additions, which differs from run to run. Integer sums do not: an element of `fixed_point` counts multiples of a power of
// two that is large enough for the largest possible sum.
struct Sums {
  void* floating;     // (N, H, W, C) double for float64, float for all other dtypes; nullptr for fixed point
  void* fixed_point;  // (N, H, W, C) of 64 bits
  void* not_finite;   // one bit for each sum, in 32-bit words: it has a term that is not finite
  void* largest;      // two 64-bit numbers
};

// Fixed-point sums are converted to the tensors' dtype and written to `grad_input`. Floating-point sums are left to the
// caller.
const char* launch_backward(
    const Shape& shape, Dtype dtype, const void* grad_output, const void* input, const void* offset, const void* mask,
    Sums sums, void* grad_input, void* grad_offset, void* grad_mask, Device device);

}  // namespace dcnv3
