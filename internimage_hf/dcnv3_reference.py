# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Input, sampling offsets and modulation mask come in, DCNv3's output goes out: the reference implementation.

Equation 2 of the paper (https://arxiv.org/abs/2211.05778, section 3.1) at one output pixel p0:

    y(p0) = sum over groups g, sum over points k:  w_g  m_gk  x_g(p0 + p_k + dp_gk)

`dcnv3_plain` computes it in differentiable PyTorch operators: `x`, `y` hold the positions p0 + p_k + dp_gk, `mask` the m_gk,
the sum over k is its last but one line. The weights w_g are the model's output projection. Exporters and the transforms of
torch.func see this code, and device types other than the CPU run it where there is no compiled kernel. It materialises every
sampled point, as `dcnv3_core_pytorch` of OpenGVLab/InternImage does; `dcnv3_chunked.py` does not.

A sampling point exactly on a pixel (all are, before training) belongs to the cell to the right and below. Its derivatives by
the position are those of that cell; those of the cell to the left and above differ. All implementations follow this rule.
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

    def packed(self) -> list[int]:
        """All but the offset scale as integers, as operators of PyTorch take them; `unpack_geometry` is the inverse."""
        pairs = (self.kernel_size, self.stride, self.padding, self.dilation)
        return [*(size for pair in pairs for size in pair), self.groups, int(self.remove_center)]

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

        Positions are computed from the kernel's centre: so a point on a pixel is exact for every offset scale.
        """
        half = (self.dilation[axis] * (self.kernel_size[axis] - 1)) // 2
        centers = torch.arange(outputs, device=kernel_positions.device, dtype=dtype) * self.stride[axis]
        centers = centers + (half - self.padding[axis])
        from_center = (kernel_positions * self.dilation[axis] - half).to(dtype) * self.offset_scale
        return centers[:, None] + from_center


def unpack_geometry(sizes: list[int], offset_scale: float) -> Geometry:
    """The hyper-parameters that `Geometry.packed` made `sizes` of."""
    pairs = [(sizes[i], sizes[i + 1]) for i in range(0, 8, 2)]
    return Geometry(*pairs, groups=sizes[8], offset_scale=offset_scale, remove_center=bool(sizes[9]))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for anything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exponentials_over_points(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of a softmax over the last dimension. A quotient is NaN only where the denominator is."""
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    return exponentials, exponentials.sum(-1, keepdim=True)


def softmax_over_points(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension; for nine values on the CPU several times faster than `torch.softmax`."""
    exponentials, total = exponentials_over_points(logits)
    return exponentials / total


def _sampling_size(size: int) -> int:
    """The next power of two: `grid_sample` then computes the coordinates of pixels without rounding.

    With another size it rounds, and a point on a pixel may fall into the cell to the left, whose derivative differs.
    Symbolic sizes, and sizes that Dynamo may make symbolic, are returned unchanged: exported programs give the same values,
    but possibly the other derivative.
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
    """`_sample`, corner by corner: a compiler fuses this code, also for symbolic sizes."""
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
        by_gathering: sample by `gather` instead of `grid_sample`; for compiled code, since eager code takes several times
            the memory.
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
    # Move points outside the image (NaN included) to -2, where nothing is sampled and no integer overflows.
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = torch.where(inside, x, -2), torch.where(inside, y, -2)

    mask = mask.to(dtype).unflatten(-1, (groups, points))
    mask = (softmax_over_points(mask) if softmax else mask).permute(0, 3, 1, 2, 4)  # (N, G, H_out, W_out, P)
    mask = torch.where(inside, mask, 0)  # points outside sample zero, but 0 x inf would be NaN
    value = input.to(dtype).unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2)  # (N, G, C/G, H, W)
    sample = _sample_by_gathering if by_gathering else _sample
    # (N*G, C/G, H_out, W_out*P)
    sampled = sample(value.flatten(0, 1), *(position.flatten(0, 1).flatten(2, 3) for position in (x, y)))
    sampled = sampled.unflatten(-1, (width_out, points)).unflatten(0, (-1, groups))
    output = (sampled * mask.unsqueeze(2)).sum(-1)  # (N, G, C/G, H_out, W_out)
    return output.permute(0, 3, 4, 1, 2).flatten(-2).to(input.dtype)


__all__ = [
    "Geometry",
    "compute_dtype",
    "dcnv3_plain",
    "exponentials_over_points",
    "softmax_over_points",
    "unpack_geometry",
]
