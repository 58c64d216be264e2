# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""InternImage (DCNv3) and FlashInternImage (DCNv4): images in; feature maps, pooled features or logits out.

Papers: https://arxiv.org/abs/2211.05778 (InternImage, CVPR 2023), https://arxiv.org/abs/2401.06197 (DCNv4, CVPR 2024).
Official code and weights: https://github.com/OpenGVLab/InternImage and https://github.com/OpenGVLab/DCNv4, MIT. This is an
independent implementation of the same arithmetic; `checkpoint.py` translates the official names. "Official" in a docstring
names the corresponding class of classification/models/intern_image.py (FlashInternImage: flash_intern_image.py), unless
another file is given.

Feature maps are (batch, channels, height, width) between modules and (batch, height, width, channels) within a stage. Compiled
code has one more dimension of size 1 before the channels of the latter (`hide_layout` in compatibility.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .compatibility import (
    LoadsOfficialNames,
    channels_last,
    halve,
    hide_layout,
    is_sharded_away,
    none_is_unset,
    show_layout,
)
from .configuration_internimage import InternImageConfig
from .dcnv3 import chosen_backend, dcnv3, dcnv3_softmax, is_compiled
from .kernel_loader import offer_kernel_layer


class InternImageDropPath(nn.Module):
    """Stochastic depth: drops a branch for whole samples and rescales the others (https://arxiv.org/abs/1603.09382).

    Official: timm's `DropPath`.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1.0 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep_prob).div_(keep_prob)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class InternImageLayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (batch, channels, height, width) map. Official: `build_norm_layer` with "LN"."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = show_layout(super().forward(hide_layout(hidden_states.permute(0, 2, 3, 1))))
        # `contiguous` copies nothing: the result is dense already. Inductor needs the call to fuse the permutations of maps
        # with a symbolic height and width.
        return hidden_states.contiguous().permute(0, 3, 1, 2)


class InternImageTokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the last dimension of (..., channels). Official: `build_norm_layer` with "BN"."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.flatten(0, -2)).view_as(hidden_states)


def _norm2d(config: InternImageConfig, channels: int) -> nn.Module:
    if config.norm_layer == "BN":
        return nn.BatchNorm2d(channels, eps=config.batch_norm_eps)
    return InternImageLayerNorm2d(channels, eps=config.layer_norm_eps)


def _token_norm(config: InternImageConfig, channels: int) -> nn.Module:
    if config.norm_layer == "BN":
        return InternImageTokenBatchNorm(channels, eps=config.batch_norm_eps)
    return nn.LayerNorm(channels, eps=config.layer_norm_eps)


def _uses_res_post_norm(config: InternImageConfig) -> bool:
    # The official code tests `res_post_norm` last: only without layer scale, and only if `post_norm` is false.
    return config.res_post_norm and not config.post_norm and config.layer_scale_init_value is None


def _linear(in_features: int, out_features: int, initialization: str, bias: bool = True) -> nn.Linear:
    """An `nn.Linear` with an attribute for `_init_weights`: its `initialization` is "zeros" or "xavier"."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.initialization = initialization
    return linear


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is the product with its weight plus its bias, and nothing else."""
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__  # accelerate replaces it, for instance where the weights are offloaded
        and type(layer.weight) is nn.Parameter
        and layer.bias is not None
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )


def _sampling_parameters(offset: nn.Linear, mask: nn.Linear, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of both layers for a query, each (N, H, W, its out_features).

    Compiled code has one matrix product, whose columns are both outputs and zeros up to a multiple of 8. The query is read
    once, and the rows are aligned: matrix products on GPUs need that, and the compiler would pad both products otherwise. The
    operator reads the columns in place. Layers that are wrapped, quantised, sharded, offloaded or have hooks are called as they
    are.
    """
    in_one = is_compiled() and not _has_any_global_hook()
    in_one = in_one and all(_is_plain(layer) and layer.weight.dtype == offset.weight.dtype for layer in (offset, mask))
    if not in_one:
        return offset(query), mask(query)
    sizes = [offset.out_features, mask.out_features, -(offset.out_features + mask.out_features) % 8]
    weight = torch.cat([offset.weight, mask.weight, offset.weight.new_zeros(sizes[2], offset.in_features)])
    bias = torch.cat([offset.bias, mask.bias, offset.bias.new_zeros(sizes[2])])
    return nn.functional.linear(query, weight, bias).split(sizes, -1)[:2]


class InternImageStem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with a norm: (N, 3, H, W) -> (N, C1, H/4, W/4). Official: `StemLayer`."""

    def __init__(self, config: InternImageConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.conv1 = nn.Conv2d(config.num_channels, config.channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = _norm2d(config, config.channels // 2)
        self.activation = ACT2FN[config.hidden_act]
        self.conv2 = nn.Conv2d(config.channels // 2, config.channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = _norm2d(config, config.channels)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` must have the shape (batch, channels, height, width), got {tuple(pixel_values.shape)}"
            )
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` must have {self.num_channels} channels (`config.num_channels`), "
                f"got {pixel_values.shape[1]} in the shape {tuple(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`pixel_values` must have a floating-point dtype, got {pixel_values.dtype}; "
                "the image processor rescales and normalises images"
            )
        # All later maps are channels-last. The image has the fewest channels, so the conversion is cheapest here.
        pixel_values = channels_last(pixel_values.to(self.conv1.weight.dtype))
        hidden_states = halve(self.conv1, pixel_values)  # (N, C1/2, H/2, W/2)
        hidden_states = self.activation(self.norm1(hidden_states))
        hidden_states = self.norm2(halve(self.conv2, hidden_states))  # (N, C1, H/4, W/4)
        return self.dropout(hidden_states)


class InternImageDownsample(nn.Module):
    """A 3x3 convolution of stride 2 and a norm: (N, C, H, W) -> (N, 2C, H/2, W/2). Official: `DownsampleLayer`."""

    def __init__(self, config: InternImageConfig, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = _norm2d(config, 2 * channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(halve(self.conv, hidden_states))


@use_kernel_forward_from_hub("DCNv3")
class InternImageDeformableSampling(nn.Module):
    """The DCNv3 operator with the softmax of the modulation mask (section 3.1, equation 2). It has no parameters.

    `from_pretrained(..., use_kernels=True)` replaces this layer by that of a compiled kernel. Official: `DCNv3Function`
    (classification/ops_dcnv3/functions/dcnv3_func.py).
    """

    def forward(
        self,
        input: torch.Tensor,
        offset: torch.Tensor,
        mask: torch.Tensor,
        groups: int,
        offset_scale: float = 1.0,
        remove_center: bool = False,
    ) -> torch.Tensor:
        return dcnv3_softmax(
            input, offset, mask, groups=groups, offset_scale=offset_scale, remove_center=remove_center
        )


@use_kernel_forward_from_hub("DCNv4")
class InternImageDCNv4Sampling(nn.Module):
    """The DCNv4 operator: DCNv3 without the softmax. It has no parameters, and `use_kernels=True` replaces it as well.

    Official: `DCNv4Function` (DCNv4_op/DCNv4/functions/dcnv4_func.py).
    """

    def forward(
        self, input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int, offset_scale: float = 1.0
    ) -> torch.Tensor:
        return dcnv3(input, offset, mask, groups=groups, offset_scale=offset_scale)


class InternImageDCNv3(nn.Module):
    """Deformable convolution v3: a depth-wise convolution gives sampling offsets and modulation mask, then it samples.

    Input and output are (batch, height, width, channels). Official: `DCNv3` (classification/ops_dcnv3/modules/dcnv3.py).
    """

    def __init__(self, config: InternImageConfig, channels: int, groups: int):
        super().__init__()
        self.groups = groups
        self.offset_scale = config.offset_scale
        self.remove_center = config.remove_center
        points = 9 - config.remove_center
        dw_kernel_size = config.dw_kernel_size or 3

        self.dw_conv = nn.Conv2d(channels, channels, dw_kernel_size, padding=dw_kernel_size // 2, groups=channels)
        self.dw_norm = _norm2d(config, channels)
        self.activation = ACT2FN[config.hidden_act]
        self.offset = _linear(channels, groups * points * 2, "zeros")
        self.mask = _linear(channels, groups * points, "zeros")
        self.input_proj = _linear(channels, channels, "xavier")
        self.output_proj = _linear(channels, channels, "xavier", bias=config.dcn_output_bias)
        self.center_feature_scale_proj = _linear(channels, groups, "zeros") if config.center_feature_scale else None
        self.sampling = InternImageDeformableSampling()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        value = show_layout(self.input_proj(hidden_states))

        query = self.dw_norm(self.dw_conv(show_layout(hidden_states).permute(0, 3, 1, 2)))
        query = self.activation(query).permute(0, 2, 3, 1)  # (N, H, W, C)

        sampled = self.sampling(
            value,
            *_sampling_parameters(self.offset, self.mask, query),
            groups=self.groups,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )
        if self.center_feature_scale_proj is not None:
            gate = self.center_feature_scale_proj(query).sigmoid().unsqueeze(-1)  # (N, H, W, G, 1)
            sampled, value = (tensor.unflatten(-1, (self.groups, -1)) for tensor in (sampled, value))
            sampled = (sampled * (1 - gate) + value * gate).flatten(-2)
        return self.output_proj(sampled).view_as(hidden_states)


class InternImageDCNv4(nn.Module):
    """Deformable convolution v4: the modulation mask has no softmax, and the depth-wise convolution is optional.

    Input and output are (batch, height, width, channels). Official: `DCNv4` (DCNv4_op/DCNv4/modules/dcnv4.py); its packed
    layer `offset_mask` is the two layers `offset` and `mask` here, its `value_proj` is `input_proj`.
    """

    def __init__(self, config: InternImageConfig, channels: int, groups: int):
        super().__init__()
        self.groups = groups
        self.offset_scale = config.offset_scale
        self.dw_conv = None
        if size := config.dw_kernel_size:
            self.dw_conv = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
        self.offset = _linear(channels, groups * 9 * 2, "zeros")
        self.mask = _linear(channels, groups * 9, "zeros")
        self.input_proj = _linear(channels, channels, "xavier")
        self.output_proj = _linear(channels, channels, "xavier", bias=config.dcn_output_bias)
        self.sampling = InternImageDCNv4Sampling()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query = show_layout(hidden_states)
        if self.dw_conv is not None:
            query = self.dw_conv(query.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        sampled = self.sampling(
            show_layout(self.input_proj(hidden_states)),
            *_sampling_parameters(self.offset, self.mask, query),
            groups=self.groups,
            offset_scale=self.offset_scale,
        )
        return self.output_proj(sampled).view_as(hidden_states)


class InternImageMLP(nn.Module):
    """Feed-forward network over the last dimension. Official: `MLPLayer`."""

    def __init__(self, config: InternImageConfig, channels: int):
        super().__init__()
        hidden_channels = int(channels * config.mlp_ratio)
        self.fc1 = nn.Linear(channels, hidden_channels)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_channels, channels, bias=config.mlp_fc2_bias)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class InternImageLayer(GradientCheckpointingLayer):
    """A deformable convolution and a feed-forward network, each with norm, layer scale, drop path and residual connection.

    Input and output are (batch, height, width, channels). Official: `InternImageLayer`.
    """

    def __init__(self, config: InternImageConfig, channels: int, groups: int, drop_path: float):
        super().__init__()
        self.layer_scale_init_value = config.layer_scale_init_value
        self.post_norm = config.post_norm
        has_layer_scale = config.layer_scale_init_value is not None

        self.norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.dcn = (InternImageDCNv4 if config.dcn_version == 4 else InternImageDCNv3)(config, channels, groups)
        self.norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = InternImageMLP(config, channels)
        self.drop_path = InternImageDropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.layer_scale1 = nn.Parameter(torch.empty(channels)) if has_layer_scale else None
        self.layer_scale2 = nn.Parameter(torch.empty(channels)) if has_layer_scale else None
        if _uses_res_post_norm(config):
            self.res_post_norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
            self.res_post_norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        else:
            self.res_post_norm1 = self.res_post_norm2 = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self._add_branch(hidden_states, self.dcn, self.norm1, self.res_post_norm1, self.layer_scale1)
        return self._add_branch(hidden_states, self.mlp, self.norm2, self.res_post_norm2, self.layer_scale2)

    def _add_branch(
        self,
        hidden_states: torch.Tensor,
        block: nn.Module,
        norm: nn.Module,
        res_post_norm: nn.Module | None,
        layer_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        branch = norm(block(hidden_states)) if self.post_norm else block(norm(hidden_states))
        if res_post_norm is not None:
            branch = res_post_norm(branch)
        branch = self.drop_path(branch)
        if layer_scale is None:
            return hidden_states + branch
        return torch.addcmul(hidden_states, branch, layer_scale)  # scaled and added in one pass over the map


class InternImageStage(nn.Module):
    """The layers of one resolution, and the norms between and after them: (N, C, H, W) -> (N, C, H, W).

    Official: `InternImageBlock`, which also holds the downsample layer.
    """

    def __init__(self, config: InternImageConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        channels = config.hidden_sizes[stage]
        self.layers = nn.ModuleList(
            InternImageLayer(config, channels, config.groups[stage], drop_path) for drop_path in drop_path_rates
        )
        # The official code counts stages from 0: "level 2" is the third stage.
        self.post_norm_block_ids = (config.level2_post_norm_block_ids or []) if stage == 2 else []
        self.post_norms = nn.ModuleList(
            nn.LayerNorm(channels, eps=config.layer_norm_eps) for _ in self.post_norm_block_ids
        )
        has_norm = not config.post_norm or config.center_feature_scale
        self.norm = nn.LayerNorm(channels, eps=config.layer_norm_eps) if has_norm else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hide_layout(hidden_states.permute(0, 2, 3, 1))  # (N, H, W, C)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states)
            if i in self.post_norm_block_ids:
                hidden_states = self.post_norms[self.post_norm_block_ids.index(i)](hidden_states)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return show_layout(hidden_states).permute(0, 3, 1, 2)  # (N, C, H, W)


@dataclass
class InternImageEncoderOutput(ModelOutput):
    """
    Args:
        last_hidden_state: map of the last stage, (batch, channels, height, width).
        stage_maps: maps of all stages, each before its downsample layer.
        hidden_states: the stem's map and those of all stages, on request.
    """

    last_hidden_state: torch.FloatTensor | None = None
    stage_maps: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class InternImageAveragePooler(nn.Module):
    """The head of T to XL: 1x1 convolution, BatchNorm, activation, average over the map -> (N, int(C4 * cls_scale)).

    Official: `conv_head` and `avgpool` of `InternImage`.
    """

    def __init__(self, config: InternImageConfig):
        super().__init__()
        self.hidden_size = int(config.hidden_sizes[-1] * config.cls_scale)
        self.conv = nn.Conv2d(config.hidden_sizes[-1], self.hidden_size, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(self.hidden_size, eps=config.batch_norm_eps)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, stage_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.activation(self.norm(self.conv(stage_maps[-1]))).mean((2, 3))


class InternImageAttentionPool(nn.Module):
    """Cross-attention from the mean token to all tokens: (N, tokens, C) -> (N, C_out).

    Official: `AttentionPoolingBlock` and `CrossAttention`.
    """

    num_heads = 16

    def __init__(self, config: InternImageConfig, channels: int, out_channels: int):
        super().__init__()
        self.query_norm = _token_norm(config, channels)
        self.key_norm = _token_norm(config, channels)
        self.value_norm = _token_norm(config, channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, out_channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(norm(hidden_states))
            .unflatten(-1, (self.num_heads, -1))
            .transpose(1, 2)  # (N, heads, ., C/heads)
            for projection, norm, hidden_states in (
                (self.query, self.query_norm, tokens.mean(1, keepdim=True)),
                (self.key, self.key_norm, tokens),
                (self.value, self.value_norm, tokens),
            )
        )
        pooled = nn.functional.scaled_dot_product_attention(query, key, value)  # (N, heads, 1, C/heads)
        return self.output_proj(pooled.flatten(1))


class InternImageClipProjector(nn.Module):
    """The head of H and G: stage 4 at the resolution of stage 3 plus stage 3, pooled by attention -> (N, 768).

    Official: `InternImage.forward_clip_projector`.
    """

    hidden_size = 768
    embed_size = 1024

    def __init__(self, config: InternImageConfig):
        super().__init__()
        self.stage4_proj = nn.Conv2d(config.hidden_sizes[3], self.embed_size * 4, kernel_size=1)
        self.pixel_shuffle = nn.PixelShuffle(2)
        self.stage3_proj = nn.Conv2d(config.hidden_sizes[2], self.embed_size, kernel_size=1)
        self.attention = InternImageAttentionPool(config, self.embed_size, self.hidden_size)
        self.norm = _token_norm(config, self.hidden_size)

    def forward(self, stage_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        stage3 = self.stage3_proj(stage_maps[2])  # (N, 1024, H/16, W/16)
        stage4 = self.pixel_shuffle(self.stage4_proj(stage_maps[3]))
        # Where stage 3 has an odd size, stage 4 has one row or column more. The official code fails there.
        stage4 = stage4[:, :, : stage3.shape[2], : stage3.shape[3]]
        tokens = (stage3 + stage4).flatten(2).transpose(1, 2)
        return self.norm(self.attention(tokens))


class InternImagePreTrainedModel(LoadsOfficialNames, PreTrainedModel):
    """Initialisation, loading of pretrained weights, and the attributes that transformers reads from a model class."""

    config: InternImageConfig
    config_class = InternImageConfig
    base_model_prefix = "internimage"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternImageLayer"]
    _supports_sdpa = True

    def __init__(self, config: InternImageConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.res_post_norm and not _uses_res_post_norm(config):
            # The official code builds and saves these norms even if it does not use them.
            self._ignore_unexpected(r"\.res_post_norm[12]\.")

    def _ignore_unexpected(self, pattern: str) -> None:
        """Checkpoint entries that match `pattern` are ignored without a warning, for this instance."""
        self._keys_to_ignore_on_load_unexpected = [*(self._keys_to_ignore_on_load_unexpected or ()), pattern]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises one module's own parameters.

        Offsets, masks and centre gates are zero, projections of the deformable convolutions are Xavier-uniform,
        convolutions are as in PyTorch, other linear layers are normal. Official: `InternImage._init_weights` and
        `_init_deform_weights`. transformers calls this only for modules that own a parameter, so nothing here may depend on
        the parent module.
        """
        if is_sharded_away(module):
            return
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            if getattr(module, "initialization", None) == "zeros":
                init.zeros_(module.weight)
            elif getattr(module, "initialization", None) == "xavier":
                init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, InternImageTokenBatchNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, InternImageLayer) and module.layer_scale1 is not None:
            init.constant_(module.layer_scale1, module.layer_scale_init_value)
            init.constant_(module.layer_scale2, module.layer_scale_init_value)

    def set_use_kernels(self, use_kernels: bool, *args, **kwargs) -> None:
        if use_kernels and chosen_backend(None)[0] != "torch":
            offer_kernel_layer(f"DCNv{self.config.dcn_version}", self.device.type)
        super().set_use_kernels(use_kernels, *args, **kwargs)

    def _stem(self) -> InternImageStem:
        base_model = getattr(self, self.base_model_prefix, self)
        if not hasattr(base_model, "stem"):
            raise NotImplementedError(f"{type(self).__name__} has no stem")
        return base_model.stem

    def get_input_embeddings(self) -> nn.Module:
        """The stem's first convolution, to which PEFT and others attach their hooks."""
        return self._stem().conv1

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._stem().conv1 = value


