"""In: images and labels of a training batch. Out: both augmented by RandAugment, random erasing, mixup and cutmix.

After the papers (arXiv 1909.13719, 1708.04896, 1710.09412, 1905.04899), with the ranges of timm, which the official code uses.
The random numbers come from `random` and torch's global generator: `Trainer` restores both when it resumes.
"""

import math
import random
from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.functional import one_hot


FILL = (124, 116, 104)  # ImageNet's mean


def _signed(value: float) -> float:
    return value if random.random() < 0.5 else -value


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    resample = random.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=FILL)


def _solarize_add(image: Image.Image, amount: int) -> Image.Image:
    return image.point([min(255, v + amount) if v < 128 else v for v in range(256)] * len(image.getbands()))


# Operations by name, each with a strength from 0 to 1 (timm's "increasing" set).
OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "invert": lambda image, s: ImageOps.invert(image),
    "rotate": lambda image, s: image.rotate(_signed(30 * s), resample=Image.Resampling.BICUBIC, fillcolor=FILL),
    "posterize": lambda image, s: ImageOps.posterize(image, max(1, 4 - int(4 * s))),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 - min(256, int(256 * s))),
    "solarize_add": lambda image, s: _solarize_add(image, min(128, int(110 * s))),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(max(0.1, 1 + _signed(0.9 * s))),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(max(0.1, 1 + _signed(0.9 * s))),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(max(0.1, 1 + _signed(0.9 * s))),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(max(0.1, 1 + _signed(0.9 * s))),
    "shear_x": lambda image, s: _affine(image, (1, _signed(0.3 * s), 0, 0, 1, 0)),
    "shear_y": lambda image, s: _affine(image, (1, 0, 0, _signed(0.3 * s), 1, 0)),
    "translate_x": lambda image, s: _affine(image, (1, 0, _signed(0.45 * s * image.width), 0, 1, 0)),
    "translate_y": lambda image, s: _affine(image, (1, 0, 0, 0, 1, _signed(0.45 * s * image.height))),
}


def rand_augment(image: Image.Image, magnitude: float, deviation: float = 0.5, count: int = 2) -> Image.Image:
    """Applies `count` random operations, each with probability 1/2 and a strength around `magnitude` of 10."""
    for name in random.choices(list(OPERATIONS), k=count):
        if random.random() < 0.5:
            strength = min(max(random.gauss(magnitude, deviation), 0.0), 10.0) / 10
            image = OPERATIONS[name](image, strength)
    return image


def random_erasing(pixel_values: torch.Tensor, probability: float) -> torch.Tensor:
    """Replaces, with this probability, a rectangle of 2 % to 33 % of the area by noise; (channels, height, width)."""
    if random.random() >= probability:
        return pixel_values
    channels, height, width = pixel_values.shape
    for _ in range(10):
        area = height * width * random.uniform(0.02, 1 / 3)
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < h < height and 0 < w < width:
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            pixel_values = pixel_values.clone()
            pixel_values[:, top : top + h, left : left + w] = torch.randn(channels, h, w, dtype=pixel_values.dtype)
            return pixel_values
    return pixel_values


class Mix:
    """Mixes each image of a batch with the image at the opposite index, by mixup or cutmix for the whole batch.

    Args:
        num_labels: number of classes.
        mixup_alpha: parameter of the beta distribution of mixup's weights; 0 turns mixup off.
        cutmix_alpha: the same for cutmix. With both on, one of them is drawn per batch.
        probability: probability that a batch is mixed.
        switch_probability: probability of cutmix if both are on.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        num_labels: int,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
    ):
        for name, value, most in (
            ("mixup_alpha", mixup_alpha, math.inf),
            ("cutmix_alpha", cutmix_alpha, math.inf),
            ("mixup_prob", probability, 1),
            ("mixup_switch_prob", switch_probability, 1),
        ):
            if not 0 <= value <= most or value == math.inf:
                raise ValueError(f"`{name}` must be a number from 0{' to 1' if most == 1 else ''}, got {value!r}")
        self.num_labels = num_labels
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.probability, self.switch_probability = probability, switch_probability

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (batch, channels, height, width) and classes (batch,) to images and the parts of the classes in them
        (batch, num_labels), which sum to 1."""
        parts = one_hot(labels, self.num_labels).float()
        if not (self.mixup_alpha or self.cutmix_alpha) or torch.rand(()) >= self.probability:
            return pixel_values, parts
        switch = self.switch_probability if self.mixup_alpha and self.cutmix_alpha else float(self.cutmix_alpha > 0)
        cut = bool(torch.rand(()) < switch)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        own = float(torch.distributions.Beta(alpha, alpha).sample())
        other = pixel_values.flip(0)
        if cut:
            height, width = pixel_values.shape[-2:]
            rows, columns = _box(height, 1 - own), _box(width, 1 - own)
            pixel_values = pixel_values.clone()
            pixel_values[..., rows, columns] = other[..., rows, columns]
            own = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        else:
            pixel_values = own * pixel_values + (1 - own) * other
        return pixel_values, own * parts + (1 - own) * parts.flip(0)


def _box(size: int, area: float) -> slice:
    """Draws one side of a box with this part of the area; the box is clipped to the image."""
    half = int(size * area**0.5) // 2
    centre = int(torch.randint(size, ()))
    return slice(max(centre - half, 0), min(centre + half, size))
