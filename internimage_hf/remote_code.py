# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Writes model folders that load where this package is not installed, with `trust_remote_code=True`."""

import json
import os
import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from . import configuration_internimage, image_processing_internimage, modeling_internimage
from .modeling_internimage import InternImagePreTrainedModel


_PROCESSOR = "InternImageImageProcessor"
_AUTO_MAP = {
    "AutoConfig": "configuration_internimage.InternImageConfig",
    "AutoModel": "modeling_internimage.InternImageModel",
    "AutoModelForImageClassification": "modeling_internimage.InternImageForImageClassification",
    "AutoBackbone": "modeling_internimage.InternImageBackbone",
}


def remote_code_files() -> list[Path]:
    """The files of this package that the models need: modeling, configuration, image processor, and their imports."""
    modules = (modeling_internimage, configuration_internimage, image_processing_internimage)
    sources = [module.__file__ for module in modules]
    files = {*sources, *(imported for source in sources for imported in get_relative_import_files(source))}
    return sorted(Path(file) for file in files)


def write_remote_code(folder: str | os.PathLike) -> None:
    """Adds the code and the `auto_map` that names it to a folder that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: if the folder has no `config.json`.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for file in remote_code_files():
        shutil.copyfile(file, folder / file.name)
    processor_file = folder / "preprocessor_config.json"
    if processor_file.is_file():
        processor = json.loads(processor_file.read_text(encoding="utf-8"))
        if processor.get("image_processor_type") == _PROCESSOR:
            auto_map = {"AutoImageProcessor": f"image_processing_internimage.{_PROCESSOR}"}
            _write_json(processor_file, {**processor, "auto_map": auto_map})
    _write_json(folder / "config.json", {**config, "auto_map": dict(_AUTO_MAP)})


def _write_json(file: Path, content: dict) -> None:
    # at once: a file that names the code is whole, and the code is there already
    temporary = file.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def save_with_remote_code(model: InternImagePreTrainedModel, folder: str | os.PathLike, **kwargs) -> None:
    """Saves a model with the code it needs, for readers who do not have this package.

    Args:
        model: an InternImage model, classifier or backbone.
        folder: where to; created if need be.
        **kwargs: as for `save_pretrained`.

    Raises:
        TypeError: if `model` is not one of this package's models.
    """
    if not isinstance(model, InternImagePreTrainedModel):
        raise TypeError(f"`model` must be an InternImage model, got {type(model).__name__}")
    model.save_pretrained(folder, **kwargs)
    write_remote_code(folder)


__all__ = ["remote_code_files", "save_with_remote_code", "write_remote_code"]
