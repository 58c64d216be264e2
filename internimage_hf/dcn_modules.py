# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""The modules `DCNv3` and `DCNv4` of the official code, as drop-in replacements: feature maps in, feature maps out.

Constructor arguments and state-dict names are those of `DCNv3` (classification/ops_dcnv3/modules/dcnv3.py in
OpenGVLab/InternImage) and `DCNv4` (DCNv4_op/DCNv4/modules/dcnv4.py in OpenGVLab/DCNv4), so that a program replaces an import
and loads its weights. They run on every device and for every batch, dtype, stride and kernel size.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .compatibility import hide_layout, show_layout
from .dcnv3 import dcnv3_softmax
from .dcnv4 import dcnv4, padded_channels


_ACTIVATIONS = {"GELU": nn.GELU, "ReLU": nn.ReLU, "SiLU": nn.SiLU}


class _ChannelsLast(nn.Module):
    """(N, C, H, W) -> (N, H, W, C), with `hide_layout`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hide_layout(hidden_states.permute(0, 2, 3, 1))


class _DeformableConvolution(nn.Module):
    """The arguments that both modules have, and what they do with them."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int,
        pad: int,
        dilation: int,
        group: int,
        offset_scale: float,
        dw_kernel_size: int | None,
        center_feature_scale: bool,
        remove_center: bool,
    ):
        super().__init__()
        for name, value, minimum in (
            ("channels", channels, 1),
            ("kernel_size", kernel_size, 1),
            ("stride", stride, 1),
            ("pad", pad, 0),
            ("dilation", dilation, 1),
            ("group", group, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"`{name}` must be an int of at least {minimum}, got {value!r}")
        if channels % group:
            raise ValueError(f"`group` must divide the {channels} channels, got {group}")
        if dw_kernel_size is not None and (
            not isinstance(dw_kernel_size, int) or dw_kernel_size < 1 or not dw_kernel_size % 2
        ):
            raise ValueError(f"`dw_kernel_size` must be an odd positive int or None, got {dw_kernel_size!r}")
        if remove_center and (kernel_size % 2 == 0 or kernel_size == 1):
            raise ValueError(f"`kernel_size` must be odd and above 1 with `remove_center`, got {kernel_size}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.pad = pad
        self.dilation = dilation
        self.group = group
        self.group_channels = channels // group
        self.offset_scale = offset_scale
        self.dw_kernel_size = dw_kernel_size
        self.center_feature_scale = center_feature_scale
        self.remove_center = int(remove_center)
        self.points = kernel_size * kernel_size - self.remove_center
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))

    def _options(self) -> dict:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.pad,
            "dilation": self.dilation,
            "groups": self.group,
            "offset_scale": self.offset_scale,
            "remove_center": bool(self.remove_center),
        }

    def _check_channels(self, input: torch.Tensor, shapes: str) -> None:
        if input.shape[-1] != self.channels:
            raise ValueError(
                f"`input` must have the shape {shapes} with {self.channels} channels, got {tuple(input.shape)}"
            )

    def _at_centers(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """For each output pixel the input pixel under the kernel's centre: (N, H, W, C) -> (N, H_out, W_out, C).

        Without stride, and with the padding that keeps the size, that is the map itself. A centre in the padding takes the
        nearest pixel.
        """
        half = self.dilation * (self.kernel_size - 1) // 2
        for axis in (1, 2):
            size = hidden_states.shape[axis]
            size_out = (size + 2 * self.pad - self.dilation * (self.kernel_size - 1) - 1) // self.stride + 1
            if (self.stride, self.pad, size_out) != (1, half, size):
                centers = torch.arange(max(size_out, 0), device=hidden_states.device) * self.stride - self.pad + half
                hidden_states = hidden_states.index_select(axis, centers.clamp(0, size - 1))
        return hidden_states

    def _blend(self, output: torch.Tensor, value: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Mixes each group of the output with that of the value, by a gate that the query gives (centre feature scale)."""
        gate = F.linear(query, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias).sigmoid()
        gate = gate.repeat_interleave(self.group_channels, dim=-1)
        return output * (1 - gate) + self._at_centers(value) * gate

    def extra_repr(self) -> str:
        names = ("channels", "kernel_size", "stride", "pad", "dilation", "group", "offset_scale", "remove_center")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _initialise(zeros: Sequence[nn.Linear], projections: Sequence[nn.Linear]) -> None:
    """As the authors do: layers of offsets and mask zero, projections Xavier-uniform, biases zero."""
    for layer in (*zeros, *projections):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for layer in zeros:
        nn.init.zeros_(layer.weight)
    for layer in projections:
        nn.init.xavier_uniform_(layer.weight)


class DCNv3(_DeformableConvolution):
    """Deformable convolution v3 with its projections, after the official module of that name.

    Args:
        channels: of input and output.
        kernel_size: of the sampling grid.
        dw_kernel_size: of the depth-wise convolution that gives offsets and mask, odd; `kernel_size` if None.
        stride, pad, dilation: of the sampling grid.
        group: number of groups of channels that share offsets and mask. It divides the channels.
        offset_scale: factor of the grid and of the offsets.
        act_layer: "GELU", "ReLU" or "SiLU", after the depth-wise convolution.
        norm_layer: "LN" or "BN", after the depth-wise convolution.
        center_feature_scale: blends each group with its projected input by a learned gate.
        remove_center: leaves the kernel's centre out.

    Raises:
        ValueError: if an argument is out of range. The message names it.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
    ):
        super().__init__(
            channels,
            kernel_size,
            stride,
            pad,
            dilation,
            group,
            offset_scale,
            kernel_size if dw_kernel_size is None else dw_kernel_size,
            center_feature_scale,
            remove_center,
        )
        if norm_layer not in ("LN", "BN"):
            raise ValueError(f'`norm_layer` must be "LN" or "BN", got {norm_layer!r}')
        if act_layer not in _ACTIVATIONS:
            raise ValueError(f"`act_layer` must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {act_layer!r}")
        size = self.dw_kernel_size
        norm = [nn.BatchNorm2d(channels), _ChannelsLast()]
        if norm_layer == "LN":
            norm = [_ChannelsLast(), nn.LayerNorm(channels, eps=1e-6)]
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels),
            nn.Sequential(*norm),
            _ACTIVATIONS[act_layer](),
        )
        self.offset = nn.Linear(channels, group * self.points * 2)
        self.mask = nn.Linear(channels, group * self.points)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        _initialise((self.offset, self.mask), (self.input_proj, self.output_proj))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, H, W, C) -> (N, H_out, W_out, C).

        Raises:
            ValueError: if the input has another shape, or is too small for the kernel.
        """
        if input.ndim != 4:
            raise ValueError(f"`input` must have the shape (N, H, W, C), got {tuple(input.shape)}")
        self._check_channels(input, "(N, H, W, C)")
        value = self.input_proj(input)
        query = self._at_centers(show_layout(self.dw_conv(input.permute(0, 3, 1, 2))))
        output = dcnv3_softmax(value, self.offset(query), self.mask(query), **self._options())
        if self.center_feature_scale:
            output = self._blend(output, value, query)
        return self.output_proj(output)


class DCNv4(_DeformableConvolution):
    """Deformable convolution v4 with its projections, after the official module of that name.

    Args:
        channels: of input and output.
        kernel_size, stride, pad, dilation: of the sampling grid.
        group: number of groups of channels that share offsets and weights. It divides the channels.
        offset_scale: factor of the grid and of the offsets.
        dw_kernel_size: of the depth-wise convolution before the layer of offsets and weights, odd; none if None.
        center_feature_scale: blends each group with its projected input by a learned gate.
        remove_center: leaves the kernel's centre out.
        output_bias: bias of the output projection.
        without_pointwise: leaves both projections out.
        **kwargs: have no effect, as in the official module. A warning names them.

    Raises:
        ValueError: if an argument is out of range. The message names it.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        **kwargs,
    ):
        super().__init__(
            channels,
            kernel_size,
            stride,
            pad,
            dilation,
            group,
            offset_scale,
            dw_kernel_size,
            center_feature_scale,
            remove_center,
        )
        if kwargs:
            warnings.warn(f"DCNv4 ignores the arguments {', '.join(map(repr, kwargs))}", stacklevel=2)
        self.without_pointwise = without_pointwise
        if size := dw_kernel_size:
            self.offset_mask_dw = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
        self.offset_mask = nn.Linear(channels, padded_channels(group, self.points))
        if not without_pointwise:
            self.value_proj = nn.Linear(channels, channels)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        _initialise((self.offset_mask,), () if self.without_pointwise else (self.value_proj, self.output_proj))

    def forward(self, input: torch.Tensor, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """(N, H*W, C) -> (N, H_out*W_out, C), or (N, H, W, C) -> (N, H_out, W_out, C).

        Args:
            input: the map, with or without its pixels in one dimension.
            shape: (H, W) of an input of three dimensions; that of a square if None.

        Raises:
            ValueError: if the input has another shape, or is too small for the kernel.
        """
        if input.ndim not in (3, 4):
            raise ValueError(f"`input` must have the shape (N, H*W, C) or (N, H, W, C), got {tuple(input.shape)}")
        self._check_channels(input, "(N, H*W, C) or (N, H, W, C)")
        hidden_states = input
        if input.ndim == 3:
            pixels = input.shape[1]
            height, width = shape if shape is not None else (int(pixels**0.5 + 0.5),) * 2
            if height * width != pixels:
                given = "is no square, and none was given" if shape is None else f"got ({height}, {width})"
                raise ValueError(f"`shape` must be the height and width of the {pixels} pixels of `input`: {given}")
            hidden_states = input.unflatten(1, (height, width))
        elif shape is not None and tuple(shape) != tuple(input.shape[1:3]):
            raise ValueError(
                f"`shape` must be the height and width of `input`, {tuple(input.shape[1:3])}, got {shape}"
            )
        value = hidden_states if self.without_pointwise else self.value_proj(hidden_states)
        query = hidden_states
        if self.dw_kernel_size is not None:
            query = self.offset_mask_dw(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        output = dcnv4(value, self.offset_mask(self._at_centers(query)), **self._options())
        if self.center_feature_scale:
            output = self._blend(output, value, output)
        if not self.without_pointwise:
            output = self.output_proj(output)
        return output.flatten(1, 2) if input.ndim == 3 else output


__all__ = ["DCNv3", "DCNv4"]
