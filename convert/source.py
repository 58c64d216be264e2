"""Finding and reading what is to be converted."""

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file

from .errors import ConversionError, first_line
from .released import RELEASED, REPOSITORY, Released


@dataclass
class Source:
    """A checkpoint that was found: its tensors as they are in the file, and what is known about it."""

    file: Path
    released: Released | None
    config: dict[str, Any] | None
    sha256: str

    def read(self, ema: bool = False) -> dict[str, torch.Tensor]:
        return read_tensors(self.file, ema)


def find(name: str, config_file: str | None, revision: str | None) -> Source:
    """Finds the checkpoint that a command line names.

    Args:
        name: a local `.pth` or `.safetensors` file, a local folder in the published layout, the name of a released
            checkpoint, or the id of a Hub repository in the published layout.
        config_file: JSON with the official fields, for what is not released under a known name.
        revision: of the Hub repository; the default branch if None.

    Raises:
        ConversionError: if there is no such thing, or no configuration for it.
    """
    path = Path(name)
    config = _read_json(Path(config_file)) if config_file is not None else None
    released = RELEASED.get(path.stem if path.suffix == ".pth" else path.name)
    if path.is_file():
        file = path
    elif path.is_dir():
        file = next((path / n for n in ("model.safetensors", "pytorch_model.bin") if (path / n).is_file()), None)
        if file is None:
            raise ConversionError(f"the folder {path} has neither model.safetensors nor pytorch_model.bin")
        if config is None:
            config = _read_json(path / "config.json")
    elif name in RELEASED:
        file = _download(REPOSITORY, released.file, revision)
    elif "/" in name and not name.startswith((".", "/")) and path.suffix != ".pth":
        file = _download(name, "model.safetensors", revision)
        if config is None:
            config = _read_json(_download(name, "config.json", revision))
    else:
        raise ConversionError(
            f"{name} is neither a file nor a folder here, nor a released checkpoint "
            f"({', '.join(RELEASED)}), nor a Hub repository"
        )
    if config is None and released is None:
        raise ConversionError(
            f"{name} is not the name of a released checkpoint: give its architecture by --config FILE (official fields)"
        )
    if released is not None and released.num_bytes is not None and file.stat().st_size != released.num_bytes:
        raise ConversionError(f"{file} has {file.stat().st_size} bytes, but {released.file} has {released.num_bytes}")
    digest = sha256_of(file)
    if released is not None and released.sha256 is not None and digest != released.sha256:
        raise ConversionError(f"{file} has the sha256 {digest}, but {released.file} has {released.sha256}")
    return Source(file, released, config, digest)


def sha256_of(file: Path) -> str:
    with open(file, "rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)
        )


def _sha256(stream) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def _download(repository: str, file: str, revision: str | None) -> Path:
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(f"cannot download {file} of {repository}: {first_line(error)}") from error


def read_tensors(file: Path, ema: bool = False) -> dict[str, torch.Tensor]:
    """The state dict in a file, mapped into memory and not read: only tensors, no code of the file is run.

    Raises:
        ConversionError: if the file is truncated, holds something else, or has no averaged weights although `ema`.
    """
    try:
        if file.suffix == ".safetensors":
            checkpoint = load_file(file)
        else:
            try:
                checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{file} holds more than tensors, and is not read because that would run code from it: "
            + first_line(error)
        ) from error
    except Exception as error:  # whatever torch's and safetensors' parsers stumble on in a wrong file
        raise ConversionError(
            f"{file} cannot be read as a checkpoint, it may be truncated: {first_line(error)}"
        ) from error

    if ema:
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_ema"), dict):
            raise ConversionError(f"{file} has no averaged weights (`model_ema`)")
        checkpoint = checkpoint["model_ema"]
    elif isinstance(checkpoint, dict):
        for name in ("model", "state_dict", "module"):
            if isinstance(checkpoint.get(name), dict):
                checkpoint = checkpoint[name]
                break
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise ConversionError(f"{file} holds a {type(checkpoint).__name__} and no state dict")
    others = [str(key) for key, value in checkpoint.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConversionError(f"{file} has entries that are no tensors: {', '.join(others[:5])}")
    return checkpoint
