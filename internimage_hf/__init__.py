# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""InternImage for Hugging Face transformers: importing the package makes the Auto classes know `internimage`."""

from .configuration_internimage import InternImageConfig
from .dcn_modules import DCNv3, DCNv4
from .dcnv3 import dcnv3_backend_report, use_dcnv3_backend
from .dcnv4 import dcnv4
from .image_processing_internimage import InternImageImageProcessor
from .inspection import count_flops, effective_receptive_field, sampling_points
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
    "DCNv3",
    "DCNv4",
    "InternImageBackbone",
    "InternImageConfig",
    "InternImageForImageClassification",
    "InternImageImageProcessor",
    "InternImageModel",
    "InternImagePreTrainedModel",
    "count_flops",
    "dcnv3_backend_report",
    "dcnv4",
    "effective_receptive_field",
    "load_dcnv3_kernel",
    "sampling_points",
    "save_with_remote_code",
    "use_dcnv3_backend",
]

register_auto_classes()
