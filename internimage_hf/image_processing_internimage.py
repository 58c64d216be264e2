# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: images. Out: `pixel_values` (batch, channels, height, width) as from the official evaluation transform.

Shortest edge to size, bicubic; centre crop; ImageNet mean and standard deviation.
"""

from typing import Any

import numpy as np
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


class InternImageImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor with ImageNet's mean and standard deviation and torchvision's centre crop.

    The official code (`build_transform` in classification/dataset/build.py) crops by torchvision. The published repositories
    name CLIP's processor. It rounds the crop's margin down, torchvision rounds half to even: their crops differ by one pixel
    where the total margin is 3 modulo 4. Images smaller than the crop are padded with zeros.
    """

    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """As in transformers, without `auto_map` unless the class is saved with its code."""
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
