# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""CB-InternImage: a composite backbone (CBNetV2, https://arxiv.org/abs/2107.00420) of two InternImages.

Known as: `CBInternImage` in detection/mmdet_custom/models/backbones/cbnet.py of OpenGVLab/InternImage.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .compatibility import is_sharded_away, none_is_unset
from .configuration_internimage_composite import InternImageCompositeConfig
from .modeling_internimage import InternImageEncoder, InternImagePreTrainedModel, InternImageStem


@dataclass
class InternImageCompositeBackboneOutput(BackboneOutput):
    """
    Args:
        auxiliary_feature_maps: the assisting encoder's maps of the same stages as `feature_maps`, the lead's. A head that
            trains as the authors do computes its loss on these as well, with the weight 0.5.
    """

    auxiliary_feature_maps: tuple[torch.FloatTensor, ...] | None = None


class InternImageCompositeBackbone(BackboneMixin, InternImagePreTrainedModel):
    """Two InternImages on one stem: the maps of the assisting encoder are added to the inputs of the lead's stages.

    Stage i of the lead gets `x + scale_i * sum over j >= i of upsample(connection_ij(assistant_j))`, where x is the stem's
    map or the downsampled map of the stage before, and the connection of i with itself is the identity.
    """

    config: InternImageCompositeConfig
    config_class = InternImageCompositeConfig
    base_model_prefix = "internimage_composite"
    has_attentions = False

    def __init__(self, config: InternImageCompositeConfig):
        super().__init__(config)
        sizes = config.hidden_sizes
        self.stem = InternImageStem(config)
        self.assistant = InternImageEncoder(config)
        self.lead = InternImageEncoder(config)
        self.connections = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(lower, size, kernel_size=1) for lower in sizes[i + 1 :])
            for i, size in enumerate(sizes)
        )
        self.connection_scales = nn.ParameterList(torch.empty(size) for size in sizes)
        self.num_features = [sizes[0], *sizes]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the authors do: the scales are zero, so that the lead begins as an InternImage by itself."""
        super()._init_weights(module)
        if isinstance(module, nn.ParameterList) and not is_sharded_away(module):
            for scale in module:
                init.zeros_(scale)

    def _additions(self, stage_maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """What each stage of the lead gets from the assistant's maps."""
        additions = []
        for i, (connections, scale) in enumerate(zip(self.connections, self.connection_scales, strict=True)):
            total = stage_maps[i]
            for connection, lower in zip(connections, stage_maps[i + 1 :], strict=True):
                total = total + nn.functional.interpolate(connection(lower), size=total.shape[2:], mode="nearest")
            # The released weights were trained with scales rounded to float16; the gradient passes by the rounding.
            rounded = scale + (scale.half().to(scale.dtype) - scale).detach()
            additions.append(total * rounded[:, None, None])
        return additions

    @none_is_unset
    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.FloatTensor, **kwargs) -> InternImageCompositeBackboneOutput:
        r"""
        Args:
            pixel_values: normalised images, (batch, num_channels, height, width), of any height and width.
            output_hidden_states (`bool`, *optional*): whether to return `hidden_states`.
            return_dict (`bool`, *optional*): whether to return an output object and not a tuple.

        Returns:
            `feature_maps`, a tuple with one map of the lead per entry of `config.out_features`, in the order of
            `config.stage_names`; `auxiliary_feature_maps`, those of the assistant; and on request `hidden_states`, the
            lead's.
        """
        stem_map = self.stem(pixel_values)
        assistant = self.assistant(stem_map, return_dict=True, **{**kwargs, "output_hidden_states": False})
        lead = self.lead(stem_map, additions=self._additions(assistant.stage_maps), return_dict=True, **kwargs)

        def selected(stage_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            maps = zip(self.stage_names, (stem_map, *stage_maps), strict=True)
            return tuple(feature_map for name, feature_map in maps if name in self.out_features)

        return InternImageCompositeBackboneOutput(
            feature_maps=selected(lead.stage_maps),
            hidden_states=lead.hidden_states,
            auxiliary_feature_maps=selected(assistant.stage_maps),
        )


__all__ = ["InternImageCompositeBackbone", "InternImageCompositeBackboneOutput"]
