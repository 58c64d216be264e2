# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""The evaluation transform of the official code: shortest edge to size, bicubic; centre crop; ImageNet statistics."""

from typing import Any

import numpy as np
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class InternImageImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor with ImageNet's mean and standard deviation and torchvision's centre crop.

    The published repositories name CLIP's processor, which `AutoImageProcessor` then uses. It rounds the crop's margin
    down where torchvision, and with it the official code (`build_transform` in classification/dataset/build.py), rounds
    half to even: one pixel apart where the margin is 3 modulo 4. Images smaller than the crop are padded with zeros.
    """

    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """As in transformers. `auto_map` is left out where this class is saved without its code."""
        if cls._auto_class is None:
            image_processor_dict = {name: v for name, v in image_processor_dict.items() if name != "auto_map"}
        return super().from_dict(image_processor_dict, **kwargs)

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Crops (channels, height, width) to `size.height` x `size.width` around the centre."""
        height, width = image.shape[-2:]
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)
        if top < 0 or left < 0:
            return super().center_crop(image, size, **kwargs)
        return image[..., top : top + size.height, left : left + size.width]


__all__ = ["InternImageImageProcessor"]
