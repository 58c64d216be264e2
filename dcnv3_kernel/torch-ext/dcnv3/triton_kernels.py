"""DCNv3 on GPUs without a compiler: the operators of the compiled variants, in Triton. Importing it registers them.

A unit of work is one group of one output pixel. A program takes a tile of pixels, two-dimensional, whose points overlap in
the first-level cache, and walks through its units, the group fastest, UNITS at a time. Location, modulation and weights are
vectors over the units; what is read and summed is (UNITS, channels), 16 bytes of channels to a thread where they allow it.

A corner outside the image is not read and has no weight, also where a modulation or gradient is infinite (0 * inf is not 0);
a point counts if it lies strictly inside (-1, height) x (-1, width).
"""

# What Triton compiles is not quite Python: the names in capitals are constants, a choice by them falls at compile time, and
# tuples cannot be unpacked into others.
# ruff: noqa: RUF005, SIM108, SIM300

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


# The kernels' arguments that are numbers: Triton would compile anew for some values of them (1, multiples of 16).
_NUMBERS = (
    "width_of_group", "groups", "height", "width", "height_out", "width_out", "kernel_h", "points", "centre",
    "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "half_h", "half_w", "offset_scale",
    "tiles_x", "tiles_y", "tile_width_log2", "tile_height_log2",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def _number(bits, C: tl.constexpr):
    """A floating-point argument: Triton would round a float64 to float32."""
    if C == tl.float64:
        return bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(exponent, C: tl.constexpr):
    if C == tl.float64:
        return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((exponent + 127) << 23).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _load_pair(pointer, index, active, C: tl.constexpr):
    """The two neighbours at 2 * index, in one access of at most eight bytes."""
    T: tl.constexpr = pointer.dtype.element_ty
    if T == tl.float64:
        first = tl.load(pointer + 2 * index, mask=active, other=0.0)
        second = tl.load(pointer + 2 * index + 1, mask=active, other=0.0)
    elif T == tl.float32:
        both = tl.load(pointer.to(tl.pointer_type(tl.int64)) + index, mask=active, other=0)
        first = both.to(tl.int32).to(T, bitcast=True)
        second = (both >> 32).to(tl.int32).to(T, bitcast=True)
    else:
        both = tl.load(pointer.to(tl.pointer_type(tl.int32)) + index, mask=active, other=0)
        first = both.to(tl.int16).to(T, bitcast=True)
        second = (both >> 16).to(tl.int16).to(T, bitcast=True)
    return first.to(C), second.to(C)


@triton.jit
def _place_on_axis(position, start, size):
    """The pixel before a position, how far beyond it lies, and whether that pixel and the next one count."""
    countable = (position > -1073741824.0) & (position < 1073741824.0)  # false for what is not a number
    position = tl.where(countable, position, 0.0)
    whole = tl.floor(position)
    fraction = position - whole
    cell = start + whole.to(tl.int32)
    low = countable & (cell >= 0) & (cell < size)
    high = countable & (cell + 1 < size) & ((cell >= 0) | ((cell == -1) & (fraction > 0.0)))
    return cell, fraction, low, high


@triton.jit
def _tile(
    height, width, height_out, width_out, groups, group_channels,
    tiles_x, tiles_y, tile_width_log2, tile_height_log2,
):  # fmt: skip
    """The program's tile: its first pixel, the end of its units, and where its image begins in the tensors."""
    number = tl.program_id(0)
    row = number // tiles_x
    image = row // tiles_y
    x = (number - row * tiles_x) << tile_width_log2
    y = (row - image * tiles_y) << tile_height_log2
    units = groups << (tile_width_log2 + tile_height_log2)
    image = image.to(tl.int64)
    input_start = image * height * width * groups * group_channels
    unit_start = image * height_out * width_out * groups
    return x, y, units, input_start, unit_start


@triton.jit
def _units(
    first, tile_x, tile_y, tile_width_log2, tile_height_log2, groups, height_out, width_out,
    UNITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """UNITS of a tile: which of them exist, their numbers in the image, output pixels and groups."""
    unit = first + tl.arange(0, UNITS)
    pixel = unit // groups
    group = unit - pixel * groups
    row = pixel >> tile_width_log2
    x = tile_x + pixel - (row << tile_width_log2)
    y = tile_y + row
    active = (row < (1 << tile_height_log2)) & (x < width_out) & (y < height_out)
    if WIDE:
        number = (y.to(tl.int64) * width_out + x) * groups + group
    else:
        number = (y * width_out + x) * groups + group
    return active, number, x, y, group


@triton.jit
def _locate(
    offset, number, active, x, y, point, points, kernel_h, centre, dilation_h, dilation_w, height, width,
    half_h, half_w, scale, POINTS: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Where a point lies: the pixel at its upper left, the fractions, and which rows and columns of corners count.

    x and y: the input pixel at the kernel's centre. POINTS: 9 or 8 for a kernel of 3 x 3, else 0.
    """
    if POINTS == 9:
        column = point // 3
        row = point % 3
    elif POINTS == 8:
        column = (point + point // 4) // 3
        row = (point + point // 4) % 3
    else:
        cell = tl.where(point >= centre, point + 1, point)
        column = cell // kernel_h
        row = cell - column * kernel_h
    offset_x, offset_y = _load_pair(offset, number * points + point, active, C)
    position_x = ((dilation_w * column - half_w).to(C) + offset_x) * scale
    position_y = ((dilation_h * row - half_h).to(C) + offset_y) * scale
    cell_x, fraction_x, left, right = _place_on_axis(position_x, x, width)
    cell_y, fraction_y, upper, lower = _place_on_axis(position_y, y, height)
    if WIDE:
        pixel = cell_y.to(tl.int64) * width + cell_x
    else:
        pixel = cell_y * width + cell_x
    return pixel, fraction_x, fraction_y, left, right, upper & active, lower & active


@triton.jit
def _softmax(mask, number, active, points, C: tl.constexpr):
    """Of the logits of units: the largest, and the reciprocal of the sum of the exponentials relative to it."""
    largest = tl.full(number.shape, float("-inf"), C)
    for point in range(points):
        logit = tl.load(mask + number * points + point, mask=active, other=0.0).to(C)
        largest = tl.maximum(largest, logit)
    total = tl.full(number.shape, 0.0, C)
    for point in range(points):
        logit = tl.load(mask + number * points + point, mask=active, other=0.0).to(C)
        total += tl.exp(logit - largest)
    return largest, 1.0 / total


@triton.jit
def _modulations(mask, number, active, POINTS: tl.constexpr, SOFTMAX: tl.constexpr, C: tl.constexpr):
    """The modulations of units, a tuple of one vector for each point."""
    values = ()
    for point in tl.static_range(POINTS):
        values = values + (tl.load(mask + number * POINTS + point, mask=active, other=0.0).to(C),)
    if SOFTMAX:
        largest = values[0]
        for point in tl.static_range(1, POINTS):
            largest = tl.maximum(largest, values[point])
        exponentials = ()
        total = tl.full(number.shape, 0.0, C)
        for point in tl.static_range(POINTS):
            exponential = tl.exp(values[point] - largest)
            exponentials = exponentials + (exponential,)
            total += exponential
        scale = 1.0 / total
        values = ()
        for point in tl.static_range(POINTS):
            values = values + (exponentials[point] * scale,)
    return values


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def _add_corner(total, image, index, counts, weight, channel, has_channel, C: tl.constexpr):
    values = tl.load(image + index[:, None] + channel[None, :], mask=counts[:, None] & has_channel[None, :], other=0.0)
    return total + tl.where(counts, weight, 0.0)[:, None] * values.to(C)


@triton.jit
def _add_point(total, image, at, modulation, group_start, row, line, channel, has_channel, C: tl.constexpr):
    """total + modulation * the point's bilinear sample, (UNITS, channels). row and line: from a pixel to the next, and to
    the one below."""
    pixel, fraction_x, fraction_y, left, right, upper, lower = at
    index = pixel * row + group_start
    top = modulation * (1.0 - fraction_y)
    bottom = modulation * fraction_y
    total = _add_corner(total, image, index, upper & left, top * (1.0 - fraction_x), channel, has_channel, C)
    total = _add_corner(total, image, index + row, upper & right, top * fraction_x, channel, has_channel, C)
    index += line
    total = _add_corner(total, image, index, lower & left, bottom * (1.0 - fraction_x), channel, has_channel, C)
    return _add_corner(total, image, index + row, lower & right, bottom * fraction_x, channel, has_channel, C)


@triton.jit(do_not_specialize=_NUMBERS)
def _forward_kernel(
    input, offset, mask, output,
    width_of_group, groups, height, width, height_out, width_out, kernel_h, points, centre, stride_h, stride_w,
    padding_h, padding_w, dilation_h, dilation_w, half_h, half_w, offset_scale,
    tiles_x, tiles_y, tile_width_log2, tile_height_log2,
    C: tl.constexpr, SOFTMAX: tl.constexpr, WIDE: tl.constexpr, POINTS: tl.constexpr, MULTIPLE: tl.constexpr,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    if MULTIPLE == CHANNELS:
        group_channels = CHANNELS
    else:
        group_channels = width_of_group * MULTIPLE
    scale = _number(offset_scale, C)
    tile_x, tile_y, units, input_start, unit_start = _tile(
        height, width, height_out, width_out, groups, group_channels,
        tiles_x, tiles_y, tile_width_log2, tile_height_log2,
    )  # fmt: skip
    image = input + input_start
    offset += unit_start * points * 2
    mask += unit_start * points
    output += unit_start * group_channels
    row = groups * group_channels
    if WIDE:
        row = row.to(tl.int64)
    line = row * width
    for first in range(0, units, UNITS):
        active, number, x, y, group = _units(
            first, tile_x, tile_y, tile_width_log2, tile_height_log2, groups, height_out, width_out, UNITS, WIDE
        )
        group_start = group * group_channels
        x = x * stride_w - padding_w + half_w
        y = y * stride_h - padding_h + half_h
        if POINTS:
            modulations = _modulations(mask, number, active, POINTS, SOFTMAX, C)
        elif SOFTMAX:
            largest, reciprocal = _softmax(mask, number, active, points, C)
        for first_channel in range(0, group_channels, CHANNELS):
            channel = first_channel + tl.arange(0, CHANNELS)
            has_channel = channel < group_channels
            total = tl.zeros((UNITS, CHANNELS), C)
            if POINTS:
                for point in tl.static_range(POINTS):
                    at = _locate(
                        offset, number, active, x, y, point, POINTS, kernel_h, centre, dilation_h, dilation_w, height, width,
                        half_h, half_w, scale, POINTS, WIDE, C,
                    )  # fmt: skip
                    total = _add_point(
                        total, image, at, modulations[point], group_start, row, line, channel, has_channel, C
                    )
            else:
                for point in range(points):
                    at = _locate(
                        offset, number, active, x, y, point, points, kernel_h, centre, dilation_h, dilation_w, height, width,
                        half_h, half_w, scale, POINTS, WIDE, C,
                    )  # fmt: skip
                    modulation = tl.load(mask + number * points + point, mask=active, other=0.0).to(C)
                    if SOFTMAX:
                        modulation = tl.exp(modulation - largest) * reciprocal
                    total = _add_point(total, image, at, modulation, group_start, row, line, channel, has_channel, C)
            index = number * group_channels
            tl.store(
                output + index[:, None] + channel[None, :],
                total.to(output.dtype.element_ty),
                mask=active[:, None] & has_channel[None, :],
            )


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _add_to_input(grad_input, not_finite, index, there, weight, grads, channel, scale, FIXED: tl.constexpr):
    """Adds a corner's part of the gradient: floating-point numbers, or the nearest multiples of 1 / scale, whose sum is
    the same in every order."""
    where = index[:, None] + channel[None, :]
    part = weight[:, None] * grads
    if FIXED:
        finite = part - part == 0.0
        whole = tl.floor(tl.where(finite, part, 0.0) * scale + 0.5).to(tl.int64)
        tl.atomic_add(grad_input + where, whole, mask=there & finite, sem="relaxed")
        tl.store(not_finite + where, tl.full(part.shape, 1, tl.int8), mask=there & (finite == 0))
    else:
        tl.atomic_add(grad_input + where, part, mask=there, sem="relaxed")


@triton.jit
def _backward_of_corner(
    grad_input, not_finite, image, index, counts, weight, grads, channel, has_channel, fixed_scale,
    FIXED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Adds to the input's gradient; returns the sum over the channels of gradient times pixel."""
    there = counts[:, None] & has_channel[None, :]
    values = tl.load(image + index[:, None] + channel[None, :], mask=there, other=0.0)
    _add_to_input(grad_input, not_finite, index, there, weight, grads, channel, fixed_scale, FIXED)
    return tl.where(counts, tl.sum(grads * values.to(C), axis=1), 0.0)


@triton.jit
def _backward_of_corners(
    grad_input, not_finite, image, at, modulation, grads, group_start, row, line, channel, has_channel, fixed_scale,
    FIXED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pixel, fraction_x, fraction_y, left, right, upper, lower = at
    index = pixel * row + group_start
    top = modulation * (1.0 - fraction_y)
    bottom = modulation * fraction_y
    a = _backward_of_corner(
        grad_input, not_finite, image, index, upper & left, top * (1.0 - fraction_x), grads, channel, has_channel,
        fixed_scale, FIXED, C,
    )  # fmt: skip
    b = _backward_of_corner(
        grad_input, not_finite, image, index + row, upper & right, top * fraction_x, grads, channel, has_channel,
        fixed_scale, FIXED, C,
    )  # fmt: skip
    index += line
    c = _backward_of_corner(
        grad_input, not_finite, image, index, lower & left, bottom * (1.0 - fraction_x), grads, channel, has_channel,
        fixed_scale, FIXED, C,
    )  # fmt: skip
    d = _backward_of_corner(
        grad_input, not_finite, image, index + row, lower & right, bottom * fraction_x, grads, channel, has_channel,
        fixed_scale, FIXED, C,
    )  # fmt: skip
    return a, b, c, d


@triton.jit
def _backward_of_point(
    grad_input, not_finite, image, grad_output, grads, at, modulation, active, unit, group_start, row, line,
    group_channels, scale, fixed_scale,
    FIXED: tl.constexpr, WHOLE: tl.constexpr, CHANNELS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Adds to the input's gradient, returns those of both offsets and of the modulation.

    grads: the gradient of the output, (UNITS, CHANNELS), if these are all channels of a group (WHOLE).
    """
    channels = tl.arange(0, CHANNELS)
    if WHOLE:
        a, b, c, d = _backward_of_corners(
            grad_input, not_finite, image, at, modulation, grads, group_start, row, line, channels,
            channels < group_channels, fixed_scale, FIXED, C,
        )  # fmt: skip
    else:
        a = tl.zeros_like(modulation)
        b = tl.zeros_like(modulation)
        c = tl.zeros_like(modulation)
        d = tl.zeros_like(modulation)
        for first_channel in range(0, group_channels, CHANNELS):
            channel = first_channel + channels
            has_channel = channel < group_channels
            grads = _grads(grad_output, unit, active, channel, has_channel, group_channels, C)
            more_a, more_b, more_c, more_d = _backward_of_corners(
                grad_input, not_finite, image, at, modulation, grads, group_start, row, line, channel, has_channel,
                fixed_scale, FIXED, C,
            )  # fmt: skip
            a += more_a
            b += more_b
            c += more_c
            d += more_d
    fraction_x, fraction_y = at[1], at[2]
    upper = (1.0 - fraction_x) * a + fraction_x * b
    lower = (1.0 - fraction_x) * c + fraction_x * d
    grad_x = modulation * scale * ((1.0 - fraction_y) * (b - a) + fraction_y * (d - c))
    grad_y = modulation * scale * (lower - upper)
    inside = (at[3] | at[4]) & (at[5] | at[6])
    grad_modulation = (1.0 - fraction_y) * upper + fraction_y * lower
    # a point outside has no gradient, whatever its modulation
    return tl.where(inside, grad_x, 0.0), tl.where(inside, grad_y, 0.0), grad_modulation


@triton.jit
def _stacked(values, POINTS: tl.constexpr, T: tl.constexpr):
    """One vector for each of 8 or 9 points, side by side: (UNITS, 8) or, with zeros at the end, (UNITS, 16).

    To be stored at once, in whole lines of memory.
    """
    SIZE: tl.constexpr = 8 if POINTS == 8 else 16
    stack = ()
    for i in tl.static_range(SIZE):
        if i < POINTS:
            stack = stack + (values[i].to(T),)
        else:
            stack = stack + (tl.zeros_like(values[0]).to(T),)
    for level in tl.static_range(3 if POINTS == 8 else 4):
        joined = ()
        for i in tl.static_range(SIZE >> (level + 1)):
            joined = joined + (tl.join(stack[i], stack[i + (SIZE >> (level + 1))]),)
        stack = joined
    return tl.reshape(stack[0], (values[0].shape[0], SIZE))


@triton.jit
def _grads(grad_output, unit, active, channel, has_channel, group_channels, C: tl.constexpr):
    start = unit * group_channels
    there = active[:, None] & has_channel[None, :]
    return tl.load(grad_output + start[:, None] + channel[None, :], mask=there, other=0.0).to(C)


@triton.jit(do_not_specialize=_NUMBERS)
def _backward_kernel(
    grad_output, input, offset, mask, grad_input, not_finite, fixed_exponent, grad_offset, grad_mask,
    width_of_group, groups, height, width, height_out, width_out, kernel_h, points, centre, stride_h, stride_w,
    padding_h, padding_w, dilation_h, dilation_w, half_h, half_w, offset_scale,
    tiles_x, tiles_y, tile_width_log2, tile_height_log2,
    C: tl.constexpr, SOFTMAX: tl.constexpr, WIDE: tl.constexpr, POINTS: tl.constexpr, MULTIPLE: tl.constexpr,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr, WHOLE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """grad_input: sums, zero before. With POINTS, grad_mask is that of the mask or logits; without, of the modulations."""
    if MULTIPLE == CHANNELS:
        group_channels = CHANNELS
    else:
        group_channels = width_of_group * MULTIPLE
    scale = _number(offset_scale, C)
    if FIXED:
        fixed_scale = _power_of_two(tl.load(fixed_exponent), C)
    else:
        fixed_scale = 1.0
    tile_x, tile_y, units, input_start, unit_start = _tile(
        height, width, height_out, width_out, groups, group_channels,
        tiles_x, tiles_y, tile_width_log2, tile_height_log2,
    )  # fmt: skip
    image = input + input_start
    grad_input += input_start
    not_finite += input_start
    grad_output += unit_start * group_channels
    offset += unit_start * points * 2
    grad_offset += unit_start * points * 2
    mask += unit_start * points
    grad_mask += unit_start * points
    T: tl.constexpr = grad_mask.dtype.element_ty
    row = groups * group_channels
    if WIDE:
        row = row.to(tl.int64)
    line = row * width
    for first in range(0, units, UNITS):
        active, unit, x, y, group = _units(
            first, tile_x, tile_y, tile_width_log2, tile_height_log2, groups, height_out, width_out, UNITS, WIDE
        )
        group_start = group * group_channels
        x = x * stride_w - padding_w + half_w
        y = y * stride_h - padding_h + half_h
        grads = tl.zeros((UNITS, CHANNELS), C)
        if WHOLE:
            channel = tl.arange(0, CHANNELS)
            grads = _grads(grad_output, unit, active, channel, channel < group_channels, group_channels, C)
        if POINTS:
            modulations = _modulations(mask, unit, active, POINTS, SOFTMAX, C)
            grads_x = ()
            grads_y = ()
            grads_m = ()
            for point in tl.static_range(POINTS):
                at = _locate(
                    offset, unit, active, x, y, point, POINTS, kernel_h, centre, dilation_h, dilation_w, height, width,
                    half_h, half_w, scale, POINTS, WIDE, C,
                )  # fmt: skip
                grad_x, grad_y, grad_m = _backward_of_point(
                    grad_input, not_finite, image, grad_output, grads, at, modulations[point], active, unit, group_start,
                    row, line, group_channels, scale, fixed_scale, FIXED, WHOLE, CHANNELS, C,
                )  # fmt: skip
                grads_x = grads_x + (grad_x,)
                grads_y = grads_y + (grad_y,)
                grads_m = grads_m + (grad_m,)
            if SOFTMAX:
                mean = tl.zeros_like(modulations[0])
                for point in tl.static_range(POINTS):
                    mean += modulations[point] * grads_m[point]
                grads_of_logits = ()
                for point in tl.static_range(POINTS):
                    grads_of_logits = grads_of_logits + (modulations[point] * (grads_m[point] - mean),)
                grads_m = grads_of_logits
            stack_m = _stacked(grads_m, POINTS, T)
            stack_x = _stacked(grads_x, POINTS, T)
            stack_y = _stacked(grads_y, POINTS, T)
            SIZE: tl.constexpr = 2 * stack_m.shape[1]
            pairs = tl.reshape(tl.join(stack_x, stack_y), (UNITS, SIZE))
            column = tl.arange(0, SIZE)
            there = active[:, None] & (column < 2 * POINTS)[None, :]
            tl.store(grad_offset + (unit * (2 * POINTS))[:, None] + column[None, :], pairs, mask=there)
            column = tl.arange(0, SIZE // 2)
            there = active[:, None] & (column < POINTS)[None, :]
            tl.store(grad_mask + (unit * POINTS)[:, None] + column[None, :], stack_m, mask=there)
        else:
            if SOFTMAX:
                largest, reciprocal = _softmax(mask, unit, active, points, C)
            for point in range(points):
                at = _locate(
                    offset, unit, active, x, y, point, points, kernel_h, centre, dilation_h, dilation_w, height, width,
                    half_h, half_w, scale, POINTS, WIDE, C,
                )  # fmt: skip
                modulation = tl.load(mask + unit * points + point, mask=active, other=0.0).to(C)
                if SOFTMAX:
                    modulation = tl.exp(modulation - largest) * reciprocal
                grad_x, grad_y, grad_m = _backward_of_point(
                    grad_input, not_finite, image, grad_output, grads, at, modulation, active, unit, group_start, row, line,
                    group_channels, scale, fixed_scale, FIXED, WHOLE, CHANNELS, C,
                )  # fmt: skip
                here = unit * points + point
                tl.store(grad_offset + 2 * here, grad_x.to(grad_offset.dtype.element_ty), mask=active)
                tl.store(grad_offset + 2 * here + 1, grad_y.to(grad_offset.dtype.element_ty), mask=active)
                tl.store(grad_mask + here, grad_m.to(T), mask=active)


@triton.jit
def _fixed_to_floating_kernel(
    sums, not_finite, fixed_exponent, grad_input, count, C: tl.constexpr, SIZE: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < count
    # in two steps: a power of two may itself be too large
    exponent = -tl.load(fixed_exponent)
    half = exponent // 2
    value = tl.load(sums + at, mask=there, other=0).to(C) * _power_of_two(half, C) * _power_of_two(exponent - half, C)
    value = tl.where(tl.load(not_finite + at, mask=there, other=0) == 0, value, float("nan"))
    tl.store(grad_input + at, value.to(grad_input.dtype.element_ty), mask=there)


# ----------------------------------------------------------------------------------------------------------------- host

_MOST_CHANNELS = 64  # of a group at once
_WIDE_FROM = 2**31  # elements of an image: numbered by 64 bits
_CANNOT = "the GPU kernel cannot serve this call: "
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: on a CPU, for tests
# The interpreter takes long for a step, however many units it is for.
_LARGEST_TILE_LOG2 = 4 if INTERPRETED else 3
_INTERPRETED_UNITS = 1024


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"dcnv3: {message}")


# The dtype of the sums, and how wide it is, for each dtype of the tensors.
_COMPUTE = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}


class _Plan(NamedTuple):
    """What the kernels need to know of a call besides the tensors."""

    numbers: tuple[int, ...]  # _NUMBERS, the tiles aside
    constants: tuple[tuple[str, object], ...]
    dtype: torch.dtype
    batch: int
    height_out: int
    width_out: int
    groups: int


@functools.lru_cache(maxsize=1024)
def _plan(
    batch, height, width, channels, height_out, width_out, dtype, kernel_h, kernel_w, stride_h, stride_w, padding_h,
    padding_w, dilation_h, dilation_w, groups, offset_scale, remove_center, softmax,
) -> _Plan:  # fmt: skip
    points = kernel_h * kernel_w - remove_center
    sizes = (
        height + 2 * padding_h, width + 2 * padding_w, channels, points, dilation_h, dilation_w, stride_h, stride_w
    )  # fmt: skip
    _require(max(sizes) <= 2**29, _CANNOT + "a height, width, number of channels or hyper-parameter above 2^29")
    wide = max(height * width * channels, height_out * width_out * max(channels, 2 * groups * points)) >= _WIDE_FROM
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
        dilation_h * (kernel_h - 1) // 2, dilation_w * (kernel_w - 1) // 2, bits(offset_scale),
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
    """The number of tiles, and of those in a row and a column of an image, and the logarithms of their width and height:
    as large as the work allows that a program takes few steps and all multiprocessors get several."""
    width_log2 = min(_LARGEST_TILE_LOG2, (width_out - 1).bit_length())
    height_log2 = min(2 * _LARGEST_TILE_LOG2 - width_log2, (height_out - 1).bit_length())
    while True:
        tiles_x, tiles_y = -(-width_out >> width_log2), -(-height_out >> height_log2)
        tiles = batch * tiles_x * tiles_y
        fits = groups << (width_log2 + height_log2) <= 4 * units and tiles >= 4 * multiprocessors
        if fits or width_log2 + height_log2 == 0:
            _require(tiles < 2**31, _CANNOT + "an output of so many pixels")
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
    """The threads that share a unit: each has 16 bytes of what is read, in backward of the sums that are added to."""
    constants = dict(plan.constants)
    dtype = _COMPUTE[plan.dtype] if kernel is _backward_kernel else plan.dtype
    return max(1, constants["CHANNELS"] // min(constants["MULTIPLE"], 16 // dtype.itemsize))


def _launch(kernel, plan: _Plan, device: torch.device, config: tuple[int, int], tensors: tuple, **constants) -> None:
    """config: units to a thread, and warps of a program."""
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

# Units to a thread, and warps of a program; the first is taken where nothing is measured.
_CONFIGS = ((1, 2), (1, 4), (2, 4), (1, 8))
_tuned: dict[tuple, tuple[int, int]] = {}


def _config(kernel, plan: _Plan, input: torch.Tensor) -> tuple[int, int]:
    """The fastest of _CONFIGS for the dtype, group width and number of points on this kind of device.

    Measured once, on tensors of its own: the choice does not hang on which call is the first, backward's sums need not be
    reset, and no batch or image size is measured anew. Not while a graph is captured, nor for unusual calls.
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
        constants["SOFTMAX"],
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)  # the user's random numbers stay what they are

    def random(last: int) -> torch.Tensor:
        return torch.randn(batch, size, size, last, generator=generator, device=device).to(dtype)

    try:
        input, offset, mask = random(channels), random(groups * points * 2), random(groups * points)
        if kernel is _forward_kernel:
            tensors, more = (input, offset, mask, torch.empty_like(input)), {}
        else:
            sums = torch.zeros_like(input, dtype=_COMPUTE[dtype])
            tensors = (input, input, offset, mask, sums, sums, sums, torch.empty_like(offset), torch.empty_like(mask))
            more = {"WHOLE": True, "FIXED": False}
    except RuntimeError:  # no memory for it
        return _CONFIGS[0]
    times = {}
    for config in _CONFIGS:
        # With fewer threads than units would take, Triton computes locations where it read the offsets, once for all lanes,
        # and sends them around.
        if config[0] > 1 and config[0] >= _lanes(kernel, plan):
            continue
        # what a device cannot run (its registers or memory are too few), or no memory to measure it
        with contextlib.suppress(RuntimeError, triton.TritonError):
            run = functools.partial(_launch, kernel, plan, device, config, tensors, **more)
            times[config] = do_bench(run, warmup=5, rep=20, return_mode="median")
    return min(times, key=times.get, default=_CONFIGS[0])


# ---- operators


def _contiguous_pairs(offset: torch.Tensor) -> torch.Tensor:
    """Pairs are read in one access, which must not cross their size."""
    offset = offset.contiguous()
    return offset.clone() if offset.data_ptr() % min(8, 2 * offset.element_size()) else offset


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
        plan = _plan(*input.shape, *size, input.dtype, *options, softmax)
        config = _config(_forward_kernel, plan, input)
        tensors = (input.contiguous(), _contiguous_pairs(offset), mask.contiguous(), output)
        _launch(_forward_kernel, plan, input.device, config, tensors)
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
        plan = _plan(*input.shape, *size, input.dtype, *options, softmax)
        constants = dict(plan.constants)
        grad_output, mask = grad_output.contiguous(), mask.contiguous()
        if deterministic:
            terms = size[0] * size[1] * (kernel_h * kernel_w - remove_center)
            exponent = _fixed_exponent(grad_output, None if softmax else mask, terms, compute)
            sums = torch.zeros_like(input, dtype=torch.int64, **contiguous)
            not_finite = torch.zeros_like(input, dtype=torch.int8, **contiguous)
            config = _CONFIGS[0]  # another one may add the channels of a group in another order
        else:
            sums = torch.zeros_like(input, dtype=compute, **contiguous)
            exponent = not_finite = sums  # not used
            config = _config(_backward_kernel, plan, input)
        # Where the number of points is known when the kernel is compiled, it finishes the softmax.
        finish_softmax = softmax and not constants["POINTS"]
        grad_modulation = torch.empty_like(grad_mask, dtype=compute) if finish_softmax else grad_mask
        tensors = (
            grad_output, input.contiguous(), _contiguous_pairs(offset), mask, sums, not_finite, exponent, grad_offset,
            grad_modulation,
        )  # fmt: skip
        whole = input.shape[3] // groups <= constants["CHANNELS"]
        _launch(_backward_kernel, plan, input.device, config, tensors, WHOLE=whole, FIXED=deterministic)
        if finish_softmax:
            modulation = mask.to(compute).unflatten(-1, (groups, -1)).softmax(-1)
            weighted = modulation * grad_modulation.view_as(modulation)
            weighted -= modulation * weighted.sum(-1, keepdim=True)
            grad_mask.copy_(weighted.flatten(-2))
        if deterministic:
            grad_input = torch.empty_like(input, **contiguous)
            block = 1 << 16 if INTERPRETED else 1024
            _fixed_to_floating_kernel[(triton.cdiv(sums.numel(), block),)](
                sums, not_finite, exponent, grad_input, sums.numel(), C=constants["C"], SIZE=block
            )
        else:
            grad_input = sums.to(input.dtype)
    return grad_input, grad_offset, grad_mask


def _fixed_exponent(
    grad_output: torch.Tensor, mask: torch.Tensor | None, terms: int, compute: torch.dtype
) -> torch.Tensor:
    """e such that sums of `terms` products of a gradient and a modulation stay below 2^62 multiples of 2^-e. Stays on the
    device. mask: None for a softmax."""

    def exponent(tensor):  # 2^exponent is above all finite values
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


if not hasattr(ops, "dcnv3_forward"):  # else this is imported a second time, by somebody else under another name
    _register()
