# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: a classifier or a backbone. Out: an ONNX program. Needs `pip install internimage-hf[export]`.

torch.export records each call of DCNv3 as one operator. The translation replaces it by standard ONNX operators around one
`GridSample`, or by one custom node for runtimes with a DCNv3 plug-in. Decomposing the PyTorch definition instead takes
several times as long with symbolic sizes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import rewriter
from onnxscript.onnx_opset import opset18
from onnxscript.values import Op, Opset
from torch import nn

from .dcnv3 import dcnv3_as_operator
from .dcnv3_reference import Geometry, unpack_geometry
from .modeling_internimage import InternImageBackbone, InternImageForImageClassification


DCNV3_DOMAIN = "internimage_hf"
DCNV3_OPS = ("native", "custom")
_PAIRS = ("kernel_size", "stride", "padding", "dilation")
# The opset of torch's exporter; it cannot convert to an older one.
MIN_OPSET = 18


def export_onnx(
    model: InternImageForImageClassification | InternImageBackbone,
    *,
    image_size: tuple[int, int] = (224, 224),
    dynamic: bool = True,
    opset: int = MIN_OPSET,
    dcnv3_op: str = "native",
) -> torch.onnx.ONNXProgram:
    """Exports a classifier or a backbone to an ONNX program; its method `save` writes the file.

    Its input is `pixel_values` (batch_size, num_channels, height, width) in the model's dtype. Its output is `logits`
    (batch_size, num_labels), or one map (batch_size, channels, height/n, width/n) per entry of `config.out_features`, under
    its name.

    Args:
        model: the model, in evaluation mode.
        image_size: height and width in pixels; with `dynamic` only those of the example input.
        dynamic: whether batch size, height and width may differ between runs. Each side must then have at least 33 pixels:
            torch.export treats sizes 0 and 1 as constants, and the last stage's map would have them. Without `dynamic`
            the program takes one image of `image_size`.
        opset: version of the standard operators, at least 18.
        dcnv3_op: "native" or "custom", see `dcnv3_translation_table`.

    Raises:
        TypeError: if the model is of another class.
        ValueError: if an argument is out of range or the model is in training mode.
    """
    if not isinstance(opset, int) or opset < MIN_OPSET:
        raise ValueError(f"`opset` must be an int of at least {MIN_OPSET}, got {opset!r}")
    table = dcnv3_translation_table(dcnv3_op)
    with dcnv3_as_operator():
        program = export_program(model, image_size=image_size, dynamic=("batch", "size") if dynamic else ())
    onnx_program = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        input_names=["pixel_values"],
        output_names=output_names(model),
        # for an exported program, the exporter reads only the names of the axes from this
        dynamic_shapes={"pixel_values": {0: "batch_size", 2: "height", 3: "width"}} if dynamic else None,
        custom_translation_table=table,
        verbose=False,
    )
    # removes stack traces: megabytes, with paths of this machine
    ClearMetadataAndDocStringPass()(onnx_program.model)
    return onnx_program


def output_names(model: InternImageForImageClassification | InternImageBackbone) -> list[str]:
    """Returns the names of an exported model's outputs."""
    return list(model.out_features) if isinstance(model, InternImageBackbone) else ["logits"]


class _Outputs(nn.Module):
    """A model that takes one tensor and returns a tuple of tensors."""

    def __init__(self, model: InternImageForImageClassification | InternImageBackbone):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(pixel_values=pixel_values)
        return outputs.feature_maps if isinstance(self.model, InternImageBackbone) else (outputs.logits,)


def export_program(
    model: InternImageForImageClassification | InternImageBackbone,
    *,
    image_size: tuple[int, int],
    dynamic: tuple[str, ...] = ("batch", "size"),
) -> torch.export.ExportedProgram:
    """Exports a classifier or a backbone by `torch.export`: `pixel_values` -> tuple of tensors, in the order of `output_names`.

    Args:
        model: the model, in evaluation mode.
        image_size: height and width of the example input in pixels.
        dynamic: variable axes: "batch", and "size" for height and width.

    Raises:
        TypeError: if the model is of another class.
        ValueError: if the image size is too small or the model is in training mode.
    """
    if not isinstance(model, (InternImageForImageClassification, InternImageBackbone)):
        raise TypeError(
            f"`model` must be an InternImageForImageClassification or an InternImageBackbone, got {type(model).__name__}"
        )
    if model.training:
        raise ValueError("`model` is in training mode; call `model.eval()` first")
    height, width = image_size
    if min(height, width) < 1:
        raise ValueError(f"`image_size` must be a positive height and width, got {image_size}")
    if "size" in dynamic:  # no map of the example may have size 1: torch.export would make it a constant
        height, width = max(height, 64), max(width, 64)
    first = next(model.parameters())
    batch_size = 2 if "batch" in dynamic else 1
    example = torch.zeros(batch_size, model.config.num_channels, height, width, dtype=first.dtype, device=first.device)
    # `Dim.DYNAMIC`, no named dimensions: torch.export must prove every condition on those, and fails for some true ones.
    dims = {
        "batch": {0: torch.export.Dim("batch_size")},
        "size": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},
    }
    shapes = {axis: dim for name in dynamic for axis, dim in dims[name].items()}
    with torch.no_grad():
        return torch.export.export(_Outputs(model), (example,), dynamic_shapes={"pixel_values": shapes}, strict=False)


