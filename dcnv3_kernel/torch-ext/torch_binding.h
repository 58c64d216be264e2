// The operators' C++ entry points, and the checks that all backends share. Shapes are in dcnv3_shape.h.

#pragma once

#include <cmath>
#include <string>
#include <tuple>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "dcnv3_shape.h"

torch::stable::Tensor dcnv3_forward(
    torch::stable::Tensor input, torch::stable::Tensor offset, torch::stable::Tensor mask, int64_t kernel_h,
    int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
    int64_t dilation_w, int64_t groups, double offset_scale, bool remove_center, bool softmax);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> dcnv3_backward(
    torch::stable::Tensor grad_output, torch::stable::Tensor input, torch::stable::Tensor offset,
    torch::stable::Tensor mask, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups, double offset_scale,
    bool remove_center, bool softmax, bool deterministic);

std::string dcnv3_cpu_capability();

namespace dcnv3 {

inline Shape checked_shape(
    const torch::stable::Tensor& input, const torch::stable::Tensor& offset, const torch::stable::Tensor& mask,
    int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, int64_t groups, double offset_scale, bool remove_center, bool softmax) {
  STD_TORCH_CHECK(
      input.dim() == 4 && offset.dim() == 4 && mask.dim() == 4,
      "dcnv3: input, offset and mask must be (batch, height, width, channels), they have ", input.dim(), ", ",
      offset.dim(), " and ", mask.dim(), " dimensions");
  STD_TORCH_CHECK(
      input.scalar_type() == offset.scalar_type() && input.scalar_type() == mask.scalar_type(),
      "dcnv3: input, offset and mask must have one dtype");
  STD_TORCH_CHECK(
      input.is_cuda() == offset.is_cuda() && input.is_cuda() == mask.is_cuda() &&
          input.get_device_index() == offset.get_device_index() && input.get_device_index() == mask.get_device_index(),
      "dcnv3: input, offset and mask must be on one device");
  STD_TORCH_CHECK(
      kernel_h > 0 && kernel_w > 0 && stride_h > 0 && stride_w > 0 && padding_h >= 0 && padding_w >= 0 &&
          dilation_h > 0 && dilation_w > 0,
      "dcnv3: kernel size, stride and dilation must be positive, padding must not be negative");
  STD_TORCH_CHECK(
      !remove_center || (kernel_h == kernel_w && kernel_h % 2 == 1 && kernel_h > 1),
      "dcnv3: remove_center needs a square kernel of odd size above 1, got ", kernel_h, " x ", kernel_w);
  STD_TORCH_CHECK(std::isfinite(offset_scale), "dcnv3: offset_scale must be finite, got ", offset_scale);
  STD_TORCH_CHECK(
      groups > 0 && input.size(3) > 0 && input.size(3) % groups == 0, "dcnv3: groups must divide the channels, ",
      input.size(3), ", got ", groups);
  STD_TORCH_CHECK(input.size(1) > 0 && input.size(2) > 0, "dcnv3: input has no pixels");
  Shape s;
  s.batch = input.size(0), s.height = input.size(1), s.width = input.size(2), s.channels = input.size(3);
  s.kernel_h = kernel_h, s.kernel_w = kernel_w, s.stride_h = stride_h, s.stride_w = stride_w;
  s.padding_h = padding_h, s.padding_w = padding_w, s.dilation_h = dilation_h, s.dilation_w = dilation_w;
  s.groups = groups, s.group_channels = s.channels / groups;
  s.points = kernel_h * kernel_w - (remove_center ? 1 : 0);
  s.offset_scale = offset_scale, s.remove_center = remove_center, s.softmax = softmax;
  const int64_t room_h = s.height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1;
  const int64_t room_w = s.width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "dcnv3: input of ", s.height, " x ", s.width, " is too small for the kernel");
  s.height_out = room_h / stride_h + 1;
  s.width_out = room_w / stride_w + 1;
  STD_TORCH_CHECK(
      offset.size(0) == s.batch && offset.size(1) == s.height_out && offset.size(2) == s.width_out &&
          offset.size(3) == groups * s.points * 2,
      "dcnv3: offset must be (", s.batch, ", ", s.height_out, ", ", s.width_out, ", ", groups * s.points * 2, "), got (",
      offset.size(0), ", ", offset.size(1), ", ", offset.size(2), ", ", offset.size(3), ")");
  STD_TORCH_CHECK(
      mask.size(0) == s.batch && mask.size(1) == s.height_out && mask.size(2) == s.width_out &&
          mask.size(3) == groups * s.points,
      "dcnv3: mask must be (", s.batch, ", ", s.height_out, ", ", s.width_out, ", ", groups * s.points, "), got (",
      mask.size(0), ", ", mask.size(1), ", ", mask.size(2), ", ", mask.size(3), ")");
  return s;
}

inline Dtype dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "dcnv3: the dtype must be float32, float64, float16 or bfloat16");
      return Dtype::float32;
  }
}

inline void check_grad_output(const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input, const Shape& s) {
  STD_TORCH_CHECK(
      grad_output.dim() == 4 && grad_output.size(0) == s.batch && grad_output.size(1) == s.height_out &&
          grad_output.size(2) == s.width_out && grad_output.size(3) == s.channels &&
          grad_output.scalar_type() == input.scalar_type() &&
          grad_output.get_device_index() == input.get_device_index(),
      "dcnv3: grad_output must have the output's shape, dtype and device");
}

}  // namespace dcnv3
