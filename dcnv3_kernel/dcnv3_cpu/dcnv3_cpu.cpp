// In: the operators' tensors on a CPU. Out: the operators' results. Chooses the instruction set, allocates memory, distributes
// the work over threads.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../torch-ext/torch_binding.h"
#include "dcnv3_cpu.h"

#ifdef DCNV3_X86_VARIANTS
#include <cpuid.h>
#endif

namespace {

using torch::stable::Tensor;

#ifdef DCNV3_X86_VARIANTS
bool has_f16c() {  // clang's __builtin_cpu_supports does not know F16C
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The kernels for the best instruction set of this machine. DCNV3_CPU_CAPABILITY=baseline|avx2 selects a lower one.
const dcnv3::Kernels& kernels() {
  static const dcnv3::Kernels& chosen = [&]() -> const dcnv3::Kernels& {
#ifdef DCNV3_X86_VARIANTS
    const char* wanted = std::getenv("DCNV3_CPU_CAPABILITY");
    if (wanted == nullptr) wanted = "";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
        has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool baseline = std::strcmp(wanted, "baseline") == 0;
    if (avx512 && !baseline && std::strcmp(wanted, "avx2") != 0) return dcnv3::avx512_kernels;
    if (avx2 && !baseline) return dcnv3::avx2_kernels;
#endif
    return dcnv3::baseline_kernels;
  }();
  return chosen;
}

// Allocates memory; if that fails, raises an error that says what it was for.
template <class T>
std::unique_ptr<T[]> memory_for(const char* what, int64_t count) {
  std::unique_ptr<T[]> memory(new (std::nothrow) T[count]);
  if (!memory) dcnv3::out_of_memory(what, count, sizeof(T));
  return memory;
}

// 64-byte aligned memory for one thread.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(memory_for<char>("the work of a thread", bytes + 64)) {
    auto address = reinterpret_cast<uintptr_t>(memory_.get());
    aligned_ = memory_.get() + (64 - address % 64) % 64;
  }
  void* get() const { return aligned_; }

 private:
  std::unique_ptr<char[]> memory_;
  char* aligned_;
};

void check_image(const dcnv3::Shape& s) {
  STD_TORCH_CHECK(
      s.height * s.width <= INT32_MAX, "dcnv3: an image may have at most 2147483647 pixels on the CPU, this one has ",
      s.height * s.width);
  constexpr int64_t longest = 1 << 24;  // float32 does not represent all larger integers
  STD_TORCH_CHECK(
      s.height <= longest && s.width <= longest, "dcnv3: an image may have at most 16777216 rows and columns on the CPU, this "
      "one has ", s.height, " x ", s.width);
}

// Memory of the calling thread that is kept for its next call: the page faults of new memory take longer than the work.
constexpr size_t most_bytes_kept = 4 << 20;
constexpr const char* sums_of_slices = "sums of the gradient of input";
char* kept_memory(size_t bytes) {
  thread_local std::unique_ptr<char[]> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    size = 0;  // in case the allocation fails
    memory.reset();
    memory = memory_for<char>(sums_of_slices, bytes);
    size = bytes;
  }
  return memory.get();
}

constexpr int64_t many_groups = 16, most_groups_at_once = 16, rows_in_use = 16, most_bytes_in_use = 512 * 1024;

}  // namespace

