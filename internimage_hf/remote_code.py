# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: a model and a folder. Out: the saved model with a copy of this package's code, for `trust_remote_code=True`.

The folder then loads where this package is not installed.
"""

import inspect
import json
import os
import uuid
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto
from transformers.utils.hub import create_and_tag_model_card

from .configuration_internimage import InternImageConfig
from .configuration_internimage_composite import InternImageCompositeConfig
from .configuration_internimage_dino import InternImageDinoConfig
from .configuration_internimage_rcnn import InternImageRcnnConfig
from .image_processing_internimage import InternImageImageProcessor
from .image_processing_internimage_detection import InternImageDetectionImageProcessor
from .modeling_internimage import InternImageBackbone
from .modeling_internimage_composite import InternImageCompositeBackbone


# Of the package's own models. Heads of transformers have processors of transformers.
_PROCESSORS = {
    InternImageConfig: InternImageImageProcessor,
    InternImageDinoConfig: InternImageDetectionImageProcessor,
    InternImageRcnnConfig: InternImageDetectionImageProcessor,
}
# The generated module registers the backbone's classes before transformers reads a head's configuration. It subclasses the
# head: with transformers' own class in `auto_map`, saving the loaded model would copy transformers' files as its code.
_HEAD_MODULE = "modeling_internimage_head"
_HEAD_CODE = '''# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""{model} of transformers on an InternImage backbone."""

import transformers
from transformers import AutoBackbone, AutoConfig

from .configuration_internimage import InternImageConfig
from .configuration_internimage_composite import InternImageCompositeConfig
from .modeling_internimage import InternImageBackbone
from .modeling_internimage_composite import InternImageCompositeBackbone


