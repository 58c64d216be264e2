"""The parts that the benchmarks share: shapes, inputs, the official code, clocks, the record of the machine, results."""

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import platform
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
import transformers
from torch.profiler import ProfilerActivity, profile

import internimage_hf
from internimage_hf import InternImageConfig, kernel_loader
from internimage_hf.dcnv3 import dcnv3_backend_report
from internimage_hf.modeling_internimage import InternImageDropPath


KERNEL_PROJECT = Path(__file__).resolve().parents[1] / "dcnv3_kernel"
POINTS = 9  # of the 3 x 3 kernel that all variants have

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------- operator: shapes


# The models whose calls of the operator are measured on a GPU: the number of images, and their height and width.
GPU_MODELS = {"T": (32, 224), "B": (32, 224), "H": (4, 512)}


class OperatorCall(NamedTuple):
    """A shape of the operator's input, square, and how often a model makes a call of this shape."""

    size: int  # height and width
    channels: int
    groups: int
    count: int


def operator_calls(variant: str, image_size: int) -> list[OperatorCall]:
    """The operator calls of a released variant, one shape per stage."""
    config = InternImageConfig.from_variant(variant)
    calls, size = [], -(-image_size // 4)
    for stage, (groups, depth) in enumerate(zip(config.groups, config.depths, strict=True)):
        calls.append(OperatorCall(size, config.channels * 2**stage, groups, depth))
        size = -(-size // 2)
    return calls


def make_inputs(
    batch: int, call: OperatorCall, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> list[torch.Tensor]:
    """Input, offset and mask logits, normally distributed: (batch, size, size, ...) each."""
    generator = torch.Generator(device).manual_seed(seed)
    widths = (call.channels, call.groups * POINTS * 2, call.groups * POINTS)
    shapes = [(batch, call.size, call.size, width) for width in widths]
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


# ------------------------------------------------------------------------------------- operator: other formulations


def softmax_of_mask(mask: torch.Tensor, groups: int) -> torch.Tensor:
    """The softmax over the points of each group by `F.softmax`, as the official module computes it."""
    return F.softmax(mask.unflatten(-1, (groups, POINTS)), -1).flatten(-2)


def grid_sample_arguments(
    input: torch.Tensor, offset: torch.Tensor, groups: int, offset_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps (N*G, C/G, H, W) and the grid (N, H, W, G, P, 2) with which `F.grid_sample` samples all points."""
    height, width = input.shape[1:3]
    cells = torch.arange(3, device=input.device) - 1
    offset = offset.unflatten(-1, (groups, POINTS, 2))
    x = torch.arange(width, device=input.device).view(-1, 1, 1) + (cells.repeat_interleave(3) + offset[..., 0]) * (
        offset_scale
    )
    y = torch.arange(height, device=input.device).view(-1, 1, 1, 1) + (cells.repeat(3) + offset[..., 1]) * offset_scale
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
    return input.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1), grid


def materialising(
    input: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int, offset_scale: float = 1.0
) -> torch.Tensor:
    """DCNv3 by one `grid_sample` of all points: every sample is written to memory, as in the official fallback.

    Computes in float32. Shapes as for `dcnv3_softmax`; kernel 3 x 3, stride and padding 1.
    """
    batch, height, width, channels = input.shape
    maps, grid = grid_sample_arguments(input.float(), offset.float(), groups, offset_scale)
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, height, width * POINTS, 2)
    samples = F.grid_sample(maps, grid, align_corners=False).unflatten(-1, (width, POINTS))  # (N*G, C/G, H, W, P)
    mask = softmax_of_mask(mask.float(), groups).unflatten(-1, (groups, POINTS))
    mask = mask.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, height, width, POINTS)
    output = (samples * mask).sum(-1).view(batch, channels, height, width)
    return output.permute(0, 2, 3, 1).to(input.dtype)


# ---------------------------------------------------------------------------------------------- operator: kernels


@contextmanager
def _in_place_of(modules: Mapping[str, types.ModuleType], folders: Sequence[Path]) -> Iterator[None]:
    """Puts modules and folders before those that Python would find, inside the block only."""
    before, path = {name: sys.modules.get(name) for name in modules}, sys.path[:]
    sys.modules.update(modules)
    sys.path[:0] = map(str, folders)
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def built_kernels(device_type: str) -> dict[str, types.ModuleType]:
    """The kernels in `dcnv3_kernel/build` for a device type, by name: "CUDA kernel", "Triton kernel", "CPU kernel"."""
    kernels = {}
    for folder in kernel_loader.find_variants(KERNEL_PROJECT, device_type):
        compiled = "CPU kernel" if device_type == "cpu" else "CUDA kernel"
        name = compiled if "stable-abi" in folder.name else "Triton kernel"
        if name not in kernels:
            kernels[name] = kernel_loader.load_variant(folder, device_type)
    return kernels


def is_stale(kernel: types.ModuleType) -> bool:
    """Whether the sources have changed since a kernel was built: its identifier holds a digest of them."""
    with _in_place_of({}, [KERNEL_PROJECT]):
        source_digest = importlib.import_module("builder.package").source_digest
    folder = Path(kernel.__file__).parent
    backend = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["backend"]
    source = backend["type"] if "stable-abi" in folder.name else "triton"
    architectures = [name.removesuffix("+PTX") for name in backend.get("archs", [])]
    return not kernel.__name__.endswith(source_digest(source, architectures)[:10])


def describe(kernel: types.ModuleType) -> str:
    """The folder of a kernel, and whether it was built from the present sources."""
    return f"{Path(kernel.__file__).parent.name}, {'STALE: build it again' if is_stale(kernel) else 'up to date'}"


def check_gpu_kernels() -> int:
    """Prints the kernels for GPUs that were built; the result is 1 if one is missing or stale."""
    kernels = {name: describe(kernel) for name, kernel in built_kernels("cuda").items()}
    states = {name: kernels.get(name, "MISSING") for name in ("CUDA kernel", "Triton kernel")}
    print("; ".join(f"{name}: {state}" for name, state in states.items()))
    return int(any("STALE" in state or "MISSING" in state for state in states.values()))


# ----------------------------------------------------------------------------------------------- the official code


def import_official(folder: Path, name: str) -> types.ModuleType:
    """Imports a module of the official classification code, such as `ops_dcnv3.functions` or `models.intern_image`.

    The compiled operator may be installed, built in place, or missing; `has_official_operator` tells. Two modules that the
    official code imports are replaced: `pkg_resources`, which it asks for the version of the operator, and
    `timm.models.layers`, of which it uses two functions.

    Args:
        folder: a checkout of https://github.com/OpenGVLab/InternImage.

    Raises:
        SystemExit: if the folder is no such checkout.
    """
    source = folder / "classification"
    if not (source / "ops_dcnv3").is_dir():
        raise SystemExit(
            f"--upstream {folder} is not a checkout of OpenGVLab/InternImage: {source}/ops_dcnv3 is missing"
        )
    resources = types.ModuleType("pkg_resources")
    resources.get_distribution = lambda name: types.SimpleNamespace(version="1.1")
    layers = types.ModuleType("timm.models.layers")
    layers.DropPath, layers.trunc_normal_ = InternImageDropPath, torch.nn.init.trunc_normal_
    replaced = {name: types.ModuleType(name) for name in ("timm", "timm.models")}
    replaced |= {"pkg_resources": resources, "timm.models.layers": layers}
    with _in_place_of(replaced, [source, source / "ops_dcnv3"]):
        try:
            importlib.import_module("DCNv3")
        except ImportError:  # not built, or built for another torch
            sys.modules["DCNv3"] = types.ModuleType("DCNv3")
        return importlib.import_module(name)


def has_official_operator() -> bool:
    """Whether `import_official` found the compiled operator."""
    return hasattr(sys.modules["DCNv3"], "dcnv3_forward")


# ------------------------------------------------------------------------------------------------------------ clocks


def take_turns(
    functions: Mapping[str, Callable[[], T]], turns: int, seconds: float = float("inf"), at_least: int = 1
) -> dict[str, list[T]]:
    """Calls every function once per turn, so that a slow moment of the machine affects all of them alike.

    No turn begins after so many seconds, except the first `at_least`.
    """
    results = {name: [] for name in functions}
    end = time.monotonic() + seconds
    for turn in range(turns):
        if turn >= at_least and time.monotonic() > end:
            break
        for name, function in functions.items():
            results[name].append(function())
    return results


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], calls: int = 1, device: torch.device = torch.device("cpu")) -> float:  # noqa: B008
    """Wall-clock time of a call. The time to free the last result is not part of it."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        result = call()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed / calls


def peak_memory(call: Callable[[], object], device: torch.device = torch.device("cpu")) -> int:  # noqa: B008
    """Bytes that PyTorch allocates during a call beyond those before it, at their peak, the result included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    current = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            highest = max(highest, current)
    return highest


# ------------------------------------------------------------------------------------------------------ command line


def positive(kind: Callable[[str], T]) -> Callable[[str], T]:
    """An argument's type: a positive number."""

    def parse(text: str) -> T:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return number

    parse.__name__ = kind.__name__  # argparse's messages have it
    return parse


def device(text: str) -> torch.device:
    """An argument's type: a device of the type cpu or cuda that is there."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"PyTorch {torch.__version__} finds no GPU {text} here")
    return found


def argument_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--upstream", type=Path, help="checkout of OpenGVLab/InternImage to compare with")
    parser.add_argument("--threads", type=positive(int), help="threads of the CPU; PyTorch's default if absent")
    parser.add_argument("--output", type=Path, help="folder for the results as JSON and Markdown")
    return parser


def set_up(threads: int | None, device: torch.device) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


# ----------------------------------------------------------------------------------------------------------- results


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:  # not Linux
        names = []
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, {capability}"


def environment(device: torch.device, **more: object) -> dict[str, object]:
    """What the figures depend on: hardware, versions, the command."""
    backend = dcnv3_backend_report().get(device.type, {})
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "internimage_hf": internimage_hf.__version__,
        "dcnv3_backend": {name: text.replace(f"{KERNEL_PROJECT.parent}/", "") for name, text in backend.items()},
        "command": " ".join(["python", *sys.argv]),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["cudnn_allow_tf32"] = torch.backends.cudnn.allow_tf32
        facts["triton"] = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    return facts | more


def heading(title: str, environment: Mapping[str, object]) -> list[str]:
    return [f"# {title}", "", *(f"- {name}: {value}" for name, value in environment.items())]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table: an empty line, the header, the rows. All columns but the first are numbers."""
    cells = [[str(cell).replace("|", "/") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| "
        + " | ".join((f"{c:>{w}}" if i else f"{c:<{w}}") for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return ["", lines[0], f"|{rule}|", *lines[1:]]


def write_results(folder: Path | None, program: str, report: Mapping[str, object], markdown: str) -> None:
    """Writes or replaces `<program>_<hardware>_<date>.json` and `.md`, each file at once."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    facts = report["environment"]
    machine = re.sub(r"[^a-z0-9]+", "_", facts["hardware"].split(",")[0].lower()).strip("_")
    stem = f"{program}_{machine}_{facts['date'].split()[0]}"
    for suffix, text in ((".json", json.dumps(report, indent=1) + "\n"), (".md", markdown)):
        unfinished = folder / f".{stem}{suffix}"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / f"{stem}{suffix}")
