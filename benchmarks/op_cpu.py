"""Compares formulations of DCNv3 on the CPU, at the shapes of InternImage-T's 30 calls for a 224 x 224 image.

    python benchmarks/op_cpu.py --upstream path/to/InternImage [--malloc-tuned]

`--upstream` names a checkout of OpenGVLab/InternImage. Its fallback `dcnv3_core_pytorch` is the yardstick then, after the
softmax of the mask that its module applies. Without it, the yardstick is our own formulation that writes every sampled point
to memory in the same way: one `grid_sample`, a product and a sum.

A measurement is the wall-clock time of one call, softmax of the mask included. "forward" runs under `no_grad`, "backward" is
`torch.autograd.grad` alone, of a graph made before, "forward+backward" is both. The formulations take turns. In its turn a
formulation makes two calls. The first ("cold") finds the caches as the formulation before left them; the second finds its
tensors there, as in a model, where the layer before has just written them.

The table sums over the 30 calls: the median of each shape, times the number of calls of that shape. It has the time of the
second calls, its ratio to the yardstick's, the same ratio of the first calls, the peak of the memory that PyTorch allocates
during a call (the result included, the inputs not; the worst shape), and the ratio of the second calls shape by shape.

For the compiled kernel follow, at batch 1, the time of the backward pass with one thread by that with two, whether the results
agree bit by bit, and the peak of its resident memory beyond inputs and results.

`--malloc-tuned` restarts the program with settings of glibc's malloc that keep freed memory. Large temporaries then cost no
page faults: this compares the arithmetic, and favours the formulations that have large temporaries.
"""

import ctypes
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

from internimage_hf.dcnv3 import dcnv3_softmax
from internimage_hf.kernel_loader import get_dcnv3_kernel


CPU = torch.device("cpu")
CALLS = harness.operator_calls("t", 224)

Formulation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def official_fallback(folder: Path) -> Formulation:
    fallback = harness.import_official(folder, "ops_dcnv3.functions").dcnv3_core_pytorch

    def formulation(input, offset, mask, groups):
        channels = input.shape[-1] // groups
        mask = harness.softmax_of_mask(mask, groups)
        return fallback(input, offset, mask, 3, 3, 1, 1, 1, 1, 1, 1, groups, channels, 1.0, False)

    return formulation


def loop_of_grid_samples(input, offset, mask, groups):
    """One `grid_sample` per point, accumulated. Autograd keeps all of them for the backward pass."""
    maps, grid = harness.grid_sample_arguments(input, offset, groups)
    mask = mask.unflatten(-1, (groups, -1))
    mask = (mask - mask.amax(-1, keepdim=True)).exp()  # several times as fast as `F.softmax` for nine values
    mask = mask / mask.sum(-1, keepdim=True)
    output = 0
    for point in range(grid.shape[-2]):
        point_grid = grid[..., point, :].permute(0, 3, 1, 2, 4).flatten(0, 1)
        point_mask = mask[..., point].permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1)
        output = output + F.grid_sample(maps, point_grid, align_corners=False) * point_mask
    return output.unflatten(0, (-1, groups)).flatten(1, 2).permute(0, 2, 3, 1)


def chunked(input, offset, mask, groups):
    return dcnv3_softmax(input, offset, mask, groups=groups, backend="torch")


def compiled_kernel(input, offset, mask, groups):
    return dcnv3_softmax(input, offset, mask, groups=groups, backend="kernel")


KERNEL = "compiled kernel"
KERNEL_BFLOAT16 = "compiled kernel, bfloat16"
FORMULATIONS: dict[str, Formulation] = {
    "loop of grid_samples": loop_of_grid_samples,
    "chunked implementation (embedding_bag)": chunked,
    KERNEL: compiled_kernel,
    KERNEL_BFLOAT16: compiled_kernel,
}

# ------------------------------------------------------------------------------------------------------ measurements


def forward(formulation, tensors, groups, grad_output):
    return partial(formulation, *tensors, groups)


def backward(formulation, tensors, groups, grad_output):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = formulation(*tensors, groups)
    return partial(torch.autograd.grad, output, tensors, grad_output, retain_graph=True)


def forward_and_backward(formulation, tensors, groups, grad_output):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(formulation(*tensors, groups), tensors, grad_output)


# Each prepares the call that is timed.
PASSES = {"forward": forward, "backward": backward, "forward+backward": forward_and_backward}


