# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""InternImage for Hugging Face transformers: importing the package makes the Auto classes know `internimage`."""

from .configuration_internimage import InternImageConfig
from .dcnv3 import dcnv3_backend_report, use_dcnv3_backend
from .image_processing_internimage import InternImageImageProcessor
from .kernel_loader import load_dcnv3_kernel
from .modeling_internimage import (
    InternImageBackbone,
    InternImageForImageClassification,
    InternImageModel,
    InternImagePreTrainedModel,
)
from .registration import register_auto_classes
from .remote_code import save_with_remote_code


__version__ = "0.1.0"

__all__ = [
    "InternImageBackbone",
    "InternImageConfig",
    "InternImageForImageClassification",
    "InternImageImageProcessor",
    "InternImageModel",
    "InternImagePreTrainedModel",
    "dcnv3_backend_report",
    "load_dcnv3_kernel",
    "save_with_remote_code",
    "use_dcnv3_backend",
]

register_auto_classes()
