# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Configuration of CB-InternImage: two InternImage backbones, the second fed by the first."""

from .configuration_internimage import InternImageConfig


class InternImageCompositeConfig(InternImageConfig):
    r"""
    Configuration of an [`InternImageCompositeBackbone`]: that of the InternImage which both of its parts are.

    `InternImageCompositeConfig.from_variant("h", use_clip_projector=False)` is the released CB-InternImage-H. Every field
    is as in [`InternImageConfig`]; those of the classifier have no effect.
    """

    model_type = "internimage_composite"


__all__ = ["InternImageCompositeConfig"]
