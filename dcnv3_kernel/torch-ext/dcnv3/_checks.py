"""In: the operators' arguments. Out: the output's size, or an error. torch_binding.h makes the same checks with the same messages."""

import math

import torch


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LARGEST = 2**31 - 1


def _sizes(sizes) -> str:
    return f"({', '.join(map(str, sizes))})"


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:  # not `torch._check`: torch.compile cannot trace its message
        wanted = "float32, float64, float16 or bfloat16"
        raise RuntimeError(f"dcnv3: {name} must have the dtype {wanted}, got {tensor.dtype}")


def _check_like_input(name: str, tensor: torch.Tensor, input: torch.Tensor) -> None:
    torch._check(
        tensor.dim() == 4,
        lambda: f"dcnv3: {name} must have 4 dimensions (batch, height, width, channels), got {tensor.dim()}",
    )
    torch._check(
        tensor.dtype == input.dtype,
        lambda: f"dcnv3: {name} must have the dtype of input, {input.dtype}, got {tensor.dtype}",
    )
    torch._check(
        tensor.device == input.device,
        lambda: f"dcnv3: {name} must be on the device of input, {input.device}, got {tensor.device}",
    )


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple) -> None:
    for got, wanted in zip(tensor.shape, expected, strict=True):
        torch._check(got == wanted, lambda: f"dcnv3: {name} must be {_sizes(expected)}, got {_sizes(tensor.shape)}")


def output_size(
    input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups,
    offset_scale, remove_center,
):  # fmt: skip
    """The output's height and width; symbolic if those of the input are.

    Raises:
        RuntimeError: if an argument does not fit; the message names it, its value and what was expected.
    """
    for name, tensor in (("input", input), ("offset", offset), ("mask", mask)):
        _check_like_input(name, tensor, input)
    check_dtype("input", input)
    for name, h, w, least in (
        ("kernel_size", kernel_h, kernel_w, 1),
        ("stride", stride_h, stride_w, 1),
        ("padding", padding_h, padding_w, 0),
        ("dilation", dilation_h, dilation_w, 1),
    ):
        torch._check(
            least <= min(h, w) and max(h, w) <= _LARGEST,
            lambda n=name, h=h, w=w, at=least: (
                f"dcnv3: {n} must be at least {at} and at most {_LARGEST}, got ({h}, {w})"
            ),
        )
    torch._check(
        kernel_h * kernel_w <= _LARGEST,
        lambda: f"dcnv3: kernel_size must have at most {_LARGEST} points, got ({kernel_h}, {kernel_w})",
    )
    torch._check(
        not remove_center or (kernel_h == kernel_w and kernel_h % 2 == 1 and kernel_h > 1),
        lambda: f"dcnv3: remove_center needs a square kernel_size of odd size above 1, got ({kernel_h}, {kernel_w})",
    )
    torch._check(math.isfinite(offset_scale), lambda: f"dcnv3: offset_scale must be finite, got {offset_scale}")
    batch, height, width, channels = input.shape
    for name, length in (("height", height), ("width", width), ("number of channels", channels)):
        torch._check(length >= 1, lambda n=name, got=length: f"dcnv3: input must have a {n} of at least 1, got {got}")
    torch._check(groups >= 1, lambda: f"dcnv3: groups must be at least 1, got {groups}")
    torch._check(
        channels % groups == 0, lambda: f"dcnv3: groups must divide the channels of input, {channels}, got {groups}"
    )
    room_h = height + 2 * padding_h - dilation_h * (kernel_h - 1) - 1
    room_w = width + 2 * padding_w - dilation_w * (kernel_w - 1) - 1
    for room in (room_h, room_w):
        torch._check(
            room >= 0,
            lambda: (
                f"dcnv3: input of ({height}, {width}) pixels is too small for kernel_size ({kernel_h}, {kernel_w}), "
                f"padding ({padding_h}, {padding_w}), dilation ({dilation_h}, {dilation_w})"
            ),
        )
    size = (room_h // stride_h + 1, room_w // stride_w + 1)
    points = groups * (kernel_h * kernel_w - int(remove_center))
    _check_shape("offset", offset, (batch, *size, 2 * points))
    _check_shape("mask", mask, (batch, *size, points))
    return size


def check_grad_output(grad_output: torch.Tensor, input: torch.Tensor, size: tuple) -> None:
    """Checks grad_output, which must have the shape of the output. size: the result of `output_size`.

    Raises:
        RuntimeError: if its shape, dtype or device is not that of the output.
    """
    _check_like_input("grad_output", grad_output, input)
    _check_shape("grad_output", grad_output, (input.shape[0], *size, input.shape[3]))
