# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""InternImage for Hugging Face transformers: importing the package makes the Auto classes know `internimage`."""

from .configuration_internimage import InternImageConfig
from .configuration_internimage_composite import InternImageCompositeConfig
from .configuration_internimage_dino import InternImageDinoConfig
from .configuration_internimage_rcnn import InternImageRcnnConfig
from .dcn_modules import DCNv3, DCNv4
from .dcnv3 import dcnv3_backend_report, use_dcnv3_backend
from .dcnv4 import dcnv4
from .image_processing_internimage import InternImageImageProcessor
from .image_processing_internimage_detection import InternImageDetectionImageProcessor
from .inspection import count_flops, effective_receptive_field, sampling_points
from .kernel_loader import load_dcnv3_kernel
from .modeling_internimage import (
    InternImageBackbone,
    InternImageForImageClassification,
    InternImageModel,
    InternImagePreTrainedModel,
)
from .modeling_internimage_composite import InternImageCompositeBackbone
from .modeling_internimage_dino import InternImageDinoForObjectDetection, InternImageDinoPreTrainedModel
from .modeling_internimage_rcnn import InternImageRcnnForInstanceSegmentation
from .registration import register_auto_classes
from .remote_code import save_with_remote_code


__version__ = "0.1.0"

__all__ = [
    "DCNv3",
    "DCNv4",
    "InternImageBackbone",
    "InternImageCompositeBackbone",
    "InternImageCompositeConfig",
    "InternImageConfig",
    "InternImageDetectionImageProcessor",
    "InternImageDinoConfig",
    "InternImageDinoForObjectDetection",
    "InternImageDinoPreTrainedModel",
    "InternImageForImageClassification",
    "InternImageImageProcessor",
    "InternImageModel",
    "InternImagePreTrainedModel",
    "InternImageRcnnConfig",
    "InternImageRcnnForInstanceSegmentation",
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
