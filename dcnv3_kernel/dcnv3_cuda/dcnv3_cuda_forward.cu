#include "dcnv3_cuda_kernels.h"

namespace dcnv3 {

const char* launch_forward(
    const Shape& shape, Dtype dtype, const void* input, const void* offset, const void* mask, void* output, Device device) {
  return with_type(dtype, [&](auto type) -> const char* {
    typedef decltype(type) T;
    const bool aligned = is_aligned(input) && is_aligned(output) && is_aligned(offset, 2 * sizeof(T));
    const auto plan = plan_call<T>(shape, false, aligned, device.multiprocessors);
    if (plan.error != nullptr) return plan.error;
    with_kernel<T, true>(plan, [&](auto vector, auto lanes, auto points, auto index) {
      DCNV3_LAUNCH(
          (forward_kernel<T, vector.value, lanes.value, points.value, decltype(index)>), plan.grid, plan.block,
          plan.shared_bytes, device.stream, plan.problem, static_cast<const T*>(input), static_cast<const T*>(offset),
          static_cast<const T*>(mask), static_cast<T*>(output));
    });
    return launch_error();
  });
}

}  // namespace dcnv3
