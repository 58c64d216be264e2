# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: a model that holds an InternImage, and images. Out: its sampling points, its receptive fields, its FLOPs.

The model stays as it is: all three functions read it through hooks while it runs in evaluation mode, and remove them. It may be
a classifier, a backbone, a head of transformers on the backbone, or loaded with `use_kernels=True` or as remote code.
"""

import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .dcnv3_reference import Geometry, compute_dtype, softmax_over_points


@dataclass(frozen=True)
class LayerSampling:
    """Where one deformable convolution samples, and with which weights.

    Attributes:
        name: of the module in the model, such as "internimage.encoder.stages.0.layers.0.dcn".
        stage: 1 to 4, as in `config.stage_names`.
        layer: from 0, within the stage.
        stride: pixels of the image between two positions of the stage's map: 4, 8, 16 or 32. Map position (row, column) lies
            on the image's pixel (row * stride, column * stride).
        image_size: (height, width) of the image.
        cell: (row, column) of the only map position that the tensors hold; None if they hold all.
        positions: (batch, height, width, groups, points, 2), x before y, in pixels of the image. Height and width are those of
            the stage's map, or 1 with a `cell`. Positions outside the image sample zero.
        weights: (batch, height, width, groups, points), the modulation: the softmax of DCNv3, the unbounded weights of DCNv4.
        grid: (points, 2), x before y: where the points lie around the map position while the offsets are zero, in pixels.
    """

    name: str
    stage: int
    layer: int
    stride: int
    image_size: tuple[int, int]
    cell: tuple[int, int] | None
    positions: torch.Tensor
    weights: torch.Tensor
    grid: torch.Tensor

    def at(self, query: Sequence[float]) -> "LayerSampling":
        """The part for the map position nearest to a pixel.

        Args:
            query: (x, y), in pixels of the image.

        Raises:
            ValueError: if the pixel is outside the image, or this is one position already.
        """
        if self.cell is not None:
            raise ValueError(
                f"`at` needs the sampling points of all positions, these are those of the cell {self.cell}"
            )
        x, y = _checked_pixel(query, self.image_size, "query")
        row, column = cell = _nearest_cell(x, y, self.stride, self.positions.shape[1:3])
        part = (slice(None), slice(row, row + 1), slice(column, column + 1))
        return replace(self, cell=cell, positions=self.positions[part], weights=self.weights[part])

    @property
    def centers(self) -> torch.Tensor:
        """The mean position of each group, weighted by the weights' magnitudes: (batch, height, width, groups, 2)."""
        weights = self.weights.abs().unsqueeze(-1)
        return (weights * self.positions).sum(-2) / weights.sum(-2)

    @property
    def origins(self) -> torch.Tensor:
        """The pixels on which the map positions lie, x before y: (height, width, 2)."""
        rows, columns = (torch.arange(size, device=self.positions.device) for size in self.positions.shape[1:3])
        if self.cell is not None:
            rows, columns = rows + self.cell[0], columns + self.cell[1]
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack((x, y), -1).to(self.positions.dtype) * self.stride

    @property
    def reach(self) -> torch.Tensor:
        """The mean distance of the points from their map position, weighted as in `centers`, in pixels: (batch, height, width)."""
        weights = self.weights.abs()
        distances = (self.positions - self.origins[:, :, None, None]).norm(dim=-1)
        return (weights * distances).sum((-2, -1)) / weights.sum((-2, -1))

    def spread_groups(self, number: int, image: int = 0) -> list[int]:
        """Groups whose centres lie far from each other at the first position: the farthest from the position, and so on.

        Args:
            number: of groups; all groups if there are fewer.
            image: index in the batch.

        Raises:
            ValueError: if `number` is below 1.
        """
        if number < 1:
            raise ValueError(f"`number` must be at least 1, got {number}")
        centers, nearest = self.centers[image, 0, 0], self.origins[0, 0]
        distances, chosen = (centers - nearest).norm(dim=-1), []
        for _ in range(min(number, len(centers))):
            chosen.append(int(distances.argmax()))
            distances = torch.minimum(distances, (centers - centers[chosen[-1]]).norm(dim=-1))
            distances[chosen] = -1
        return chosen


