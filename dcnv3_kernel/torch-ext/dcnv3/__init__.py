"""DCNv3, the deformable convolution of InternImage (arXiv 2211.05778, section 3.1, equation 2)."""

import torch

from ._ops import add_op_namespace_prefix, ops


# ------------------------------------------------------------------------------------------------ registration


@torch.library.register_fake(add_op_namespace_prefix("dcnv3_forward"))
def _(input, offset, mask, *options):
    return input.new_empty(*offset.shape[:3], input.shape[3])


@torch.library.register_fake(add_op_namespace_prefix("dcnv3_backward"))
def _(grad_output, input, offset, mask, *options):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (input, offset, mask))


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward(ctx, grad_output):
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = ops.dcnv3_backward(grad_output, *ctx.saved_tensors, *ctx.options, deterministic)
    return *grads, *(None for _ in ctx.options)


def _double_backward(ctx, *grads):
    raise RuntimeError("dcnv3 cannot be differentiated twice")


torch.library.register_autograd(add_op_namespace_prefix("dcnv3_forward"), _backward, setup_context=_save_for_backward)
torch.library.register_autograd(add_op_namespace_prefix("dcnv3_backward"), _double_backward)


# --------------------------------------------------------------------------------------------------- functions


def dcnv3(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    *,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> torch.Tensor:
    """Samples the input at P points around each output pixel and sums them, weighted by a modulation mask.

    Args:
        input: (batch, height, width, channels); float32, float64, float16 or bfloat16. Sums are float32, or float64 for float64.
        offset: (batch, height_out, width_out, groups * P * 2), x before y, in input pixels before scaling; points down the
            kernel's columns first.
        mask: (batch, height_out, width_out, groups * P). If dtypes differ, all are converted to the widest of the three.
        kernel_size, stride, padding, dilation: an int or a (vertical, horizontal) pair.
        groups: of channels that share offsets and mask.
        offset_scale: stretches the kernel's grid and the offsets.
        remove_center: leave the kernel's centre out.

    Returns:
        (batch, height_out, width_out, channels) in the input's dtype, differentiable once.

    Raises:
        RuntimeError: if shapes or values do not fit; the message names them.
    """
    pairs = (kernel_size, stride, padding, dilation)
    return _call(input, offset, mask, pairs, groups, offset_scale, remove_center, False)


def dcnv3_softmax(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask_logits: torch.Tensor,
    *,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> torch.Tensor:
    """`dcnv3` with a softmax of `mask_logits` over the P points of each group, computed inside."""
    pairs = (kernel_size, stride, padding, dilation)
    return _call(input, offset, mask_logits, pairs, groups, offset_scale, remove_center, True)


def _call(input, offset, mask, pairs, groups, offset_scale, remove_center, softmax):
    dtype = input.dtype
    if offset.dtype != dtype or mask.dtype != dtype:
        widest = torch.promote_types(dtype, torch.promote_types(offset.dtype, mask.dtype))
        input, offset, mask = input.to(widest), offset.to(widest), mask.to(widest)
    numbers = [n for pair in pairs for n in (pair if isinstance(pair, (tuple, list)) else (pair, pair))]
    arguments = (input, offset, mask, *numbers, groups, offset_scale, remove_center, softmax)
    output = ops.dcnv3_forward(*arguments)
    return output if output.dtype == dtype else output.to(dtype)


from . import layers  # noqa: E402 (it needs the functions)


__all__ = ["dcnv3", "dcnv3_softmax", "layers"]
