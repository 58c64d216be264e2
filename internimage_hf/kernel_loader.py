# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Finds a compiled DCNv3 kernel for a kind of device: a folder in the layout of https://github.com/huggingface/kernels.

Looked for, the first that works: `LOCAL_KERNELS`, a compiled variant that came with the package or was built in its
checkout (`make kernel`), the Hub (through the `kernels` library, if it is installed), and last the Triton variant.
"""

import base64
import hashlib
import importlib.util
import json
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The publisher is one that the Hub marks as trusted: a stranger cannot register the name, and `kernels` refuses what lies
# there if it ever loses that mark. The version is a branch that only compatible builds go to.
HUB_REPOSITORY, HUB_VERSION = "kernels-community/dcnv3", 1
_FROM_HUB = f"{HUB_REPOSITORY} on the Hub, version {HUB_VERSION}"
_HUB_SECONDS = 2.0

_HERE = Path(__file__).resolve().parent
_lock = threading.Lock()
_found: dict[str, tuple[ModuleType | None, str]] = {}


def get_dcnv3_kernel(device_type: str) -> tuple[ModuleType | None, str]:
    """The kernel module that serves tensors on `device_type`, or None, and the reason. Looked for once per process."""
    if device_type not in _found:
        with _lock:
            if device_type not in _found:
                _found[device_type] = _find(device_type)
    return _found[device_type]


def forget_kernels() -> None:
    """Lets the next call look again: after `make kernel`, or a change of the environment."""
    with _lock:
        _found.clear()


def offer_kernel_layer(layer_name: str, device_type: str) -> None:
    """Tells the `kernels` library which layer of our kernel stands for the layer of that name in `kernelize`.

    Where there is no kernel, and where the user told it another (`kernels.register_kernel_mapping`), nothing changes.
    """
    if not _has_kernels_library():
        return
    from kernels import register_kernel_mapping
    from kernels.layer.globals import _KERNEL_MAPPING  # there is no public way to ask

    if device_type in _KERNEL_MAPPING.get().get(layer_name, {}):
        return
    kernel, _ = get_dcnv3_kernel(device_type)
    if kernel is not None:
        register_kernel_mapping({layer_name: {device_type: _LoadedLayer(getattr(kernel.layers, layer_name))}})


class _LoadedLayer:
    """A layer of a kernel that is loaded already: loaded by `kernels` once more, it would register its operators twice."""

    def __init__(self, layer: type[torch.nn.Module]):
        self.layer = layer

    def load(self) -> type[torch.nn.Module]:
        return self.layer


def _find(device_type: str) -> tuple[ModuleType | None, str]:
    if device_type not in ("cpu", "cuda", "xpu"):
        return None, f"there is no kernel for devices of the type {device_type!r}"
    problems = []
    for what, load in _candidates(device_type):
        try:
            kernel = load()
        except (
            Exception,
            SystemExit,
        ) as error:  # a kernel is code from elsewhere: whatever it raises, the model must run
            problems.append(f"{what}: {type(error).__name__}: {_first_line(error)}")
            continue
        # The Hub is asked without the user's doing, and may have nothing: only the report says so.
        if local := [problem for problem in problems if not problem.startswith(_FROM_HUB)]:
            logger.warning(
                f"The DCNv3 kernel for {device_type} is {what}. These could not be used: {'; '.join(local)}"
            )
        return kernel, f"{what}; these could not be used: {'; '.join(problems)}" if problems else what
    if not problems:
        problems.append(
            f"no variant for {platform.machine()} {platform.system()} and torch {torch.__version__} was found; "
            "`make kernel` in a clone builds one, `pip install kernels` lets the Hub be asked"
        )
    reason = "; ".join(problems)
    logger.warning(f"No DCNv3 kernel for {device_type}, the slower PyTorch definition is used. {reason}")
    return None, reason


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _candidates(device_type: str) -> Iterator[tuple[str, Callable[[], ModuleType]]]:
    """What to try, in order: a description and what loads it."""
    for entry in os.environ.get("LOCAL_KERNELS", "").split(":"):
        name, _, path = (part.strip() for part in entry.partition("="))
        if entry.strip() and not (name and path):
            problem = ValueError("an entry must be OWNER/NAME=PATH, entries are separated by colons")
            yield f"LOCAL_KERNELS, {entry!r}", lambda problem=problem: _fail(problem)
        elif name.split("/")[-1] == "dcnv3":
            yield from _local_candidates(path, device_type)

    bundled = [_HERE / "_kernels"]
    if (_HERE.parent / "dcnv3_kernel" / "build.py").is_file():
        bundled.append(_HERE.parent / "dcnv3_kernel")
    ours = [folder for root in bundled for folder in find_variants(root, device_type)]
    compiled = [folder for folder in ours if "stable-abi" in folder.name]
    for folder in compiled:
        yield str(folder), lambda folder=folder: load_variant(folder, device_type)

    if _has_kernels_library() and not _offline():
        yield _FROM_HUB, lambda: _load_from_hub(device_type)
    for folder in ours:
        if folder not in compiled:
            yield str(folder), lambda folder=folder: load_variant(folder, device_type)


def _local_candidates(path: str, device_type: str) -> Iterator[tuple[str, Callable[[], ModuleType]]]:
    """The variants in a folder that the user named, or what is wrong with it."""
    try:
        local = Path(path).expanduser()
        folders = [local] if (local / "metadata.json").is_file() else find_variants(local, device_type)
        problem = FileNotFoundError(f"no variant for {device_type} in it")
    except (OSError, RuntimeError) as error:  # a path that cannot be, the home of nobody
        folders, problem = [], error
    for folder in folders:
        yield f"LOCAL_KERNELS, {folder}", lambda folder=folder: load_variant(folder, device_type)
    if not folders:
        yield f"LOCAL_KERNELS, {path}", lambda: _fail(problem)


def _fail(problem: Exception) -> ModuleType:
    raise problem


def _has_kernels_library() -> bool:
    try:
        return importlib.util.find_spec("kernels") is not None
    except ValueError:  # something that was put in its place
        return False


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def find_variants(root: Path, device_type: str) -> list[Path]:
    """The variants in a folder (or its `build/`) that fit this machine, its torch and the device; compiled ones first."""
    if (root / "build").is_dir():
        root = root / "build"
    machine, system = platform.machine().lower(), platform.system().lower()
    torch_version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    compiled = []
    if device_type == "cuda" and torch.version.cuda:
        compute = rf"cu{torch.version.cuda.split('.')[0]}\d"  # any minor version
    elif device_type == "cuda" and torch.version.hip:
        compute = "rocm" + "".join(torch.version.hip.split(".")[:2])
    else:
        compute = re.escape(device_type)
    for folder in root.glob(f"torch-stable-abi*-{machine}-{system}"):
        name = re.fullmatch(rf"torch-stable-abi(\d)(\d+)-{compute}-{machine}-{system}", folder.name)
        if name is not None and (int(name[1]), int(name[2])) <= torch_version:
            compiled.append(folder)
    noarch = {"cuda": "torch-rocm" if torch.version.hip else "torch-cuda", "xpu": "torch-xpu"}.get(device_type)
    triton = [root / noarch] if noarch and (root / noarch).is_dir() else []
    return sorted(compiled, key=lambda folder: folder.name, reverse=True) + triton


def load_variant(folder: Path, device_type: str) -> ModuleType:
    """Imports a variant's folder as a module of its own name, which its build made unique.

    Not `kernels.get_local_kernel`: that is an extra, and refuses a CPU variant where torch was built for CUDA.

    Raises:
        ValueError: if the variant is for another kind of device or other GPUs than those here, or not as it was built.
        ImportError: if it lacks a function of the kernel; and whatever its own code raises.
    """
    metadata = _metadata_for(folder, device_type)
    name = metadata["id"]
    if name in sys.modules:
        _check_interface(sys.modules[name])
        return sys.modules[name]
    if hasattr(getattr(torch.ops, name), "dcnv3_forward"):  # to register operators twice ends the process
        raise ImportError(f"the operators of {name} are there already, of a copy that could not be loaded")
    _check_files(folder, metadata.get("digest") or {})
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        _check_interface(module)
    except BaseException:
        for loaded in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
            del sys.modules[loaded]
        raise
    return module


def _metadata_for(folder: Path, device_type: str) -> dict:
    """A variant's metadata, if it is one for this kind of device."""
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        metadata["id"], built_for = str(metadata["id"]), metadata["backend"]["type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its metadata.json must be JSON with `id` and `backend.type`: {error}") from error
    if {"rocm": "cuda"}.get(built_for, built_for) != device_type:
        raise ValueError(f"it is built for {built_for}, not for {device_type}")
    if built_for == "cuda":
        _check_gpus(metadata["backend"].get("archs") or [])
    return metadata


