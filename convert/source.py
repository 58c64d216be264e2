"""In: the name of a checkpoint. Out: its file, tensors and configuration."""

import contextlib
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import httpx
from safetensors.torch import load_file

from .errors import ConversionError, describe, first_line
from .plain_data import STAND_INS
from .released import RELEASED, Released, released_as


@dataclass
class Source:
    """A checkpoint, before its tensors are read.

    Args:
        file: the checkpoint's file; only its name if `find` did not need to download it.
        released: the released checkpoint of this name, if any.
        config: the official fields, if given or beside the file.
        sha256: the file's checksum.
        left_out: the file's entries that `read` does not return, by name; set by `read`.
        unknown_fields: fields of `config` without effect; set when the model's configuration is built.
    """

    file: Path
    released: Released | None
    config: dict[str, Any] | None
    sha256: str
    left_out: dict[str, str] = field(default_factory=dict)
    unknown_fields: list[str] = field(default_factory=list)

    def read(self, ema: bool = False) -> dict[str, torch.Tensor]:
        tensors, self.left_out = read_tensors(self.file, ema)
        return tensors


def find(name: str, config_file: str | None, revision: str | None, converted: str | None = None) -> Source:
    """Finds the checkpoint of a command line.

    Args:
        name: a local `.pth` or `.safetensors` file, a local folder in the published layout, the name of a released
            checkpoint, or the id of a Hub repository in the published layout.
        config_file: JSON with the official fields, for checkpoints without a released name.
        revision: revision of the Hub repository; None for the default branch.
        converted: sha256 of an already converted file: a Hub file with this checksum is not downloaded.

    Raises:
        ConversionError: if the checkpoint or its configuration cannot be found.
    """
    path = Path(name)
    digest = None
    config = _read_json(Path(config_file)) if config_file is not None else None
    released = released_as(path.stem if path.suffix == ".pth" else path.name)
    if path.is_file():
        file = path
    elif path.is_dir():
        file = next((path / n for n in ("model.safetensors", "pytorch_model.bin") if (path / n).is_file()), None)
        if file is None:
            index = next(path.glob("*.index.json"), None)
            sharded = f"; {index.name} says that it is in several files, which must be merged first" if index else ""
            raise ConversionError(f"the folder {path} has neither model.safetensors nor pytorch_model.bin{sharded}")
        if config is None:
            config = _read_json(path / "config.json")
    elif released is not None and name in (released.name, *released.other_names):
        file, digest = _from_hub(released.repository, released.files, revision, converted)
    elif "/" in name and not name.startswith((".", "/")) and path.suffix != ".pth":
        file, digest = _from_hub(name, ("model.safetensors",), revision, converted)
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
    if digest is not None:
        return Source(file, released, config, digest)
    if released is not None and released.num_bytes is not None and file.stat().st_size != released.num_bytes:
        raise ConversionError(f"{file} has {file.stat().st_size} bytes, but {released.file} has {released.num_bytes}")
    digest = sha256_of(file)
    if released is not None and released.sha256 is not None and digest != released.sha256:
        raise ConversionError(f"{file} has the sha256 {digest}, but {released.file} has {released.sha256}")
    return Source(file, released, config, digest)


