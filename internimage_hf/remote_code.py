# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Writes model folders that load where this package is not installed, with `trust_remote_code=True`."""

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto

from . import configuration_internimage, image_processing_internimage, modeling_internimage
from .modeling_internimage import InternImageBackbone, InternImagePreTrainedModel


_PROCESSOR = "InternImageImageProcessor"
_AUTO_MAP = {
    "AutoConfig": "configuration_internimage.InternImageConfig",
    "AutoModel": "modeling_internimage.InternImageModel",
    "AutoModelForImageClassification": "modeling_internimage.InternImageForImageClassification",
    "AutoBackbone": "modeling_internimage.InternImageBackbone",
}
# A head of transformers needs its backbone's classes registered before its configuration is read. The subclasses keep
# transformers from taking its own files for this repository's code when the loaded model is saved again.
_HEAD_MODULE = "modeling_internimage_head"
_HEAD_CODE = '''"""{model} of transformers on an InternImage backbone."""

import transformers
from transformers import AutoBackbone, AutoConfig

from .configuration_internimage import InternImageConfig
from .modeling_internimage import InternImageBackbone


AutoConfig.register("internimage", InternImageConfig, exist_ok=True)
AutoBackbone.register(InternImageConfig, InternImageBackbone, exist_ok=True)


class {config}(transformers.{config}):
    pass


class {model}(transformers.{model}):
    config_class = {config}
'''


def remote_code_files(with_processor: bool = True) -> list[Path]:
    """The files of this package that the models need: configuration, modeling, image processor, and their imports."""
    modules = [modeling_internimage, configuration_internimage]
    if with_processor:
        modules.append(image_processing_internimage)
    sources = [module.__file__ for module in modules]
    files = {*sources, *(imported for source in sources for imported in get_relative_import_files(source))}
    return sorted(Path(file) for file in files)


def _auto_classes(model_class: type[PreTrainedModel]) -> list[str]:
    """The Auto classes of transformers that load a configuration of this model as this model."""
    config_class = model_class.config_class
    result = []
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and config_class in mapping:
            found = mapping[config_class]
            if model_class in (found if isinstance(found, tuple) else (found,)):
                result.append(name)
    return result


def write_remote_code(folder: str | os.PathLike, model_class: type[PreTrainedModel] | None = None) -> None:
    """Adds the code and the `auto_map` that names it to a folder that `save_pretrained` wrote.

    Args:
        folder: that has a `config.json`.
        model_class: whose instance was saved; only needed for a head of transformers with an InternImage backbone.

    Raises:
        FileNotFoundError: if the folder has no `config.json`.
        TypeError: if no Auto class of transformers loads `model_class`.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    is_head = model_class is not None and not issubclass(model_class, InternImagePreTrainedModel)
    if is_head:
        auto_classes = _auto_classes(model_class)
        if not auto_classes:
            raise TypeError(f"no Auto class of transformers loads `{model_class.__name__}`")
        names = {"config": model_class.config_class.__name__, "model": model_class.__name__}
        auto_map = {"AutoConfig": f"{_HEAD_MODULE}.{names['config']}"}
        auto_map |= dict.fromkeys(auto_classes, f"{_HEAD_MODULE}.{names['model']}")
        (folder / f"{_HEAD_MODULE}.py").write_text(_HEAD_CODE.format(**names), encoding="utf-8")
    else:
        auto_map = dict(_AUTO_MAP)
    for file in remote_code_files(with_processor=not is_head):
        shutil.copyfile(file, folder / file.name)
    processor_file = folder / "preprocessor_config.json"
    if not is_head and processor_file.is_file():
        processor = json.loads(processor_file.read_text(encoding="utf-8"))
        if processor.get("image_processor_type") == _PROCESSOR:
            processor_map = {"AutoImageProcessor": f"image_processing_internimage.{_PROCESSOR}"}
            _write_json(processor_file, {**processor, "auto_map": processor_map})
    _write_json(folder / "config.json", {**config, "auto_map": auto_map})


def _write_json(file: Path, content: dict) -> None:
    # at once: a file that names the code is whole, and the code is there already
    temporary = file.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def save_with_remote_code(model: PreTrainedModel, folder: str | os.PathLike, **kwargs) -> None:
    """Saves a model with the code it needs, for readers who do not have this package.

    They load it by its Auto class (`AutoModelForImageClassification`, `AutoModelForObjectDetection`, ...) with
    `trust_remote_code=True`. Readers who have imported this package need no flag.

    Args:
        model: an InternImage model, classifier or backbone, or a head of transformers with an InternImage backbone.
        folder: where to; created if need be.
        **kwargs: as for `save_pretrained`.

    Raises:
        TypeError: if `model` holds no InternImage, or no Auto class of transformers loads its class.
    """
    if not isinstance(model, InternImagePreTrainedModel):
        if not isinstance(model, PreTrainedModel) or not any(
            isinstance(m, InternImageBackbone) for m in model.modules()
        ):
            raise TypeError(
                f"`model` must be an InternImage model or hold an InternImageBackbone, got {type(model).__name__}"
            )
        if not _auto_classes(type(model)):
            raise TypeError(
                f"`model` must be of a class that an Auto class of transformers loads, got {type(model).__name__}"
            )
    model.save_pretrained(folder, **kwargs)
    write_remote_code(folder, type(model))


__all__ = ["remote_code_files", "save_with_remote_code", "write_remote_code"]
