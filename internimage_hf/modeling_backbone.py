# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""The backbone within a head, and the base class of the heads."""

from torch import nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel

from .configuration_internimage import InternImageConfig
from .configuration_internimage_composite import InternImageCompositeConfig
from .modeling_internimage import InternImageBackbone, InternImagePreTrainedModel
from .modeling_internimage_composite import InternImageCompositeBackbone


# By the names of their configurations' classes. transformers imports the code of a local folder once for its configuration and
# again for its model, so that the configuration's class is another one than that imported here.
_OWN = {
    InternImageConfig.__name__: InternImageBackbone,
    InternImageCompositeConfig.__name__: InternImageCompositeBackbone,
}


def load_backbone(config: PreTrainedConfig) -> nn.Module:
    """A backbone with fresh weights. InternImage's own need no registration with AutoBackbone."""
    own = _OWN.get(type(config).__name__)
    return own(config) if own is not None else AutoBackbone.from_config(config)


class InternImageHeadPreTrainedModel(PreTrainedModel):
    """What transformers asks of the class of a model on a backbone, or of a part of such a model."""

    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def set_use_kernels(self, use_kernels: bool, *args, **kwargs) -> None:
        backbone = getattr(self, "backbone", None)  # encoder and decoder have none
        if isinstance(backbone, InternImagePreTrainedModel):
            backbone.set_use_kernels(use_kernels, *args, **kwargs)  # it offers its operator's kernel
        super().set_use_kernels(use_kernels, *args, **kwargs)


__all__ = ["InternImageHeadPreTrainedModel", "load_backbone"]
