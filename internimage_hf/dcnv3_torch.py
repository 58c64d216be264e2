# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""DCNv3 in PyTorch, in two formulations of the same arithmetic (section 3.1, equation 2 of the InternImage paper).

`dcnv3_plain` is differentiable PyTorch code around one `grid_sample`: what exporters and the transforms of torch.func see,
and what devices other than the CPU run (compiled, around gathers). It materialises every sampled point, as the official fallback
(`dcnv3_core_pytorch`) does.

`dcnv3_cpu` never does. Seen from an output pixel, one group's result is a weighted sum of 4 * P short rows of the input:
what `embedding_bag` computes, vectorised over the channels of the group and without temporaries. Seen from an input pixel,
so is the gradient of the input, of rows of the output's gradient. Work goes in chunks whose buffers stay in the cache, and
the backward pass recomputes instead of storing. `benchmarks/op_cpu.py` compares it with the alternatives.

A point on a pixel, as all are before training, belongs to the cell to the right and below: there the derivatives by the
position, which differ from those of the cell to the left and above, are taken. So does the kernel.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Geometry(NamedTuple):
    """The hyper-parameters of a call. Pairs are (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool

    @property
    def points(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                (height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def kernel_positions(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column in the kernel of each of the P points, x-major, int64."""
        rows, columns = self.kernel_size
        points = torch.arange(rows * columns, device=device)
        if self.remove_center:
            center = rows * columns // 2
            points = torch.cat((points[:center], points[center + 1 :]))
        return points % rows, points // rows

    def base_positions(
        self, axis: int, outputs: int, kernel_positions: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Where the points lie without offsets along an axis (0 vertical), in input pixels: (outputs, P).

        Relative to the kernel's centre, a point on a pixel is there exactly, whatever the offset scale.
        """
        half = (self.dilation[axis] * (self.kernel_size[axis] - 1)) // 2
        centers = torch.arange(outputs, device=kernel_positions.device, dtype=dtype) * self.stride[axis]
        centers = centers + (half - self.padding[axis])
        from_center = (kernel_positions * self.dilation[axis] - half).to(dtype) * self.offset_scale
        return centers[:, None] + from_center


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for anything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _exponentials_over_points(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a softmax over the last dimension divides, and what by: its sum, NaN if one of the quotients is."""
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    return exponentials, exponentials.sum(-1, keepdim=True)


def softmax_over_points(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension. `torch.softmax` takes several times as long on the CPU for nine values."""
    exponentials, total = _exponentials_over_points(logits)
    return exponentials / total


def _sampling_size(size: int) -> int:
    """The least power of two that is not less: with it, `grid_sample`'s coordinates of pixels are exact.

    With another size they are rounded, and a point on a pixel may fall into the cell to the left, whose derivative differs.
    Sizes that are symbolic, or that Dynamo is about to make so, stay what they are: what is exported with them gives the
    same values, but possibly that derivative.
    """
    if type(size) is not int or torch.compiler.is_dynamo_compiling():
        return size
    return 1 << (size - 1).bit_length()


def _sample(value: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Bilinear samples of maps, zero outside, by `grid_sample`.

    Args:
        value: (maps, channels, height, width).
        x, y: (maps, rows, columns), in pixels.

    Returns:
        (maps, channels, rows, columns)
    """
    height, width = value.shape[2:]
    sampling_height, sampling_width = _sampling_size(height), _sampling_size(width)
    if sampling_height is not height or sampling_width is not width:
        value = F.pad(value, (0, sampling_width - width, 0, sampling_height - height))
    grid = torch.stack(((2 * x + 1) / sampling_width - 1, (2 * y + 1) / sampling_height - 1), -1)
    return F.grid_sample(value, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _sample_by_gathering(value: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`_sample`, corner by corner: what a compiler fuses, for sizes that are symbolic too."""
    height, width = value.shape[2:]
    pixels, total = value.flatten(2), 0
    left, upper = x.floor(), y.floor()
    for row, by_row in ((upper, 1 - (y - upper)), (upper + 1, y - upper)):
        for column, by_column in ((left, 1 - (x - left)), (left + 1, x - left)):
            there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(there, row, 0).long() * width + torch.where(there, column, 0).long()
            index = index.flatten(1).unsqueeze(1).expand(-1, value.shape[1], -1)
            corner = pixels.gather(2, index).unflatten(-1, x.shape[1:])
            total = total + torch.where(there.unsqueeze(1), corner, 0) * (by_row * by_column).unsqueeze(1)
    return total


def dcnv3_plain(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    geometry: Geometry,
    softmax: bool,
    by_gathering: bool = False,
) -> torch.Tensor:
    """DCNv3 by sampling all points at once. Shapes as for `dcnv3`.

    Args:
        by_gathering: for compilers; takes several times the memory otherwise.
    """
    groups, points = geometry.groups, geometry.points
    height, width = input.shape[1:3]
    height_out, width_out = offset.shape[1:3]
    dtype = compute_dtype(input.dtype)

    kernel_rows, kernel_columns = geometry.kernel_positions(input.device)
    offset = (
        offset.to(dtype).unflatten(-1, (groups, points, 2)).permute(0, 3, 1, 2, 4, 5)
    )  # (N, G, H_out, W_out, P, 2)
    x = geometry.base_positions(1, width_out, kernel_columns, dtype) + offset[..., 0] * geometry.offset_scale
    y = geometry.base_positions(0, height_out, kernel_rows, dtype)[:, None] + offset[..., 1] * geometry.offset_scale
    # What does not lie inside (NaN does not) goes where nothing is sampled, and out of reach of an integer overflow.
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = torch.where(inside, x, -2), torch.where(inside, y, -2)

    mask = mask.to(dtype).unflatten(-1, (groups, points))
    mask = (softmax_over_points(mask) if softmax else mask).permute(0, 3, 1, 2, 4)  # (N, G, H_out, W_out, P)
    mask = torch.where(inside, mask, 0)  # 0 * inf is not 0: one that does not count may be anything
    value = input.to(dtype).unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2)  # (N, G, C/G, H, W)
    sample = _sample_by_gathering if by_gathering else _sample
    # (N*G, C/G, H_out, W_out*P)
    sampled = sample(value.flatten(0, 1), *(position.flatten(0, 1).flatten(2, 3) for position in (x, y)))
    sampled = sampled.unflatten(-1, (width_out, points)).unflatten(0, (-1, groups))
    output = (sampled * mask.unsqueeze(2)).sum(-1)  # (N, G, C/G, H_out, W_out)
    return output.permute(0, 3, 4, 1, 2).flatten(-2).to(input.dtype)


# Sampling points of one chunk. Each needs about 60 bytes, and the buffers of two threads are to stay in the cache; fewer
# points spend their time in the overhead of PyTorch's calls.
_CHUNK_POINTS = 65536
# Zeros around the image: a point that lies outside is moved to two pixels of them, and reads nothing else.
_RING = 2


class _CpuOp:
    """What all chunks of a call share."""

    def __init__(
        self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, geometry: Geometry, softmax: bool
    ):
        self.input, self.offset, self.mask, self.geometry, self.softmax = input, offset, mask, geometry, softmax
        self.batch, self.height, self.width, self.channels = input.shape
        self.height_out, self.width_out = offset.shape[1:3]
        self.dtype = compute_dtype(input.dtype)
        groups, points = geometry.groups, geometry.points
        self.group_channels = self.channels // groups

        self.table_height, self.table_width = self.height + 2 * _RING, self.width + 2 * _RING
        points_per_row = self.width_out * groups * points
        rows = max(1, _CHUNK_POINTS // points_per_row)
        self.rows_per_chunk = min(rows, self.height_out)
        self.images_per_chunk = min(max(1, rows // self.height_out), self.batch)
        table_rows = self.images_per_chunk * self.table_height * self.table_width * groups
        self.index_dtype = torch.int32 if table_rows < 2**31 else torch.int64

        # Everything over (W_out, G, P) in full: a broadcast nine values long would keep PyTorch from vectorising.
        kernel_rows, kernel_columns = geometry.kernel_positions(input.device)
        base_x = geometry.base_positions(1, self.width_out, kernel_columns, self.dtype)
        self.base_x = base_x[:, None].expand(-1, groups, -1).reshape(-1)
        base_y = geometry.base_positions(0, self.height_out, kernel_rows, self.dtype)
        self.base_y = base_y[:, None, :].expand(-1, self.width_out * groups, -1).reshape(self.height_out, -1)
        group = torch.arange(groups, dtype=self.index_dtype) + _RING * (self.table_width + 1) * groups
        self.base_index = group[:, None].expand(self.width_out, -1, points).reshape(-1)
        # from corner to corner of a point: upper left, upper right, lower left, lower right
        self.corner_steps = (0, groups, self.table_width * groups - groups, groups)

    def _image_chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some images after others, and their pixels with the ring, (-1, C / G) in the dtype of the arithmetic."""
        for first in range(0, self.batch, self.images_per_chunk):
            images = slice(first, min(first + self.images_per_chunk, self.batch))
            table = F.pad(self.input[images].to(self.dtype), (0, 0, _RING, _RING, _RING, _RING))
            yield images, table.contiguous().view(-1, self.group_channels)

    def _row_chunks(self) -> Iterator[slice]:
        for row in range(0, self.height_out, self.rows_per_chunk):
            yield slice(row, min(row + self.rows_per_chunk, self.height_out))

    def _chunk(self, tensor: torch.Tensor, images: slice, rows: slice, last: int) -> torch.Tensor:
        """A chunk of offsets, masks or gradients, (n, rows, -1, last) and contiguous."""
        chunk = tensor[images, rows]
        return chunk.reshape(*chunk.shape[:2], -1, last).to(self.dtype).contiguous()

    def _positions(self, images: slice, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the points of some output rows of some images lie, in input pixels: x and y, (n, rows, W_out * G * P).

        Inside means strictly inside (-1, size): everything else, NaN included, is moved to the ring of zeros.
        """
        offset = self._chunk(self.offset, images, rows, 2)
        x = torch.add(self.base_x, offset[..., 0], alpha=self.geometry.offset_scale)
        y = torch.add(self.base_y[rows], offset[..., 1], alpha=self.geometry.offset_scale)
        for position, size in ((x, self.width), (y, self.height)):
            F.threshold_(position, -1, -_RING).nan_to_num_(nan=-_RING, posinf=size).clamp_max_(size)
        return x, y

    def _modulations(self, images: slice, rows: slice) -> tuple[torch.Tensor, bool]:
        """The mask of a chunk, normalised if this op does that: (n, rows, W_out * G * P); and whether it is finite."""
        mask = self._chunk(self.mask, images, rows, self.geometry.points)
        if not self.softmax:
            return mask.flatten(2), math.isfinite(mask.sum())
        exponentials, total = _exponentials_over_points(mask)
        return exponentials.div_(total).flatten(2), math.isfinite(total.sum())

    def _outside(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Which of the points that `_positions` returned do not count."""
        return (x <= -1) | (x >= self.width) | (y <= -1) | (y >= self.height)

    def _split_positions(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Leaves the fractional parts in `x` and `y`; returns the table's row of each point's upper left corner."""
        groups = self.geometry.groups
        y0 = y.floor()
        y.sub_(y0)
        index = y0.to(self.index_dtype).mul_(self.table_width * groups)
        x0 = torch.floor(x, out=y0)
        x.sub_(x0)
        index.add_(x0.to(self.index_dtype), alpha=groups).add_(self.base_index)
        if index.shape[0] > 1:
            images = torch.arange(index.shape[0], dtype=self.index_dtype).view(-1, 1, 1)
            index.add_(images * (self.table_height * self.table_width * groups))
        return index

    @staticmethod
    def _weights(fx: torch.Tensor, fy: torch.Tensor, modulations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of the four corners: upper left, upper right, lower left, lower right. Uses up `fx` and `fy`."""
        lower = fy.mul_(modulations)
        upper = modulations - lower
        upper_right = upper * fx
        lower_right = fx.mul_(lower)
        return upper.sub_(upper_right), upper_right, lower.sub_(lower_right), lower_right

    def forward(self) -> torch.Tensor:
        output = self.input.new_empty(self.batch, self.height_out, self.width_out, self.channels)
        for images, table in self._image_chunks():
            for rows in self._row_chunks():
                output[images, rows] = self._forward_chunk(table, images, rows)
        return output

    def _forward_chunk(self, table: torch.Tensor, images: slice, rows: slice) -> torch.Tensor:
        fx, fy = self._positions(images, rows)
        modulations, finite = self._modulations(images, rows)
        if not finite:  # as in `dcnv3_plain`
            modulations = modulations.masked_fill(self._outside(fx, fy), 0)
        index = self._split_positions(fx, fy)
        bags = torch.arange(0, index.numel(), self.geometry.points, dtype=self.index_dtype)
        total = None
        for step, weight in zip(self.corner_steps, self._weights(fx, fy, modulations), strict=True):
            index.add_(step)
            part = torch.embedding_bag(table, index.view(-1), bags, False, 0, False, weight.view(-1))[0]
            total = part if total is None else total.add_(part)
        return total.view(*fx.shape[:2], self.width_out, self.channels)

    def backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of input, offset and mask."""
        grad_input, grad_offset, grad_mask = grads = tuple(
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor in (self.input, self.offset, self.mask)
        )
        for images, table in self._image_chunks():
            by_table = torch.zeros_like(table)
            for rows in self._row_chunks():
                grad = self._chunk(grad_output, images, rows, self.group_channels).view(-1, self.group_channels)
                by_x, by_y, by_mask = self._backward_chunk(table, by_table, grad, images, rows)
                by_offset = grad_offset[images, rows].unflatten(-1, (-1, 2))
                by_offset[..., 0], by_offset[..., 1] = (
                    by_x.unflatten(-1, (self.width_out, -1)),
                    by_y.unflatten(-1, (self.width_out, -1)),
                )
                grad_mask[images, rows] = by_mask.unflatten(-1, (self.width_out, -1))
            by_table = by_table.view(-1, self.table_height, self.table_width, self.channels)
            grad_input[images] = by_table[:, _RING:-_RING, _RING:-_RING]
        return grads

    def _backward_chunk(
        self, table: torch.Tensor, by_table: torch.Tensor, grad: torch.Tensor, images: slice, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds to the gradient of the table; returns those of the offsets' x and y and of the mask, one for each point.

        grad: of the output, (pixels * G, C / G).
        """
        fx, fy = self._positions(images, rows)
        modulations, finite = self._modulations(images, rows)
        counting, outside = modulations, None
        if not (finite and math.isfinite(grad.sum())):  # as in `dcnv3_plain`
            outside = self._outside(fx, fy)
            counting = modulations.masked_fill(outside, 0)
        index = self._split_positions(fx, fy)

        # Each corner times the gradient.
        bags = torch.arange(0, index.numel(), self.geometry.points, dtype=self.index_dtype)
        bag_of_point = torch.arange(grad.shape[0], dtype=self.index_dtype).repeat_interleave(self.geometry.points)
        corner, products = index.clone().view(-1), []
        for step in self.corner_steps:
            corner.add_(step)
            products.append(
                torch.ops.aten._embedding_bag_per_sample_weights_backward(
                    grad, table, corner, bags, bag_of_point, 0
                ).view_as(fx)
            )
        upper_left, upper_right, lower_left, lower_right = products
        upper_change, lower_change = upper_right.sub_(upper_left), lower_right.sub_(lower_left)
        upper, lower = upper_left.addcmul_(fx, upper_change), lower_left.addcmul_(fx, lower_change)
        by_x = torch.addcmul(upper_change, fy, lower_change.sub_(upper_change))
        by_y = lower.sub_(upper)
        by_mask = upper.addcmul_(fy, by_y)

        # The points by their pixel: what an input pixel gets is a sum of rows of the gradient.
        index, order = index.view(-1).sort()
        bag_of_point = bag_of_point[order]
        first = int(index[0])
        counts = index.sub_(first).bincount()
        starts = (counts.cumsum(0) - counts).to(self.index_dtype)
        for step, weight in zip(self.corner_steps, self._weights(fx, fy, counting), strict=True):
            first += step
            part = torch.embedding_bag(grad, bag_of_point, starts, False, 0, False, weight.view(-1)[order])[0]
            by_table[first : first + len(part)] += part

        factor = counting * self.geometry.offset_scale
        by_x.mul_(factor)
        by_y.mul_(factor)
        if outside is not None:
            for by in (by_x, by_y, by_mask):
                by.masked_fill_(outside, 0)
        if self.softmax:
            modulations, by = (t.view(*fx.shape[:2], -1, self.geometry.points) for t in (modulations, by_mask))
            by.sub_(torch.mul(by, modulations).sum(-1, keepdim=True)).mul_(modulations)
        return by_x, by_y, by_mask


class _DCNv3Cpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, offset, mask, geometry, softmax):
        ctx.save_for_backward(input, offset, mask)
        ctx.geometry, ctx.softmax = geometry, softmax
        return _CpuOp(input, offset, mask, geometry, softmax).forward()

    @staticmethod
    def backward(ctx, grad_output):
        # An operator, so that differentiating again meets it, also where the output's gradient is a constant.
        options = (_packed(ctx.geometry), ctx.geometry.offset_scale, ctx.softmax)
        return *_compiled_backward(grad_output, *ctx.saved_tensors, *options), None, None


def dcnv3_cpu(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, geometry: Geometry, softmax: bool
) -> torch.Tensor:
    """DCNv3 on CPU tensors by chunks, with a backward pass that recomputes. Shapes as for `dcnv3`."""
    if input.numel() == 0 or offset.numel() == 0:
        return dcnv3_plain(input, offset, mask, geometry, softmax)
    return _DCNv3Cpu.apply(input, offset, mask, geometry, softmax)


# The same for torch.compile, which cannot look into an operator of ours. It would take `dcnv3_plain` apart instead: into
# more memory and time than the chunks take, after minutes of compilation for symbolic sizes. (A loop of `grid_sample`s,
# which it also could take apart, is compiled into code that corrupts the heap when training, torch 2.13 and 2.15.)


@torch.library.custom_op("internimage_hf::dcnv3_cpu", mutates_args=(), device_types="cpu")
def _compiled_forward(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, sizes: list[int], offset_scale: float, softmax: bool
) -> torch.Tensor:
    with torch.no_grad():
        return dcnv3_cpu(input, offset, mask, unpack_geometry(sizes, offset_scale), softmax)


@_compiled_forward.register_fake
def _(input, offset, mask, sizes, offset_scale, softmax):
    return input.new_empty(*offset.shape[:3], input.shape[3])


@torch.library.custom_op("internimage_hf::dcnv3_cpu_backward", mutates_args=(), device_types="cpu")
def _compiled_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    sizes: list[int],
    offset_scale: float,
    softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if input.numel() == 0 or offset.numel() == 0:
        return torch.zeros_like(input), torch.zeros_like(offset), torch.zeros_like(mask)
    return _CpuOp(input, offset, mask, unpack_geometry(sizes, offset_scale), softmax).backward(grad_output)


@_compiled_backward.register_fake
def _(grad_output, input, offset, mask, sizes, offset_scale, softmax):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (input, offset, mask))


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _refuse_second_derivative(*_):
    raise RuntimeError("dcnv3 cannot be differentiated twice")


def _backward(ctx, grad_output):
    return *_compiled_backward(grad_output, *ctx.saved_tensors, *ctx.options), None, None, None


_compiled_forward.register_autograd(_backward, setup_context=_save_for_backward)
_compiled_backward.register_autograd(_refuse_second_derivative)


def _packed(geometry: Geometry) -> list[int]:
    pairs = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    return [*(size for pair in pairs for size in pair), geometry.groups, int(geometry.remove_center)]


def unpack_geometry(sizes: list[int], offset_scale: float) -> Geometry:
    """The hyper-parameters of a call of the operator `internimage_hf::dcnv3_cpu`, whose arguments these are."""
    pairs = [(sizes[i], sizes[i + 1]) for i in range(0, 8, 2)]
    return Geometry(*pairs, groups=sizes[8], offset_scale=offset_scale, remove_center=bool(sizes[9]))


def dcnv3_cpu_compiled(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, geometry: Geometry, softmax: bool
) -> torch.Tensor:
    """`dcnv3_cpu` as one operator that torch.compile leaves alone. Shapes as for `dcnv3`."""
    return _compiled_forward(input, offset, mask, _packed(geometry), geometry.offset_scale, softmax)


__all__ = [
    "Geometry",
    "compute_dtype",
    "dcnv3_cpu",
    "dcnv3_cpu_compiled",
    "dcnv3_plain",
    "softmax_over_points",
    "unpack_geometry",
]
