"""In: images of distorted digits on photographs. Out: a small InternImage that was trained on them in half a minute.

`ablations.py` compares variants of this model; `figures.py` draws it where no checkpoint is named.
"""

import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from embedded_data import DIGIT_NAMES, load_single_digits
from tqdm import tqdm

from internimage_hf import InternImageConfig, InternImageForImageClassification, InternImageImageProcessor


SMALL = {"channels": 16, "depths": [1, 1, 2, 1], "groups": [2, 4, 8, 16]}
_PROCESSOR = InternImageImageProcessor()
_MEAN, _STD = (np.array(values, np.float32) * 255 for values in (_PROCESSOR.image_mean, _PROCESSOR.image_std))


def small_config(size: int, **fields) -> InternImageConfig:
    labels = dict(enumerate(DIGIT_NAMES))
    return InternImageConfig(**{**SMALL, "image_size": size, "id2label": labels, **fields})


def normalised(images: np.ndarray) -> torch.Tensor:
    """(batch, height, width, 3) in uint8 -> `pixel_values`, as the image processor computes them."""
    return torch.from_numpy((images - _MEAN) / _STD).permute(0, 3, 1, 2)


def train(
    model: torch.nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    learning_rate: float = 2e-3,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> list[float]:
    """AdamW, a linear warm-up over 10 % of the steps, then a cosine to zero. No clipping of gradients.

    Args:
        model: a classifier of this package.
        images, labels: as `load_single_digits` gives them.
        seed: of the order of the images.
        progress: is called with 1 after each step.

    Returns:
        The norm of the gradient in each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rng, norms = np.random.default_rng(seed), []
    model.train()
    for _ in range(steps):
        batch = rng.integers(len(images), size=batch_size)
        loss = model(normalised(images[batch]), labels=torch.from_numpy(labels[batch])).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None).item())
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(1)
    model.eval()
    return norms


@torch.no_grad()
def predict(model: torch.nn.Module, images: np.ndarray, batch_size: int = 100) -> np.ndarray:
    """The class of each image."""
    parts = np.array_split(images, max(1, -(-len(images) // batch_size)))
    return np.concatenate([model(normalised(part)).logits.argmax(-1).numpy() for part in parts])


def digit_classifier(
    folder: Path = Path("outputs/digits_on_photographs"), size: int = 96, steps: int = 400, images: int = 4000
) -> Path:
    """The folder of a classifier of digits on photographs, with its image processor; trains it if it is not there."""
    if (folder / "config.json").is_file():
        return folder
    logging.getLogger(__name__).warning("training the small model of the figures in %s", folder)
    held_out = -(-images // 8)
    with tqdm(total=images + held_out, unit="image", desc="images") as progress:
        data = load_single_digits(images, held_out, size, progress=progress.update)
    torch.manual_seed(0)
    model = InternImageForImageClassification(small_config(size))
    with tqdm(total=steps, unit="step", desc="training") as progress:
        train(model, *data["train"], steps=steps, progress=progress.update)
    pixels, labels = data["validation"]
    print(f"{folder}: {(predict(model, pixels) == labels).mean():.1%} of {len(labels)} held-out images right")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        InternImageImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ).save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)  # a folder of that name is complete
    except OSError:
        if not (folder / "config.json").is_file():  # another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
