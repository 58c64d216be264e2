// In: the operators' arguments. Out: a checked `Shape`; the declarations of the C++ entry points, which every backend
// implements; allocations whose errors say what the memory was for.

#pragma once

#include <cmath>
#include <cstdint>
#include <exception>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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

// The messages are the same as in torch-ext/dcnv3/_checks.py.
inline void check_like_input(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& input) {
  STD_TORCH_CHECK(
      tensor.dim() == 4, "dcnv3: ", name, " must have 4 dimensions (batch, height, width, channels), got ", tensor.dim());
  STD_TORCH_CHECK(
      tensor.scalar_type() == input.scalar_type(), "dcnv3: ", name, " must have the dtype of input, ",
      torch::headeronly::toString(input.scalar_type()), ", got ", torch::headeronly::toString(tensor.scalar_type()));
  const auto device = [](const torch::stable::Tensor& t) {
    return std::string(t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda" : "another type") + ":" +
        std::to_string(t.get_device_index());
  };
  STD_TORCH_CHECK(
      tensor.is_cuda() == input.is_cuda() && tensor.is_cpu() == input.is_cpu() &&
          tensor.get_device_index() == input.get_device_index(),
      "dcnv3: ", name, " must be on the device of input, ", device(input), ", got ", device(tensor));
}

constexpr int64_t largest = INT32_MAX;  // limit of sizes and hyper-parameters: the product of two does not overflow

inline void check_pair(const char* name, int64_t h, int64_t w, int64_t least) {
  STD_TORCH_CHECK(
      least <= h && least <= w && h <= largest && w <= largest, "dcnv3: ", name, " must be at least ", least,
      " and at most ", largest, ", got (", h, ", ", w, ")");
}

inline void check_size(const char* name, int64_t size) {
  STD_TORCH_CHECK(size >= 1, "dcnv3: input must have a ", name, " of at least 1, got ", size);
  STD_TORCH_CHECK(size <= largest, "dcnv3: input must have a ", name, " of at most ", largest, ", got ", size);
}

inline void check_per_point(const char* name, const torch::stable::Tensor& tensor, const Shape& s, int64_t last) {
  STD_TORCH_CHECK(
      tensor.size(0) == s.batch && tensor.size(1) == s.height_out && tensor.size(2) == s.width_out &&
          tensor.size(3) == last,
      "dcnv3: ", name, " must be (", s.batch, ", ", s.height_out, ", ", s.width_out, ", ", last, "), got (",
      tensor.size(0), ", ", tensor.size(1), ", ", tensor.size(2), ", ", tensor.size(3), ")");
}

inline Shape checked_shape(
    const torch::stable::Tensor& input, const torch::stable::Tensor& offset, const torch::stable::Tensor& mask,
    int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t padding_h, int64_t padding_w,
    int64_t dilation_h, int64_t dilation_w, int64_t groups, double offset_scale, bool remove_center, bool softmax) {
  check_like_input("input", input, input);
  check_like_input("offset", offset, input);
  check_like_input("mask", mask, input);
  check_pair("kernel_size", kernel_h, kernel_w, 1);
  check_pair("stride", stride_h, stride_w, 1);
  check_pair("padding", padding_h, padding_w, 0);
  check_pair("dilation", dilation_h, dilation_w, 1);
  STD_TORCH_CHECK(
      kernel_h * kernel_w <= largest, "dcnv3: kernel_size must have at most ", largest, " points, got (", kernel_h, ", ",
      kernel_w, ")");
  STD_TORCH_CHECK(
      !remove_center || (kernel_h == kernel_w && kernel_h % 2 == 1 && kernel_h > 1),
      "dcnv3: remove_center needs a square kernel_size of odd size above 1, got (", kernel_h, ", ", kernel_w, ")");
  STD_TORCH_CHECK(std::isfinite(offset_scale), "dcnv3: offset_scale must be finite, got ", offset_scale);
  check_size("height", input.size(1));
  check_size("width", input.size(2));
  check_size("number of channels", input.size(3));
  STD_TORCH_CHECK(groups >= 1, "dcnv3: groups must be at least 1, got ", groups);
  STD_TORCH_CHECK(
      input.size(3) % groups == 0, "dcnv3: groups must divide the channels of input, ", input.size(3), ", got ", groups);
  Shape s;
  s.batch = input.size(0), s.height = input.size(1), s.width = input.size(2), s.channels = input.size(3);
  s.kernel_h = kernel_h, s.kernel_w = kernel_w, s.stride_h = stride_h, s.stride_w = stride_w;
  s.padding_h = padding_h, s.padding_w = padding_w, s.dilation_h = dilation_h, s.dilation_w = dilation_w;
  s.groups = groups, s.group_channels = s.channels / groups;
  s.points = kernel_h * kernel_w - (remove_center ? 1 : 0);
  s.offset_scale = offset_scale, s.remove_center = remove_center, s.softmax = softmax;
  const int64_t room_h = s.height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1;
  const int64_t room_w = s.width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1;
  STD_TORCH_CHECK(
      room_h >= 0 && room_w >= 0, "dcnv3: input of (", s.height, ", ", s.width, ") pixels is too small for kernel_size (",
      kernel_h, ", ", kernel_w, "), padding (", padding_h, ", ", padding_w, "), dilation (", dilation_h, ", ", dilation_w,
      ")");
  s.height_out = room_h / stride_h + 1;
  s.width_out = room_w / stride_w + 1;
  check_per_point("offset", offset, s, groups * s.points * 2);
  check_per_point("mask", mask, s, groups * s.points);
  s.offset_pitch = groups * s.points * 2, s.mask_pitch = groups * s.points;
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
      STD_TORCH_CHECK(false, "dcnv3: input must have the dtype float32, float64, float16 or bfloat16, got ",
          torch::headeronly::toString(tensor.scalar_type()));
      return Dtype::float32;
  }
}