def make_call(
    formulation: Formulation, name: str, batch: int, shape: harness.OperatorCall, dtype: torch.dtype
) -> tuple[Callable[[], object], int]:
    """A function that makes one call of a pass, and the bytes of its result."""
    tensors = harness.make_inputs(batch, shape, dtype)
    grad_output = harness.make_inputs(batch, shape, dtype, seed=1)[0]
    call = PASSES[name](formulation, tensors, shape.groups, grad_output)

    def with_or_without_gradients():
        with torch.set_grad_enabled(name != "forward"):
            return call()

    results = [grad_output] if name == "forward" else tensors
    return with_or_without_gradients, sum(tensor.nbytes for tensor in results)


def prepare(
    formulations: Mapping[str, Formulation], name: str, batch: int, shape: harness.OperatorCall
) -> dict[str, Callable[[], object]]:
    """The calls of all formulations, after a comparison of their results."""
    calls, expected = {}, None
    for label, formulation in formulations.items():
        dtype = torch.bfloat16 if label == KERNEL_BFLOAT16 else torch.float32
        calls[label], _ = make_call(formulation, name, batch, shape, dtype)
        result = calls[label]()
        result = result if isinstance(result, torch.Tensor) else result[0]
        expected = result if expected is None else expected
        tolerance = (0.05 if dtype == torch.bfloat16 else 1e-3) * float(expected.abs().max())
        if not torch.allclose(result.float(), expected, atol=tolerance, rtol=0):
            raise SystemExit(f"{label}: its {name} pass at {shape.size}x{shape.size}x{shape.channels} is wrong")
    return calls


def measure(formulations: Mapping[str, Formulation], name: str, batch: int, repeats: int) -> dict[str, dict]:
    """The figures of one pass, by formulation; the first formulation is the yardstick."""
    results = {label: {"milliseconds": 0.0, "cold_milliseconds": 0.0, "shapes": []} for label in formulations}
    for shape in CALLS:
        calls = prepare(formulations, name, batch, shape)
        twice = {
            label: lambda call=call: (harness.seconds_of(call), harness.seconds_of(call))
            for label, call in calls.items()
        }
        for label, times in harness.take_turns(twice, repeats).items():
            cold, warm = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
            results[label]["milliseconds"] += shape.count * warm
            results[label]["cold_milliseconds"] += shape.count * cold
            results[label]["shapes"].append(
                {
                    "shape": [batch, shape.size, shape.size, shape.channels],
                    "milliseconds": warm,
                    "peak_bytes": harness.peak_memory(calls[label]),
                }
            )
    yardstick = next(iter(results.values()))
    for result in results.values():
        result["time_ratio"] = result["milliseconds"] / yardstick["milliseconds"]
        result["cold_time_ratio"] = result["cold_milliseconds"] / yardstick["cold_milliseconds"]
        by_shape = list(zip(result["shapes"], yardstick["shapes"], strict=True))
        result["time_ratio_by_shape"] = [s["milliseconds"] / y["milliseconds"] for s, y in by_shape]
        result["memory_ratio_worst_shape"] = max(s["peak_bytes"] / y["peak_bytes"] for s, y in by_shape)
    return results


def measure_threads(repeats: int) -> dict[str, object]:
    """The time with one thread by the time with two: `speedups` of the fastest tenth of calls, `medians` of the median.

    Measured are the kernel's backward pass at batch 1 for each shape and last, as a limit, PyTorch's `special.i0e`, whose
    arithmetic needs little memory. `same` tells whether the kernel's results agree bit by bit.

    The operator is called in inference mode, because autograd adds about 50 us in one thread.
    """
    kernel, _ = get_dcnv3_kernel("cpu")
    options = (3, 3, 1, 1, 1, 1, 1, 1)
    calls = []
    for shape in CALLS:
        tensors = (
            torch.randn(1, shape.size, shape.size, shape.channels),
            *harness.make_inputs(1, shape, torch.float32),
        )
        calls.append(partial(kernel.ops.dcnv3_backward, *tensors, *options, shape.groups, 1.0, False, True, False))
    arithmetic = torch.randn(1 << 17)
    calls.append(partial(torch.special.i0e, arithmetic, out=torch.empty_like(arithmetic)))
    speedups, medians, same = [], [], True
    for call in calls:
        results = {}

        def ten_times(threads, call=call, results=results):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                for _ in range(4):  # OpenMP's threads have to wake up
                    results[threads] = call()
                return [harness.seconds_of(call) for _ in range(10)]

        turns = harness.take_turns({threads: partial(ten_times, threads) for threads in (1, 2)}, repeats)
        times = {threads: [time for turn in values for time in turn] for threads, values in turns.items()}
        fastest = {threads: statistics.quantiles(values, n=10)[0] for threads, values in times.items()}
        speedups.append(fastest[1] / fastest[2])
        medians.append(statistics.median(times[1]) / statistics.median(times[2]))
        same &= all(torch.equal(one, two) for one, two in zip(results[1], results[2], strict=True))
    return {"speedups": speedups, "medians": medians, "same": same}


