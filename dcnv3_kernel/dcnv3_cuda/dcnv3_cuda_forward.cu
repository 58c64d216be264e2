// In: a forward call. Out: a launch of `forward_kernel` or `team_forward_kernel` with the template arguments that serve the call.

#include "dcnv3_cuda.h"
#include "forward.h"
#include "launch.h"
#include "team_forward.h"

namespace dcnv3 {

const char* launch_forward(
    const Shape& shape, Dtype dtype, const void* input, const void* offset, const void* mask, void* output, Device device) {
  return with_type(dtype, [&](auto type) -> const char* {
    typedef decltype(type) T;
    const bool aligned = is_aligned(input) && is_aligned(output) && has_aligned_pairs<T>(offset, shape.offset_pitch);
    const auto plan = plan_call<T>(shape, false, aligned, device.multiprocessors);
    if (plan.error != nullptr) return plan.error;
    const auto launch = [&](auto kernel) {
      DCNV3_LAUNCH(
          kernel, plan.grid, plan.block, plan.shared_bytes, device.stream, plan.problem, static_cast<const T*>(input),
          static_cast<const T*>(offset), static_cast<const T*>(mask), static_cast<T*>(output));
    };
    constexpr int full = 16 / sizeof(T);
    if constexpr (sizeof(T) < 8) {
      if (plan.teams) {
        with_main_shape(plan.problem, [&](auto channels, auto points) {
          launch(team_forward_kernel<T, channels.value, points.value>);
        });
        return launch_error();
      }
    }
    with_vector<full>(
        plan, [&](auto vector, auto index) { launch(forward_kernel<T, vector.value, decltype(index)>); });
    return launch_error();
  });
}

}  // namespace dcnv3