for config_class, backbone_class in (
    (InternImageConfig, InternImageBackbone),
    (InternImageCompositeConfig, InternImageCompositeBackbone),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoBackbone.register(config_class, backbone_class, exist_ok=True)


class {config}(transformers.{config}):
    pass


class {model}(transformers.{model}):
    config_class = {config}
'''


def _own_config_class(model_class: type[PreTrainedModel] | None) -> type[PreTrainedConfig] | None:
    """The configuration class of a model of this package or of one derived from it; None for a head of transformers."""
    if model_class is None:
        return InternImageConfig
    own = (
        c for c in model_class.__mro__ if c.__module__.startswith(f"{__package__}.") and issubclass(c, PreTrainedModel)
    )
    return next((c.config_class for c in own), None)


def _auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, tuple[type[PreTrainedModel], ...]]:
    """The Auto classes of transformers that know a configuration, and the models that they load for it."""
    result = {}
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if name.startswith(("AutoModel", "AutoBackbone")) and mapping is not None and config_class in mapping:
            found = mapping[config_class]
            result[name] = found if isinstance(found, tuple) else (found,)
    return result


def _module(one: type) -> str:
    return one.__module__.rpartition(".")[2]


def remote_code_files(
    with_processor: bool = True, config_class: type[PreTrainedConfig] = InternImageConfig
) -> list[Path]:
    """The files of this package that its models of a configuration need: configuration, modeling, image processor, and
    their imports.
    """
    classes = {config_class, *(one for found in _auto_classes(config_class).values() for one in found)}
    if with_processor and config_class in _PROCESSORS:
        classes.add(_PROCESSORS[config_class])
    sources = {inspect.getsourcefile(one) for one in classes}
    files = {*sources, *(imported for source in sources for imported in get_relative_import_files(source))}
    return sorted(Path(file) for file in files)


def _code(model_class: type[PreTrainedModel] | None) -> tuple[dict[str, bytes], dict[str, str]]:
    """Returns the content of each code file by name, and the configuration's `auto_map`.

    Raises:
        TypeError: if no Auto class of transformers loads `model_class`.
    """
    config_class = _own_config_class(model_class)
    if config_class is not None:
        files = {file.name: file.read_bytes() for file in remote_code_files(config_class=config_class)}
        auto_map = {"AutoConfig": f"{_module(config_class)}.{config_class.__name__}"}
        for name, (found, *_) in _auto_classes(config_class).items():
            auto_map[name] = f"{_module(found)}.{found.__name__}"
        return files, auto_map
    config_class = model_class.config_class
    auto_classes = [name for name, found in _auto_classes(config_class).items() if model_class in found]
    if not auto_classes:
        raise TypeError(f"no Auto class of transformers loads `{model_class.__name__}`")
    files = {}
    for backbone_config in (InternImageConfig, InternImageCompositeConfig):
        for file in remote_code_files(with_processor=False, config_class=backbone_config):
            files[file.name] = file.read_bytes()
    names = {"config": config_class.__name__, "model": model_class.__name__}
    files[f"{_HEAD_MODULE}.py"] = _HEAD_CODE.format(**names).encode()
    auto_map = {"AutoConfig": f"{_HEAD_MODULE}.{names['config']}"}
    auto_map |= dict.fromkeys(auto_classes, f"{_HEAD_MODULE}.{names['model']}")
    return files, auto_map


def check_remote_code(folder: str | os.PathLike, model_class: type[PreTrainedModel] | None = None) -> None:
    """Checks that `write_remote_code` would overwrite only earlier versions of the package's own files.

    Args:
        folder: the model's future folder; it need not exist.
        model_class: as for `write_remote_code`.

    Raises:
        NotADirectoryError: if `folder` is a file.
        FileExistsError: if a foreign file, folder or symbolic link has the name of one of the package's files.
        TypeError: if no Auto class of transformers loads `model_class`.
    """
    _check_files(Path(folder), _code(model_class)[0])


def _check_files(folder: Path, files: dict[str, bytes]) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be a folder, it is a file")
    for name, content in files.items():
        file = folder / name
        if os.path.lexists(file) and not _is_ours(file, content):
            raise FileExistsError(
                f"{file} exists and is not a file of internimage_hf, which has the same name: rename it, or save the "
                "model to another folder"
            )


def _is_ours(file: Path, content: bytes) -> bool:
    """Whether a file starts with the package's copyright line or with the first line of the new content."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        first = stream.readline()
    has_copyright = first.startswith(b"# Copyright ") and b"The internimage-hf authors." in first
    return has_copyright or first == content[: content.index(b"\n") + 1]


def write_remote_code(folder: str | os.PathLike, model_class: type[PreTrainedModel] | None = None) -> list[Path]:
    """Adds the code files and the `auto_map` to a folder that `save_pretrained` wrote.

    Each file is replaced atomically. `config.json` comes last: after an interruption it names no missing file. A symbolic
    link is replaced by a file; its target stays unchanged.

    Args:
        folder: the model's folder, with a `config.json`.
        model_class: class of the saved model; needed only for a head of transformers with an InternImage backbone.

    Returns:
        The written files.

    Raises:
        FileNotFoundError: if the folder has no `config.json`.
        FileExistsError: if a foreign file of the folder has the name of one of the package's files.
        ValueError: if `config.json` or `preprocessor_config.json` is not a JSON object.
        TypeError: if no Auto class of transformers loads `model_class`.
    """
    folder = Path(folder)
    files, auto_map = _code(model_class)
    config = {**_read_json(folder / "config.json"), "auto_map": auto_map}
    processor_file = folder / "preprocessor_config.json"
    processor_class = _PROCESSORS.get(_own_config_class(model_class))
    if processor_class is not None and processor_file.is_file():
        processor = _read_json(processor_file)
        if processor.get("image_processor_type") == processor_class.__name__:
            processor["auto_map"] = {"AutoImageProcessor": f"{_module(processor_class)}.{processor_class.__name__}"}
            files[processor_file.name] = _json_bytes(processor)
    files["config.json"] = _json_bytes(config)
    _check_files(folder, {name: content for name, content in files.items() if name.endswith(".py")})
    for name, content in files.items():
        replace_file(folder / name, content)
    return [folder / name for name in files]


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be a JSON object, it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object, it is a {type(content).__name__}")
    return content


def _json_bytes(content: dict) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def replace_file(file: Path, content: bytes) -> None:
    """Writes a file atomically; it replaces an earlier file or a symbolic link of that name."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def save_with_remote_code(
    model: PreTrainedModel, folder: str | os.PathLike, *, push_to_hub: bool = False, **kwargs
) -> None:
    """Saves a model together with its code, for readers without this package.

    They load the folder by its Auto class (`AutoModelForImageClassification`, `AutoModelForObjectDetection`, ...) with
    `trust_remote_code=True`. Readers with this package imported need no flag.

    Args:
        model: an InternImage model, classifier or backbone, or a head of transformers with an InternImage backbone.
        folder: the output folder; created if missing.
        push_to_hub: whether to upload the written files, weights and code in one commit, to `repo_id` (by default the
            folder's name in the user's namespace).
        **kwargs: arguments of `save_pretrained`, including those for the Hub (`repo_id`, `commit_message`, `create_pr`,
            `token`), and of `huggingface_hub.create_repo`, for instance `private`.

    Raises:
        TypeError: if `model` holds no InternImage, or no Auto class of transformers loads its class.
        ValueError: if `model` has PEFT adapters: `save_pretrained` would write no configuration for them.
        FileExistsError: if a foreign file of the folder has the name of one of the package's files. Nothing is written.
    """
    if not isinstance(model, PreTrainedModel) or not (
        _own_config_class(type(model))
        or any(isinstance(m, (InternImageBackbone, InternImageCompositeBackbone)) for m in model.modules())
    ):
        raise TypeError(
            f"`model` must be an InternImage model or hold an InternImageBackbone, got {type(model).__name__}"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("`model` must be saved without adapters: merge them first, or save them by `save_pretrained`")
    folder = Path(folder)
    check_remote_code(folder, type(model))
    # One rank writes. transformers without `should_save_on_this_rank` decides by the argument alone.
    writes = getattr(model, "should_save_on_this_rank", bool)(kwargs.get("is_main_process", True))
    saving = {name: kwargs.pop(name) for name in inspect.signature(model.save_pretrained).parameters if name in kwargs}
    if not push_to_hub or not writes:
        model.save_pretrained(folder, **saving)
        if writes:
            write_remote_code(folder, type(model))
        return

    # `save_pretrained(push_to_hub=True)` would commit before the code files exist; the commit is made here instead.
    api, token = HfApi(), saving.get("token")
    commit = {"commit_message": kwargs.pop("commit_message", None) or "Upload model", "token": token}
    commit["create_pr"] = kwargs.pop("create_pr", False)
    repo_id = api.create_repo(
        kwargs.pop("repo_id", folder.absolute().name), token=token, exist_ok=True, **kwargs
    ).repo_id
    before = _states(folder)
    model.save_pretrained(folder, **saving)
    written = set(write_remote_code(folder, type(model)))
    card = folder / "README.md"
    if not api.file_exists(repo_id, card.name, token=token):
        if not card.exists():
            create_and_tag_model_card(repo_id, model.model_tags, token=token).save(card)
        written.add(card)
    written |= {file for file, state in _states(folder).items() if before.get(file) != state}
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in sorted(written)]
    api.create_commit(repo_id, operations, **commit)


def _states(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Inode, size and time of each file of a folder: they change when the file is written."""
    if not folder.is_dir():
        return {}
    stats = {file: file.stat() for file in folder.iterdir() if file.is_file()}
    return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


__all__ = ["check_remote_code", "remote_code_files", "save_with_remote_code", "write_remote_code"]
