# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""DCNv3 in PyTorch, in two formulations of the same arithmetic (section 3.1, equation 2 of the InternImage paper).

`dcnv3_plain` is differentiable PyTorch code around one `grid_sample`: what compilers and exporters see, and what devices
other than the CPU run. It materialises every sampled point, as the official fallback (`dcnv3_core_pytorch`) does.

`dcnv3_cpu` never does. Seen from an output pixel, one group's result is a weighted sum of 4 * P short rows of the input:
what `embedding_bag` computes, vectorised over the channels of the group and without temporaries. Work goes in chunks
whose buffers stay in the cache, and the backward pass recomputes instead of storing. `benchmarks/op_cpu.py` compares it
with the alternatives.
"""

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
        """Where the points lie without offsets along an axis (0 vertical), in input pixels: (outputs, P)."""
        half = (self.dilation[axis] * (self.kernel_size[axis] - 1)) // 2
        centers = torch.arange(outputs, device=kernel_positions.device, dtype=dtype) * self.stride[axis]
        centers = centers + (half - self.padding[axis] - half * self.offset_scale)
        return centers[:, None] + kernel_positions.to(dtype) * (self.dilation[axis] * self.offset_scale)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for anything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_over_points(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension. `torch.softmax` takes several times as long on the CPU for nine values."""
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def dcnv3_plain(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, geometry: Geometry, softmax: bool
) -> torch.Tensor:
    """DCNv3 as one `grid_sample` of all points. Shapes as for `dcnv3`."""
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
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)

    mask = mask.to(dtype).unflatten(-1, (groups, points))
    mask = (softmax_over_points(mask) if softmax else mask).permute(0, 3, 1, 2, 4)  # (N, G, H_out, W_out, P)
    if not softmax:  # 0 * inf: one that does not count may be anything. A softmax is NaN at all points or at none.
        mask = torch.where(inside, mask, 0)
    value = input.to(dtype).unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2)  # (N, G, C/G, H, W)
    sampled = F.grid_sample(
        value.flatten(0, 1),
        grid.flatten(0, 1).flatten(2, 3),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )  # (N*G, C/G, H_out, W_out*P)
    sampled = sampled.unflatten(-1, (width_out, points)).unflatten(0, (-1, groups))
    output = (sampled * mask.unsqueeze(2)).sum(-1)  # (N, G, C/G, H_out, W_out)
    return output.permute(0, 3, 4, 1, 2).flatten(-2).to(input.dtype)


# Sampling points of one chunk. Each needs about 60 bytes, and the buffers of two threads are to stay in the cache; fewer
# points spend their time in the overhead of PyTorch's calls.
_CHUNK_POINTS = 65536
# Zeros around the image: a point that lies outside is moved to two pixels of them, and reads nothing else.
_RING = 2


