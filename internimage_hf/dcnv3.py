# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""DCNv3, the deformable convolution of InternImage: argument checks and the choice of what computes it.

The operator is defined in section 3.1, equation 2 of https://arxiv.org/abs/2211.05778; known as `DCNv3Function` and
`dcnv3_core_pytorch` in OpenGVLab/InternImage (classification/ops_dcnv3/functions/dcnv3_func.py).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from .dcnv3_chunked import dcnv3_cpu
from .dcnv3_reference import Geometry, dcnv3_plain
from .kernel_loader import get_dcnv3_kernel


BACKENDS = ("auto", "torch", "kernel")

_backend_in_context: ContextVar[str | None] = ContextVar("dcnv3_backend", default=None)


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
    backend: str | None = None,
) -> torch.Tensor:
    """Samples the input at P points around each output pixel and sums them, weighted by a modulation mask.

    Point (ix, iy) of output column x samples, in a group, input column
    `x*stride - padding + half - half*offset_scale + (ix*dilation + offset_x) * offset_scale` where
    `half = (dilation*(kernel_size-1))//2`, and rows likewise: the offset scale stretches the kernel's grid and the
    offsets alike. Sampling is bilinear, zero outside the image; a point counts if it lies strictly inside
    (-1, height) x (-1, width), so one with a NaN offset does not. One that does not count adds 0 and has the gradient 0
    for its offset and modulation, whatever its modulation is, NaN and infinity included. Where left and right derivative
    by the offset differ, on a pixel, all backends take the right and lower one, as the official operator does.

    Args:
        input: (batch, height, width, channels), any floating-point dtype. Arithmetic is float32 for all but float64.
        offset: (batch, height_out, width_out, groups * P * 2), in input pixels before scaling; x before y in each pair,
            points down the kernel's columns first (`ix * kernel_height + iy`), groups outermost.
        mask: (batch, height_out, width_out, groups * P), used as it is. P is the size of the kernel, less one with
            `remove_center`. Offset and mask may be columns of one contiguous tensor, which kernels read without a copy.
        kernel_size, stride, padding, dilation: an int or a (vertical, horizontal) pair.
        groups: number of groups of channels that share offsets and mask; divides the channels.
        offset_scale: see above.
        remove_center: leave the kernel's centre out; needs a square kernel of odd size.
        backend: "torch", "kernel", or "auto" for a kernel where there is one. By default the choice of
            `use_dcnv3_backend`, then of the environment variable `DCNV3_BACKEND`, then "auto".

    Returns:
        (batch, height_out, width_out, channels) in the input's dtype, differentiable once in all three tensors. Inside
        `torch.func.grad`, `vmap` and their like it is computed by the PyTorch definition, whatever the backend.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a shape, dtype, device or value is wrong; the message names the argument.
        RuntimeError: if `backend` is "kernel" and there is none for the input's device, or the kernel lacks a dtype; if
            there is too little memory, with the number of bytes; in a second differentiation.
    """
    geometry = _check(input, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center)
    return _call(input, offset, mask, geometry, False, backend)


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
    backend: str | None = None,
) -> torch.Tensor:
    """`dcnv3` with the mask normalised inside: a softmax of `mask_logits` over the P points of each group.

    Arguments, result and errors as for `dcnv3`. Gradients are those of the logits: of a group whose softmax is not finite,
    they are NaN.
    """
    geometry = _check(
        input,
        offset,
        mask_logits,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        offset_scale,
        remove_center,
        mask_name="mask_logits",
    )
    return _call(input, offset, mask_logits, geometry, True, backend)


# ----------------------------------------------------------------------------------------------------- choice of backend


@contextmanager
def use_dcnv3_backend(backend: str) -> Iterator[None]:
    """Chooses the backend of all calls within the `with` block: "auto", "torch" or "kernel". Per thread and task.

    Raises:
        ValueError: if there is no such backend.
    """
    token = _backend_in_context.set(_known(backend, "backend"))
    try:
        yield
    finally:
        _backend_in_context.reset(token)


# not a ContextVar, which torch.export(strict=True) cannot look into
_as_operator_in_export = False


