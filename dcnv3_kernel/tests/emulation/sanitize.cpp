// In: numbers of cases, all if there are none. Out: exit status 0 if a sanitizer finds nothing in them.
//
//   sanitize [CASE ...]
//
// Runs every GPU kernel once, in threads (threads.h), on memory that ends where the tensors end. ThreadSanitizer finds races
// between lanes, warps and blocks; AddressSanitizer finds accesses outside the tensors and outside shared memory. Both end the
// program with an error. The program also fails if a deterministic result differs from run to run.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "../../dcnv3_cuda/dcnv3_cuda.h"

namespace {

using dcnv3::Dtype;
using dcnv3::Shape;

struct Case {
  const char* what;
  Dtype dtype;
  int64_t batch, height, width, groups, group_channels, kernel, stride, padding, dilation;
  bool remove_center, softmax;
  float spread;  // standard deviation of the offsets, in pixels
  int multiprocessors;
};

const Case cases[] = {
    {"windows, width 16", Dtype::bfloat16, 1, 2, 9, 4, 16, 3, 1, 1, 1, false, true, 1.0f, 1},
    {"windows, width 32", Dtype::float32, 1, 2, 9, 2, 32, 3, 1, 1, 1, true, true, 1.0f, 1},
    {"windows that many points leave", Dtype::float16, 2, 3, 3, 2, 16, 3, 1, 1, 1, true, false, 6.0f, 1},
    {"windows and an odd number of groups", Dtype::float32, 1, 2, 4, 3, 16, 3, 1, 2, 1, false, true, 2.0f, 2},
    {"more groups than a block takes at once", Dtype::float32, 1, 1, 2, 33, 32, 3, 1, 1, 1, false, true, 1.0f, 1},
    {"general, 16 bytes a lane", Dtype::float16, 1, 5, 4, 2, 24, 3, 2, 1, 1, false, true, 2.0f, 1},
    {"general, one channel a lane", Dtype::float32, 1, 4, 3, 2, 5, 3, 1, 1, 2, false, true, 2.0f, 1},
    {"general, more channels than lanes", Dtype::bfloat16, 1, 3, 3, 1, 70, 3, 1, 1, 1, true, true, 2.0f, 1},
    {"general, more groups than a block takes at once", Dtype::float32, 1, 2, 1, 33, 5, 3, 1, 1, 1, true, true, 1.0f, 1},
    {"double", Dtype::float64, 1, 4, 4, 1, 6, 5, 1, 2, 1, false, false, 3.0f, 1},
};

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

struct Tensor {
  int64_t bytes;
  std::unique_ptr<unsigned char[]> data;
  explicit Tensor(int64_t bytes) : bytes(bytes), data(new unsigned char[bytes]()) {}
  bool operator==(const Tensor& other) const { return std::memcmp(data.get(), other.data.get(), bytes) == 0; }
};

// Normally distributed numbers. bfloat16 takes the upper half of a float.
Tensor random_tensor(Dtype dtype, int64_t count, float spread, std::mt19937& random) {
  Tensor tensor(count * size_of(dtype));
  std::normal_distribution<float> normal(0.0f, spread);
  for (int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    const double wide = value;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t upper = static_cast<uint16_t>(bits >> 16);
    const _Float16 half = static_cast<_Float16>(value);
    const void* from = dtype == Dtype::float64 ? static_cast<const void*>(&wide)
        : dtype == Dtype::float32              ? static_cast<const void*>(&value)
        : dtype == Dtype::bfloat16             ? static_cast<const void*>(&upper)
                                               : static_cast<const void*>(&half);
    std::memcpy(tensor.data.get() + i * size_of(dtype), from, size_of(dtype));
  }
  return tensor;
}

void check(const char* error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

void run(const Case& c) {
  std::printf("%s\n", c.what);
  std::fflush(stdout);
  std::mt19937 random(0);
  Shape s{};
  s.batch = c.batch, s.height = c.height, s.width = c.width, s.channels = c.groups * c.group_channels;
  s.kernel_h = s.kernel_w = c.kernel, s.stride_h = s.stride_w = c.stride, s.padding_h = s.padding_w = c.padding;
  s.dilation_h = s.dilation_w = c.dilation;
  s.height_out = (c.height + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
  s.width_out = (c.width + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1;
  s.groups = c.groups, s.group_channels = c.group_channels, s.points = c.kernel * c.kernel - c.remove_center;
  s.offset_scale = 1.0, s.remove_center = c.remove_center, s.softmax = c.softmax;
  const int64_t inputs = s.batch * s.height * s.width * s.channels, pixels = s.batch * s.height_out * s.width_out;
  const int64_t of_pixel = s.groups * s.points, outputs = pixels * s.channels, masks = pixels * of_pixel;
  const int64_t size = size_of(c.dtype);
  // Deterministic sums without a softmax need a contiguous mask. The last pixel has no gap after it.
  const int64_t gap = c.softmax ? 2 : 0;
  s.offset_pitch = 2 * of_pixel + gap, s.mask_pitch = of_pixel + gap;
  const Tensor input = random_tensor(c.dtype, inputs, 1.0f, random), grad_output = random_tensor(c.dtype, outputs, 1.0f, random);
  const Tensor offset = random_tensor(c.dtype, pixels * s.offset_pitch - gap, c.spread, random);
  const Tensor mask = random_tensor(c.dtype, pixels * s.mask_pitch - gap, 1.0f, random);
  const dcnv3::Device device{nullptr, c.multiprocessors};

  Tensor output(outputs * size), grad_offset(2 * masks * size), grad_mask(masks * size);
  check(dcnv3::launch_forward(
      s, c.dtype, input.data.get(), offset.data.get(), mask.data.get(), output.data.get(), device));
  const auto backward = [&](dcnv3::Sums sums, void* grad_input) {
    check(dcnv3::launch_backward(
        s, c.dtype, grad_output.data.get(), input.data.get(), offset.data.get(), mask.data.get(), sums, grad_input,
        grad_offset.data.get(), grad_mask.data.get(), device));
  };
  Tensor sums(inputs * (c.dtype == Dtype::float64 ? 8 : 4));
  backward({sums.data.get(), nullptr, nullptr, nullptr}, nullptr);

  Tensor results[2] = {Tensor(inputs * size), Tensor(inputs * size)};
  for (Tensor& result : results) {
    Tensor fixed_point(inputs * 8), not_finite((inputs + 31) / 32 * 4), largest(16);
    backward({nullptr, fixed_point.data.get(), not_finite.data.get(), largest.data.get()}, result.data.get());
  }
  if (!(results[0] == results[1])) check("a deterministic gradient differs from run to run");
}

}  // namespace

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) run(cases[std::atoi(arguments[i])]);
  if (count == 1) {
    for (const Case& c : cases) run(c);
  }
  std::printf("done\n");
}