Tensor dcnv3_forward(
    Tensor input, Tensor offset, Tensor mask, int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
    int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups, double offset_scale,
    bool remove_center, bool softmax) {
  dcnv3::Shape shape = dcnv3::checked_shape(
      input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups,
      offset_scale, remove_center, softmax);
  check_image(shape);
  dcnv3::make_contiguous("a contiguous copy of input", input);
  dcnv3::make_equidistant("a contiguous copy of offset", offset, shape.offset_pitch);
  dcnv3::make_equidistant("a contiguous copy of mask", mask, shape.mask_pitch);
  Tensor output =
      dcnv3::new_empty("the output", input, {shape.batch, shape.height_out, shape.width_out, shape.channels});
  if (output.numel() == 0) return output;
  const dcnv3::ForwardArguments arguments{
      shape,         dcnv3::dtype_of(input), input.const_data_ptr(), offset.const_data_ptr(), mask.const_data_ptr(),
      output.mutable_data_ptr()};
  const dcnv3::Kernels& set = kernels();
  const size_t bytes = set.forward_scratch(arguments);
  const int64_t grain = 1 + 8192 / (shape.groups * shape.points);
  torch::stable::parallel_for(
      0, shape.batch * shape.height_out * shape.width_out, grain, [&](int64_t begin, int64_t end) {
        Scratch scratch(bytes);
        set.forward(arguments, begin, end, scratch.get());
      });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> dcnv3_backward(
    Tensor grad_output, Tensor input, Tensor offset, Tensor mask, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
    int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups,
    double offset_scale, bool remove_center, bool softmax, bool /* deterministic: always the case on a CPU */) {
  dcnv3::Shape shape = dcnv3::checked_shape(
      input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups,
      offset_scale, remove_center, softmax);
  dcnv3::check_grad_output(grad_output, input, shape);
  check_image(shape);
  dcnv3::make_contiguous("a contiguous copy of grad_output", grad_output);
  dcnv3::make_contiguous("a contiguous copy of input", input);
  dcnv3::make_equidistant("a contiguous copy of offset", offset, shape.offset_pitch);
  dcnv3::make_equidistant("a contiguous copy of mask", mask, shape.mask_pitch);
  Tensor grad_input = dcnv3::new_empty_like("the gradient of input", input);
  Tensor grad_offset = dcnv3::new_empty_like("the gradient of offset", offset);
  Tensor grad_mask = dcnv3::new_empty_like("the gradient of mask", mask);
  if (offset.numel() == 0) return {torch::stable::zero_(grad_input), grad_offset, grad_mask};

  dcnv3::BackwardArguments arguments{
      shape,
      dcnv3::dtype_of(input),
      grad_output.const_data_ptr(),
      input.const_data_ptr(),
      offset.const_data_ptr(),
      mask.const_data_ptr(),
      grad_input.mutable_data_ptr(),
      grad_offset.mutable_data_ptr(),
      grad_mask.mutable_data_ptr(),
      1,
      1,
      false,
      nullptr,
      nullptr};
  // At least 8 tasks, to occupy as many threads. Every slice but the first costs a buffer and a pass over it. Two threads that
  // share an image should have separate slices, because adjacent groups of a pixel share cache lines. With many groups the
  // shared lines of a pixel cost less than the pass over another buffer.
  const int64_t parts = shape.batch * shape.groups, threads = torch::stable::get_num_threads();
  arguments.slices = (dcnv3::max_slices + parts - 1) / parts;
  if (shape.batch == 1 && shape.groups < many_groups) arguments.slices = std::max(arguments.slices, int64_t(2));
  arguments.slices = std::min({arguments.slices, shape.height_out, dcnv3::max_slices});
  // More groups at once read the tensors in longer runs, as long as the rows of sums in use stay in the second-level cache. A
  // task has all groups if the slices can be distributed evenly over the threads. Otherwise it has as many as leave each
  // thread 4 tasks; a thread then shares cache lines with another thread at most in its first and its last task. The choice
  // does not affect results.
  const int64_t slices = shape.batch * arguments.slices, compute_size = dcnv3::compute_size(arguments.dtype);
  const int64_t bytes_in_use = std::min(shape.height, rows_in_use) * shape.width * shape.group_channels * compute_size;
  const int64_t most_at_once = std::min(most_groups_at_once, most_bytes_in_use / bytes_in_use);
  int64_t at_once = shape.groups;
  const bool evenly = (slices + threads - 1) / threads * shape.groups <= (slices * shape.groups + threads - 1) / threads;
  if (at_once > most_at_once || !evenly) {
    while (at_once > 1 && (at_once > most_at_once || parts * arguments.slices < at_once * 4 * threads)) at_once /= 2;
  }
  arguments.groups_at_once = at_once;
  const bool full_precision = arguments.dtype == dcnv3::Dtype::float32 || arguments.dtype == dcnv3::Dtype::float64;
  arguments.in_place = full_precision && at_once == shape.groups;
  const int64_t tasks = slices * ((shape.groups + at_once - 1) / at_once);
  std::unique_ptr<char[]> partial;
  std::unique_ptr<int64_t[]> ranges;
  if (arguments.slices > 1) {
    const size_t bytes_of_partial = (arguments.slices - (arguments.in_place ? 1 : 0)) * input.numel() * compute_size;
    if (bytes_of_partial <= most_bytes_kept) {
      arguments.partial = kept_memory(bytes_of_partial);
    } else {
      partial = memory_for<char>(sums_of_slices, bytes_of_partial);
      arguments.partial = partial.get();
    }
    ranges = memory_for<int64_t>("the rows of tasks", 2 * tasks);
    arguments.ranges = ranges.get();
  }
  const dcnv3::Kernels& set = kernels();
  const size_t bytes = set.backward_scratch(arguments);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(bytes);
    set.backward(arguments, begin, end, scratch.get());
  });
  if (arguments.slices > 1) {
    torch::stable::parallel_for(
        0, shape.batch * shape.height, 1 + 4096 / (shape.width * shape.channels),
        [&](int64_t begin, int64_t end) { set.backward_reduce(arguments, begin, end); });
  }
  return {grad_input, grad_offset, grad_mask};
}

// The instruction set in use, "baseline", "avx2" or "avx512"; for reports and tests.
std::string dcnv3_cpu_capability() { return kernels().name; }