def peak_resident(call: Callable[[], object]) -> int:
    """Bytes of resident memory during a call beyond those before it, at their peak, as Linux counts them.

    Freed buffers are returned to the system first, so that they count when the call takes them again.
    """

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = status("VmRSS")
    result = call()
    peak = status("VmHWM")
    del result
    return peak - before


def measure_kernels_memory(batch: int) -> int:
    """The kernel's largest use of resident memory beyond inputs and results, over shapes, passes and dtypes."""
    highest = 0
    for shape in CALLS:
        for name in ("forward", "backward"):
            for dtype in (torch.float32, torch.bfloat16):
                call, result_bytes = make_call(compiled_kernel, name, batch, shape, dtype)
                call()
                highest = max(highest, peak_resident(call) - result_bytes)
    return highest


# ----------------------------------------------------------------------------------------------------------- program


def markdown(report: dict) -> str:
    lines = harness.heading("DCNv3 on a CPU", report["environment"])
    header = ("formulation", "ms", "time", "cold", "peak MiB", "memory", "time by shape")
    for title, results in report["measurements"].items():
        rows = [
            (
                label,
                f"{result['milliseconds']:.1f}",
                f"{result['time_ratio']:.3f}",
                f"{result['cold_time_ratio']:.3f}",
                f"{max(shape['peak_bytes'] for shape in result['shapes']) / 2**20:.1f}",
                f"{result['memory_ratio_worst_shape']:.2f}",
                " ".join(f"{ratio:.3f}" for ratio in result["time_ratio_by_shape"]),
            )
            for label, result in results.items()
        ]
        lines += ["", f"## {title}", *harness.table(header, rows)]
    if "threads" in report:
        header = ("1 thread / 2 threads", *(f"{call.size} x {call.size}" for call in CALLS), "arithmetic alone")
        rows = [
            (label, *(f"{ratio:.2f}" for ratio in report["threads"][kind]))
            for kind, label in (("speedups", "fastest tenth of calls"), ("medians", "median"))
        ]
        lines += ["", "## The kernel's backward pass, batch 1", *harness.table(header, rows)]
        lines += ["", f"Results agree bit by bit: {'yes' if report['threads']['same'] else 'NO'}."]
    if "memory" in report:
        lines += ["", f"The kernel's resident memory beyond inputs and results: {report['memory'] / 1e6:.2f} MB."]
    return "\n".join(lines) + "\n"


def restart_with_tuned_malloc() -> None:
    """Restarts the program unless malloc has the settings that keep freed memory: it reads them at the start only."""
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_TOP_PAD_": str(1 << 26)}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def main(argv: list[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--batch", type=harness.positive(int), nargs="+", default=[8, 1])
    parser.add_argument("--repeats", type=harness.positive(int), default=15)
    parser.add_argument("--passes", choices=list(PASSES), nargs="+", default=list(PASSES))
    parser.add_argument("--only", default="", help="besides the yardstick, only formulations whose name contains this")
    parser.add_argument("--malloc-tuned", action="store_true", help="let malloc keep freed memory (glibc)")
    parser.set_defaults(threads=2)
    arguments = parser.parse_args(argv)
    if arguments.malloc_tuned:
        restart_with_tuned_malloc()
    harness.set_up(arguments.threads, CPU)

    if arguments.upstream is not None:
        yardstick = {"official dcnv3_core_pytorch": official_fallback(arguments.upstream)}
    else:
        yardstick = {"materialising (yardstick)": harness.materialising}
    kernel, reason = get_dcnv3_kernel("cpu")
    chosen = {
        label: formulation
        for label, formulation in FORMULATIONS.items()
        if arguments.only in label and (kernel is not None or formulation is not compiled_kernel)
    }
    report = {
        "environment": harness.environment(CPU, repeats=arguments.repeats, malloc_tuned=arguments.malloc_tuned),
        "measurements": {},
    }
    if kernel is None:
        report["environment"]["left_out"] = f"{KERNEL}: {reason}"
    for batch in arguments.batch:
        for name in arguments.passes:
            title = f"{name}, batch {batch}"
            report["measurements"][title] = measure({**yardstick, **chosen}, name, batch, arguments.repeats)
            print(f"measured: {title}", file=sys.stderr)
            harness.write_results(arguments.output, "op_cpu", report, markdown(report))
    if {KERNEL, KERNEL_BFLOAT16} <= set(chosen):
        report["threads"] = measure_threads(10 * arguments.repeats)
        torch.set_num_threads(arguments.threads)
        if not arguments.malloc_tuned:  # which keeps all memory resident
            report["memory"] = max(measure_kernels_memory(batch) for batch in arguments.batch)
        harness.write_results(arguments.output, "op_cpu", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
