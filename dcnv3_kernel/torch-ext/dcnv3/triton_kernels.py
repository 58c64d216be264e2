"""DCNv3's kernels in Triton. In: tensors and the numbers of a call. Out: its result. triton_launch.py calls them.

A unit of work is one group of one output pixel. A program processes a two-dimensional tile of output pixels, because the points
of adjacent pixels overlap in the first-level cache. It takes the units of its tile UNITS at a time; the group is the fastest
index. Locations, modulations and weights are vectors over the units. Channels are read and summed as (UNITS, channels), with 16
bytes of channels per thread if the group width allows it.

A point counts if it lies strictly inside (-1, height) x (-1, width). A corner outside the image is not read and has weight 0.
It is left out rather than multiplied by 0, because a modulation or gradient may be infinite and 0 * inf is NaN.
"""

# The language of Triton differs from Python. Names in capitals are compile-time constants, and branches on them are decided when
# a kernel is compiled. Tuples cannot be unpacked into other tuples.
# ruff: noqa: RUF005, SIM108, SIM300

import triton
import triton.language as tl


# The kernels' integer arguments. Without `do_not_specialize`, Triton compiles again for some of their values (1, multiples of 16).
NUMBERS = (
    "width_of_group", "groups", "height", "width", "height_out", "width_out", "kernel_h", "points", "centre",
    "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w", "half_h", "half_w", "offset_scale",
    "offset_pitch", "mask_pitch",
    "tiles_x", "tiles_y", "tile_width_log2", "tile_height_log2",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- arithmetic


@triton.jit
def _number(bits, C: tl.constexpr):
    """A floating-point argument from its bits. Triton would round a float64 argument to float32."""
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
    """The two elements at 2 * index and 2 * index + 1. One access if they have at most eight bytes."""
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
    """The pixel before a position, the distance from it, and whether that pixel and the next one are inside the image."""
    countable = (position > -1073741824.0) & (position < 1073741824.0)  # false for NaN
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
    """The program's tile: its first output pixel, its number of units, and where its image starts.

    The start is given in elements of the input, in output pixels and in units.
    """
    number = tl.program_id(0)
    row = number // tiles_x
    image = row // tiles_y
    x = (number - row * tiles_x) << tile_width_log2
    y = (row - image * tiles_y) << tile_height_log2
    units = groups << (tile_width_log2 + tile_height_log2)
    image = image.to(tl.int64)
    input_start = image * height * width * groups * group_channels
    pixel_start = image * height_out * width_out
    return x, y, units, input_start, pixel_start, pixel_start * groups


@triton.jit
def _units(
    first, tile_x, tile_y, tile_width_log2, tile_height_log2, groups, height_out, width_out,
    UNITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """UNITS units of a tile: whether each exists, its number and its pixel's within the image, column, row and group."""
    unit = first + tl.arange(0, UNITS)
    pixel = unit // groups
    group = unit - pixel * groups
    row = pixel >> tile_width_log2
    x = tile_x + pixel - (row << tile_width_log2)
    y = tile_y + row
    active = (row < (1 << tile_height_log2)) & (x < width_out) & (y < height_out)
    if WIDE:
        pixel_of_image = y.to(tl.int64) * width_out + x
    else:
        pixel_of_image = y * width_out + x
    return active, pixel_of_image * groups + group, pixel_of_image, x, y, group


@triton.jit
def _locate(
    offset, pair, active, x, y, point, kernel_h, centre, dilation_h, dilation_w, height, width,
    half_h, half_w, scale, POINTS: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The location of a point: its upper left pixel, the fractions, and which columns and rows of its corners are inside.

    pair: the index of the unit's first offset, counted in pairs. x, y: the input pixel at the kernel's centre.
    POINTS: 9 or 8 for a kernel of 3 x 3, otherwise 0.
    """
    # the kernel's column and row in pixels from its centre, which in a kernel of 3 x 3 is one dilation from the first point
    if POINTS == 9:
        column = dilation_w * (point // 3 - 1)
        row = dilation_h * (point % 3 - 1)
    elif POINTS == 8:
        column = dilation_w * ((point + point // 4) // 3 - 1)
        row = dilation_h * ((point + point // 4) % 3 - 1)
    else:
        cell = tl.where(point >= centre, point + 1, point)
        column = cell // kernel_h
        row = dilation_h * (cell - column * kernel_h) - half_h
        column = dilation_w * column - half_w
    offset_x, offset_y = _load_pair(offset, pair + point, active, C)
    position_x = (column.to(C) + offset_x) * scale
    position_y = (row.to(C) + offset_y) * scale
    cell_x, fraction_x, left, right = _place_on_axis(position_x, x, width)
    cell_y, fraction_y, upper, lower = _place_on_axis(position_y, y, height)
    if WIDE:
        pixel = cell_y.to(tl.int64) * width + cell_x
    else:
        pixel = cell_y * width + cell_x
    return pixel, fraction_x, fraction_y, left, right, upper & active, lower & active


@triton.jit
def _softmax(mask, first, active, points, C: tl.constexpr):
    """For each unit, the largest logit, and 1 / the sum of exp(logit - largest). first: the index of its first logit."""
    largest = tl.full(first.shape, float("-inf"), C)
    for point in range(points):
        logit = tl.load(mask + first + point, mask=active, other=0.0).to(C)
        largest = tl.maximum(largest, logit)
    total = tl.full(first.shape, 0.0, C)
    for point in range(points):
        logit = tl.load(mask + first + point, mask=active, other=0.0).to(C)
        total += tl.exp(logit - largest)
    return largest, 1.0 / total


@triton.jit
def _modulations(mask, first, active, POINTS: tl.constexpr, SOFTMAX: tl.constexpr, C: tl.constexpr):
    """The modulations: a tuple with one vector over the units for each point."""
    values = ()
    for point in tl.static_range(POINTS):
        values = values + (tl.load(mask + first + point, mask=active, other=0.0).to(C),)
    if SOFTMAX:
        largest = values[0]
        for point in tl.static_range(1, POINTS):
            largest = tl.maximum(largest, values[point])
        exponentials = ()
        total = tl.full(first.shape, 0.0, C)
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
    """total + modulation * the point's bilinear sample, (UNITS, channels).

    row, line: the distance in elements from a pixel to the next one, and to the one below.
    """
    pixel, fraction_x, fraction_y, left, right, upper, lower = at
    index = pixel * row + group_start
    top = modulation * (1.0 - fraction_y)
    bottom = modulation * fraction_y
    total = _add_corner(total, image, index, upper & left, top * (1.0 - fraction_x), channel, has_channel, C)
    total = _add_corner(total, image, index + row, upper & right, top * fraction_x, channel, has_channel, C)
    index += line
    total = _add_corner(total, image, index, lower & left, bottom * (1.0 - fraction_x), channel, has_channel, C)
    return _add_corner(total, image, index + row, lower & right, bottom * fraction_x, channel, has_channel, C)


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    input, offset, mask, output,
    width_of_group, groups, height, width, height_out, width_out, kernel_h, points, centre, stride_h, stride_w,
    padding_h, padding_w, dilation_h, dilation_w, half_h, half_w, offset_scale, offset_pitch, mask_pitch,
    tiles_x, tiles_y, tile_width_log2, tile_height_log2,
    C: tl.constexpr, SOFTMAX: tl.constexpr, WIDE: tl.constexpr, POINTS: tl.constexpr, MULTIPLE: tl.constexpr,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    if MULTIPLE == CHANNELS:
        group_channels = CHANNELS
    else:
        group_channels = width_of_group * MULTIPLE
    scale = _number(offset_scale, C)
    tile_x, tile_y, units, input_start, pixel_start, unit_start = _tile(
        height, width, height_out, width_out, groups, group_channels,
        tiles_x, tiles_y, tile_width_log2, tile_height_log2,
    )  # fmt: skip
    image = input + input_start
    offset += pixel_start * offset_pitch
    mask += pixel_start * mask_pitch
    output += unit_start * group_channels
    row = groups * group_channels
    if WIDE:
        row = row.to(tl.int64)
    line = row * width
    for first in range(0, units, UNITS):
        active, number, pixel, x, y, group = _units(
            first, tile_x, tile_y, tile_width_log2, tile_height_log2, groups, height_out, width_out, UNITS, WIDE
        )
        group_start = group * group_channels
        pair = pixel * (offset_pitch // 2) + group * points
        first_mask = pixel * mask_pitch + group * points
        x = x * stride_w - padding_w + half_w
        y = y * stride_h - padding_h + half_h
        if POINTS:
            modulations = _modulations(mask, first_mask, active, POINTS, SOFTMAX, C)
        elif SOFTMAX:
            largest, reciprocal = _softmax(mask, first_mask, active, points, C)
        for first_channel in range(0, group_channels, CHANNELS):
            channel = first_channel + tl.arange(0, CHANNELS)
            has_channel = channel < group_channels
            total = tl.zeros((UNITS, CHANNELS), C)
            if POINTS:
                for point in tl.static_range(POINTS):
                    at = _locate(
                        offset, pair, active, x, y, point, kernel_h, centre, dilation_h, dilation_w, height, width,
                        half_h, half_w, scale, POINTS, WIDE, C,
                    )  # fmt: skip
                    total = _add_point(
                        total, image, at, modulations[point], group_start, row, line, channel, has_channel, C
                    )
            else:
                for point in range(points):
                    at = _locate(
                        offset, pair, active, x, y, point, kernel_h, centre, dilation_h, dilation_w, height, width,
                        half_h, half_w, scale, POINTS, WIDE, C,
                    )  # fmt: skip
                    modulation = tl.load(mask + first_mask + point, mask=active, other=0.0).to(C)
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
    """Adds a corner's contribution to the gradient of the input.

    FIXED: it is rounded to a multiple of 1 / scale. Sums of such integers do not depend on their order.
    """
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
    """Adds to the gradient of the input. Returns the dot product of grads with the corner."""
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
    """Adds to the gradient of the input. Returns the gradients of both offsets and of the modulation.

    WHOLE: CHANNELS covers all channels of a group, and grads holds their gradient of the output, (UNITS, CHANNELS).
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
    # a point outside the image has no gradient, even if its modulation is not finite
    return tl.where(inside, grad_x, 0.0), tl.where(inside, grad_y, 0.0), grad_modulation


@triton.jit
def _stacked(values, POINTS: tl.constexpr, T: tl.constexpr):
    """Stacks one vector for each of 8 or 9 points: (UNITS, 8), or (UNITS, 16) with zeros at the end.

    One store then writes whole lines of memory.
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


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(
    grad_output, input, offset, mask, grad_input, not_finite, fixed_exponent, grad_offset, grad_mask,
    width_of_group, groups, height, width, height_out, width_out, kernel_h, points, centre, stride_h, stride_w,
    padding_h, padding_w, dilation_h, dilation_w, half_h, half_w, offset_scale, offset_pitch, mask_pitch,
    tiles_x, tiles_y, tile_width_log2, tile_height_log2,
    C: tl.constexpr, SOFTMAX: tl.constexpr, WIDE: tl.constexpr, POINTS: tl.constexpr, MULTIPLE: tl.constexpr,
    CHANNELS: tl.constexpr, UNITS: tl.constexpr, WHOLE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """grad_input: the sums, zero at the beginning.

    grad_mask: if POINTS is not 0, the gradient of the mask (or logits); otherwise the gradient of the modulation.
    """
    if MULTIPLE == CHANNELS:
        group_channels = CHANNELS
    else:
        group_channels = width_of_group * MULTIPLE
    scale = _number(offset_scale, C)
    if FIXED:
        fixed_scale = _power_of_two(tl.load(fixed_exponent), C)
    else:
        fixed_scale = 1.0
    tile_x, tile_y, units, input_start, pixel_start, unit_start = _tile(
        height, width, height_out, width_out, groups, group_channels,
        tiles_x, tiles_y, tile_width_log2, tile_height_log2,
    )  # fmt: skip
    image = input + input_start
    grad_input += input_start
    not_finite += input_start
    grad_output += unit_start * group_channels
    offset += pixel_start * offset_pitch
    grad_offset += unit_start * points * 2
    mask += pixel_start * mask_pitch
    grad_mask += unit_start * points
    T: tl.constexpr = grad_mask.dtype.element_ty
    row = groups * group_channels
    if WIDE:
        row = row.to(tl.int64)
    line = row * width
    for first in range(0, units, UNITS):
        active, unit, pixel, x, y, group = _units(
            first, tile_x, tile_y, tile_width_log2, tile_height_log2, groups, height_out, width_out, UNITS, WIDE
        )
        group_start = group * group_channels
        pair = pixel * (offset_pitch // 2) + group * points
        first_mask = pixel * mask_pitch + group * points
        x = x * stride_w - padding_w + half_w
        y = y * stride_h - padding_h + half_h
        grads = tl.zeros((UNITS, CHANNELS), C)
        if WHOLE:
            channel = tl.arange(0, CHANNELS)
            grads = _grads(grad_output, unit, active, channel, channel < group_channels, group_channels, C)
        if POINTS:
            modulations = _modulations(mask, first_mask, active, POINTS, SOFTMAX, C)
            grads_x = ()
            grads_y = ()
            grads_m = ()
            for point in tl.static_range(POINTS):
                at = _locate(
                    offset, pair, active, x, y, point, kernel_h, centre, dilation_h, dilation_w, height, width,
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
                largest, reciprocal = _softmax(mask, first_mask, active, points, C)
            for point in range(points):
                at = _locate(
                    offset, pair, active, x, y, point, kernel_h, centre, dilation_h, dilation_w, height, width,
                    half_h, half_w, scale, POINTS, WIDE, C,
                )  # fmt: skip
                modulation = tl.load(mask + first_mask + point, mask=active, other=0.0).to(C)
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
def fixed_to_floating_kernel(sums, not_finite, fixed_exponent, grad_input, count, C: tl.constexpr, SIZE: tl.constexpr):
    """Converts fixed-point sums to the dtype of grad_input. A sum with a term that is not finite becomes NaN."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < count
    # in two steps, because a single power of two may overflow
    exponent = -tl.load(fixed_exponent)
    half = exponent // 2
    value = tl.load(sums + at, mask=there, other=0).to(C) * _power_of_two(half, C) * _power_of_two(exponent - half, C)
    value = tl.where(tl.load(not_finite + at, mask=there, other=0) == 0, value, float("nan"))
    tl.store(grad_input + at, value.to(grad_input.dtype.element_ty), mask=there)