def _positions(op: "_CpuOp", images: slice, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the points of some output rows of some images lie, in input pixels: x and y, (n, rows, W_out * G * P).

    Inside means strictly inside (-1, size): everything else, NaN included, is moved to the ring of zeros.
    """
    offset = op.offset[images, rows]
    offset = offset.reshape(*offset.shape[:2], -1, 2).to(op.dtype)
    x = torch.add(op.base_x, offset[..., 0], alpha=op.geometry.offset_scale)
    y = torch.add(op.base_y[rows], offset[..., 1], alpha=op.geometry.offset_scale)
    for position, size in ((x, op.width), (y, op.height)):
        F.threshold_(position, -1, -_RING).nan_to_num_(nan=-_RING, posinf=size).clamp_max_(size)
    return x, y


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

    def chunk_mask(self, images: slice, rows: slice) -> torch.Tensor:
        """The mask of a chunk, normalised if this op does that: (n, rows, W_out*G, P)."""
        mask = self.mask[images, rows]
        mask = mask.reshape(*mask.shape[:2], -1, self.geometry.points).to(self.dtype)
        return softmax_over_points(mask) if self.softmax else mask

    def outside(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Which of the points that `_positions` returned do not count."""
        return (x <= -1) | (x >= self.width) | (y <= -1) | (y >= self.height)

    def split_positions(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
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

    def forward(self) -> torch.Tensor:
        output = self.input.new_empty(self.batch, self.height_out, self.width_out, self.channels)
        for first in range(0, self.batch, self.images_per_chunk):
            images = slice(first, min(first + self.images_per_chunk, self.batch))
            table = F.pad(self.input[images].to(self.dtype), (0, 0, _RING, _RING, _RING, _RING))
            table = table.view(-1, self.group_channels)
            for row in range(0, self.height_out, self.rows_per_chunk):
                rows = slice(row, min(row + self.rows_per_chunk, self.height_out))
                output[images, rows] = self._forward_chunk(table, images, rows)
        return output

    def _forward_chunk(self, table: torch.Tensor, images: slice, rows: slice) -> torch.Tensor:
        fx, fy = _positions(self, images, rows)
        upper = self.chunk_mask(images, rows).view_as(fx)
        if not self.softmax and not upper.sum().isfinite():  # as in `dcnv3_plain`
            upper = upper.masked_fill(self.outside(fx, fy), 0)
        index = self.split_positions(fx, fy)
        lower = fy.mul_(upper)
        upper = upper - lower
        upper_right = upper * fx
        lower_right = fx.mul_(lower)
        weights = (upper.sub_(upper_right), upper_right, lower.sub_(lower_right), lower_right)

        groups = self.geometry.groups
        bags = torch.arange(0, index.numel(), self.geometry.points, dtype=self.index_dtype)
        steps = (0, groups, self.table_width * groups - groups, groups)  # from corner to corner
        total = None
        for step, weight in zip(steps, weights, strict=True):
            index.add_(step)
            part = torch.embedding_bag(table, index.view(-1), bags, False, 0, False, weight.view(-1))[0]
            total = part if total is None else total.add_(part)
        return total.view(*fx.shape[:2], self.width_out, self.channels)

    def backward(self, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three gradients, by `grid_sample`'s own backward pass.

        It scatters along the pixels, which makes it the fastest way in PyTorch to the gradient of the input, and gives
        that of the positions at no extra cost. Hence the layout, (n, G, ..., pixels), in which the sums over the points
        and over the channels are vectorised as well.
        """
        grads = tuple(
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor in (self.input, self.offset, self.mask)
        )
        kernel_rows, kernel_columns = self.geometry.kernel_positions(self.input.device)
        pixels = (self.geometry.points, self.height_out, self.width_out)
        base_x = self.geometry.base_positions(1, self.width_out, kernel_columns, self.dtype).T[:, None, :]
        base_y = self.geometry.base_positions(0, self.height_out, kernel_rows, self.dtype).T[:, :, None]
        bases = [base.expand(pixels).flatten(1) for base in (base_x, base_y)]  # (P, pixels)
        for first in range(0, self.batch, self.images_per_chunk):
            images = slice(first, min(first + self.images_per_chunk, self.batch))
            self._backward_images(grad_output[images], images, bases, *(grad[images] for grad in grads))
        return grads

    def _backward_images(
        self,
        grad_output: torch.Tensor,
        images: slice,
        bases: list[torch.Tensor],
        grad_input: torch.Tensor,
        grad_offset: torch.Tensor,
        grad_mask: torch.Tensor,
    ) -> None:
        """Writes the gradients of some images to where they belong."""
        groups, points, scale = self.geometry.groups, self.geometry.points, self.geometry.offset_scale
        number, num_pixels = grad_output.shape[0], self.height_out * self.width_out
        per_point = (number, num_pixels, groups, points)
        value = self.input[images].to(self.dtype).unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)

        # x and y in planes of their own: (n, G, P, pixels), in grid_sample's coordinates, in which the image is two long
        planes = value.new_empty(2, number, groups, points, num_pixels)
        planes.copy_(self.offset[images].reshape(*per_point, 2).permute(4, 0, 2, 3, 1))
        if scale != 1:
            planes.mul_(scale)
        sizes = (self.width, self.height)
        for plane, base in zip(planes, bases, strict=True):
            plane.add_(base)
        # What is not strictly inside goes a pixel further: the change of coordinates rounds, and a point exactly on an
        # edge, as all of them are before training, must not come back in with a gradient.
        F.threshold_(planes, -1, -_RING).nan_to_num_(nan=-_RING).neg_()
        for plane, size in zip(planes, sizes, strict=True):
            F.threshold_(plane, -size, -size - 1).mul_(-2 / size).add_(1 / size - 1)
        outside = None
        if not (self.softmax or (grad_output.sum() + self.mask[images].sum()).isfinite()):  # as in `dcnv3_plain`
            outside = (planes.abs() > 1 + 2 / planes.new_tensor(sizes).view(2, 1, 1, 1, 1)).any(0)
        grid = planes.flatten(1, 2).permute(1, 2, 3, 0)  # (n*G, P, pixels, 2)

        mask = torch.empty_like(planes[0]).copy_(self.mask[images].reshape(per_point).permute(0, 2, 3, 1))
        if self.softmax:
            mask.sub_(mask.amax(2, keepdim=True)).exp_()
            mask.div_(mask.sum(2, keepdim=True))
        if outside is not None:
            mask.masked_fill_(outside, 0)
        by_mask = torch.empty_like(mask)
        grad = value.new_empty(number, groups, self.group_channels, num_pixels)
        grad.copy_(grad_output.reshape(number, num_pixels, groups, -1).permute(0, 2, 3, 1))

        # One point of a large map at a time, all of a small one: the products are the largest buffers.
        points_at_once = min(points, -(-_CHUNK_POINTS * 4 // grad.numel()))
        products = grad.new_empty(grad.numel() * points_at_once)
        by_value, by_grid = None, []
        for first in range(0, points, points_at_once):
            some = slice(first, min(first + points_at_once, points))
            shape = (number, groups, self.group_channels, some.stop - some.start, num_pixels)
            product = products[: grad.numel() * shape[3]].view(shape)
            sampled = F.grid_sample(value, grid[:, some], mode="bilinear", padding_mode="zeros", align_corners=False)
            torch.mul(sampled.view(shape), grad.unsqueeze(3), out=product)
            torch.sum(product, 2, out=by_mask[:, :, some])
            del sampled
            torch.mul(grad.unsqueeze(3), mask[:, :, some].unsqueeze(2), out=product)
            some_by_value, some_by_grid = torch.ops.aten.grid_sampler_2d_backward(
                product.flatten(0, 1), value, grid[:, some], 0, 0, False, [True, True]
            )
            by_value = some_by_value if by_value is None else by_value.add_(some_by_value)
            by_grid.append(some_by_grid)

        if self.softmax:
            by_mask.sub_(torch.mul(by_mask, mask).sum(2, keepdim=True)).mul_(mask)
        if outside is not None:
            by_mask.masked_fill_(outside, 0)
        grad_mask.view(per_point).copy_(by_mask.permute(0, 3, 1, 2))
        by_grid = by_grid[0] if len(by_grid) == 1 else torch.cat(by_grid, 1)
        if outside is not None:
            by_grid = by_grid.masked_fill(outside.flatten(0, 1).unsqueeze(-1), 0)
        factors = by_grid.new_tensor([2 * scale / size for size in sizes]).repeat(num_pixels)
        by_offset = by_grid.flatten(2).mul_(factors).view(number, groups, points, num_pixels, 2)
        grad_offset.view(*per_point, 2).copy_(by_offset.permute(0, 3, 1, 2, 4))
        by_input = by_value.view(number, groups, self.group_channels, -1).permute(0, 3, 1, 2)
        grad_input.view(number, -1, groups, self.group_channels).copy_(by_input)


class _DCNv3Cpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, offset, mask, geometry, softmax):
        ctx.save_for_backward(input, offset, mask)
        ctx.geometry, ctx.softmax = geometry, softmax
        return _CpuOp(input, offset, mask, geometry, softmax).forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        return *_CpuOp(*ctx.saved_tensors, ctx.geometry, ctx.softmax).backward(grad_output), None, None


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


def _backward(ctx, grad_output):
    return *_compiled_backward(grad_output, *ctx.saved_tensors, *ctx.options), None, None, None


_compiled_forward.register_autograd(_backward, setup_context=_save_for_backward)


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
