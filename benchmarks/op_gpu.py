"""Times DCNv3 on a GPU: our kernels beside the PyTorch definition, other people's operators and a plain copy.

    python benchmarks/op_gpu.py --output benchmarks/results

Shapes: the calls of InternImage-T and -B for 32 images of 224 x 224 and of InternImage-H for 4 of 512 x 512, softmax of the mask
included. Every operator is first compared with the definition in float64, and left out if it is wrong. A measurement is a CUDA
graph of several calls, each on tensors of its own, together larger than the second-level cache: neither the host's time nor a
warm cache is in the figures. The graphs of all operators take turns, and the table gives medians.

The share of the copy's bandwidth counts what a call must move at the least (input, offset and mask read, output written) by the time it
takes, over what copying a large tensor on the device moves. `--upstream` and `--dcnv4` name checkouts of OpenGVLab/InternImage and
OpenGVLab/DCNv4 whose extensions are built in place. The official operator has no bfloat16 and is timed in float16 there, and so is
DCNv4's, whose backward pass has none. DCNv4 is another operator (no softmax); it and `deformops` (a package) read offset and mask
from one tensor, which is made outside of the measurement. With `--device cpu` everything runs on small shapes, to try the script.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import softmax

from internimage_hf import kernel_loader
from internimage_hf.dcnv3_torch import Geometry, dcnv3_plain


ROOT = Path(__file__).resolve().parents[1]
# model: (images, [(height and width, channels, groups, calls in the model)])
MODELS = {
    "T": (32, [(56, 64, 4, 4), (28, 128, 8, 4), (14, 256, 16, 18), (7, 512, 32, 4)]),
    "B": (32, [(56, 112, 7, 4), (28, 224, 14, 4), (14, 448, 28, 21), (7, 896, 56, 4)]),
    "H": (4, [(128, 320, 10, 6), (64, 640, 20, 6), (32, 1280, 40, 32), (16, 2560, 80, 6)]),
}
SMALL = {"small": (2, [(8, 32, 2, 1)])}
POINTS = 9
KERNELS = ("CUDA kernel", "Triton kernel", "CPU kernel")


class Operator(NamedTuple):
    """What is timed, and how its tensors are made of input, offset, mask logits and the number of groups beforehand."""

    call: Callable[..., torch.Tensor]  # (*tensors, groups) -> output
    pack: Callable[..., tuple[torch.Tensor, ...]] = lambda input, offset, mask, groups: (input, offset, mask)


def geometry(groups: int) -> Geometry:
    return Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups, 1.0, False)


def definition(input, offset, mask, groups):
    return dcnv3_plain(input, offset, mask, geometry(groups), True)


def our_kernels(device: str) -> dict[str, Operator]:
    """The compiled and the Triton variant that were built for the device."""
    operators = {}
    for folder in kernel_loader.find_variants(ROOT / "dcnv3_kernel", device):
        name = "CPU kernel" if device == "cpu" else "CUDA kernel" if "stable-abi" in folder.name else "Triton kernel"
        module = kernel_loader.load_variant(folder, device)
        operators.setdefault(name, Operator(partial(_our_kernel, module)))
    return operators


def _our_kernel(module, input, offset, mask, groups):
    return module.dcnv3_softmax(input, offset, mask, groups=groups)


def deformops() -> Operator:
    from deformops.registry import attn

    def call(input, packed, groups):
        return attn(input, packed, groups=groups, group_dims=input.shape[-1] // groups, softmax=True)

    def pack(input, offset, mask, groups):
        pairs = offset.unflatten(-1, (groups, POINTS, 2))
        return input, torch.cat((pairs, mask.unflatten(-1, (groups, POINTS, 1))), -1).flatten(-3)

    return Operator(call, pack)


def stand_in_for_pkg_resources() -> None:
    """The official code asks it for the version of its operator, which is built in place here and has none."""
    resources = types.ModuleType("pkg_resources")
    resources.get_distribution = lambda name: types.SimpleNamespace(version="1.1")
    sys.modules["pkg_resources"] = resources


def official(folder: Path) -> Operator:
    stand_in_for_pkg_resources()
    sys.path.insert(0, str(folder / "classification" / "ops_dcnv3"))
    from functions.dcnv3_func import DCNv3Function

    def call(input, offset, mask, groups):
        mask = softmax(mask.unflatten(-1, (groups, POINTS)), -1).flatten(-2)
        channels = input.shape[-1] // groups
        return DCNv3Function.apply(
            input, offset, mask, 3, 3, 1, 1, 1, 1, 1, 1, groups, channels, 1.0, input.shape[0], False
        )

    return Operator(call)


def dcnv4(folder: Path) -> Operator:
    sys.path.insert(0, str(folder / "DCNv4_op"))
    from DCNv4.functions.dcnv4_func import DCNv4Function

    def call(input, packed, groups):
        channels = input.shape[-1] // groups
        return DCNv4Function.apply(input, packed, 3, 3, 1, 1, 1, 1, 1, 1, groups, channels, 1.0, input.shape[0], False)

    def pack(input, offset, mask, groups):
        packed = torch.cat((offset.unflatten(-1, (groups, -1)), mask.unflatten(-1, (groups, -1))), -1).flatten(-2)
        return input, torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 8))

    return Operator(call, pack)


# ------------------------------------------------------------------------------------------------------------- timing


class Series(NamedTuple):
    """Some calls of an operator in a row."""

    run: Callable[[], object]
    calls: int


class Clock:
    """Times series of calls: by events on a GPU, by the wall elsewhere."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size if self.on_gpu else 2**20
        self.stream = torch.cuda.Stream() if self.on_gpu else None

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds."""
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def series(self, calls: list[Callable[[], object]], milliseconds: float = 2.0) -> Series:
        """The calls over and over, one graph, for about so long."""
        if not self.on_gpu:
            return Series(lambda: [call() for call in calls], len(calls))
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                calls[0]()
            self.stream.synchronize()
            one = min(self.once(calls[0]) for _ in range(2))
        count = max(1, min(50, round(milliseconds / one)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(count):
                calls[i % len(calls)]()
        return Series(graph.replay, count)

    def medians(self, series: dict[str, Series], seconds: float, most: int = 50) -> dict[str, float]:
        """Milliseconds of a call of each series, all taking turns, for so many seconds or repetitions."""
        times = {name: [] for name in series}
        for one in series.values():
            one.run()
        end = time.monotonic() + seconds
        for repetition in range(most):
            for name, one in series.items():
                times[name].append(self.once(one.run) / one.calls)
            if repetition >= 4 and time.monotonic() > end:
                break
        return {name: statistics.median(values) for name, values in times.items()}


def make_inputs(images, size, channels, groups, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(images, size, size, c) for c in (channels, groups * POINTS * 2, groups * POINTS)]
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def errors(operators: dict[str, Operator], dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest error of the outputs on a small case, relative to the largest output of the definition in float64."""
    tensors = make_inputs(2, 8, 64, 4, dtype, device)
    expected = definition(*(t.cpu().double() for t in tensors), 4)
    result = {}
    for name, operator in operators.items():
        actual = operator.call(*operator.pack(*tensors, 4), 4).cpu().double()
        result[name] = ((actual - expected).abs().max() / expected.abs().max()).item()
    return result


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second, read and written."""
    count, device = (2**30, "cuda") if clock.on_gpu else (2**24, "cpu")
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = clock.series([lambda: target.copy_(source)], 10.0)
    return 2 * count / (clock.medians({"copy": copy}, 2.0, 20)["copy"] / 1e3)


def bytes_moved(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in (*tensors, tensors[0]))


def deterministic(call: Callable[[], object]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(False)


def time_case(
    operators: dict[str, Operator], sets: list[list[torch.Tensor]], groups: int, clock: Clock, seconds: float
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Milliseconds of the forward and of the backward pass of each operator, and what is wrong with those of other people.

    Each of `sets` is input, offset and mask.
    """

    def no_grad(operator, tensors):
        with torch.no_grad():
            operator.call(*tensors, groups)

    def prepare(name, operator):
        used = sets[:1] if name == "definition" else sets  # it takes long enough, and much memory
        packed = [operator.pack(*tensors, groups) for tensors in used]
        forward[name] = clock.series([partial(no_grad, operator, tensors) for tensors in packed])
        calls = []
        with torch.cuda.stream(clock.stream) if clock.on_gpu else nullcontext():  # where backward passes run then, too
            for tensors in packed:
                leaves = [t.detach().requires_grad_() for t in tensors]
                output = operator.call(*leaves, groups)
                gradient = torch.randn_like(output)
                calls.append(partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True))
        backward[name] = clock.series(calls)
        if name in ("CUDA kernel", "Triton kernel"):
            backward[f"{name}, deterministic"] = clock.series([partial(deterministic, call) for call in calls])

    forward, backward, failures = {}, {}, {}
    for name, operator in operators.items():
        try:
            prepare(name, operator)
        except Exception as error:
            if "kernel" in name:
                raise
            failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return {"forward": clock.medians(forward, seconds), "backward": clock.medians(backward, seconds)}, failures