@dataclass(frozen=True)
class ReceptiveField:
    """How strongly one position of a map depends on each pixel.

    Attributes:
        name: of the module in the model whose output is the map.
        stage: 1 to 4, None for a module that is not a stage.
        stride: pixels of the image between two positions of the map.
        cell: (row, column) of the position.
        gradient: (batch, height, width), at least 0: sum over the image's channels of the magnitude of the gradient.
    """

    name: str
    stage: int | None
    stride: int
    cell: tuple[int, int]
    gradient: torch.Tensor

    def share_of_pixels(self, part: float) -> float:
        """The smallest share of the pixels that holds `part` of the gradient's sum over the batch; NaN for a zero gradient.

        Raises:
            ValueError: if `part` is not in (0, 1].
        """
        ordered = self._total().flatten().sort(descending=True).values.cumsum(0)
        return self._first(ordered, part) / len(ordered)

    def share_of_square(self, part: float) -> float:
        """The share of the image within the smallest square around the position that holds `part` of the gradient's sum.

        RepLKNet's measure (https://arxiv.org/abs/2203.06717, appendix) takes it of log10(gradient + 1), this one of the
        gradient itself. A square that reaches over the image's edge counts with its part inside. NaN for a zero gradient.

        Raises:
            ValueError: if `part` is not in (0, 1].
        """
        total = self._total()
        height, width = total.shape
        row, column = (min(index * self.stride, size - 1) for index, size in zip(self.cell, total.shape, strict=True))
        vertical = (torch.arange(height, device=total.device) - row).abs()
        horizontal = (torch.arange(width, device=total.device) - column).abs()
        ring = torch.maximum(
            vertical[:, None], horizontal
        ).flatten()  # half the side of the square that reaches the pixel
        sums = torch.zeros(int(ring.max()) + 1, dtype=total.dtype, device=total.device)
        side = self._first(sums.index_add(0, ring, total.flatten()).cumsum(0), part)
        return math.nan if math.isnan(side) else (ring < side).double().mean().item()

    def _total(self) -> torch.Tensor:
        return self.gradient.double().sum(0)

    @staticmethod
    def _first(sums: torch.Tensor, part: float) -> float:
        """How many entries of cumulative sums are needed to reach a part of the last one."""
        if not _is_number(part) or not 0 < part <= 1:
            raise ValueError(f"`part` must be above 0 and at most 1, got {part!r}")
        if not sums[-1] > 0:
            return math.nan
        return min(len(sums), int((sums < part * sums[-1] * (1 - 1e-12)).sum()) + 1)


def sampling_points(
    model: nn.Module,
    pixel_values: torch.Tensor,
    query: Sequence[float] | None = None,
    stages: int | Sequence[int] | None = None,
) -> list[LayerSampling]:
    """Where each deformable convolution of an InternImage samples (section 3.1 of https://arxiv.org/abs/2211.05778).

    The cost is that of a forward pass of the backbone. All positions of InternImage-T take 14 MiB for an image of 224 x 224
    and 300 MiB for one of 1024 x 1024; `query` avoids this. Without `query`, `LayerSampling.at` selects positions later,
    without a forward pass.

    Before training all offsets are zero: all groups lie on the regular grid.

    Args:
        model: holds one InternImage, of DCNv3 or DCNv4 (see the module's docstring). Only the backbone runs.
        pixel_values: normalised images, (batch, channels, height, width).
        query: (x, y) in pixels of the image: only the map positions nearest to it.
        stages: 1 to 4, one or several; all by default.

    Returns:
        One entry per layer, in the order of the layers. A composite backbone has those of both encoders.

    Raises:
        ValueError: if the model holds no or several InternImages, `query` is outside the image, there is no such stage, or
            `pixel_values` are wrong. The message is one line.
    """
    root_name, root = _internimage(model)
    size = _image_size(pixel_values)
    pixel = None if query is None else _checked_pixel(query, size, "query")
    found: list[LayerSampling] = []

    with ExitStack() as hooks, torch.no_grad(), _evaluating(root):
        for encoder_name, encoder in _encoders(root):
            wanted = _checked_stages(stages, len(encoder.stages))
            for stage in wanted:
                for layer, module in enumerate(encoder.stages[stage - 1].layers):
                    template = partial(
                        LayerSampling,
                        name=_joined(root_name, encoder_name, f"stages.{stage - 1}.layers.{layer}.dcn"),
                        stage=stage,
                        layer=layer,
                        stride=4 * 2 ** (stage - 1),
                        image_size=size,
                    )
                    hook = partial(_record_sampling, found, template, pixel)
                    hooks.callback(module.dcn.sampling.register_forward_pre_hook(hook, with_kwargs=True).remove)
        root(_on_device(pixel_values, root))
    return found