# -------------------------------------------------------------------------------------------------------- the operator


def dcnv3_translation_table(dcnv3_op: str = "native") -> dict[Callable, Callable]:
    """Returns the argument `custom_translation_table` of `torch.onnx.export` for any model that contains InternImage.

    `export_onnx` uses it already. For another model, for instance a detector:

        with dcnv3_as_operator():
            program = torch.export.export(detector.eval(), (), {"pixel_values": pixel_values}, strict=False)
        torch.onnx.export(program, dynamo=True, custom_translation_table=dcnv3_translation_table()).save("detector.onnx")

    Args:
        dcnv3_op: "native" for standard operators around one `GridSample`, for any runtime. "custom" for one node, `DCNv3` of
            the domain `internimage_hf`, version 1, for runtimes with a plug-in: inputs `input` (batch, height, width, channels), `offset`
            and `mask` (after its softmax, which is a `Softmax` node), output (batch, height_out, width_out, channels),
            all as for `internimage_hf.dcnv3.dcnv3`; attributes `kernel_size`, `stride`, `padding`, `dilation` (two ints
            each, vertical first), `groups`, `remove_center` (int), `offset_scale` (float).

    Raises:
        ValueError: if `dcnv3_op` has another value.
    """
    if dcnv3_op not in DCNV3_OPS:
        raise ValueError(f"`dcnv3_op` must be one of {', '.join(map(repr, DCNV3_OPS))}, got {dcnv3_op!r}")

    def translate(input, offset, mask, sizes, offset_scale, softmax):
        geometry = unpack_geometry(list(sizes), offset_scale)
        if softmax:
            split = _ints(opset18, 0, 0, 0, geometry.groups, geometry.points)
            mask = opset18.Softmax(opset18.Reshape(mask, split), axis=-1)
            mask = opset18.Reshape(mask, _ints(opset18, 0, 0, 0, geometry.groups * geometry.points))
        if dcnv3_op == "native":
            return _native_dcnv3(opset18, input, offset, mask, geometry)
        pairs = {name: list(getattr(geometry, name)) for name in _PAIRS}
        return _dcnv3_node(
            input,
            offset,
            mask,
            **pairs,
            groups=geometry.groups,
            offset_scale=geometry.offset_scale,
            remove_center=int(geometry.remove_center),
        )

    return {torch.ops.internimage_hf.dcnv3_cpu.default: translate}


def expand_dcnv3(model: ir.Model) -> int:
    """Replaces a model's DCNv3 nodes by standard operators, in place; returns the number of replaced nodes.

    The types of the nodes' inputs must be known, as in the `model` of an exported program.
    """

    def pattern(op, input, offset, mask):
        return op.DCNv3(input, offset, mask, _domain=DCNV3_DOMAIN, _allow_other_attributes=True, _outputs=["sampled"])

    def replacement(op, input, offset, mask, sampled):
        attributes = {name: attribute.value for name, attribute in sampled.producer().attributes.items()}
        for name in _PAIRS:
            attributes[name] = tuple(attributes[name])
        return _native_dcnv3(op, input, offset, mask, Geometry(**attributes))

    return rewriter.RewriteRule(pattern, replacement).apply_to_model(model)


