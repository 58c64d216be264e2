"""In: nothing. Out: the folder of a small classifier of digits, the default model of the examples."""

import json
import logging
from pathlib import Path

import image_classification
from embedded_data import DIGIT_NAMES


def is_demo(folder: Path) -> bool:
    """Whether a folder holds a classifier of digits; a program's default folder may hold another model."""
    if not (folder / "model.safetensors").is_file() or not (folder / "config.json").is_file():
        return False
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label") or {}
    return [names.get(str(i)) for i in range(len(names))] == DIGIT_NAMES


def demo_model(epochs: int = 8) -> Path:
    """Returns the folder of the model that `image_classification.py` trains without arguments; trains it if missing.

    If that folder holds another model, the demo's model goes to `outputs/demo`.
    """
    folder, other = Path("outputs/image_classification"), Path("outputs/demo")
    if found := next((f for f in (folder, other) if is_demo(f)), None):
        return found
    if folder.exists():
        folder = other
    logging.getLogger(__name__).warning("training the demo's model in %s, half a minute", folder)
    image_classification.main(["--output_dir", str(folder), "--num_train_epochs", str(epochs)])
    return folder