class InternImageEncoder(InternImagePreTrainedModel):
    """The four stages and the downsample layers between them. Official: `levels` of `InternImage`."""

    main_input_name = "hidden_states"
    _can_record_outputs = {"hidden_states": InternImageStage}

    def __init__(self, config: InternImageConfig):
        super().__init__(config)
        num_layers = sum(config.depths)
        if config.drop_path_type == "uniform":
            rates = [config.drop_path_rate] * num_layers
        else:
            rates = torch.linspace(0, config.drop_path_rate, num_layers, device="cpu").tolist()
        starts = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
        self.stages = nn.ModuleList(
            InternImageStage(config, stage, rates[start : start + depth])
            for stage, (start, depth) in enumerate(zip(starts, config.depths, strict=True))
        )
        self.downsamples = nn.ModuleList(
            InternImageDownsample(config, channels) for channels in config.hidden_sizes[:-1]
        )
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, hidden_states: torch.Tensor, additions: list[torch.Tensor] | None = None, **kwargs
    ) -> InternImageEncoderOutput:
        """`additions`, if given, are added to the inputs of the stages, map by map (in a composite backbone)."""
        stage_maps = ()
        for i, stage in enumerate(self.stages):
            if additions is not None:
                hidden_states = hidden_states + additions[i]
            hidden_states = stage(hidden_states)
            stage_maps += (hidden_states,)
            if i < len(self.downsamples):
                hidden_states = self.downsamples[i](hidden_states)
        return InternImageEncoderOutput(last_hidden_state=hidden_states, stage_maps=stage_maps)