def _schema() -> onnx.defs.OpSchema:
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    attr_type = onnx.defs.OpSchema.AttrType
    attributes = [
        *((name, attr_type.INTS, "vertical, horizontal") for name in _PAIRS),
        ("groups", attr_type.INT, "groups of channels that share offsets and mask"),
        ("offset_scale", attr_type.FLOAT, "stretches the kernel's grid and the offsets"),
        ("remove_center", attr_type.INT, "1 if the kernel's centre is left out"),
    ]
    return onnx.defs.OpSchema(
        "DCNv3",
        DCNV3_DOMAIN,
        1,
        doc="Deformable convolution v3, https://arxiv.org/abs/2211.05778, equation 2.",
        inputs=[
            parameter("input", "T", "(N, H, W, C)"),
            parameter("offset", "T", "(N, H_out, W_out, groups*P*2), x before y"),
            parameter("mask", "T", "(N, H_out, W_out, groups*P)"),
        ],
        outputs=[parameter("output", "T", "(N, H_out, W_out, C)")],
        type_constraints=[("T", [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")], "")],
        attributes=[attribute(name, kind, description, required=True) for name, kind, description in attributes],
    )


_dcnv3_node = Op(Opset(DCNV3_DOMAIN, 1), "DCNv3", _schema())


def _ints(op: Any, *values: int) -> ir.Value:
    return op.Constant(value=ir.tensor(np.array(values, np.int64)))


def _native_dcnv3(op: Any, input: ir.Value, offset: ir.Value, mask: ir.Value, geometry: Geometry) -> ir.Value:
    """Builds `dcnv3_plain` from operators of opset 18 by `op`. Shapes and dtypes as for `dcnv3`.

    Only the numbers of channels are constants; the graph reads all other sizes from its inputs at run time.
    """
    groups, points, scale = geometry.groups, geometry.points, geometry.offset_scale
    dtype = ir.DataType.DOUBLE if input.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    kernel_rows, kernel_columns = (p.numpy() for p in geometry.kernel_positions(torch.device("cpu")))

    def number(value: float | np.ndarray) -> ir.Value:
        return op.Constant(value=ir.tensor(np.asarray(value, dtype.numpy())))

    def in_compute_dtype(tensor: ir.Value) -> ir.Value:
        return tensor if tensor.dtype == dtype else op.Cast(tensor, to=dtype.value)

    def size(tensor: ir.Value, axis: int) -> ir.Value:
        return op.Shape(tensor, start=axis, end=axis + 1)

    def shape(*sizes: int | ir.Value) -> ir.Value:
        return op.Concat(*(_ints(op, s) if isinstance(s, int) else s for s in sizes), axis=0)

    def base_positions(outputs: ir.Value, axis: int, kernel_positions: np.ndarray) -> ir.Value:  # (outputs, P)
        half = (geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)) // 2
        first, step = (op.Constant(value=ir.tensor(np.array(value, np.int64))) for value in (0, 1))
        centers = op.Cast(op.Range(first, op.Squeeze(outputs), step), to=dtype.value)
        centers = op.Mul(op.Unsqueeze(centers, _ints(op, 1)), number(geometry.stride[axis]))
        start = half - geometry.padding[axis] - half * scale
        return op.Add(centers, number(start + kernel_positions * (geometry.dilation[axis] * scale)))

    def in_grid(position: ir.Value, length: ir.Value) -> ir.Value:  # from pixels to -1 ... 1; NaN is outside
        length = op.Cast(length, to=dtype.value)
        inside = op.And(op.Greater(position, number(-1)), op.Less(position, length))
        position = op.Where(inside, position, number(-2))
        return op.Sub(op.Div(op.Add(op.Mul(position, number(2)), number(1)), length), number(1))

    height, width = size(input, 1), size(input, 2)
    height_out, width_out = size(offset, 1), size(offset, 2)

    # (N, G, H_out, W_out, P, 2)
    offset = op.Reshape(in_compute_dtype(offset), shape(0, 0, 0, groups, points * 2))
    offset = op.Transpose(offset, perm=[0, 3, 1, 2, 4])
    offset = op.Reshape(offset, shape(-1, groups, height_out, width_out, points, 2))
    offset_x, offset_y = (
        op.Mul(op.Gather(offset, op.Constant(value=ir.tensor(np.array(i, np.int64))), axis=-1), number(scale))
        for i in (0, 1)
    )
    x = op.Add(offset_x, base_positions(width_out, 1, kernel_columns))
    y = op.Add(offset_y, op.Unsqueeze(base_positions(height_out, 0, kernel_rows), _ints(op, 1)))
    last = _ints(op, -1)
    grid = op.Concat(op.Unsqueeze(in_grid(x, width), last), op.Unsqueeze(in_grid(y, height), last), axis=-1)
    grid = op.Reshape(grid, shape(-1, height_out, op.Mul(width_out, _ints(op, points)), 2))

    value = op.Reshape(in_compute_dtype(input), shape(0, 0, 0, groups, -1))
    value = op.Transpose(value, perm=[0, 3, 4, 1, 2])  # (N, G, C/G, H, W)
    group_channels = size(value, 2)
    value = op.Reshape(value, shape(-1, group_channels, height, width))
    sampled = op.GridSample(value, grid, mode="bilinear", padding_mode="zeros", align_corners=0)
    sampled = op.Reshape(sampled, shape(-1, groups, group_channels, height_out, width_out, points))

    mask = op.Reshape(in_compute_dtype(mask), shape(0, 0, 0, groups, points))
    mask = op.Unsqueeze(op.Transpose(mask, perm=[0, 3, 1, 2, 4]), _ints(op, 2))  # (N, G, 1, H_out, W_out, P)
    output = op.ReduceSum(op.Mul(sampled, mask), last, keepdims=0)  # (N, G, C/G, H_out, W_out)
    output = op.Reshape(op.Transpose(output, perm=[0, 3, 4, 1, 2]), shape(0, 0, 0, -1))
    return output if input.dtype == dtype else op.Cast(output, to=input.dtype.value)


__all__ = ["dcnv3_translation_table", "expand_dcnv3", "export_onnx", "export_program", "output_names"]
