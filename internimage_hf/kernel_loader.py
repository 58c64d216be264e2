# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""A device type comes in, the compiled DCNv3 kernel for it goes out, or the reason why there is none.

The `kernels` library (https://github.com/huggingface/kernels) knows which build variant fits a machine and imports it. This
module adds the places to look in: `LOCAL_KERNELS`, the variants that came with the package or were built in its checkout
(`make kernel`), and what the Hub's cache holds. Only `load_dcnv3_kernel` and `from_pretrained(use_kernels=True)` ask the Hub.
"""

import base64
import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The Hub marks this publisher as trusted; `kernels` refuses a publisher without that mark. Branch v1 only gets builds with
# the same interface.
HUB_REPOSITORY, HUB_REVISION = "kernels-community/dcnv3", "v1"

_HERE = Path(__file__).resolve().parent
_lock = threading.RLock()
_found: dict[str, tuple[ModuleType | None, str]] = {}


def get_dcnv3_kernel(device_type: str) -> tuple[ModuleType | None, str]:
    """The kernel module for tensors on `device_type`, or None; and the reason. Searched once per process, without network."""
    if device_type not in _found:
        with _lock:
            if device_type not in _found:
                _found[device_type] = _find(device_type)
    return _found[device_type]


def load_dcnv3_kernel(device_type: str | None = None) -> ModuleType:
    """Loads the DCNv3 kernel from the Hub, for this process and through the Hub's cache for later ones.

    Args:
        device_type: "cpu", "cuda" (ROCm included) or "xpu"; by default that of the accelerator, "cpu" without one. A kernel
            that `LOCAL_KERNELS` names stands for the Hub's.

    Returns:
        The kernel's module, which computes DCNv3 on that device type from now on.

    Raises:
        ImportError: if the `kernels` library is missing or too old, or the kernel lacks a function.
        ValueError: if torch is not built for `device_type`, the Hub no longer marks the publisher as trusted, or the kernel
            is damaged, or built for other GPUs.
        FileNotFoundError: if the repository has no variant for this machine.
        huggingface_hub.errors.HfHubHTTPError, OSError: if the Hub does not answer, or has no such repository.
    """
    if device_type is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device_type = "cpu" if accelerator is None else accelerator.type
    library = _require_library()
    with _lock:
        what, folder = next(_local_kernels(device_type), (f"{HUB_REPOSITORY} on the Hub, {HUB_REVISION}", None))
        if isinstance(folder, Exception):
            raise folder
        if folder is None:
            folder = library.install_kernel(HUB_REPOSITORY, revision=HUB_REVISION, backend=_backend(device_type))
        kernel = load_variant(folder, device_type)
        _found[device_type] = kernel, what
    return kernel


def forget_kernels() -> None:
    """Lets the next call look again: after `make kernel`, or a change of the environment."""
    with _lock:
        _found.clear()


def offer_kernel_layer(layer_name: str, device_type: str) -> None:
    """Registers a layer of the DCNv3 kernel with `kernels`, for transformers' `use_kernels=True`.

    Asks the Hub where no compiled kernel is at hand. Nothing changes where there is no kernel, and where the user
    registered another layer of that name (`kernels.register_kernel_mapping`).
    """
    library = _library()
    if library is None or device_type in library.layer.globals._KERNEL_MAPPING.get().get(layer_name, {}):
        return  # the library has no public way to ask for its mapping
    kernel, _ = get_dcnv3_kernel(device_type)
    if kernel is None or not _is_compiled(Path(kernel.__file__).parent):
        try:
            kernel = load_dcnv3_kernel(device_type)
        except Exception as error:
            log = logger.info if kernel is not None else logger.warning
            log(f"{HUB_REPOSITORY} could not be loaded from the Hub. {type(error).__name__}: {_first_line(error)}")
    layer = getattr(getattr(kernel, "layers", None), layer_name, None)  # older builds have no layer for DCNv4
    if layer is not None:
        library.register_kernel_mapping({layer_name: {device_type: _LoadedLayer(layer)}})


class _LoadedLayer:
    """A layer of a loaded kernel. If `kernels` loaded a copy of it, operators would be registered twice."""

    def __init__(self, layer: type[torch.nn.Module]):
        self.layer = layer

    def load(self) -> type[torch.nn.Module]:
        return self.layer


# ---------------------------------------------------------------------------------------------------- places to look in


def _library() -> ModuleType | None:
    """The `kernels` library, None where there is none: code of this package loaded from the Hub runs without it too.

    Its only import: transformers takes an import outside of a `try` for a requirement of that code.
    """
    try:
        import kernels
        import kernels.layer.globals
        import kernels.variants
    except (ImportError, ValueError):  # ValueError: a module without `__spec__` was put in its place
        return None
    return kernels


def _require_library() -> ModuleType:
    library = _library()
    if library is None:
        raise ImportError("the library `kernels`, 0.17 or newer, is not installed")
    return library


def _find(device_type: str) -> tuple[ModuleType | None, str]:
    problems = []
    for what, found in _candidates(device_type):
        try:
            if isinstance(found, Exception):
                raise found
            kernel = load_variant(found, device_type)
        except (Exception, SystemExit) as error:  # a kernel is foreign code: whatever it raises, the model must run
            problems.append(f"{what}: {type(error).__name__}: {_first_line(error)}")
            continue
        if problems:
            unusable = f"These could not be used: {'; '.join(problems)}"
            logger.warning(f"The DCNv3 kernel for {device_type} is {what}. {unusable}")
            return kernel, f"{what}. {unusable}"
        return kernel, what
    if not problems:
        problems.append(
            f"no variant for {device_type} on this machine with torch {torch.__version__} was found; `make kernel` in a clone "
            "builds one, `internimage_hf.load_dcnv3_kernel()` asks the Hub"
        )
    reason = "; ".join(problems)
    logger.warning(f"No DCNv3 kernel for {device_type}, the slower PyTorch definition is used. {reason}")
    return None, reason


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _candidates(device_type: str) -> Iterator[tuple[str, Path | Exception]]:
    """The folders of variants to try, in order, each with its description; an exception stands for a place without one."""
    try:
        _require_library()
    except ImportError as error:
        yield "no kernel can be loaded", error
        return
    yield from _local_kernels(device_type)
    roots = [_HERE / "_kernels"]
    if (_HERE.parent / "dcnv3_kernel" / "build.py").is_file():
        roots.append(_HERE.parent / "dcnv3_kernel")
    ours = [folder for root in roots for folder in find_variants(root, device_type)]
    cached = find_variants(_cached_snapshot(), device_type)
    for folder in (
        *filter(_is_compiled, ours),
        *filter(_is_compiled, cached),
        *(folder for folder in (*ours, *cached) if not _is_compiled(folder)),
    ):
        yield str(folder), folder


def _local_kernels(device_type: str) -> Iterator[tuple[str, Path | Exception]]:
    """What the user named in the environment variable LOCAL_KERNELS, or what is wrong with it."""
    for entry in os.environ.get("LOCAL_KERNELS", "").split(":"):
        name, _, path = (part.strip() for part in entry.partition("="))
        if entry.strip() and not (name and path):
            problem = ValueError("an entry must be OWNER/NAME=PATH, entries are separated by colons")
            yield f"LOCAL_KERNELS, {entry!r}", problem
        elif name.split("/")[-1] == "dcnv3":
            try:
                local = Path(path).expanduser()
                folders = [local] if (local / "metadata.json").is_file() else find_variants(local, device_type)
                problem = FileNotFoundError(f"no variant for {device_type} in it")
            except (OSError, RuntimeError) as error:  # a path that cannot exist, the home of an unknown user
                folders, problem = [], error
            yield from ((f"LOCAL_KERNELS, {folder}", folder) for folder in folders)
            if not folders:
                yield f"LOCAL_KERNELS, {path}", problem


def _cached_snapshot() -> Path | None:
    """Where the Hub's cache holds the kernel's repository, if it does."""
    cache = os.environ.get("KERNELS_CACHE")
    try:
        folder = snapshot_download(
            HUB_REPOSITORY, repo_type="kernel", revision=HUB_REVISION, cache_dir=cache, local_files_only=True
        )
    except (OSError, ValueError):  # LocalEntryNotFoundError; a cache that cannot be read
        return None
    return Path(folder)


def _backend(device_type: str) -> str:
    """The name that `kernels` has for a device type of this torch."""
    return "rocm" if device_type == "cuda" and torch.version.hip else device_type


def _is_compiled(folder: Path) -> bool:
    return "stable-abi" in folder.name


def find_variants(root: Path | None, device_type: str) -> list[Path]:
    """The variants in a folder (or its `build/`) that fit this machine, its torch and the device type; compiled ones first."""
    library = _require_library().variants
    if root is not None and (root / "build").is_dir():
        root = root / "build"
    variants = [] if root is None else library.get_variants_local(root)
    if not variants:
        return []
    try:
        fitting, _ = library.resolve_variants(variants, _backend(device_type))
    except ValueError:  # torch is not built for the device type
        return []
    return [root / variant.variant_str for variant in fitting]


# ---------------------------------------------------------------------------------------------------------- one variant


def load_variant(folder: Path, device_type: str) -> ModuleType:
    """Imports the variant in a folder, after the checks that `kernels` does not make. A second call gives the same module.

    Raises:
        ValueError: if the variant is for another device type or other GPUs than those here, or a file is not as it was built.
        ImportError: if it lacks a function of the kernel, or its operators are registered already; and whatever its own code
            raises.
    """
    library = _require_library()
    metadata = library.Metadata.read_from_file(folder / "metadata.json")
    built_for = str(metadata.backend.backend_type).lower()
    if built_for != _backend(device_type):
        raise ValueError(f"it is built for {built_for}, not for {device_type}")
    if built_for == "cuda":
        _check_gpus(metadata.backend.archs or [])
    if metadata.id in sys.modules:
        _check_interface(sys.modules[metadata.id])
        return sys.modules[metadata.id]
    if hasattr(getattr(torch.ops, metadata.id), "dcnv3_forward"):  # registering operators twice ends the process
        raise ImportError(f"the operators of {metadata.id} are registered already, by a copy that could not be loaded")
    if metadata.digest is not None:
        _check_files(folder, metadata.digest)
    try:
        with _without_local_kernels():
            module = library.get_local_kernel(folder)
        _check_interface(module)
    except BaseException:
        for loaded in [n for n in sys.modules if n == metadata.id or n.startswith(f"{metadata.id}.")]:
            del sys.modules[loaded]
        raise
    return module


@contextmanager
def _without_local_kernels() -> Iterator[None]:
    """`kernels` refuses to load anything while LOCAL_KERNELS has a malformed entry, also what it does not concern."""
    value = os.environ.pop("LOCAL_KERNELS", None)
    try:
        yield
    finally:
        if value is not None:
            os.environ["LOCAL_KERNELS"] = value


def _check_files(folder: Path, expected: Any) -> None:
    """Verifies the checksums of a `kernels` Digest: a truncated shared library can end the process when it is loaded."""
    for name, digest in expected.files.items():
        actual = hashlib.new(str(expected.algorithm), (folder / name).read_bytes()).digest()
        if base64.b64encode(actual).decode() != digest:
            raise ValueError(f"its {name} is not the one that was built: damaged, or changed since")


def _check_gpus(architectures: list[str]) -> None:
    """Checks all GPUs here: code runs on later minor versions of its compute capability, PTX on all later ones."""
    if not architectures or not torch.cuda.is_available():
        return
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        for name in architectures:
            parsed = re.fullmatch(r"(\d+)\.(\d+)(\+PTX)?", name)
            if parsed is None:
                continue
            built, ptx = (int(parsed[1]), int(parsed[2])), parsed[3]
            if built <= (major, minor) and (ptx or built[0] == major):
                break
        else:
            raise ValueError(
                f"it is built for GPUs of the compute capabilities {', '.join(architectures)}, cuda:{device} has {major}.{minor}"
            )


def _check_interface(module: ModuleType) -> None:
    for function in ("dcnv3", "dcnv3_softmax"):
        if not callable(getattr(module, function, None)):
            raise ImportError(f"it has no function {function}")
