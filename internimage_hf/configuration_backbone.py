# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""The backbone's configuration within that of a head."""

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig

from .configuration_internimage import InternImageConfig
from .configuration_internimage_composite import InternImageCompositeConfig


def backbone_config_from(value: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a head's backbone, from a dictionary too, of any `model_type` that AutoBackbone knows.

    InternImage's own are found without the Auto classes: where this file came with a checkpoint, nothing has registered them.

    Raises:
        ValueError: if `value` is neither a configuration nor a dictionary with a known `model_type`.
    """
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"`backbone_config` must be a configuration or a dictionary, got {type(value).__name__}")
    model_type = value.get("model_type")
    own = {config_class.model_type: config_class for config_class in (InternImageConfig, InternImageCompositeConfig)}
    if model_type not in own and model_type not in CONFIG_MAPPING:
        raise ValueError(f"`backbone_config` must have the `model_type` of a backbone, got {model_type!r}")
    return (own.get(model_type) or CONFIG_MAPPING[model_type]).from_dict(value)


__all__ = ["backbone_config_from"]