inline void check_grad_output(const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input, const Shape& s) {
  check_like_input("grad_output", grad_output, input);
  check_per_point("grad_output", grad_output, s, s.channels);
}

[[noreturn]] inline void out_of_memory(const char* what, int64_t elements, int64_t element_size) {
  int64_t bytes = 0;
  if (__builtin_mul_overflow(elements, element_size, &bytes)) bytes = INT64_MAX;
  STD_TORCH_CHECK(false, "dcnv3: out of memory. Tried to allocate ", bytes, " bytes for ", what);
  std::terminate();  // not reached
}

// Returns `allocate()`. Replaces PyTorch's error, which loses its text at the stable ABI.
template <class Allocate>
torch::stable::Tensor allocated(const char* what, int64_t elements, int64_t element_size, Allocate allocate) {
  try {
    return allocate();
  } catch (const std::exception&) {
    out_of_memory(what, elements, element_size);
  }
}

inline torch::stable::Tensor new_empty(
    const char* what, const torch::stable::Tensor& like, const std::vector<int64_t>& sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(elements, size, &elements)) elements = INT64_MAX;
  }
  const auto element_size = static_cast<int64_t>(like.element_size());
  return allocated(what, elements, element_size, [&] { return torch::stable::new_empty(like, sizes); });
}

inline torch::stable::Tensor new_empty_like(const char* what, const torch::stable::Tensor& like) {
  const auto element_size = static_cast<int64_t>(like.element_size());
  return allocated(what, like.numel(), element_size, [&] { return torch::stable::new_empty(like, like.sizes()); });
}

// Tests for contiguity first: PyTorch's operator is looked up by name at every call, which takes noticeable time for small
// images.
inline void make_contiguous(const char* what, torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  const auto element_size = static_cast<int64_t>(tensor.element_size());
  tensor = allocated(what, tensor.numel(), element_size, [&] { return torch::stable::contiguous(tensor); });
}

// Sets `pitch` if the pixels of a (N, H, W, K) tensor lie at equal distances, as those of columns of a matrix with a row for each
// pixel do. Otherwise makes the tensor contiguous.
inline void make_equidistant(const char* what, torch::stable::Tensor& tensor, int64_t& pitch) {
  const int64_t distance = tensor.stride(2);
  if (!tensor.is_contiguous() && tensor.stride(3) == 1 && distance >= tensor.size(3) && distance <= largest &&
      tensor.stride(1) == tensor.size(2) * distance && tensor.stride(0) == tensor.size(1) * tensor.stride(1)) {
    pitch = distance;
  } else {
    make_contiguous(what, tensor);
  }
}

}  // namespace dcnv3
