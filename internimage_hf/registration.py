# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: nothing. Out: transformers' Auto classes load `model_type: internimage`."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

# Imported from its own module: without torchvision, `transformers.AutoImageProcessor` of 5.17 is a placeholder.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_internimage import InternImageConfig
from .image_processing_internimage import InternImageImageProcessor
from .modeling_internimage import InternImageBackbone, InternImageForImageClassification, InternImageModel


def register_auto_classes() -> None:
    """Registers with AutoConfig, AutoModel, AutoModelForImageClassification, AutoBackbone and AutoImageProcessor.

    May be called more than once.
    """
    AutoConfig.register(InternImageConfig.model_type, InternImageConfig, exist_ok=True)
    AutoModel.register(InternImageConfig, InternImageModel, exist_ok=True)
    AutoModelForImageClassification.register(InternImageConfig, InternImageForImageClassification, exist_ok=True)
    AutoBackbone.register(InternImageConfig, InternImageBackbone, exist_ok=True)
    AutoImageProcessor.register(
        InternImageConfig, image_processor_classes={"pil": InternImageImageProcessor}, exist_ok=True
    )
