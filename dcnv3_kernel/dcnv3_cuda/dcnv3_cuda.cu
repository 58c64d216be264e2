// In: the operators' tensors on a GPU. Out: the operators' results. Allocates memory, selects device and stream, calls
// dcnv3_cuda.h.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../torch-ext/torch_binding.h"
#include "dcnv3_cuda.h"
#include "dcnv3_platform.h"

#if !defined(DCNV3_EMULATION)
// PyTorch's header declares this function only in CUDA builds. PyTorch's CUDA and ROCm libraries both export it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace {

using dcnv3::Dtype;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device the current one during the lifetime of this object.
class OnDevice {
 public:
#if defined(DCNV3_EMULATION)
  explicit OnDevice(const Tensor&) : device_{nullptr, 2} {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()), device_{nullptr, 0} {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &device_.stream));
#if DCNV3_HIP
    const bool failed = hipDeviceGetAttribute(
                            &device_.multiprocessors, hipDeviceAttributeMultiprocessorCount, tensor.get_device_index()) !=
        hipSuccess;
#else
    const bool failed = cudaDeviceGetAttribute(
                            &device_.multiprocessors, cudaDevAttrMultiProcessorCount, tensor.get_device_index()) !=
        cudaSuccess;
#endif
    STD_TORCH_CHECK(!failed, "dcnv3: the number of multiprocessors of the device is unknown");
  }
#endif
  const dcnv3::Device& get() const { return device_; }

 private:
#if !defined(DCNV3_EMULATION)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  dcnv3::Device device_;
};

// A tensor of zeros for the sums of the gradient of `input`, or for the flags and maxima that belong to them.
Tensor zeros(const Tensor& input, const std::vector<int64_t>& sizes, ScalarType dtype, int64_t element_size) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return dcnv3::allocated("sums of the gradient of input", count, element_size, [&] {
    return torch::stable::new_zeros(input, sizes, dtype);
  });
}

void check(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "dcnv3: the GPU kernel cannot serve this call: ", error == nullptr ? "" : error);
}

}  // namespace

Tensor dcnv3_forward(
    Tensor input, Tensor offset, Tensor mask, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups, double offset_scale,
    bool remove_center, bool softmax) {
  dcnv3::Shape shape = dcnv3::checked_shape(
      input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups,
      offset_scale, remove_center, softmax);
  const OnDevice device(input);
  dcnv3::make_contiguous("a contiguous copy of input", input);
  dcnv3::make_equidistant("a contiguous copy of offset", offset, shape.offset_pitch);
  dcnv3::make_equidistant("a contiguous copy of mask", mask, shape.mask_pitch);
  const Dtype dtype = dcnv3::dtype_of(input);
  Tensor output = dcnv3::new_empty("the output", input, {shape.batch, shape.height_out, shape.width_out, shape.channels});
  if (output.numel() == 0) return output;
  check(dcnv3::launch_forward(
      shape, dtype, input.const_data_ptr(), offset.const_data_ptr(), mask.const_data_ptr(), output.mutable_data_ptr(),
      device.get()));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> dcnv3_backward(
    Tensor grad_output, Tensor input, Tensor offset, Tensor mask, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups,
    double offset_scale, bool remove_center, bool softmax, bool deterministic) {
  dcnv3::Shape shape = dcnv3::checked_shape(
      input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups,
      offset_scale, remove_center, softmax);
  dcnv3::check_grad_output(grad_output, input, shape);
  const OnDevice device(input);
  dcnv3::make_contiguous("a contiguous copy of grad_output", grad_output);
  dcnv3::make_contiguous("a contiguous copy of input", input);
  dcnv3::make_equidistant("a contiguous copy of offset", offset, shape.offset_pitch);
  dcnv3::make_equidistant("a contiguous copy of mask", mask, shape.mask_pitch);
  const Dtype dtype = dcnv3::dtype_of(input);
  Tensor grad_offset = dcnv3::new_empty_like("the gradient of offset", offset);
  Tensor grad_mask = dcnv3::new_empty_like("the gradient of mask", mask);
  if (offset.numel() == 0) return {torch::stable::new_zeros(input, input.sizes()), grad_offset, grad_mask};

  const auto launch = [&](dcnv3::Sums sums, void* grad_input) {
    check(dcnv3::launch_backward(
        shape, dtype, grad_output.const_data_ptr(), input.const_data_ptr(), offset.const_data_ptr(),
        mask.const_data_ptr(), sums, grad_input, grad_offset.mutable_data_ptr(), grad_mask.mutable_data_ptr(),
        device.get()));
  };
  if (deterministic) {
    if (!softmax) {  // its largest value is looked for among all elements
      dcnv3::make_contiguous("a contiguous copy of mask", mask);
      shape.mask_pitch = mask.size(3);
    }
    Tensor grad_input = dcnv3::new_empty_like("the gradient of input", input);
    Tensor fixed_point = zeros(input, {input.numel()}, ScalarType::Long, 8);
    Tensor not_finite = zeros(input, {(input.numel() + 31) / 32}, ScalarType::Int, 4);
    Tensor largest = zeros(input, {2}, ScalarType::Long, 8);
    launch(
        {nullptr, fixed_point.mutable_data_ptr(), not_finite.mutable_data_ptr(), largest.mutable_data_ptr()},
        grad_input.mutable_data_ptr());
    return {grad_input, grad_offset, grad_mask};
  }
  const bool is_double = dtype == Dtype::float64;
  const std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  Tensor sums =
      zeros(input, sizes, is_double ? ScalarType::Double : ScalarType::Float, is_double ? 8 : 4);
  launch({sums.mutable_data_ptr(), nullptr, nullptr, nullptr}, nullptr);
  if (sums.scalar_type() == input.scalar_type()) return {sums, grad_offset, grad_mask};
  return {torch::stable::to(sums, input.scalar_type()), grad_offset, grad_mask};
}
