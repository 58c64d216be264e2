// In: nothing. Out: the dtypes and the shape of a call, for all backends.
//
// The operator is DCNv3 of InternImage (arXiv 2211.05778, section 3.1, equation 2). Tensors are channels-last and contiguous:
// input (N, H, W, G*D), offset (N, H_out, W_out, G, P, 2) with x before y, mask (N, H_out, W_out, G, P),
// output (N, H_out, W_out, G*D). Points run down the kernel's columns first. Between the pixels of offset, and of mask, there
// may be other elements: both may be columns of one matrix.

#pragma once

#include <cstddef>
#include <cstdint>

namespace dcnv3 {

enum class Dtype { float32, float64, float16, bfloat16 };

struct Shape {
  int64_t batch, height, width, channels, height_out, width_out;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t groups, group_channels, points;
  int64_t offset_pitch, mask_pitch;  // elements from one output pixel to the next one; the gradients have no gaps
  double offset_scale;
  bool remove_center;
  bool softmax;  // the mask holds logits; a softmax normalises them over the points of each group
};

}  // namespace dcnv3
