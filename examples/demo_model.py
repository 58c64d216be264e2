"""The small classifier of digits that examples use where no model is named."""

import logging
from pathlib import Path

import image_classification


def demo_model(epochs: int = 8) -> Path:
    """The folder of the model that `image_classification.py` trains without arguments; trains it if it is not there."""
    folder = Path("outputs/image_classification")
    if not (folder / "model.safetensors").is_file() or not (folder / "config.json").is_file():
        logging.getLogger(__name__).warning("training the demo's model in %s, half a minute", folder)
        image_classification.main(["--output_dir", str(folder), "--num_train_epochs", str(epochs)])
    return folder
