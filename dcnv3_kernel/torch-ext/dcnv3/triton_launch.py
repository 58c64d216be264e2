"""DCNv3's operators in Triton: the host side. In: the operators' tensors. Out: their results. Importing it registers the operators.

The operators are those of the compiled variants, for GPUs on machines without a C++ compiler. This module plans a call, chooses
the launch shape by measurement and launches the kernels of triton_kernels.py.
"""

import contextlib
import ctypes
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

from ._checks import check_grad_output, output_size
from ._ops import add_op_namespace_prefix, ops
from .triton_kernels import backward_kernel, fixed_to_floating_kernel, forward_kernel


_MOST_CHANNELS = 64  # channels of a group that are processed at once
_WIDE_FROM = 2**31  # an image with this number of elements needs 64-bit indices
_CANNOT = "the GPU kernel cannot serve this call: "
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: runs on a CPU, for tests
# A step of the interpreter takes long, regardless of the number of units. Larger tiles and more units mean fewer steps.
_LARGEST_TILE_LOG2 = 4 if INTERPRETED else 3
_INTERPRETED_UNITS = 1024


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"dcnv3: {message}")


# The compute type, which is also the dtype of the sums, for each dtype of the tensors.
_COMPUTE = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}


class _Plan(NamedTuple):
    """The arguments of the kernels for a call, without the tensors."""

    numbers: tuple[int, ...]  # triton_kernels.NUMBERS without the last four, which describe the tiles
    constants: tuple[tuple[str, object], ...]
    dtype: torch.dtype
    batch: int
    height_out: int
    width_out: int
    groups: int


@functools.lru_cache(maxsize=1024)
def _plan(
    batch, height, width, channels, height_out, width_out, dtype, kernel_h, kernel_w, stride_h, stride_w, padding_h,
    padding_w, dilation_h, dilation_w, groups, offset_scale, remove_center, softmax, offset_pitch, mask_pitch,
) -> _Plan:  # fmt: skip
    """offset_pitch, mask_pitch: elements from one output pixel to the next one."""
    points = kernel_h * kernel_w - remove_center
    sizes = (
        height + 2 * padding_h, width + 2 * padding_w, channels, points, dilation_h, dilation_w, stride_h, stride_w
    )  # fmt: skip
    _require(
        max(sizes) <= 2**29, _CANNOT + "a height, a width, the number of channels or a hyper-parameter is above 2^29"
    )
    _require(groups * points < 2**30, _CANNOT + "an output pixel has 2^30 points or more")
    wide = (
        max(height * width * channels, height_out * width_out * max(channels, offset_pitch, mask_pitch)) >= _WIDE_FROM
    )
    group_channels = channels // groups
    block = min(1 << (group_channels - 1).bit_length(), _MOST_CHANNELS)
    multiple = block if block == group_channels else min(group_channels & -group_channels, 16)
    small = kernel_h == kernel_w == 3
    is_double = dtype == torch.float64

    def bits(value: float) -> int:
        float_type, int_type = (ctypes.c_double, ctypes.c_int64) if is_double else (ctypes.c_float, ctypes.c_int32)
        return int_type.from_buffer(float_type(value)).value

    numbers = (
        group_channels // multiple, groups, height, width, height_out, width_out, kernel_h, points,
        points // 2 if remove_center else points, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
        dilation_h * (kernel_h - 1) // 2, dilation_w * (kernel_w - 1) // 2, bits(offset_scale), offset_pitch, mask_pitch,
    )  # fmt: skip
    constants = {
        "C": tl.float64 if is_double else tl.float32,
        "SOFTMAX": softmax,
        "WIDE": wide,
        "POINTS": points if small else 0,
        "MULTIPLE": multiple,
        "CHANNELS": block,
    }
    return _Plan(numbers, tuple(constants.items()), dtype, batch, height_out, width_out, groups)


