"""Times DCNv3 on a GPU: our kernels beside the reference implementation, other operators and a plain copy.

    python benchmarks/op_gpu.py --output benchmarks/results

The shapes are those of InternImage-T and -B for 32 images of 224 x 224 and of InternImage-H for 4 of 512 x 512. The softmax of
the mask is included. Every operator is first compared with the reference implementation in float64, and left out if it is
wrong. A measurement is a CUDA graph of several calls. Each call has tensors of its own, which are together larger than the
second-level cache: the figures contain neither the host's time nor a warm cache. The graphs of all operators take turns, and
the tables give medians.

The share of the copy's bandwidth is the least that a call must move (input, offset and mask read, output written) by the time
of the call, over the bandwidth of a copy of a large tensor on the device.

`--upstream` and `--dcnv4` name checkouts of OpenGVLab/InternImage and OpenGVLab/DCNv4 whose extensions are built; `deformops`
is compared where the package is installed. The official operator has no bfloat16, and DCNv4's backward pass has none: float16
stands in for it. DCNv4 has no softmax, so its results are not compared. DCNv4 and `deformops` read offset and mask from one
tensor, which is made before the measurement. With `--device cpu` everything runs on a small shape, to try the program.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import harness
import torch

from internimage_hf.dcnv3 import dcnv3_softmax


SMALL = (2, [harness.OperatorCall(size=8, channels=32, groups=2, count=1)])
REFERENCE = "reference implementation"
KERNELS = ("CUDA kernel", "Triton kernel", "CPU kernel")

# --------------------------------------------------------------------------------------------------------- operators


class Operator(NamedTuple):
    """A function of tensors and the number of groups, and how its tensors are made of input, offset and mask logits."""

    call: Callable[..., torch.Tensor]  # (*tensors, groups) -> output
    pack: Callable[..., tuple[torch.Tensor, ...]] = lambda input, offset, mask, groups: (input, offset, mask)
    has_bfloat16: bool = True
    has_softmax: bool = True

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16 if dtype == torch.bfloat16 and not self.has_bfloat16 else dtype


def reference(input, offset, mask, groups):
    return dcnv3_softmax(input, offset, mask, groups=groups, backend="torch")


def our_kernel(module) -> Operator:
    return Operator(lambda input, offset, mask, groups: module.dcnv3_softmax(input, offset, mask, groups=groups))


def deformops() -> Operator:
    from deformops.registry import attn

    def call(input, packed, groups):
        return attn(input, packed, groups=groups, group_dims=input.shape[-1] // groups, softmax=True)

    def pack(input, offset, mask, groups):
        pairs = offset.unflatten(-1, (groups, harness.POINTS, 2))
        return input, torch.cat((pairs, mask.unflatten(-1, (groups, harness.POINTS, 1))), -1).flatten(-3)

    return Operator(call, pack)


def official(folder: Path) -> Operator:
    function = harness.import_official(folder, "ops_dcnv3.functions").DCNv3Function
    if not harness.has_official_operator():
        raise ImportError("its operator is not built, or not for this torch")

    def call(input, offset, mask, groups):
        batch, *_, channels = input.shape
        mask = harness.softmax_of_mask(mask, groups)
        return function.apply(
            input, offset, mask, 3, 3, 1, 1, 1, 1, 1, 1, groups, channels // groups, 1.0, batch, False
        )

    return Operator(call, has_bfloat16=False)


def dcnv4(folder: Path) -> Operator:
    sys.path.insert(0, str(folder / "DCNv4_op"))
    from DCNv4.functions.dcnv4_func import DCNv4Function

    def call(input, packed, groups):
        batch, *_, channels = input.shape
        return DCNv4Function.apply(
            input, packed, 3, 3, 1, 1, 1, 1, 1, 1, groups, channels // groups, 1.0, batch, False
        )

    def pack(input, offset, mask, groups):
        packed = torch.cat((offset.unflatten(-1, (groups, -1)), mask.unflatten(-1, (groups, -1))), -1).flatten(-2)
        return input, torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 8))

    return Operator(call, pack, has_bfloat16=False, has_softmax=False)


def load_operators(
    kernels: dict[str, ModuleType], arguments: argparse.Namespace, left_out: dict[str, str]
) -> dict[str, Operator]:
    """All operators by name, ours first. Those of other people that cannot be loaded are added to `left_out`."""
    operators = {REFERENCE: Operator(reference)}
    operators |= {name: our_kernel(kernel) for name, kernel in kernels.items()}
    others = {"deformops": deformops} if arguments.device.type == "cuda" else {}
    if arguments.upstream:
        others["official"] = partial(official, arguments.upstream)
    if arguments.dcnv4:
        others["DCNv4"] = partial(dcnv4, arguments.dcnv4)
    for name, load in others.items():
        try:
            operators[name] = load()
        except Exception as error:  # other people's code may raise anything
            left_out[name] = f"cannot be loaded ({first_line(error)})"
    return operators


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def relative_error(operator: Operator, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of the output in a small case, relative to the reference implementation's largest output."""
    tensors = harness.make_inputs(2, harness.OperatorCall(8, 64, 4, 1), operator.dtype(dtype), device)
    expected = reference(*(tensor.cpu().double() for tensor in tensors), 4)
    actual = operator.call(*operator.pack(*tensors, 4), 4).cpu().double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def without_wrong_ones(
    operators: dict[str, Operator], dtype: torch.dtype, device: torch.device, left_out: dict[str, str]
) -> dict[str, Operator]:
    """The operators whose results are right; the others are added to `left_out`."""
    right = {}
    for name, operator in operators.items():
        if operator.has_softmax:
            error = relative_error(operator, dtype, device)
            if not error < (1e-4 if dtype == torch.float32 else 3e-2):
                left_out[f"{name}, {str(dtype).removeprefix('torch.')}"] = f"its error is {error:.1e}"
                continue
        right[name] = operator
    return right