def summary(rows: list[dict]) -> list[str]:
    """A Markdown table of what all calls of a model take, relative to the CUDA kernel or what there is in its place."""
    sums = {}
    for row in rows:
        for name, milliseconds in row["milliseconds"].items():
            key = (row["model"], row["dtype"], row["pass"])
            sums.setdefault(key, {}).setdefault(name, []).append(row["calls"] * milliseconds)
    names = list(dict.fromkeys(name for of_model in sums.values() for name in of_model))
    first = next(name for name in names if name in KERNELS)
    lines = [f"| all calls of a model | {first} | " + " | ".join(f"{n} / {first}" for n in names if n != first) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for key, of_model in sums.items():
        stages = len(of_model[first])
        total = sum(of_model[first])
        ratios = [  # of operators that none of the stages lacks
            f"{sum(of_model[n]) / total:.2f}" if len(of_model.get(n, ())) == stages else ""
            for n in names
            if n != first
        ]
        lines.append(f"| {', '.join(key)} | {total:.3f} ms | " + " | ".join(ratios) + " |")
    return lines


def table(report: dict) -> str:
    """Markdown: times in milliseconds; behind ours the share of the copy's bandwidth (forward)."""
    machine = report["machine"]
    lines = [
        f"# DCNv3 on {machine['device']}",
        "",
        f"{report['date']}; torch {machine['torch']}, CUDA {machine['cuda']}, Triton {machine['triton']}. A copy moves "
        f"{report['copy_bandwidth'] / 1e12:.2f} TB/s. Command: `{report['command']}`. Milliseconds, softmax of the mask included.",
    ]
    for name, error in report["left_out"].items():
        lines.append(f"Left out: {name}: {error}.")
    lines += ["", *summary(report["rows"])]
    for direction in ("forward", "backward"):
        rows = [r for r in report["rows"] if r["pass"] == direction]
        names = list(dict.fromkeys(n for r in rows for n in r["milliseconds"]))
        lines += [
            "",
            f"## {direction}",
            "",
            "| model, dtype, stage | " + " | ".join(names) + " | bandwidth of the kernel |",
        ]
        lines.append("|---|" + "---:|" * (len(names) + 1))
        for r in rows:
            times = [f"{r['milliseconds'][n]:.4f}" if n in r["milliseconds"] else "" for n in names]
            share = f"{r['bandwidth_share']:.0%}" if "bandwidth_share" in r else ""
            lines.append(f"| {r['model']}, {r['dtype']}, {r['shape']} | " + " | ".join(times) + f" | {share} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each pass of a shape")
    parser.add_argument("--upstream", type=Path, help="checkout of OpenGVLab/InternImage with its operator built")
    parser.add_argument("--dcnv4", type=Path, help="checkout of OpenGVLab/DCNv4 with its operator built")
    parser.add_argument("--output", type=Path, help="folder for the JSON and Markdown files")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu tries the script")

    device = arguments.device
    operators = {"definition": Operator(definition), **our_kernels(device)}
    left_out = {}
    for name, load in (
        ("deformops", deformops if device == "cuda" else None),
        ("official", arguments.upstream and (lambda: official(arguments.upstream))),
        ("DCNv4", arguments.dcnv4 and (lambda: dcnv4(arguments.dcnv4))),
    ):
        if not load:
            continue
        try:
            operators[name] = load()
        except Exception as error:  # whatever other people's code raises
            left_out[name] = f"cannot be loaded ({type(error).__name__}: {error})"
    clock = Clock(device)
    rows = []
    for dtype_name in arguments.dtypes:
        dtype = getattr(torch, dtype_name)
        half_only = {n: o for n, o in operators.items() if dtype is torch.bfloat16 and n in ("official", "DCNv4")}
        usable = {n: o for n, o in operators.items() if n not in half_only}
        for chosen, chosen_dtype in ((usable, dtype), (half_only, torch.float16)):
            # DCNv4 computes something else: its softmax is missing
            checked = {n: o for n, o in chosen.items() if n != "DCNv4"}
            for name, error in errors(checked, chosen_dtype, device).items():
                if not error < (1e-4 if chosen_dtype is torch.float32 else 3e-2):
                    left_out[f"{name}, {chosen_dtype}"] = f"its error is {error:.1e}"
                    del chosen[name]
        for model, (images, shapes) in (
            SMALL if device == "cpu" else {m: MODELS[m] for m in arguments.models}
        ).items():
            for size, channels, groups, calls in shapes:
                tensors = make_inputs(images, size, channels, groups, dtype, device)
                count = min(32, 3 * clock.cache_bytes // bytes_moved(tensors) + 1)
                sets = [make_inputs(images, size, channels, groups, dtype, device, seed) for seed in range(count)]
                shape = f"{images}x{size}x{size}x{channels}, {groups} groups"
                times, failures = time_case(usable, sets, groups, clock, arguments.seconds)
                if half_only:
                    halves = [[t.half() for t in tensors] for tensors in sets]
                    others, more_failures = time_case(half_only, halves, groups, clock, arguments.seconds)
                    failures |= more_failures
                    for direction, values in others.items():
                        times[direction].update({f"{n} (float16)": v for n, v in values.items()})
                left_out |= {f"{n}, {dtype_name}, {shape}": failure for n, failure in failures.items()}
                for direction, values in times.items():
                    row = {
                        "model": model,
                        "dtype": dtype_name,
                        "shape": shape,
                        "group_width": channels // groups,
                    }
                    row |= {"calls": calls, "pass": direction, "milliseconds": values, "bytes": bytes_moved(tensors)}
                    rows.append(row)
                print(
                    model,
                    dtype_name,
                    shape,
                    {d: {n: round(v, 4) for n, v in t.items()} for d, t in times.items()},
                )
                sys.stdout.flush()
    bandwidth = copy_bandwidth(clock)
    for row in rows:
        ours = next((n for n in KERNELS if n in row["milliseconds"]), None)
        if row["pass"] == "forward" and ours is not None:
            row["bandwidth_share"] = row["bytes"] / (row["milliseconds"][ours] / 1e3) / bandwidth
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    report = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/op_gpu.py " + " ".join(argv if argv is not None else sys.argv[1:]),
        "machine": {
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton_version,
            "python": platform.python_version(),
        },
        "copy_bandwidth": bandwidth,
        "left_out": left_out,
        "rows": rows,
    }
    print(table(report))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        stem = (
            arguments.output
            / f"op_{report['machine']['device'].replace(' ', '_').replace('/', '_').lower()}_{report['date']}"
        )
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(report))
    wrong = [name for name in left_out if "kernel" in name]
    if wrong:
        print(f"error: wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
