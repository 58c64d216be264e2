# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""The backbone within a head."""

from torch import nn
from transformers import AutoBackbone, PreTrainedConfig

from .configuration_internimage import InternImageConfig
from .configuration_internimage_composite import InternImageCompositeConfig
from .modeling_internimage import InternImageBackbone
from .modeling_internimage_composite import InternImageCompositeBackbone


_OWN = {InternImageConfig: InternImageBackbone, InternImageCompositeConfig: InternImageCompositeBackbone}


def load_backbone(config: PreTrainedConfig) -> nn.Module:
    """A backbone with fresh weights. InternImage's own need no registration with AutoBackbone."""
    return _OWN[type(config)](config) if type(config) in _OWN else AutoBackbone.from_config(config)


__all__ = ["load_backbone"]
