# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Input, sampling offsets and modulation mask come in, DCNv3's output goes out: the chunked implementation for the CPU.

It runs where there is no compiled kernel, and never materialises the sampled points. Seen from an output pixel, one group's
result is a weighted sum of 4 * P short rows of the input: what `embedding_bag` computes, vectorised over the channels of the
group and without temporaries. Seen from an input pixel, so is the gradient of the input, of rows of the output's gradient.
Work goes in chunks whose buffers stay in the cache, and the backward pass recomputes instead of storing. `benchmarks/op_cpu.py`
compares it with the alternatives.

It is one operator, `internimage_hf::dcnv3_cpu`, which torch.compile leaves as it is. Inductor would take `dcnv3_plain` apart
into more memory and time, after minutes of compilation for symbolic sizes; of a loop of `grid_sample`s it makes code that
corrupts the heap when training (torch 2.13 and 2.15).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .dcnv3_reference import Geometry, compute_dtype, exponentials_over_points, unpack_geometry


# Sampling points of one chunk, about 60 bytes each. With more points, the buffers of two threads leave the cache; with fewer,
# the overhead of PyTorch's calls dominates.
_CHUNK_POINTS = 65536
# Rows and columns of zeros around the image. A point outside the image is moved there: its four corners are zeros.
_RING = 2


class _Chunks:
    """One call: its tensors, and what all chunks share."""

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

        # Expand everything over (W_out, G, P): PyTorch does not vectorise broadcasts of nine values.
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
        """Slices of the batch, each with its pixels and the ring of zeros: (-1, C / G) in the dtype of the arithmetic."""
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
        """Positions of the sampling points of a chunk, in input pixels: x and y, (n, rows, W_out * G * P).

        A point that is not strictly inside (-1, size), NaN included, is moved to the ring of zeros.
        """
        offset = self._chunk(self.offset, images, rows, 2)
        x = torch.add(self.base_x, offset[..., 0], alpha=self.geometry.offset_scale)
        y = torch.add(self.base_y[rows], offset[..., 1], alpha=self.geometry.offset_scale)
        for position, size in ((x, self.width), (y, self.height)):
            F.threshold_(position, -1, -_RING).nan_to_num_(nan=-_RING, posinf=size).clamp_max_(size)
        return x, y

    def _modulations(self, images: slice, rows: slice) -> tuple[torch.Tensor, bool]:
        """The mask of a chunk, after the softmax if there is one, (n, rows, W_out * G * P); and whether it is finite."""
        mask = self._chunk(self.mask, images, rows, self.geometry.points)
        if not self.softmax:
            return mask.flatten(2), math.isfinite(mask.sum())
        exponentials, total = exponentials_over_points(mask)
        return exponentials.div_(total).flatten(2), math.isfinite(total.sum())

    def _outside(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """A boolean for each point of `_positions`: whether it lies outside the image and adds nothing."""
        return (x <= -1) | (x >= self.width) | (y <= -1) | (y >= self.height)

    def _split_positions(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Returns the table's row of each point's upper left corner. `x` and `y` keep their fractional parts."""
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
        """Weights of the corners: upper left, upper right, lower left, lower right. Overwrites `fx` and `fy`."""
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


@torch.library.custom_op("internimage_hf::dcnv3_cpu", mutates_args=(), device_types="cpu")
def _forward(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, sizes: list[int], offset_scale: float, softmax: bool
) -> torch.Tensor:
    if input.numel() == 0:
        return input.new_empty(*offset.shape[:3], input.shape[3])
    return _Chunks(input, offset, mask, unpack_geometry(sizes, offset_scale), softmax).forward()


@_forward.register_fake
def _(input, offset, mask, sizes, offset_scale, softmax):
    return input.new_empty(*offset.shape[:3], input.shape[3])


@torch.library.custom_op("internimage_hf::dcnv3_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    sizes: list[int],
    offset_scale: float,
    softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if input.numel() == 0:
        return torch.zeros_like(input), torch.zeros_like(offset), torch.zeros_like(mask)
    return _Chunks(input, offset, mask, unpack_geometry(sizes, offset_scale), softmax).backward(grad_output)


@_backward.register_fake
def _(grad_output, input, offset, mask, sizes, offset_scale, softmax):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (input, offset, mask))


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate(ctx, grad_output):
    return *_backward(grad_output, *ctx.saved_tensors, *ctx.options), None, None, None


def _refuse_second_derivative(*_):
    raise RuntimeError("dcnv3 cannot be differentiated twice")


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
_backward.register_autograd(_refuse_second_derivative)


def dcnv3_cpu(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, geometry: Geometry, softmax: bool
) -> torch.Tensor:
    """DCNv3 on CPU tensors by chunks. Shapes as for `dcnv3`."""
    return _forward(input, offset, mask, geometry.packed(), geometry.offset_scale, softmax)


__all__ = ["dcnv3_cpu"]
