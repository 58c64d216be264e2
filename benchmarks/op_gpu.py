"""Times DCNv3 on a GPU: our kernels beside the PyTorch definition, other people's operators and a plain copy.

    python benchmarks/op_gpu.py --output benchmarks/results

Shapes: the calls of InternImage-T and -B for 32 images of 224 x 224 and of InternImage-H for 4 of 512 x 512, softmax of the mask
included. Every operator is first compared with the definition in float64, and left out if it is wrong. Then all take turns within
each repetition; the second-level cache is overwritten before each call, and the table gives medians.

The share of the copy's bandwidth counts what a call must move at the least (input, offset and mask read, output written) by the time it
takes, over what copying a large tensor on the device moves. `--upstream` and `--dcnv4` name checkouts of OpenGVLab/InternImage and
OpenGVLab/DCNv4 whose extensions are built in place; they have no bfloat16 and are timed in float16 there. DCNv4 is another operator
(no softmax), `deformops` (a package) reads offset and mask from one tensor. With `--device cpu` everything runs on small shapes,
to try the script.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

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

# what is timed: (input, offset, mask logits, groups) -> output
Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


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
        operators.setdefault(
            name, lambda input, offset, mask, groups, m=module: m.dcnv3_softmax(input, offset, mask, groups=groups)
        )
    return operators


def deformops() -> Operator:
    from deformops.registry import attn

    def operator(input, offset, mask, groups):
        pairs = offset.unflatten(-1, (groups, POINTS, 2))
        packed = torch.cat((pairs, mask.unflatten(-1, (groups, POINTS, 1))), -1).flatten(-3)
        return attn(input, packed, groups=groups, group_dims=input.shape[-1] // groups, softmax=True)

    return operator


def official(folder: Path) -> Operator:
    sys.path.insert(0, str(folder / "classification" / "ops_dcnv3"))
    from functions.dcnv3_func import DCNv3Function

    def operator(input, offset, mask, groups):
        mask = softmax(mask.unflatten(-1, (groups, POINTS)), -1).flatten(-2)
        channels = input.shape[-1] // groups
        return DCNv3Function.apply(
            input, offset, mask, 3, 3, 1, 1, 1, 1, 1, 1, groups, channels, 1.0, input.shape[0], False
        )

    return operator


def dcnv4(folder: Path) -> Operator:
    sys.path.insert(0, str(folder / "DCNv4_op"))
    from DCNv4.functions.dcnv4_func import DCNv4Function

    def operator(input, offset, mask, groups):
        packed = torch.cat((offset.unflatten(-1, (groups, -1)), mask.unflatten(-1, (groups, -1))), -1).flatten(-2)
        packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 8))
        channels = input.shape[-1] // groups
        return DCNv4Function.apply(input, packed, 3, 3, 1, 1, 1, 1, 1, 1, groups, channels, 1.0, input.shape[0], False)

    return operator


class Clock:
    """Times a call, with cold caches: events on a GPU, the wall elsewhere."""

    def __init__(self, device: str):
        self.device = device
        self.cache = torch.empty(2**28 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        """Milliseconds."""
        self.cache.zero_()
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def medians(calls: dict[str, Callable[[], object]], clock: Clock, seconds: float, most: int = 100) -> dict[str, float]:
    """Of each call, all taking turns, for so many seconds or repetitions."""
    times = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    end = time.monotonic() + seconds
    while True:
        for name, call in calls.items():
            times[name].append(clock(call))
        count = len(next(iter(times.values())))
        if count >= most or (count >= 5 and time.monotonic() > end):
            return {name: statistics.median(values) for name, values in times.items()}


def make_inputs(images, size, channels, groups, dtype, device):
    generator = torch.Generator().manual_seed(0)
    shapes = [(images, size, size, c) for c in (channels, groups * POINTS * 2, groups * POINTS)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def errors(operators: dict[str, Operator], dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest error of the outputs on a small case, relative to the largest output of the definition in float64."""
    tensors = make_inputs(2, 8, 64, 4, dtype, device)
    expected = definition(*(t.cpu().double() for t in tensors), 4)
    result = {}
    for name, operator in operators.items():
        actual = operator(*tensors, 4).cpu().double()
        result[name] = ((actual - expected).abs().max() / expected.abs().max()).item()
    return result


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second, read and written."""
    count = 2**30 if clock.device == "cuda" else 2**24
    source = torch.zeros(count, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * count / (medians({"copy": lambda: target.copy_(source)}, clock, 2.0, 20)["copy"] / 1e3)


def bytes_moved(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in (*tensors, tensors[0]))


def time_case(
    operators: dict[str, Operator], tensors, groups: int, clock: Clock, seconds: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of the forward and of the backward pass of each operator."""
    forward = {name: lambda o=o: o(*tensors, groups) for name, o in operators.items()}
    with torch.no_grad():
        result = {"forward": medians(forward, clock, seconds)}
    grad_output = torch.randn_like(tensors[0])
    backward = {}
    for name, operator in operators.items():
        leaves = [t.detach().requires_grad_() for t in tensors]
        output = operator(*leaves, groups)

        def call(output=output, leaves=leaves):
            torch.autograd.grad(output, leaves, grad_output, retain_graph=True)

        backward[name] = call
    for name in [n for n in backward if n in ("CUDA kernel", "Triton kernel")]:

        def deterministic(call=backward[name]):
            torch.use_deterministic_algorithms(True)
            try:
                call()
            finally:
                torch.use_deterministic_algorithms(False)

        backward[f"{name}, deterministic"] = deterministic
    result["backward"] = medians(backward, clock, seconds)
    return result


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
    operators = {"definition": definition, **our_kernels(device)}
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
        except ImportError as error:
            left_out[name] = f"cannot be imported ({error})"
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
                times = time_case(usable, tensors, groups, clock, arguments.seconds)
                if half_only:
                    others = time_case(half_only, [t.half() for t in tensors], groups, clock, arguments.seconds)
                    for direction, values in others.items():
                        times[direction].update({f"{n} (float16)": v for n, v in values.items()})
                for direction, values in times.items():
                    row = {
                        "model": model,
                        "dtype": dtype_name,
                        "shape": f"{images}x{size}x{size}x{channels}, {groups} groups",
                    }
                    row |= {"calls": calls, "pass": direction, "milliseconds": values, "bytes": bytes_moved(tensors)}
                    rows.append(row)
                print(
                    model,
                    dtype_name,
                    rows[-1]["shape"],
                    {d: {n: round(v, 4) for n, v in t.items()} for d, t in times.items()},
                )
                sys.stdout.flush()
    bandwidth = copy_bandwidth(clock)
    for row in rows:
        ours = next((n for n in ("CUDA kernel", "Triton kernel", "CPU kernel") if n in row["milliseconds"]), None)
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