class InternImageModel(InternImagePreTrainedModel):
    """InternImage without a classifier. Official: `InternImage.forward_features`.

    Args:
        config: the configuration.
        add_pooling_layer: whether to build the pooler; without it `pooler_output` is None.
    """

    # The classifier of a classification checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: InternImageConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.stem = InternImageStem(config)
        self.encoder = InternImageEncoder(config)
        self.pooler = None
        if add_pooling_layer:
            self.pooler = (
                InternImageClipProjector(config) if config.use_clip_projector else InternImageAveragePooler(config)
            )
        else:
            self._ignore_unexpected(r"^(internimage\.)?pooler\.")
        self.post_init()

    @none_is_unset
    @can_return_tuple
    def forward(
        self, pixel_values: torch.FloatTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        r"""
        Args:
            pixel_values: normalised images, (batch, num_channels, height, width), of any height and width.
            output_hidden_states (`bool`, *optional*): whether to return `hidden_states`.
            return_dict (`bool`, *optional*): whether to return an output object and not a tuple.

        Returns:
            `last_hidden_state` (batch, hidden_sizes[-1], height/32, width/32), `pooler_output` (batch, width of the
            head), and on request `hidden_states`: the maps of the stem and of the four stages.

        Raises:
            ValueError: if `pixel_values` is missing or its shape, channels or dtype are wrong.
        """
        if pixel_values is None:
            raise ValueError("You have to specify `pixel_values`")
        encoder_outputs = self.encoder(self.stem(pixel_values), return_dict=True, **kwargs)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=encoder_outputs.last_hidden_state,
            pooler_output=self.pooler(encoder_outputs.stage_maps) if self.pooler is not None else None,
            hidden_states=encoder_outputs.hidden_states,
        )