@functools.lru_cache(maxsize=1024)
def _tiles(
    batch: int, height_out: int, width_out: int, groups: int, units: int, multiprocessors: int
) -> tuple[int, ...]:
    """The number of tiles, of tiles in a row and in a column of an image, and the logarithms of a tile's width and height.

    Takes the largest tiles with which a program needs few steps and every multiprocessor still gets several tiles.
    """
    width_log2 = min(_LARGEST_TILE_LOG2, (width_out - 1).bit_length())
    height_log2 = min(2 * _LARGEST_TILE_LOG2 - width_log2, (height_out - 1).bit_length())
    while True:
        tiles_x, tiles_y = -(-width_out >> width_log2), -(-height_out >> height_log2)
        tiles = batch * tiles_x * tiles_y
        fits = groups << (width_log2 + height_log2) <= 4 * units and tiles >= 4 * multiprocessors
        if fits or width_log2 + height_log2 == 0:
            _require(tiles < 2**31, _CANNOT + "the output has too many pixels")
            return tiles, tiles_x, tiles_y, width_log2, height_log2
        if height_log2 >= width_log2:
            height_log2 -= 1
        else:
            width_log2 -= 1


class _Device(NamedTuple):
    name: str
    multiprocessors: int
    warp_size: int


@functools.lru_cache
def _properties(device: torch.device) -> _Device:
    if device.type == "cpu":
        return _Device("interpreter", 0, 32)
    properties = torch.get_device_module(device).get_device_properties(device)
    multiprocessors = getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
    return _Device(properties.name, multiprocessors, getattr(properties, "warp_size", 32))


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def _lanes(kernel, plan: _Plan) -> int:
    """The number of threads that share a unit. A thread has 16 bytes of the input, in the backward pass of the sums."""
    constants = dict(plan.constants)
    dtype = _COMPUTE[plan.dtype] if kernel is backward_kernel else plan.dtype
    return max(1, constants["CHANNELS"] // min(constants["MULTIPLE"], 16 // dtype.itemsize))


def _launch(kernel, plan: _Plan, device: torch.device, config: tuple[int, int], tensors: tuple, **constants) -> None:
    """Launches a kernel. config: units per thread, and warps per program."""
    per_thread, warps = config
    properties = _properties(device)
    units = max(1, per_thread * warps * properties.warp_size // _lanes(kernel, plan))
    if INTERPRETED:
        units = _INTERPRETED_UNITS
    tiles, *shape = _tiles(plan.batch, plan.height_out, plan.width_out, plan.groups, units, properties.multiprocessors)
    kernel[(tiles,)](
        *tensors, *plan.numbers, *shape, **dict(plan.constants), **constants, UNITS=units,
        num_warps=warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip


# ---- tuning

# (units per thread, warps per program). The first one is used if nothing is measured.
_CONFIGS = ((1, 2), (1, 4), (2, 4), (1, 8))
_tuned: dict[tuple, tuple[int, int]] = {}


def _config(kernel, plan: _Plan, input: torch.Tensor) -> tuple[int, int]:
    """The fastest of _CONFIGS for the dtype, the group width and the number of points on this model of device.

    Measures once, on its own tensors: the choice then does not depend on the first call, the sums of the backward pass need no
    reset, and another batch or image size needs no measurement. Does not measure during the capture of a graph or for unusual
    calls.
    """
    constants = dict(plan.constants)
    usual = constants["POINTS"] and constants["CHANNELS"] == constants["MULTIPLE"] >= 8 and not constants["WIDE"]
    if INTERPRETED or not usual:
        return _CONFIGS[0]
    key = (
        kernel.fn.__name__,
        _properties(input.device).name,
        input.dtype,
        *(v for k, v in plan.constants if k != "C"),
    )
    if key not in _tuned:
        capturing = getattr(torch.get_device_module(input.device), "is_current_stream_capturing", None)
        if capturing is not None and capturing():
            return _CONFIGS[0]
        _tuned[key] = _measured_config(kernel, constants, input.dtype, input.device)
    return _tuned[key]


def _measured_config(kernel, constants: dict, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    points, group_channels = constants["POINTS"], constants["CHANNELS"]
    batch, size, groups = 8, 56, max(1, 64 // group_channels)
    channels = groups * group_channels
    plan = _plan(
        batch, size, size, channels, size, size, dtype, 3, 3, 1, 1, 1, 1, 1, 1, groups, 1.0, points == 8,
        constants["SOFTMAX"], groups * points * 2, groups * points,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)  # does not change the user's random state

    def random(last: int) -> torch.Tensor:
        return torch.randn(batch, size, size, last, generator=generator, device=device).to(dtype)

    try:
        input, offset, mask = random(channels), random(groups * points * 2), random(groups * points)
        if kernel is forward_kernel:
            tensors, more = (input, offset, mask, torch.empty_like(input)), {}
        else:
            sums = torch.zeros_like(input, dtype=_COMPUTE[dtype])
            tensors = (input, input, offset, mask, sums, sums, sums, torch.empty_like(offset), torch.empty_like(mask))
            more = {"WHOLE": True, "FIXED": False}
    except RuntimeError:  # not enough memory for these tensors
        return _CONFIGS[0]
    times = {}
    for config in _CONFIGS:
        # With at least as many units as threads, Triton computes a location only in the thread that read the offset, and then
        # exchanges locations between threads.
        if config[0] > 1 and config[0] >= _lanes(kernel, plan):
            continue
        # The device cannot run a config (too few registers or too little shared memory), or lacks memory to measure it.
        with contextlib.suppress(RuntimeError, triton.TritonError):
            run = functools.partial(_launch, kernel, plan, device, config, tensors, **more)
            times[config] = do_bench(run, warmup=5, rep=20, return_mode="median")
    return min(times, key=times.get, default=_CONFIGS[0])


# ---- operators


def _equidistant(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A tensor whose pixels lie at equal distances, as those of columns of a matrix with a row for each pixel, and the distance.

    It is the given (N, H, W, K) tensor, or a contiguous copy.
    """
    _, height, width, last = tensor.shape
    pitch = tensor.stride(2)
    if last <= pitch < _WIDE_FROM and tensor.stride() == (height * width * pitch, width * pitch, pitch, 1):
        return tensor, pitch
    return tensor.contiguous(), last


def _equidistant_pairs(offset: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`_equidistant`, with aligned pairs: a kernel reads a pair in one access."""
    tensor, pitch = _equidistant(offset)
    if pitch % 2 or tensor.data_ptr() % min(8, 2 * tensor.element_size()):
        return offset.clone(memory_format=torch.contiguous_format), offset.shape[3]
    return tensor, pitch


def _forward(
    input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups,
    offset_scale, remove_center, softmax,
):  # fmt: skip
    options = (
        kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups, offset_scale,
        remove_center,
    )  # fmt: skip
    size = output_size(input, offset, mask, *options)
    output = input.new_empty((input.shape[0], *size, input.shape[3]))
    if output.numel() == 0:
        return output
    with _on_device_of(input):
        (offset, offset_pitch), (mask, mask_pitch) = _equidistant_pairs(offset), _equidistant(mask)
        plan = _plan(*input.shape, *size, input.dtype, *options, softmax, offset_pitch, mask_pitch)
        config = _config(forward_kernel, plan, input)
        tensors = (input.contiguous(), offset, mask, output)
        _launch(forward_kernel, plan, input.device, config, tensors)
    return output


def _backward(
    grad_output, input, offset, mask, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h,
    dilation_w, groups, offset_scale, remove_center, softmax, deterministic,
):  # fmt: skip
    options = (
        kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups, offset_scale,
        remove_center,
    )  # fmt: skip
    size = output_size(input, offset, mask, *options)
    check_grad_output(grad_output, input, size)
    contiguous = {"memory_format": torch.contiguous_format}
    grad_offset = torch.empty_like(offset, **contiguous)
    grad_mask = torch.empty_like(mask, **contiguous)
    if offset.numel() == 0:
        return torch.zeros_like(input, **contiguous), grad_offset, grad_mask

    compute = _COMPUTE[input.dtype]
    with _on_device_of(input):
        (offset, offset_pitch), (mask, mask_pitch) = _equidistant_pairs(offset), _equidistant(mask)
        plan = _plan(*input.shape, *size, input.dtype, *options, softmax, offset_pitch, mask_pitch)
        constants = dict(plan.constants)
        grad_output = grad_output.contiguous()
        if deterministic:
            terms = size[0] * size[1] * (kernel_h * kernel_w - remove_center)
            exponent = _fixed_exponent(grad_output, None if softmax else mask, terms, compute)
            sums = torch.zeros_like(input, dtype=torch.int64, **contiguous)
            not_finite = torch.zeros_like(input, dtype=torch.int8, **contiguous)
            config = _CONFIGS[0]  # a fixed config, because others may sum the channels of a group in another order
        else:
            sums = torch.zeros_like(input, dtype=compute, **contiguous)
            exponent = not_finite = sums  # placeholders that the kernel does not use
            config = _config(backward_kernel, plan, input)
        # The kernel computes the gradient of the softmax itself if the number of points is a compile-time constant.
        finish_softmax = softmax and not constants["POINTS"]
        grad_modulation = torch.empty_like(grad_mask, dtype=compute) if finish_softmax else grad_mask
        tensors = (
            grad_output, input.contiguous(), offset, mask, sums, not_finite, exponent, grad_offset,
            grad_modulation,
        )  # fmt: skip
        whole = input.shape[3] // groups <= constants["CHANNELS"]
        _launch(backward_kernel, plan, input.device, config, tensors, WHOLE=whole, FIXED=deterministic)
        if finish_softmax:
            modulation = mask.to(compute).unflatten(-1, (groups, -1)).softmax(-1)
            weighted = modulation * grad_modulation.view_as(modulation)
            weighted -= modulation * weighted.sum(-1, keepdim=True)
            grad_mask.copy_(weighted.flatten(-2))
        if deterministic:
            grad_input = torch.empty_like(input, **contiguous)
            block = 1 << 16 if INTERPRETED else 1024
            fixed_to_floating_kernel[(triton.cdiv(sums.numel(), block),)](
                sums, not_finite, exponent, grad_input, sums.numel(), C=constants["C"], SIZE=block
            )
        else:
            grad_input = sums.to(input.dtype)
    return grad_input, grad_offset, grad_mask


def _fixed_exponent(
    grad_output: torch.Tensor, mask: torch.Tensor | None, terms: int, compute: torch.dtype
) -> torch.Tensor:
    """e such that a sum of `terms` products of a gradient and a modulation is below 2^62 multiples of 2^-e.

    The result is a tensor on the device of grad_output. mask: None for a softmax, whose modulations are at most 1.
    """

    def exponent(tensor):  # 2^exponent exceeds all finite absolute values
        largest = tensor.nan_to_num(0, 0, 0).abs().amax()
        if compute == torch.float64:
            return (largest.view(torch.int64) >> 52) - 1022
        return ((largest.float().view(torch.int32) >> 23) - 126).long()

    most_product, most_scale = (1025, 1022) if compute == torch.float64 else (129, 126)
    product = exponent(grad_output) + (1 if mask is None else exponent(mask))
    return (62 - terms.bit_length() - product.clamp(max=most_product)).clamp(max=most_scale)


def _register() -> None:
    options = (
        "int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w, int dilation_h, "
        "int dilation_w, int groups, float offset_scale, bool remove_center, bool softmax"
    )
    tensors = "Tensor input, Tensor offset, Tensor mask"
    devices = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")
    for name, schema, function in (
        ("dcnv3_forward", f"({tensors}, {options}) -> Tensor", _forward),
        (
            "dcnv3_backward",
            f"(Tensor grad_output, {tensors}, {options}, bool deterministic) -> (Tensor, Tensor, Tensor)",
            _backward,
        ),
    ):
        torch.library.define(add_op_namespace_prefix(name), schema)
        torch.library.impl(add_op_namespace_prefix(name), devices)(function)


# The operators exist already if this file was imported before under another module name.
if not hasattr(ops, "dcnv3_forward"):
    _register()
