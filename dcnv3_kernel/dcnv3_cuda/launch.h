// In: a dtype, a `Plan`. Out: the template arguments of the kernel that serves them, and the error of a launch.

#pragma once

#include "launch_plan.h"

namespace dcnv3 {

inline bool is_aligned(const void* pointer, size_t bytes = 16) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether the pairs of a tensor of offsets can be loaded at once.
template <class T>
bool has_aligned_pairs(const void* offset, int64_t pitch) {
  return is_aligned(offset, 2 * sizeof(T)) && pitch % 2 == 0;
}

// Calls `run` with a value of the element type that corresponds to the dtype.
template <class Run>
const char* with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::float32:
      return run(float());
    case Dtype::float64:
      return run(double());
    case Dtype::float16:
      return run(Half());
    default:
      return run(BFloat16());
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls `run(group_channels, points)` with compile-time constants: 16 or 32 channels, 9 or 8 points.
template <class C, class Run>
void with_main_shape(const Problem<C>& q, Run run) {
  if (q.group_channels == 16) {
    if (q.points == 9) return run(Constant<16>(), Constant<9>());
    return run(Constant<16>(), Constant<8>());
  }
  if (q.points == 9) return run(Constant<32>(), Constant<9>());
  run(Constant<32>(), Constant<8>());
}

// Calls `run(vector, index)`: a compile-time constant, and a value of the index type.
template <int full, class C, class Run>
void with_vector(const Plan<C>& plan, Run run) {
  if (plan.wide) return run(Constant<1>(), int64_t());
  if (plan.vector == full) return run(Constant<full>(), int32_t());
  run(Constant<1>(), int32_t());
}

inline const char* launch_error() {
#if defined(DCNV3_EMULATION)
  return nullptr;
#elif DCNV3_HIP
  const hipError_t error = hipGetLastError();
  return error == hipSuccess ? nullptr : hipGetErrorString(error);
#else
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace dcnv3
