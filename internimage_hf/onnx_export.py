# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""DCNv3 in ONNX, and the export of models with it; needs `pip install internimage-hf[export]`.

torch.export sees each call of DCNv3 as one operator, which becomes one node: `DCNv3` of the domain `internimage_hf`, for
runtimes that have it as a plug-in, or standard operators around one `GridSample`. (The exporter can also take the PyTorch
definition apart; on its symbolic sizes that takes several times as long.)
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import rewriter
from onnxscript.onnx_opset import opset18
from onnxscript.values import Opset

from .dcnv3 import dcnv3_as_operator
from .dcnv3_torch import Geometry, unpack_geometry


DCNV3_DOMAIN = "internimage_hf"
DCNV3_OPS = ("native", "custom")
_custom_opset = Opset(DCNV3_DOMAIN, 1)


def _onnx_dcnv3(op: Any, input: ir.Value, offset: ir.Value, mask: ir.Value, geometry: Geometry) -> ir.Value:
    """`dcnv3_plain` in ONNX operators of opset 16 to 19, made by `op`. Shapes and dtypes as for `dcnv3`.

    Only the channels have to be known; N, H, W, H_out, W_out are read from the tensors when the model runs.
    """
    groups, points, scale = geometry.groups, geometry.points, geometry.offset_scale
    dtype = ir.DataType.DOUBLE if input.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT

    def integers(*values: int) -> ir.Value:
        return op.Constant(value=ir.tensor(np.array(values, np.int64)))

    def numbers(values: float | np.ndarray) -> ir.Value:
        return op.Constant(value=ir.tensor(np.asarray(values, dtype.numpy())))

    def arithmetic(tensor: ir.Value) -> ir.Value:
        return tensor if tensor.dtype == dtype else op.Cast(tensor, to=dtype.value)

    def size(tensor: ir.Value, axis: int) -> ir.Value:  # (1,)
        return op.Shape(tensor, start=axis, end=axis + 1)

    def centers(outputs: ir.Value, axis: int) -> ir.Value:  # (outputs,)
        half = (geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)) // 2
        zero, one = (op.Constant(value=ir.tensor(np.array(value, np.int64))) for value in (0, 1))
        indices = op.Cast(op.Range(zero, op.Squeeze(outputs), one), to=dtype.value)
        return op.Add(
            op.Mul(indices, numbers(geometry.stride[axis])), numbers(half - geometry.padding[axis] - half * scale)
        )

    def in_grid(position: ir.Value, length: ir.Value) -> ir.Value:  # from pixels to [-1, 1]
        length = op.Cast(length, to=dtype.value)
        inside = op.And(op.Greater(position, numbers(-1)), op.Less(position, length))
        position = op.Where(inside, position, numbers(-2))
        position = op.Div(op.Add(op.Mul(position, numbers(2)), numbers(1)), length)
        return op.Unsqueeze(op.Sub(position, numbers(1)), integers(-1))

    height, width = size(input, 1), size(input, 2)
    height_out, width_out = size(offset, 1), size(offset, 2)
    rows, columns = (
        position.numpy().astype(dtype.numpy()) for position in geometry.kernel_positions(torch.device("cpu"))
    )

    offset = op.Reshape(arithmetic(offset), integers(0, 0, 0, groups, points * 2))
    offset = op.Transpose(offset, perm=[0, 3, 1, 2, 4])  # (N, G, H_out, W_out, P*2)
    offset = op.Reshape(offset, op.Concat(integers(-1, groups), height_out, width_out, integers(points, 2), axis=0))
    if scale != 1:
        offset = op.Mul(offset, numbers(scale))
    offset_x, offset_y = (op.Gather(offset, op.Constant(value=ir.tensor(np.array(i, np.int64))), axis=-1) for i in (0, 1))
    base_x = op.Add(
        op.Unsqueeze(centers(width_out, 1), integers(1)), numbers(columns * (geometry.dilation[1] * scale))
    )  # (W_out, P)
    base_y = op.Add(
        op.Unsqueeze(centers(height_out, 0), integers(1, 2)), numbers(rows * (geometry.dilation[0] * scale))
    )  # (H_out, 1, P)
    grid = op.Concat(in_grid(op.Add(offset_x, base_x), width), in_grid(op.Add(offset_y, base_y), height), axis=-1)
    grid = op.Reshape(grid, op.Concat(integers(-1), height_out, op.Mul(width_out, integers(points)), integers(2), axis=0))

    value = op.Reshape(arithmetic(input), integers(0, 0, 0, groups, -1))
    value = op.Transpose(value, perm=[0, 3, 4, 1, 2])  # (N, G, C/G, H, W)
    group_channels = size(value, 2)
    value = op.Reshape(value, op.Concat(integers(-1), group_channels, height, width, axis=0))
    sampled = op.GridSample(value, grid, mode="bilinear", padding_mode="zeros", align_corners=0)
    sampled = op.Reshape(
        sampled, op.Concat(integers(-1, groups), group_channels, height_out, width_out, integers(points), axis=0)
    )  # (N, G, C/G, H_out, W_out, P)

    mask = op.Reshape(arithmetic(mask), integers(0, 0, 0, groups, points))
    mask = op.Unsqueeze(op.Transpose(mask, perm=[0, 3, 1, 2, 4]), integers(2))  # (N, G, 1, H_out, W_out, P)
    output = op.ReduceSum(op.Mul(sampled, mask), integers(-1), keepdims=0)  # (N, G, C/G, H_out, W_out)
    output = op.Reshape(op.Transpose(output, perm=[0, 3, 4, 1, 2]), integers(0, 0, 0, -1))
    return output if input.dtype == dtype else op.Cast(output, to=input.dtype.value)


def _softmax_over_points(op: Any, logits: ir.Value, geometry: Geometry) -> ir.Value:
    split = op.Constant(value=ir.tensor(np.array([0, 0, 0, geometry.groups, geometry.points], np.int64)))
    merged = op.Constant(value=ir.tensor(np.array([0, 0, 0, -1], np.int64)))
    return op.Reshape(op.Softmax(op.Reshape(logits, split), axis=-1), merged)


def dcnv3_translation_table(dcnv3_op: str = "native") -> dict[Callable, Callable]:
    def translate(input, offset, mask, sizes, offset_scale, softmax):
        geometry = unpack_geometry(list(sizes), offset_scale)
        if softmax:
            mask = _softmax_over_points(opset18, mask, geometry)
        if dcnv3_op == "native":
            return _onnx_dcnv3(opset18, input, offset, mask, geometry)
        attributes = {**geometry._asdict(), "remove_center": int(geometry.remove_center)}
        return _custom_opset.DCNv3(input, offset, mask, **{name: list(v) if isinstance(v, tuple) else v for name, v in attributes.items()})

    return {torch.ops.internimage_hf.dcnv3_cpu.default: translate}
