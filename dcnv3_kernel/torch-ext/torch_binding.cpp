// In: the entry points of one backend. Out: the operators, registered with PyTorch for the device type of that backend.

#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "torch_binding.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "dcnv3_forward(Tensor input, Tensor offset, Tensor mask, int kernel_h, int kernel_w, int stride_h, int stride_w, "
      "int padding_h, int padding_w, int dilation_h, int dilation_w, int groups, float offset_scale, bool remove_center, "
      "bool softmax) -> Tensor");
  ops.def(
      "dcnv3_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor mask, int kernel_h, int kernel_w, "
      "int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, int dilation_w, int groups, "
      "float offset_scale, bool remove_center, bool softmax, bool deterministic) -> (Tensor, Tensor, Tensor)");
#if defined(CPU_KERNEL)
  ops.def("dcnv3_cpu_capability() -> str");
#endif
}

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("dcnv3_forward", TORCH_BOX(&dcnv3_forward));
  ops.impl("dcnv3_backward", TORCH_BOX(&dcnv3_backward));
}
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("dcnv3_cpu_capability", TORCH_BOX(&dcnv3_cpu_capability));
}
#elif defined(EMULATION_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("dcnv3_forward", TORCH_BOX(&dcnv3_forward));
  ops.impl("dcnv3_backward", TORCH_BOX(&dcnv3_backward));
}
#elif defined(CUDA_KERNEL) || defined(ROCM_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("dcnv3_forward", TORCH_BOX(&dcnv3_forward));
  ops.impl("dcnv3_backward", TORCH_BOX(&dcnv3_backward));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