class InternImageForImageClassification(InternImagePreTrainedModel):
    """InternImage with a linear classifier on the pooled features. Official: `InternImage`."""

    accepts_loss_kwargs = False

    def __init__(self, config: InternImageConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.internimage = InternImageModel(config)
        hidden_size = self.internimage.pooler.hidden_size
        self.classifier = nn.Linear(hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @none_is_unset
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        r"""
        Args:
            pixel_values: normalised images, (batch, num_channels, height, width), of any height and width.
            labels: (batch,) class indices for cross-entropy; (batch,) or (batch, num_labels) floats for regression
                (mean squared error); (batch, num_labels) floats for several labels per image. `config.problem_type`
                decides, or is set from `num_labels` and the dtype of the labels.
            output_hidden_states (`bool`, *optional*): whether to return `hidden_states`.
            return_dict (`bool`, *optional*): whether to return an output object and not a tuple.

        Returns:
            `loss` if there are labels, `logits` (batch, num_labels), and on request `hidden_states`.
        """
        outputs = self.internimage(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class InternImageBackbone(BackboneMixin, InternImagePreTrainedModel):
    """InternImage as a backbone for detectors and segmenters: the maps of the stages in `config.out_features`.

    Official: `InternImage` (detection/mmdet_custom/models/backbones/intern_image.py).
    """

    has_attentions = False
    # The pooler and the classifier of a classification checkpoint.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^(internimage\.)?pooler\."]

    def __init__(self, config: InternImageConfig):
        super().__init__(config)
        self.stem = InternImageStem(config)
        self.encoder = InternImageEncoder(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.post_init()

    @none_is_unset
    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.FloatTensor, **kwargs) -> BackboneOutput:
        r"""
        Args:
            pixel_values: normalised images, (batch, num_channels, height, width), of any height and width.
            output_hidden_states (`bool`, *optional*): whether to return `hidden_states`.
            return_dict (`bool`, *optional*): whether to return an output object and not a tuple.

        Returns:
            `feature_maps`, a tuple with one map per entry of `config.out_features`, in the order of
            `config.stage_names`, and on request `hidden_states`.
        """
        stem_map = self.stem(pixel_values)
        encoder_outputs = self.encoder(stem_map, return_dict=True, **kwargs)
        maps = zip(self.stage_names, (stem_map, *encoder_outputs.stage_maps), strict=True)
        return BackboneOutput(
            feature_maps=tuple(feature_map for name, feature_map in maps if name in self.out_features),
            hidden_states=encoder_outputs.hidden_states,
        )


__all__ = [
    "InternImageBackbone",
    "InternImageForImageClassification",
    "InternImageModel",
    "InternImagePreTrainedModel",
]