@contextlib.contextmanager
def configuration_of(source: Source) -> Iterator[None]:
    """Within the block, errors of building a configuration become a ConversionError that names the source."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(f"the configuration of {source.file} is wrong: {error}") from error


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
    except OSError as error:
        raise ConversionError(f"cannot read the configuration {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"cannot read the configuration {file}: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def _from_hub(
    repository: str, files: tuple[str, ...], revision: str | None, converted: str | None
) -> tuple[Path, None] | tuple[Path, str]:
    """Returns the cached or downloaded file; or its name and checksum, if it is converted already and not cached.

    Args:
        files: the names that the file may have. The next one is tried if the repository lacks the one before it.
    """
    cached = {file: try_to_load_from_cache(repository, file, revision=revision) for file in files}
    files = tuple(sorted(files, key=lambda file: not isinstance(cached[file], str)))  # a cached file needs no network
    for tried, file in enumerate(files, start=1):
        if converted is not None and not isinstance(cached[file], str):
            try:
                url = hf_hub_url(repository, file, revision=revision)
                etag = get_hf_file_metadata(url).etag  # the sha256 of a large file
            except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError):
                etag = None  # the download below raises the error
            if etag == converted:
                return Path(file), converted
        try:
            return _download(repository, file, revision), None
        except ConversionError as error:
            lacks_it = isinstance(error.__cause__, RemoteEntryNotFoundError)
            if lacks_it and tried < len(files):
                continue
            if tried == 1:
                raise
            before = " and ".join(files[: tried - 1])
            raise ConversionError(f"{error} (tried before: {before}, which {repository} does not have)") from error
    raise AssertionError("`files` is empty")


def _download(repository: str, file: str, revision: str | None) -> Path:
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        # huggingface_hub's message is general; the cause has the reason
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise ConversionError(f"cannot download {file} of {repository}: {first_line(cause)}") from error


_EMA = ("model_ema", "state_dict_ema", "ema_state_dict")
_WEIGHTS = ("model", "state_dict", "module")


def read_tensors(file: Path, ema: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Maps a file's state dict into memory, without running code of the file.

    Returns the tensors by name, without a common prefix `module.`, and descriptions of the file's other entries by name.

    Raises:
        ConversionError: if the file is truncated, has another content, or lacks the averaged weights for `ema`.
    """
    checkpoint = _load(file)
    left_out: dict[str, str] = {}
    place = ""
    for names in (_EMA, _WEIGHTS) if ema else (_WEIGHTS, _WEIGHTS):  # nested twice: {"state_dict": {"model": ...}}
        if not isinstance(checkpoint, dict):
            break
        name = next((name for name in names if isinstance(checkpoint.get(name), dict)), None)
        if name is None and names is _EMA:
            raise ConversionError(f"{file} has no averaged weights: none of {', '.join(f'`{name}`' for name in _EMA)}")
        if name is not None:
            left_out |= {f"{place}{key}": _described(value) for key, value in checkpoint.items() if key != name}
            checkpoint, place = checkpoint[name], f"{place}{name}."
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise ConversionError(f"{file} holds {_described(checkpoint)} and no state dict")
    others = [str(k) for k, v in checkpoint.items() if not isinstance(v, torch.Tensor) or not isinstance(k, str)]
    if others:
        raise ConversionError(
            f"{file} has {len(others)} entries that are no tensors under a name: {', '.join(others[:5])}"
        )
    if all(name.startswith("module.") for name in checkpoint):  # saved from a wrapper for data-parallel training
        checkpoint = {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    return dict(checkpoint), left_out


def shape_of(file: Path, tensors: dict[str, torch.Tensor], name: str, dimensions: int) -> torch.Size:
    """Returns the shape of a tensor that determines the architecture.

    Raises:
        ConversionError: if the tensor is missing, has another number of dimensions, or no elements.
    """
    if name not in tensors:
        raise ConversionError(f"{file}: {name} is missing")
    check_kind(name, tensors[name])
    shape = tensors[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise ConversionError(f"{file}: {name} has the shape {tuple(shape)}, expected {dimensions} dimensions above 0")
    return shape


def check_kind(name: str, tensor: torch.Tensor) -> None:
    """Raises ConversionError for a tensor without plain values: sparse, nested, quantized, or without data."""
    for kind, found in (
        ("nested", tensor.is_nested),
        ("sparse", not tensor.is_nested and tensor.layout != torch.strided),
        ("quantized", tensor.is_quantized),
        ("a tensor without data (meta device)", tensor.is_meta),
    ):
        if found:
            raise ConversionError(f"{name} is {kind}, expected an ordinary tensor")


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.layout == torch.strided else "a tensor"
    if isinstance(value, (dict, list, tuple, set)):
        kind = "dict" if isinstance(value, dict) else type(value).__name__
        return f"a {kind} of {len(value)} entries"
    if isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def _load(file: Path) -> Any:
    kind = _kind(file)
    if kind is not None and kind not in ("safetensors", "pickle", "zip"):
        raise ConversionError(f"{file} {kind}, not a checkpoint")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
            warnings.simplefilter("ignore")  # warnings about the format: such files are read or refused here
            if kind == "safetensors" or (kind is None and file.suffix == ".safetensors"):
                return load_file(file)
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except OSError as error:
        raise ConversionError(f"cannot read {describe(error)}") from error
    except Exception as error:  # torch's and safetensors' parsers raise many kinds for an invalid file
        if kind is None and file.suffix != ".safetensors":
            reason = "it is neither a file of torch.save nor a safetensors file"
        elif isinstance(error, pickle.UnpicklingError):
            raise ConversionError(_refusal(file, str(error))) from error
        else:
            reason = (
                f"it may be truncated or of another kind: {first_line(error).split('. ')[0]}"  # without torch's advice
            )
        raise ConversionError(f"{file} cannot be read as a checkpoint: {reason}") from error


def _refusal(file: Path, message: str) -> str:
    """Explains in one line why a pickle is refused; torch's own message is long and has terminal codes."""
    if found := re.search(r"GLOBAL (\S+)", message):
        what = f"an object of the class or function {found[1]}"
    else:
        reason = message.rsplit("WeightsUnpickler error:", 1)[-1].strip().split("\n")[0]
        what = f"something that is neither a tensor nor plain data ({reason})"
    return (
        f"{file} holds {what}, and is not read because that would run code from it. If you trust it, save its weights "
        "alone with the program that wrote it: "
        f'torch.save({{"model": torch.load("{file.name}", weights_only=False)["model"]}}, "weights.pth")'
    )


def _kind(file: Path) -> str | None:
    """Identifies a file by its first bytes: a readable format, or the end of an error message; None if unknown."""
    with open(file, "rb") as stream:
        start = stream.read(512)
    if not start:
        return "is empty (0 bytes)"
    for magic, kind in (
        (b"PK\x03\x04", "zip"),
        (b"\x80", "pickle"),
        (b"\x1f\x8b", "is a gzip archive (unpack it first)"),
        (b"BZh", "is a bzip2 archive (unpack it first)"),
        (b"\xfd7zXZ\x00", "is an xz archive (unpack it first)"),
        (b"\x28\xb5\x2f\xfd", "is a zstd archive (unpack it first)"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive (unpack it first)"),
        (b"\x89HDF", "is an HDF5 file"),
        (b"version https://git-lfs", "is a pointer of Git LFS (`git lfs pull` fetches the file)"),
        (b"<", "is a web page or another text in angle brackets (download the file itself)"),
    ):
        if start.startswith(magic):
            return kind
    if start[257:262] == b"ustar":
        return "is a tar archive (unpack it first)"
    return "safetensors" if start[8:9] == b"{" else None