def _record_sampling(found: list, template: partial, pixel: tuple | None, module: nn.Module, args, kwargs) -> None:
    """A forward pre-hook of a sampling layer: appends a `LayerSampling`."""
    call = _sampling_call(args, kwargs)
    groups, offset_scale = call["groups"], float(call.get("offset_scale", 1.0))
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups, offset_scale, bool(call.get("remove_center", False)))
    stride = template.keywords["stride"]
    offset, mask = call["offset"], call["mask"]
    height, width = offset.shape[1:3]
    cell, rows, columns = None, slice(None), slice(None)
    if pixel is not None:
        cell = _nearest_cell(*pixel, stride, (height, width))
        rows, columns = (slice(index, index + 1) for index in cell)
    dtype = compute_dtype(call["input"].dtype)
    offset = offset[:, rows, columns].to(dtype).unflatten(-1, (groups, geometry.points, 2))
    weights = mask[:, rows, columns].to(dtype).unflatten(-1, (groups, geometry.points))
    if _is(module, "InternImageDeformableSampling"):
        weights = softmax_over_points(weights)
    elif not _is(module, "InternImageDCNv4Sampling"):
        raise ValueError(f"the sampling layer {type(module).__name__} is neither that of DCNv3 nor that of DCNv4")

    kernel_rows, kernel_columns = geometry.kernel_positions(offset.device)
    x = geometry.base_positions(1, width, kernel_columns, dtype)[columns]  # (W, P)
    y = geometry.base_positions(0, height, kernel_rows, dtype)[rows]
    base = torch.stack(torch.broadcast_tensors(x[None], y[:, None]), -1)  # (H, W, P, 2)
    grid = torch.stack((kernel_columns - 1, kernel_rows - 1), -1).to(dtype) * offset_scale
    positions = (base[:, :, None] + offset * offset_scale) * stride
    found.append(template(cell=cell, positions=positions, weights=weights.clone(), grid=grid * stride))