def _check_files(folder: Path, digest: dict) -> None:
    """Of a library that was cut short, the dynamic linker ends the process."""
    if digest.get("algorithm") != "sha256":
        return
    for name, expected in digest["files"].items():
        if base64.b64encode(hashlib.sha256((folder / name).read_bytes()).digest()).decode() != expected:
            raise ValueError(f"its {name} is not the one that was built: damaged, or changed since")


def _check_gpus(architectures: list[str]) -> None:
    """Of what was compiled for other GPUs, the first launch would fail. Code runs on later minor versions, PTX on all later ones."""
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


def _load_from_hub(device_type: str) -> ModuleType:
    """Asks the Hub, for so long and no longer; what a slow download leaves in the cache serves the next process."""
    # by itself `kernels` takes the variant for the devices that torch was built for, which the tensors may not be on
    for_others = torch.version.cuda or torch.version.hip or torch.version.xpu
    options = {"backend": "cpu"} if device_type == "cpu" and for_others else {}
    result: list[ModuleType] = []
    problem: list[Exception] = []

    def ask():
        try:
            from kernels import get_kernel

            result.append(get_kernel(HUB_REPOSITORY, version=HUB_VERSION, **options))
        except Exception as error:
            problem.append(error)

    thread = threading.Thread(target=ask, daemon=True, name="dcnv3-kernel-from-hub")
    thread.start()
    thread.join(_HUB_SECONDS)
    if problem:
        raise problem[0]
    if not result:
        raise TimeoutError(f"no answer within {_HUB_SECONDS:g} s")
    _check_interface(result[0])
    if file := getattr(result[0], "__file__", None):
        _metadata_for(Path(file).parent, device_type)
    return result[0]
