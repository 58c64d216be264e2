# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""DCNv4 for users of the published operator: an input and a packed tensor of offsets and weights in, sampled features out.

Paper: https://arxiv.org/abs/2401.06197. Known as `DCNv4Function` in OpenGVLab/DCNv4 (DCNv4_op/DCNv4/functions/dcnv4_func.py).
Apart from the packing, DCNv4 is DCNv3 without the softmax of the modulation mask, so `dcnv3` computes it.
"""

import torch

from .dcnv3 import dcnv3


def padded_channels(groups: int, points: int) -> int:
    """Channels of `offset_mask` as published: three for each point of each group, up to the next multiple of 8."""
    return -(-3 * groups * points // 8) * 8


def dcnv4(
    input: torch.Tensor,
    offset_mask: torch.Tensor,
    *,
    kernel_size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Samples the input at P points around each output pixel and sums the samples, weighted by an unbounded mask.

    Args:
        input: (batch, height, width, channels), any floating-point dtype. Arithmetic is float32 for all but float64.
        offset_mask: (batch, height_out, width_out, M). Group g has the channels from 3*P*g on: first P sampling offsets
            (x, y) in input pixels before scaling, points down the kernel's columns first, then P weights, which are used as
            they are. M is 3*P*groups, or that rounded up to a multiple of 8 as published; the padding is not read and has
            the gradient zero. P is the size of the kernel, less one with `remove_center`.
        kernel_size, stride, padding, dilation: an int or a (vertical, horizontal) pair.
        groups: number of groups of channels that share offsets and weights. It divides the channels.
        offset_scale: factor of the kernel's grid and of the offsets.
        remove_center: leaves the kernel's centre out. The kernel must be square and of odd size.
        backend: as for `internimage_hf.dcnv3.dcnv3`.

    Returns:
        (batch, height_out, width_out, channels) in the input's dtype, differentiable once in both tensors.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a shape, dtype, device or value is wrong. The message names the argument.
        RuntimeError: as for `internimage_hf.dcnv3.dcnv3`.
    """
    if not isinstance(offset_mask, torch.Tensor):
        raise TypeError(f"`offset_mask` must be a tensor, got {type(offset_mask).__name__}")
    if offset_mask.ndim != 4:
        raise ValueError(
            f"`offset_mask` must have the shape (batch, height, width, channels), got {tuple(offset_mask.shape)}"
        )
    if not offset_mask.is_floating_point():
        raise ValueError(f"`offset_mask` must have a floating-point dtype, got {offset_mask.dtype}")
    sizes = tuple(kernel_size) if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    for name, values, given in (("kernel_size", sizes, kernel_size), ("groups", (groups,), groups)):
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
            raise ValueError(f"`{name}` must be a positive int{' or a pair' * (name != 'groups')}, got {given!r}")
    if len(sizes) != 2:
        raise ValueError(f"`kernel_size` must be a positive int or a pair, got {kernel_size!r}")
    points = sizes[0] * sizes[1] - (1 if remove_center else 0)
    used, padded = 3 * groups * points, padded_channels(groups, points)
    if offset_mask.shape[-1] not in (used, padded):
        expected = f"{used}" if used == padded else f"{used}, or {padded} with padding,"
        raise ValueError(
            f"`offset_mask` must have {expected} channels ({groups} groups of {points} points), "
            f"got {offset_mask.shape[-1]} in the shape {tuple(offset_mask.shape)}"
        )
    parts = offset_mask[..., :used].unflatten(-1, (groups, 3 * points))
    try:
        return dcnv3(
            input,
            parts[..., : 2 * points].flatten(-2),
            parts[..., 2 * points :].flatten(-2),
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            offset_scale=offset_scale,
            remove_center=remove_center,
            backend=backend,
        )
    except ValueError as error:
        # `dcnv3` names its own argument; the caller of this function has the packed tensor alone.
        if str(error).startswith("`offset` "):
            raise ValueError(f"the offsets in `offset_mask` are wrong: {error}") from None
        raise


__all__ = ["dcnv4", "padded_channels"]