@contextmanager
def dcnv3_as_operator() -> Iterator[None]:
    """Within the `with` block, torch.export keeps each call as the one operator `internimage_hf::dcnv3_cpu`.

    Without it the exported program has standard operators alone. For the whole process; not for several threads.
    """
    global _as_operator_in_export
    before, _as_operator_in_export = _as_operator_in_export, True
    try:
        yield
    finally:
        _as_operator_in_export = before


def dcnv3_backend_report() -> dict[str, dict[str, str]]:
    """What would compute DCNv3 on each kind of device here, and why: `{"cpu": {"backend": ..., "reason": ...}}`."""
    choice, source = chosen_backend(None)
    report = {}
    for device_type in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        if choice == "torch":
            report[device_type] = {"backend": "torch", "reason": f"chosen by {source}"}
            continue
        kernel, reason = get_dcnv3_kernel(device_type)
        report[device_type] = {"backend": "torch" if kernel is None else "kernel", "reason": reason}
    return report


def _known(backend: object, name: str) -> str:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def chosen_backend(argument: str | None) -> tuple[str, str]:
    """The backend to use and what chose it."""
    if argument is not None:
        return _known(argument, "backend"), "the argument `backend`"
    if (in_context := _backend_in_context.get()) is not None:
        return in_context, "`use_dcnv3_backend`"
    if environment := os.environ.get("DCNV3_BACKEND"):
        return _known(environment, "DCNV3_BACKEND"), "the environment variable DCNV3_BACKEND"
    return "auto", "default"


_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _kernel(device_type: str, backend: str | None, dtypes: tuple[torch.dtype, ...]) -> ModuleType | None:
    """The compiled kernel to use, None for the PyTorch implementations.

    Raises:
        RuntimeError: if a kernel was asked for and there is none.
    """
    choice, _ = chosen_backend(backend)
    if choice == "torch":
        return None
    kernel, reason = get_dcnv3_kernel(device_type)
    if kernel is None and choice == "kernel":
        raise RuntimeError(f"there is no DCNv3 kernel for the device {device_type!r}: {reason}")
    unknown = [dtype for dtype in dtypes if dtype not in _KERNEL_DTYPES]
    if unknown and choice == "kernel":
        raise RuntimeError(f"the DCNv3 kernel has no {unknown[0]}; the backends 'auto' and 'torch' do")
    return None if unknown else kernel


# torch.compile cannot trace ContextVars or environment variables, so the backend is fixed at trace time: a function whose
# result, a bool, it takes as constant, and a look-up in a global dictionary.
_kernels_in_compiled_code: dict[str, ModuleType] = {}


@torch.compiler.assume_constant_result
def _has_kernel_for_compiled_code(device_type: str, backend: str | None, dtypes: tuple[torch.dtype, ...]) -> bool:
    kernel = _kernel(device_type, backend, dtypes)
    if kernel is not None:
        _kernels_in_compiled_code[device_type] = kernel
    return kernel is not None