def effective_receptive_field(
    model: nn.Module,
    pixel_values: torch.Tensor,
    position: Sequence[float] | None = None,
    stages: int | Sequence[int] | None = None,
    module: nn.Module | str | None = None,
) -> list[ReceptiveField]:
    """The gradient of one position of each stage's map with respect to the image (figure 7 of the paper).

    The unit is that of RepLKNet's script (https://arxiv.org/abs/2203.06717): the sum over the channels of relu(map) at the
    position. The gradient's magnitudes are summed over the image's channels; RepLKNet keeps only positive gradients.

    InternImage-T takes 0.6 s of CPU time and 0.7 GiB for all stages of an image of 224 x 224, 3.9 s and 1.3 GiB for one of
    512 x 512.

    Args:
        model: as for `sampling_points`; with `module`, any network that takes images alone.
        pixel_values: normalised images, (batch, channels, height, width).
        position: (x, y) in pixels of the image: the map position nearest to it. By default the middle of each map,
            (height // 2, width // 2).
        stages: 1 to 4, one or several; all by default. Those of a composite backbone are the stages of its last encoder.
        module: a module of the model, or its name, whose output (batch, channels, height, width) is taken instead of the
            stages'. Its stride is the quotient of the image's and the map's sizes, rounded.

    Returns:
        One entry per stage, in their order; or one for `module`.

    Raises:
        ValueError: as for `sampling_points`; if both `stages` and `module` are given, the model has no such module, or its
            output is not a map.
    """
    size = _image_size(pixel_values)
    pixel = None if position is None else _checked_pixel(position, size, "position")
    if module is None:
        root_name, root = _internimage(model)
        encoder_name, encoder = _encoders(root)[-1]
        targets = [
            (_joined(root_name, encoder_name, f"stages.{stage - 1}"), stage, encoder.stages[stage - 1])
            for stage in _checked_stages(stages, len(encoder.stages))
        ]
    else:
        if stages is not None:
            raise ValueError("`stages` and `module` exclude each other, both are given")
        root, targets = model, [(*_module_of(model, module),)]

    maps: dict[str, torch.Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: tuple, output: object) -> None:
        maps[name] = output

    fields = []
    with ExitStack() as hooks, _evaluating(root), torch.inference_mode(False), torch.enable_grad():
        for name, _, target in targets:
            hooks.callback(target.register_forward_hook(partial(keep, name)).remove)
        hooks.enter_context(_frozen(root))
        image = _on_device(pixel_values, root).detach().clone().requires_grad_()
        root(image)
        for name, stage, _ in targets:
            feature_map = maps.get(name)
            if not isinstance(feature_map, torch.Tensor) or feature_map.ndim != 4 or not feature_map.requires_grad:
                got = tuple(feature_map.shape) if isinstance(feature_map, torch.Tensor) else type(feature_map).__name__
                raise ValueError(
                    f"`module` {name} must give a map (batch, channels, height, width) that depends on the image, got {got}"
                )
            extent = feature_map.shape[2:]
            stride = max(1, round(size[0] / extent[0])) if stage is None else 4 * 2 ** (stage - 1)
            cell = (extent[0] // 2, extent[1] // 2) if pixel is None else _nearest_cell(*pixel, stride, extent)
            unit = feature_map[:, :, cell[0], cell[1]].relu().sum()
            (gradient,) = torch.autograd.grad(unit, image, retain_graph=name != targets[-1][0])
            fields.append(ReceptiveField(name, stage, stride, cell, gradient.abs().sum(1)))
    return fields


def count_flops(
    model: nn.Module, image_size: int | Sequence[int], *, device: str | torch.device = "meta", **inputs
) -> int:
    """Counts the multiply-adds of a forward pass for one image, which papers, InternImage's included, call FLOPs.

    Convolutions and matrix products are counted by `torch.utils.flop_counter`. The deformable convolution counts 5
    multiply-adds per sampling point and channel, as in the authors' `get_flops`. Norms and activations do not count.

    Args:
        model: holds one InternImage, as for `sampling_points`. The whole model runs; pass its backbone to count that alone.
        image_size: side of the square image, or (height, width).
        device: "meta" computes no values and needs no memory. Detectors that select regions by values must run: "cpu", or
            wherever the model is.
        **inputs: further arguments of the model's forward.

    Returns:
        The number of multiply-adds, about half of the number of floating-point operations.

    Raises:
        ValueError: if the model holds no InternImage, `image_size` is wrong, or the model does not run on the meta device.
    """
    _, root = _internimage(model)
    sizes = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if len(sizes) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sizes):
        raise ValueError(f"`image_size` must be a positive int or a pair (height, width), got {image_size!r}")
    on_meta = torch.device(device).type == "meta"
    pixel_values = torch.zeros(1, root.stem.num_channels, *sizes, device=device)
    sampled = 0

    def count(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal sampled
        call = _sampling_call(args, kwargs)
        sampled += call["offset"].numel() // (2 * call["groups"]) * call["input"].shape[-1]

    counter = FlopCounterMode(display=False)
    with ExitStack() as hooks, torch.no_grad(), _evaluating(model):
        for _, encoder in _encoders(root):
            for stage in encoder.stages:
                for layer in stage.layers:
                    hooks.callback(layer.dcn.sampling.register_forward_pre_hook(count, with_kwargs=True).remove)
        with counter:
            if not on_meta:
                model(pixel_values, **inputs)
            else:
                tensors = (*model.named_parameters(), *model.named_buffers())
                empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
                try:
                    torch.func.functional_call(model, empty, (pixel_values,), inputs)
                except (RuntimeError, NotImplementedError) as error:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
                    raise ValueError(
                        f"`model`, a {type(model).__name__}, does not run on the meta device ({reason}); "
                        'pass its backbone, or device="cpu"'
                    ) from error
    return counter.get_total_flops() // 2 + 5 * sampled


# ------------------------------------------------------------------------------------------------------ parts of the model


def _is(module: nn.Module, name: str) -> bool:
    """Whether a module is of a class of this package, which as remote code is another class of the same name."""
    return any(c.__name__ == name for c in type(module).__mro__)


def _internimage(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the InternImage in a model: what holds the stem."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    found = {
        name: module
        for name, module in model.named_modules()
        if any(_is(child, "InternImageStem") for child in module.children())
    }
    if len(found) != 1:
        what = f"{len(found)} ({', '.join(found)})" if found else "none"
        raise ValueError(f"`model` must hold one InternImage, the {type(model).__name__} holds {what}")
    return next(iter(found.items()))


def _encoders(root: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in root.named_modules() if _is(module, "InternImageEncoder")]


def _module_of(model: nn.Module, module: nn.Module | str) -> tuple[str, None, nn.Module]:
    """Name and module, given either."""
    for name, candidate in model.named_modules():
        if candidate is module or (isinstance(module, str) and name == module):
            return name, None, candidate
    got = module if isinstance(module, str) else type(module).__name__
    raise ValueError(f"`module` must be a module of `model`, a {type(model).__name__}, or its name; got {got}")


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _sampling_call(args: tuple, kwargs: dict) -> dict:
    """The arguments of a sampling layer by their names."""
    names = ("input", "offset", "mask", "groups", "offset_scale", "remove_center")
    return dict(zip(names, args, strict=False)) | kwargs


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode and runs without torch.compile, whose code ignores new hooks.

    `model.eval()` would choose the kernels of `use_kernels=True` anew.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter requires a gradient: autograd then keeps less for the backward pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _on_device(pixel_values: torch.Tensor, root: nn.Module) -> torch.Tensor:
    """The images on the device of the model, unless its weights are offloaded."""
    device = next((p.device for p in root.parameters()), pixel_values.device)
    return pixel_values if device.type == "meta" else pixel_values.to(device)


# ------------------------------------------------------------------------------------------------------------------ checks


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _image_size(pixel_values: torch.Tensor) -> tuple[int, int]:
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4 or not pixel_values.is_floating_point():
        got = (
            f"{tuple(pixel_values.shape)} of {pixel_values.dtype}"
            if isinstance(pixel_values, torch.Tensor)
            else type(pixel_values).__name__
        )
        raise ValueError(f"`pixel_values` must be floats of the shape (batch, channels, height, width), got {got}")
    return tuple(pixel_values.shape[2:])


def _checked_pixel(pixel: Sequence[float], size: tuple[int, int], name: str) -> tuple[float, float]:
    """(x, y) of a pixel in an image of size (height, width)."""
    pixel = tuple(pixel) if isinstance(pixel, Sequence) else pixel
    height, width = size
    if not isinstance(pixel, tuple) or len(pixel) != 2 or not all(map(_is_number, pixel)):
        raise ValueError(f"`{name}` must be a pair of numbers (x, y), got {pixel!r}")
    x, y = map(float, pixel)
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"`{name}` (x, y) must lie in the image, 0 <= x < {width} and 0 <= y < {height}, got ({x:g}, {y:g})"
        )
    return x, y


def _nearest_cell(x: float, y: float, stride: int, extent: Sequence[int]) -> tuple[int, int]:
    """(row, column) of the map position nearest to a pixel."""
    return tuple(min(int(value / stride + 0.5), size - 1) for value, size in zip((y, x), extent, strict=True))


def _checked_stages(stages: int | Sequence[int] | None, number: int) -> list[int]:
    """The wanted stages in increasing order."""
    if stages is None:
        return list(range(1, number + 1))
    wanted = [stages] if isinstance(stages, int) else list(stages) if isinstance(stages, Sequence) else [stages]
    if not wanted or not all(isinstance(s, int) and not isinstance(s, bool) and 1 <= s <= number for s in wanted):
        raise ValueError(f"`stages` must be one or several of 1 to {number}, got {stages!r}")
    return sorted(set(wanted))


__all__ = ["LayerSampling", "ReceptiveField", "count_flops", "effective_receptive_field", "sampling_points"]
