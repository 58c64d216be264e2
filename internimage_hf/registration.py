# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: nothing. Out: transformers' Auto classes load `model_type: internimage`."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
)

# Imported from its own module: without torchvision, `transformers.AutoImageProcessor` of 5.17 is a placeholder.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
)

from .compatibility import has_no_video_processor, let_pipelines_know
from .configuration_internimage import InternImageConfig
from .configuration_internimage_composite import InternImageCompositeConfig
from .configuration_internimage_dino import InternImageDinoConfig
from .configuration_internimage_rcnn import InternImageRcnnConfig
from .image_processing_internimage import InternImageImageProcessor
from .image_processing_internimage_detection import InternImageDetectionImageProcessor
from .modeling_internimage import InternImageBackbone, InternImageForImageClassification, InternImageModel
from .modeling_internimage_composite import InternImageCompositeBackbone
from .modeling_internimage_dino import InternImageDinoForObjectDetection
from .modeling_internimage_rcnn import InternImageRcnnForInstanceSegmentation


def register_auto_classes() -> None:
    """Registers the package's configurations, models and image processors with the Auto classes, and the detectors with the
    pipelines.

    May be called more than once.
    """
    AutoConfig.register(InternImageConfig.model_type, InternImageConfig, exist_ok=True)
    AutoModel.register(InternImageConfig, InternImageModel, exist_ok=True)
    AutoModelForImageClassification.register(InternImageConfig, InternImageForImageClassification, exist_ok=True)
    AutoBackbone.register(InternImageConfig, InternImageBackbone, exist_ok=True)
    AutoConfig.register(InternImageCompositeConfig.model_type, InternImageCompositeConfig, exist_ok=True)
    AutoBackbone.register(InternImageCompositeConfig, InternImageCompositeBackbone, exist_ok=True)
    AutoImageProcessor.register(
        InternImageConfig, image_processor_classes={"pil": InternImageImageProcessor}, exist_ok=True
    )
    AutoConfig.register(InternImageDinoConfig.model_type, InternImageDinoConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForObjectDetection):  # there is no model without the detection head
        auto_class.register(InternImageDinoConfig, InternImageDinoForObjectDetection, exist_ok=True)
    AutoImageProcessor.register(
        InternImageDinoConfig,
        image_processor_classes={"pil": InternImageDetectionImageProcessor},
        exist_ok=True,
    )
    AutoConfig.register(InternImageRcnnConfig.model_type, InternImageRcnnConfig, exist_ok=True)
    # `pipeline("image-segmentation")` finds its models by AutoModelForImageSegmentation
    for auto_class in (
        AutoModel,
        AutoModelForInstanceSegmentation,
        AutoModelForImageSegmentation,
        AutoModelForObjectDetection,
    ):
        auto_class.register(InternImageRcnnConfig, InternImageRcnnForInstanceSegmentation, exist_ok=True)
    AutoImageProcessor.register(
        InternImageRcnnConfig,
        image_processor_classes={"pil": InternImageDetectionImageProcessor},
        exist_ok=True,
    )
    let_pipelines_know(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, InternImageDinoForObjectDetection)
    let_pipelines_know(MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, InternImageRcnnForInstanceSegmentation)
    let_pipelines_know(MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES, InternImageRcnnForInstanceSegmentation)
    for config_class in (InternImageConfig, InternImageDinoConfig, InternImageRcnnConfig):
        has_no_video_processor(config_class)
