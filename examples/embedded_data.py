"""In: numbers and sizes. Out: scenes of handwritten digits on photographs, with boxes and masks, without a download.

Digits and photographs come with scikit-learn. Training and evaluation share neither a digit nor a part of a photograph.
"""

import datasets
import numpy as np
from PIL import Image


DIGIT_NAMES = [f"digit {i}" for i in range(10)]


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
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.model_selection import train_test_split

    if not 32 <= size <= 213:
        raise ValueError(
            f"`size` must be 32 to 213, the part of a photograph for evaluation has 214 columns, got {size}"
        )
    if min(train, evaluation) < 1:
        raise ValueError(f"`train` and `evaluation` must be at least 1, got {train} and {evaluation}")
    digits = load_digits()
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
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
    for number, (name, count) in enumerate((("train", train), ("validation", evaluation))):
        rng = np.random.default_rng((seed, number))
        cut = [
            photo.crop((0, 0, photo.width * 2 // 3, photo.height) if number == 0 else (photo.width * 2 // 3, 0, photo.width, photo.height))
            for photo in photos
        ]  # fmt: skip
        scenes = [_scene(rng, cut, parts[number], parts[2 + number], size) for _ in range(count)]
        columns = dict(zip(("image", "annotation", "objects"), map(list, zip(*scenes, strict=True)), strict=True))
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)
