// In: a backward call. Out: launches of `backward_kernel` or `window_backward_kernel`, and of the conversions of fixed-point
// sums.

#include "backward.h"
#include "dcnv3_cuda.h"
#include "launch.h"
#include "window_backward.h"

namespace dcnv3 {

const char* launch_backward(
    const Shape& shape, Dtype dtype, const void* grad_output, const void* input, const void* offset, const void* mask,
    Sums sums, void* grad_input, void* grad_offset, void* grad_mask, Device device) {
  return with_type(dtype, [&](auto type) -> const char* {
    typedef decltype(type) T;
    typedef Compute<T> C;
    const bool fixed_point = sums.floating == nullptr;
    const bool aligned = is_aligned(input) && is_aligned(grad_output) && is_aligned(sums.floating) &&
        has_aligned_pairs<T>(offset, shape.offset_pitch) && is_aligned(grad_offset, 2 * sizeof(T));
    const auto plan = plan_call<T>(shape, true, aligned, device.multiprocessors);
    if (plan.error != nullptr) return plan.error;
    const auto launch = [&](auto destination) {
      typedef decltype(destination) S;
      const auto launch_kernel = [&](auto kernel) {
        DCNV3_LAUNCH(
            kernel, plan.grid, plan.block, plan.shared_bytes, device.stream, plan.problem,
            static_cast<const T*>(grad_output), static_cast<const T*>(input), static_cast<const T*>(offset),
            static_cast<const T*>(mask), destination, static_cast<T*>(grad_offset), static_cast<T*>(grad_mask));
      };
      if constexpr (sizeof(T) < 8) {
        if (plan.windows) {
          return with_main_shape(plan.problem, [&](auto channels, auto points) {
            launch_kernel(window_backward_kernel<T, channels.value, points.value, S>);
          });
        }
      }
      with_vector<16 / sizeof(C)>(plan, [&](auto vector, auto index) {
        launch_kernel(backward_kernel<T, vector.value, decltype(index), S>);
      });
    };
    if (!fixed_point) {
      launch(FloatingSums<C>{static_cast<C*>(sums.floating)});
      return launch_error();
    }

    auto* largest = static_cast<unsigned long long*>(sums.largest);
    const FixedPointSums<C> destination{
        static_cast<unsigned long long*>(sums.fixed_point), static_cast<unsigned*>(sums.not_finite), largest,
        shape.height_out * shape.width_out * shape.points, shape.softmax};
    const auto blocks = [&](int64_t count) {
      const int64_t wanted = (count + 255) / 256, most = 8 * static_cast<int64_t>(device.multiprocessors);
      return static_cast<unsigned>(wanted < most ? wanted : most);
    };
    const int64_t pixels = shape.batch * shape.height_out * shape.width_out;
    DCNV3_LAUNCH(
        largest_kernel<T>, blocks(pixels * shape.channels), 256u, 0u, device.stream, static_cast<const T*>(grad_output),
        pixels * shape.channels, largest);
    if (!shape.softmax) {
      const int64_t count = pixels * shape.groups * shape.points;
      DCNV3_LAUNCH(
          largest_kernel<T>, blocks(count), 256u, 0u, device.stream, static_cast<const T*>(mask), count, largest + 1);
    }
    launch(destination);
    const int64_t count = shape.batch * shape.height * shape.width * shape.channels;
    DCNV3_LAUNCH(
        fixed_point_to_floating_kernel<T>, blocks(count), 256u, 0u, device.stream, destination, count,
        static_cast<T*>(grad_input));
    return launch_error();
  });
}

}  // namespace dcnv3
