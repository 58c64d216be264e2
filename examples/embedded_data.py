"""In: numbers and sizes. Out: scenes of handwritten digits on photographs, with boxes and masks, without a download.

Digits and photographs come with scikit-learn. Training and evaluation share neither a digit nor a part of a photograph.
"""

from collections.abc import Callable

import datasets
import numpy as np
from PIL import Image


DIGIT_NAMES = [f"digit {i}" for i in range(10)]


def _splits() -> list[tuple[list[Image.Image], np.ndarray, np.ndarray]]:
    """Photographs, digits and their values for training, and others for evaluation."""
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    left, right = ([], [])
    for photo in photos:
        left.append(photo.crop((0, 0, photo.width * 2 // 3, photo.height)))
        right.append(photo.crop((photo.width * 2 // 3, 0, photo.width, photo.height)))
    return [(left, parts[0], parts[2]), (right, parts[1], parts[3])]


def _background(rng: np.random.Generator, photos: list[Image.Image], size: int) -> np.ndarray:
    """A random square of a photograph, (size, size, 3) in float32, 0 to 255."""
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(size, min(photo.size) + 1))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    background = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(background, dtype=np.float32)


def _check_sizes(train: int, evaluation: int, size: int) -> None:
    if not 32 <= size <= 213:
        raise ValueError(
            f"`size` must be 32 to 213, the part of a photograph for evaluation has 214 columns, got {size}"
        )
    if min(train, evaluation) < 1:
        raise ValueError(f"`train` and `evaluation` must be at least 1, got {train} and {evaluation}")


def _scene(
    rng: np.random.Generator, photos: list[Image.Image], digits: np.ndarray, values: np.ndarray, size: int
) -> tuple[Image.Image, Image.Image, dict[str, list]]:
    """Draws an image, its class mask (0: background, 1 + n: digit n), and its objects in COCO's terms."""
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(size, min(photo.size) + 1))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    background = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = np.asarray(background, dtype=np.float32) * 0.5  # the background is darker than the digits
    mask = np.zeros((size, size), dtype=np.uint8)
    objects = {"bbox": [], "category": [], "area": [], "iscrowd": []}
    taken = np.zeros((size, size), dtype=bool)
    for _ in range(rng.integers(2, 9)):  # some digits find no free place
        pick = rng.integers(len(digits))
        digit_side = int(rng.integers(size // 3, int(size / 2.3)))
        alpha = np.asarray(
            Image.fromarray((digits[pick] * (255 / 16)).astype(np.uint8)).resize(
                (digit_side, digit_side), Image.Resampling.BICUBIC
            ),
            dtype=np.float32,
        )
        alpha /= alpha.max()
        x, y = (int(rng.integers(0, size - digit_side + 1)) for _ in range(2))
        window = (slice(y, y + digit_side), slice(x, x + digit_side))
        if taken[window].any():
            continue
        taken[window] = True
        ink = rng.integers(200, 256, 3)
        pixels[window] += alpha[..., None] * (ink - pixels[window])
        inked = alpha > 0.4
        mask[window][inked] = 1 + values[pick]
        rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
        objects["bbox"].append(
            [
                float(x + columns[0]),
                float(y + rows[0]),
                float(columns[-1] - columns[0] + 1),
                float(rows[-1] - rows[0] + 1),
            ]
        )
        objects["category"].append(int(values[pick]))
        objects["area"].append(float(inked.sum()))
        objects["iscrowd"].append(0)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask), objects


def load_digit_scenes(train: int, evaluation: int, size: int = 96, seed: int = 0) -> datasets.DatasetDict:
    """Draws scenes of a few bright digits on a darkened part of a photograph.

    Args:
        train, evaluation: numbers of scenes.
        size: side of the square images in pixels, 32 to 213: a third of a photograph has 214 columns.
        seed: seed of all random numbers.

    Returns:
        The splits `train` and `validation` with the columns `image`; `annotation`, an image of classes where 0 is the
        background and 1 + n the digit n; and `objects`, lists of `bbox` (x, y, width, height in pixels), `category`,
        `area` (inked pixels) and `iscrowd`.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_sizes(train, evaluation, size)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "annotation": datasets.Image(),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=DIGIT_NAMES)),
                "area": datasets.List(datasets.Value("float32")),
                "iscrowd": datasets.List(datasets.Value("int64")),
            },
        }
    )
    splits = {}
    for number, ((name, count), (photos, digits, values)) in enumerate(
        zip((("train", train), ("validation", evaluation)), _splits(), strict=True)
    ):
        rng = np.random.default_rng((seed, number))
        scenes = [_scene(rng, photos, digits, values, size) for _ in range(count)]
        columns = dict(zip(("image", "annotation", "objects"), map(list, zip(*scenes, strict=True)), strict=True))
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)


def _single_digit(
    rng: np.random.Generator, photos: list[Image.Image], digit: np.ndarray, size: int, smallest: float
) -> np.ndarray:
    """One digit, turned, sheared, stretched and anywhere, on a dark part of a photograph: (size, size, 3) in uint8."""
    pixels = _background(rng, photos, size) * 0.2
    side = rng.uniform(smallest, 0.875) * size
    angle, shear, stretch = np.deg2rad(rng.uniform(-40, 40)), rng.uniform(-0.3, 0.3), np.exp(rng.uniform(-0.3, 0.3))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    # from pixels of the scene to those of the digit, which has 8 and a margin of 2
    inverse = np.linalg.inv(turn @ np.array([[1, shear], [0, 1]]) @ np.diag([stretch, 1 / stretch])) * (8 / side)
    center = rng.uniform(side / 2, size - side / 2, 2)
    start = 6 - inverse @ center
    alpha = Image.fromarray(np.pad(digit, 2).astype(np.float32) / 16).transform(
        (size, size), Image.Transform.AFFINE, (*inverse[0], start[0], *inverse[1], start[1]), Image.Resampling.BICUBIC
    )
    pixels += np.asarray(alpha).clip(0, 1)[..., None] * (rng.integers(200, 256, 3) - pixels)
    return pixels.clip(0, 255).astype(np.uint8)


def load_single_digits(
    train: int,
    evaluation: int,
    size: int = 48,
    seed: int = 0,
    smallest: float = 0.5,
    progress: Callable[[int], object] | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images of one bright digit, distorted and anywhere, on a dark part of a photograph. A few minutes train on them.

    Args:
        train, evaluation: numbers of images.
        size: side of the square images in pixels, 32 to 213.
        seed: of everything random.
        smallest: side of the smallest digit as a part of the image's, above 0 and at most 0.875, the largest.
        progress: is called with 1 after each image.

    Returns:
        For `train` and `validation` the images (number, size, size, 3) in uint8 and the digits (number,) in int64.

    Raises:
        ValueError: if a number is out of range.
    """
    _check_sizes(train, evaluation, size)
    if not 0 < smallest <= 0.875:
        raise ValueError(f"`smallest` must be above 0 and at most 0.875, got {smallest}")
    result = {}
    for number, ((name, count), (photos, digits, values)) in enumerate(
        zip((("train", train), ("validation", evaluation)), _splits(), strict=True)
    ):
        rng = np.random.default_rng((seed, number))
        images, picks = np.empty((count, size, size, 3), np.uint8), rng.integers(len(digits), size=count)
        for i, pick in enumerate(picks):
            images[i] = _single_digit(rng, photos, digits[pick], size, smallest)
            if progress is not None:
                progress(1)
        result[name] = images, values[picks].astype(np.int64)
    return result