# ------------------------------------------------------------------------------------------------------------ timing


class Series(NamedTuple):
    """Several calls of an operator in a row, which `run` makes."""

    run: Callable[[], object]
    calls: int


class Clock:
    """Times series of calls: CUDA graphs by events on a GPU, by the wall clock on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 2**20
        self.stream = torch.cuda.Stream() if self.on_gpu else None

    def once(self, series: Series) -> float:
        """Milliseconds per call."""
        if not self.on_gpu:
            return harness.seconds_of(series.run) * 1e3 / series.calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        series.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / series.calls

    def series(self, calls: list[Callable[[], object]], milliseconds: float = 2.0) -> Series:
        """The calls one after another, again and again for about so long."""
        if not self.on_gpu:
            return Series(lambda: [call() for call in calls], len(calls))
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                calls[0]()
            self.stream.synchronize()
            one = min(self.once(Series(calls[0], 1)) for _ in range(2))
        count = max(1, min(50, round(milliseconds / one)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for i in range(count):
                calls[i % len(calls)]()
        return Series(graph.replay, count)

    def medians(self, series: dict[str, Series], seconds: float, turns: int = 50) -> dict[str, float]:
        """Milliseconds of a call of each series. The series take turns, 5 at least, until the seconds are over."""
        for one in series.values():
            one.run()
        times = harness.take_turns(
            {name: partial(self.once, one) for name, one in series.items()}, turns, seconds, at_least=5
        )
        return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second, read and written."""
    count, device_type = (2**30, "cuda") if clock.on_gpu else (2**24, "cpu")
    source = torch.ones(count, dtype=torch.uint8, device=device_type)
    target = torch.empty_like(source)
    copy = clock.series([lambda: target.copy_(source)], 10.0)
    return 2 * count / (clock.medians({"copy": copy}, 2.0, 20)["copy"] / 1e3)


def bytes_moved(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in (*tensors, tensors[0]))


def no_grad(call: Callable[[], object]) -> None:
    with torch.no_grad():
        call()


