"""DCNv3, the deformable convolution of InternImage (arXiv 2211.05778, section 3.1, equation 2).

In: tensors and hyper-parameters. Out: the operator's result, differentiable once, by the operators of this build (`_ops`).
"""

import torch
from torch.autograd import forward_ad

from ._checks import check_dtype, check_grad_output, output_size
from ._ops import add_op_namespace_prefix, ops


# ------------------------------------------------------------------------------------------------ registration


def _fake_forward(input, offset, mask, *options):
    *hyper_parameters, _softmax = options
    output_size(input, offset, mask, *hyper_parameters)
    return input.new_empty(*offset.shape[:3], input.shape[3])


def _fake_backward(grad_output, input, offset, mask, *options):
    *hyper_parameters, _softmax, _deterministic = options
    check_grad_output(grad_output, input, output_size(input, offset, mask, *hyper_parameters))
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


# Registers once, even if this file is imported twice: by `kernels`, and by other code under another module name.
if not getattr(ops, "python_side_is_registered", False):
    torch.library.register_fake(add_op_namespace_prefix("dcnv3_forward"), _fake_forward)
    torch.library.register_fake(add_op_namespace_prefix("dcnv3_backward"), _fake_backward)
    torch.library.register_autograd(
        add_op_namespace_prefix("dcnv3_forward"), _backward, setup_context=_save_for_backward
    )
    torch.library.register_autograd(add_op_namespace_prefix("dcnv3_backward"), _double_backward)
    ops.python_side_is_registered = True


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
        offset: (batch, height_out, width_out, groups * P * 2), x before y, in input pixels before scaling. Points run down the
            kernel's columns first.
        mask: (batch, height_out, width_out, groups * P). If dtypes differ, all tensors are converted to the widest of the three.
        kernel_size, stride, padding, dilation: an int or a (vertical, horizontal) pair.
        groups: the number of groups of channels; the channels of a group share offsets and mask.
        offset_scale: scales the kernel's grid and the offsets.
        remove_center: omits the kernel's centre.

    Returns:
        (batch, height_out, width_out, channels) in the input's dtype, differentiable once.

    Raises:
        TypeError: if an argument is of the wrong type.
        RuntimeError: if a shape, dtype, device or value does not fit; the message names it. Also for forward-mode
            differentiation (`torch.func.jvp`), which is not supported.
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
    """`dcnv3` of the softmax of `mask_logits` over the P points of each group. The operator computes the softmax.

    Args, shapes and errors are those of `dcnv3`; mask_logits: (batch, height_out, width_out, groups * P).
    """
    pairs = (kernel_size, stride, padding, dilation)
    return _call(input, offset, mask_logits, pairs, groups, offset_scale, remove_center, True)


def _call(input, offset, mask, pairs, groups, offset_scale, remove_center, softmax):
    compiling = torch.compiler.is_compiling()  # torch.compile cannot trace the test for tangents
    for name, tensor in (("input", input), ("offset", offset), ("mask_logits" if softmax else "mask", mask)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"dcnv3: {name} must be a tensor, got {type(tensor).__name__}")
        check_dtype(name, tensor)
        if not compiling and forward_ad.unpack_dual(tensor).tangent is not None:  # PyTorch would ignore the tangent
            raise RuntimeError(f"dcnv3 has no forward-mode derivative, and {name} has a tangent")
    dtype = input.dtype
    if offset.dtype != dtype or mask.dtype != dtype:
        widest = torch.promote_types(dtype, torch.promote_types(offset.dtype, mask.dtype))
        input, offset, mask = input.to(widest), offset.to(widest), mask.to(widest)
    sizes = []
    for name, value in zip(("kernel_size", "stride", "padding", "dilation"), pairs, strict=True):
        pair = (value, value) if isinstance(value, int) else value
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(size, int) for size in pair):
            raise TypeError(f"dcnv3: {name} must be an int or a (vertical, horizontal) pair of them, got {value!r}")
        sizes += pair
    output = ops.dcnv3_forward(input, offset, mask, *sizes, groups, offset_scale, remove_center, softmax)
    return output if output.dtype == dtype else output.to(dtype)


from . import layers  # noqa: E402 (it needs the functions)


__all__ = ["dcnv3", "dcnv3_softmax", "layers"]