def _kernel_for_compiled_code(
    device_type: str, backend: str | None, dtypes: tuple[torch.dtype, ...]
) -> ModuleType | None:
    has_kernel = _has_kernel_for_compiled_code(device_type, backend, dtypes)
    return _kernels_in_compiled_code[device_type] if has_kernel else None


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether torch.export is tracing. In code that torch 2.11 compiles, `torch.compiler.is_exporting()` is always true."""
    return torch.compiler.is_exporting()


def is_compiled() -> bool:
    """Whether torch.compile traces this code; False for torch.export."""
    return torch.compiler.is_compiling() and not is_exporting()


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _call(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    geometry: Geometry,
    softmax: bool,
    backend: str | None,
) -> torch.Tensor:
    """Computes DCNv3 of checked arguments: by the kernel, the chunked implementation (CPU), or the reference one."""
    exporting = torch.compiler.is_compiling() and is_exporting()
    compiling = is_compiled()
    if exporting and _as_operator_in_export:
        return dcnv3_cpu(input, offset, mask, geometry, softmax)
    # What needs standard operators: exporters, tensors without data, tensor subclasses, the transforms of torch.func.
    if (
        exporting
        or torch._C._are_functorch_transforms_active()  # there is no public way to ask
        or (not compiling and (torch.jit.is_tracing() or input.is_meta or type(input) not in _PLAIN_TENSORS))
    ):
        return dcnv3_plain(input, offset, mask, geometry, softmax, by_gathering=compiling)

    find = _kernel_for_compiled_code if compiling else _kernel
    kernel = find(input.device.type, backend, (input.dtype, offset.dtype, mask.dtype))
    if kernel is not None:
        function = kernel.dcnv3_softmax if softmax else kernel.dcnv3
        return function(input, offset, mask, **geometry._asdict())
    if input.device.type == "cpu":
        return dcnv3_cpu(input, offset, mask, geometry, softmax)
    return dcnv3_plain(input, offset, mask, geometry, softmax, by_gathering=compiling)


# ------------------------------------------------------------------------------------------------------------- checks


def _pair(value: int | tuple[int, int], name: str, minimum: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= minimum for v in pair):
        raise ValueError(f"`{name}` must be an int of at least {minimum} or a pair of them, got {value!r}")
    return pair


def _check(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    mask_name: str = "mask",
) -> Geometry:
    """Checks every argument of a call and returns its hyper-parameters."""
    tensors = {"input": input, "offset": offset, mask_name: mask}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(
                f"`{name}` must have the shape (batch, height, width, channels), got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}` must have a floating-point dtype, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"`{name}` must be on the device of `input`, {input.device}, got {tensor.device}")
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"`groups` must be a positive int, got {groups!r}")
    # not `math.isfinite`, which cannot be traced with the symbolic floats of torch.compile(dynamic=True)
    is_number = isinstance(offset_scale, (int, float)) and not isinstance(offset_scale, bool)
    if not is_number or not abs(offset_scale) <= sys.float_info.max:
        raise ValueError(f"`offset_scale` must be a finite number, got {offset_scale!r}")
    if not isinstance(remove_center, (bool, int)) or remove_center not in (0, 1):
        raise ValueError(f"`remove_center` must be a bool, got {remove_center!r}")

    geometry = Geometry(
        kernel_size=_pair(kernel_size, "kernel_size", 1),
        stride=_pair(stride, "stride", 1),
        padding=_pair(padding, "padding", 0),
        dilation=_pair(dilation, "dilation", 1),
        groups=groups,
        offset_scale=float(offset_scale),
        remove_center=bool(remove_center),
    )
    if remove_center and (geometry.kernel_size[0] != geometry.kernel_size[1] or geometry.kernel_size[0] % 2 == 0):
        raise ValueError(f"`remove_center` needs a square `kernel_size` of odd size, got {kernel_size!r}")
    if geometry.points == 0:
        raise ValueError("`remove_center` of a 1x1 `kernel_size` leaves no point")

    batch, height, width, channels = input.shape
    if channels == 0 or channels % groups:
        raise ValueError(f"`groups` must divide the channels of `input`, {channels}, got {groups}")
    if height == 0 or width == 0:
        raise ValueError(f"`input` must have a height and a width of at least 1, got the shape {tuple(input.shape)}")
    height_out, width_out = geometry.output_size(height, width)
    if height_out < 1 or width_out < 1:
        raise ValueError(
            f"`input` of the shape {tuple(input.shape)} is too small for kernel_size={kernel_size}, padding={padding}, "
            f"dilation={dilation}: the output would be {height_out} x {width_out}"
        )
    for name, tensor, last in (
        ("offset", offset, groups * geometry.points * 2),
        (mask_name, mask, groups * geometry.points),
    ):
        expected = (batch, height_out, width_out, last)
        if any(actual != wanted for actual, wanted in zip(tensor.shape, expected, strict=True)):
            raise ValueError(
                f"`{name}` must have the shape {tuple(expected)} "
                f"({groups} groups of {geometry.points} points), got {tuple(tensor.shape)}"
            )
    return geometry


__all__ = ["dcnv3", "dcnv3_as_operator", "dcnv3_backend_report", "dcnv3_softmax", "use_dcnv3_backend"]