def deterministic(call: Callable[[], object]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(False)


def time_case(
    operators: dict[str, Operator], sets: list[list[torch.Tensor]], groups: int, clock: Clock, seconds: float
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Milliseconds by pass and operator, and the failures of other people's operators by name.

    Args:
        sets: input, offset and mask logits, several times.
        seconds: for each pass.
    """
    forward, backward, failures = {}, {}, {}

    def prepare(name: str, operator: Operator) -> None:
        dtype = operator.dtype(sets[0][0].dtype)
        label = name if dtype == sets[0][0].dtype else f"{name} (float16)"
        used = sets[:1] if name == REFERENCE else sets  # it takes long enough, and much memory
        packed = [operator.pack(*(tensor.to(dtype) for tensor in tensors), groups) for tensors in used]
        forward[label] = clock.series([partial(no_grad, partial(operator.call, *p, groups)) for p in packed])
        calls = []
        with torch.cuda.stream(clock.stream) if clock.on_gpu else nullcontext():  # the backward pass runs there too
            for tensors in packed:
                leaves = [tensor.detach().requires_grad_() for tensor in tensors]
                output = operator.call(*leaves, groups)
                gradient = torch.randn_like(output)
                calls.append(partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True))
        backward[label] = clock.series(calls)
        if name in ("CUDA kernel", "Triton kernel"):
            backward[f"{label}, deterministic"] = clock.series([partial(deterministic, call) for call in calls])

    for name, operator in operators.items():
        try:
            prepare(name, operator)
        except Exception as error:  # other people's code may raise anything
            if name in KERNELS:
                raise
            failures[name] = first_line(error)
    return {"forward": clock.medians(forward, seconds), "backward": clock.medians(backward, seconds)}, failures


# ----------------------------------------------------------------------------------------------------------- results


def summary(rows: list[dict]) -> list[str]:
    """All calls of a model: the milliseconds of the first of our kernels, and the times of the others relative to it."""
    sums = {}
    for row in rows:
        for name, milliseconds in row["milliseconds"].items():
            of_model = sums.setdefault((row["model"], row["dtype"], row["pass"]), {})
            of_model.setdefault(name, []).append(row["calls"] * milliseconds)
    names = list(dict.fromkeys(name for of_model in sums.values() for name in of_model))
    first = next(name for name in (*KERNELS, *names) if name in names)
    others = [name for name in names if name != first]
    stages = rows[0]["stages"]  # before the end of a run, and where an operator failed, some are missing
    cells = []
    for key, of_model in sums.items():
        totals = {name: sum(values) for name, values in of_model.items() if len(values) == stages}
        ratios = [f"{totals[name] / totals[first]:.2f}" if {name, first} <= set(totals) else "" for name in others]
        cells.append((", ".join(key), f"{totals[first]:.3f} ms" if first in totals else "", *ratios))
    return harness.table(("all calls of a model", first, *(f"{name} / {first}" for name in others)), cells)


def markdown(report: dict) -> str:
    lines = harness.heading("DCNv3 on a GPU", report["environment"])
    lines.append(f"- a copy on the device: {report['copy_bandwidth'] / 1e12:.3f} TB/s")
    lines += [f"- left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    if report["rows"]:
        lines += summary(report["rows"])
    for direction in ("forward", "backward"):
        rows = [row for row in report["rows"] if row["pass"] == direction]
        names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
        cells = [
            (
                f"{row['model']}, {row['dtype']}, {row['shape']}",
                *(f"{row['milliseconds'][name]:.4f}" if name in row["milliseconds"] else "" for name in names),
                f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else "",
            )
            for row in rows
        ]
        lines += ["", f"## {direction}, milliseconds"]
        lines += harness.table(("model, dtype, stage", *names, "bandwidth of the kernel / the copy's"), cells)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--device", type=harness.device, default="cuda", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--models", nargs="+", choices=list(harness.GPU_MODELS), default=list(harness.GPU_MODELS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--seconds", type=harness.positive(float), default=1.0, help="for each pass of a shape")
    parser.add_argument("--dcnv4", type=Path, help="checkout of OpenGVLab/DCNv4 to compare with")
    arguments = parser.parse_args(argv)
    harness.set_up(arguments.threads, arguments.device)

    kernels = harness.built_kernels(arguments.device.type)
    if not kernels:
        raise SystemExit(
            "no kernel for this device and torch is in dcnv3_kernel/build: run dcnv3_kernel/build.py first"
        )
    left_out = {}
    operators = load_operators(kernels, arguments, left_out)
    clock = Clock(arguments.device)
    report = {
        "environment": harness.environment(
            arguments.device, **{name: harness.describe(kernel) for name, kernel in kernels.items()}
        ),
        "copy_bandwidth": copy_bandwidth(clock),
        "left_out": left_out,
        "rows": [],
    }
    cases = {
        name: (images, harness.operator_calls(name.lower(), size))
        for name, (images, size) in harness.GPU_MODELS.items()
    }
    cases = {name: cases[name] for name in arguments.models} if clock.on_gpu else {"small": SMALL}
    for dtype_name in arguments.dtypes:
        dtype = getattr(torch, dtype_name)
        right = without_wrong_ones(operators, dtype, arguments.device, left_out)
        for model, (images, calls) in cases.items():
            for call in calls:
                tensors = harness.make_inputs(images, call, dtype, arguments.device)
                count = min(32, 3 * clock.cache_bytes // bytes_moved(tensors) + 1)
                sets = [harness.make_inputs(images, call, dtype, arguments.device, seed) for seed in range(count)]
                shape = f"{images}x{call.size}x{call.size}x{call.channels}, {call.groups} groups"
                times, failures = time_case(right, sets, call.groups, clock, arguments.seconds)
                left_out |= {f"{name}, {dtype_name}, {shape}": failure for name, failure in failures.items()}
                for direction, milliseconds in times.items():
                    row = {"model": model, "dtype": dtype_name, "shape": shape, "stages": len(calls)}
                    row |= {"group_width": call.channels // call.groups, "calls": call.count, "pass": direction}
                    row |= {"milliseconds": milliseconds, "bytes": bytes_moved(tensors)}
                    ours = next((name for name in KERNELS if name in milliseconds), None)
                    if direction == "forward" and ours is not None:
                        seconds = milliseconds[ours] / 1e3
                        row["bandwidth_share"] = row["bytes"] / seconds / report["copy_bandwidth"]
                    report["rows"].append(row)
                print(f"measured: {model}, {dtype_name}, {shape}", file=sys.stderr)
                harness.write_results(arguments.output, "op_gpu", report, markdown(report))
    print(markdown(report))
    wrong = [name for name in left_out if name.split(",")[0] in KERNELS]
    if wrong:
        print(f"error: wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
