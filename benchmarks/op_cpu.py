"""Compares formulations of DCNv3 in PyTorch on the CPU, at the shapes of InternImage-T's 30 calls for a 224 x 224 image.

    python benchmarks/op_cpu.py --upstream path/to/InternImage [--malloc-tuned]

`--upstream` names a checkout of OpenGVLab/InternImage, whose fallback `dcnv3_core_pytorch` then is the yardstick, after
`F.softmax` of the mask as its module applies it. Without it, the yardstick is a formulation of our own that materialises
every sampled point in the same way (`grid_sample` once, then a product and a sum), also after `F.softmax`.

What is timed: one call of the formulation, softmax of the mask included, by the clock on the wall. "forward" runs under
`no_grad`; "backward" is `torch.autograd.grad` alone, of a graph made before; "forward+backward" both. Formulations take turns
within each repetition, so that a slow moment of the machine hits all alike. In its turn a formulation makes two calls. The
first finds the caches as the formulation before left them ("cold"); the second finds its tensors in them, as in a model,
where the layer before has just written them. The table gives, over all 30 calls (a shape's median counted as often as the
model makes that call), the second's time and its ratio to the yardstick's second, the ratio of the first calls, and the peak
of the memory that PyTorch allocated during a call, of the worst shape, the result included, inputs not.

Then, for the kernel: the time of the backward pass with one thread by that with two, for each shape at batch 1, and whether
the results are the same bit by bit; the resident memory at its peak beyond inputs and results, buffers of its own included;
and the targets, met or missed.

`--malloc-tuned` starts the program again with settings of glibc's malloc that keep freed memory: large temporaries, which
otherwise come from the kernel of the operating system page by page for each call, then cost no page faults. It is the
comparison of the arithmetic, and the less favourable one for what has no temporaries.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from internimage_hf.dcnv3 import dcnv3_softmax
from internimage_hf.dcnv3_torch import Geometry, dcnv3_cpu, dcnv3_plain, softmax_over_points
from internimage_hf.kernel_loader import get_dcnv3_kernel


# (height and width, channels, groups, number of calls) of InternImage-T at 224
SHAPES = ((56, 64, 4, 4), (28, 128, 8, 4), (14, 256, 16, 18), (7, 512, 32, 4))
POINTS = 9

Formulation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Geometry], torch.Tensor]


def torch_softmax(mask: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    return F.softmax(mask.unflatten(-1, (geometry.groups, POINTS)), -1).flatten(-2)


def upstream(folder: Path) -> Formulation:
    """The official fallback, of which only the one function is used: its compiled module is replaced by nothing."""
    file = folder / "classification" / "ops_dcnv3" / "functions" / "dcnv3_func.py"
    if not file.is_file():
        raise SystemExit(f"--upstream {folder} is not a checkout of OpenGVLab/InternImage: there is no {file}")
    sys.modules.setdefault("DCNv3", types.ModuleType("DCNv3"))
    resources = types.ModuleType("pkg_resources")  # it asks for the version of the compiled module
    resources.get_distribution = lambda name: types.SimpleNamespace(version="1.0")
    sys.modules["pkg_resources"] = resources
    spec = importlib.util.spec_from_file_location("upstream_dcnv3_func", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def official(input, offset, mask, geometry):
        mask = torch_softmax(mask, geometry)
        group_channels = input.shape[-1] // geometry.groups
        return module.dcnv3_core_pytorch(
            input, offset, mask, 3, 3, 1, 1, 1, 1, 1, 1, geometry.groups, group_channels, geometry.offset_scale, False
        )

    return official


def materialising(input, offset, mask, geometry):
    return dcnv3_plain(input, offset, torch_softmax(mask, geometry), geometry, False)


def materialising_fast_softmax(input, offset, mask, geometry):
    return dcnv3_plain(input, offset, mask, geometry, True)


def _points(offset, geometry, height, width):
    """Position of each point, (N, H, W, G, P) each."""
    rows, columns = geometry.kernel_positions(offset.device)
    offset = offset.unflatten(-1, (geometry.groups, POINTS, 2))
    x = geometry.base_positions(1, width, columns, offset.dtype)[:, None] + offset[..., 0]
    y = geometry.base_positions(0, height, rows, offset.dtype)[:, None, None] + offset[..., 1]
    return x, y


def loop(input, offset, mask, geometry, channels_first: bool = False):
    """One `grid_sample` per point, accumulated: autograd keeps every one of them for the backward pass."""
    number, height, width, channels = input.shape
    groups = geometry.groups
    x, y = _points(offset, geometry, height, width)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), -1)
    mask = softmax_over_points(mask.unflatten(-1, (groups, POINTS)))
    value = input.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    if channels_first:
        value = value.contiguous()
    output = 0
    for point in range(POINTS):
        point_grid = grid[..., point, :].permute(0, 3, 1, 2, 4).flatten(0, 1)
        point_mask = mask[..., point].permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1)
        output = output + F.grid_sample(value, point_grid, align_corners=False) * point_mask
    return output.reshape(number, channels, height, width).permute(0, 2, 3, 1)


def loop_channels_first(input, offset, mask, geometry):
    return loop(input, offset, mask, geometry, channels_first=True)


def gather(input, offset, mask, geometry):
    """The four corners of each point by `index_select`, one point at a time."""
    number, height, width, channels = input.shape
    groups = geometry.groups
    x, y = _points(offset, geometry, height, width)
    mask = softmax_over_points(mask.unflatten(-1, (groups, POINTS)))
    rows = input.reshape(-1, channels // groups)
    base = torch.arange(number).view(-1, 1, 1, 1) * (height * width)
    group = torch.arange(groups)
    output = 0
    for point in range(POINTS):
        px, py = x[..., point], y[..., point]
        x0, y0 = px.detach().floor(), py.detach().floor()
        for column, by_column in ((x0, 1 - (px - x0)), (x0 + 1, px - x0)):
            for row, by_row in ((y0, 1 - (py - y0)), (y0 + 1, py - y0)):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                index = base + row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
                weight = by_row * by_column * mask[..., point] * inside
                taken = rows.index_select(0, (index * groups + group).flatten()).view(*weight.shape, -1)
                output = output + taken * weight.unsqueeze(-1)
    return output.flatten(-2)


def shipped(input, offset, mask, geometry):
    return dcnv3_cpu(input, offset, mask, geometry, True)


def compiled_kernel(input, offset, mask, geometry):
    return dcnv3_softmax(input, offset, mask, **geometry._asdict(), backend="kernel")


KERNEL = "kernel"
KERNEL_BFLOAT16 = "kernel, bfloat16"
# what is compared by default, and with --all
FORMULATIONS: dict[str, Formulation] = {
    "loop of grid_samples": loop,
    "embedding_bag in chunks (definition)": shipped,
    KERNEL: compiled_kernel,
    KERNEL_BFLOAT16: compiled_kernel,
}
MORE_FORMULATIONS: dict[str, Formulation] = {
    "one grid_sample, fast softmax": materialising_fast_softmax,
    "loop of grid_samples, channels first": loop_channels_first,
    "loop of gathers": gather,
}


def forward(formulation, tensors, geometry, grad_output):
    return partial(formulation, *tensors, geometry)


def backward(formulation, tensors, geometry, grad_output):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output = formulation(*tensors, geometry)
    return partial(torch.autograd.grad, output, tensors, grad_output, retain_graph=True)


def forward_and_backward(formulation, tensors, geometry, grad_output):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(formulation(*tensors, geometry), tensors, grad_output)


# each prepares what is to be timed
PASSES = {"forward": forward, "backward": backward, "forward+backward": forward_and_backward}


def make_call(formulation, run, batch: int, shape: tuple[int, int, int, int], dtype: torch.dtype):
    """A function without arguments that makes one call, and the number of bytes of its result."""
    size, channels, groups, _ = shape
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, size, size, last, generator=generator).to(dtype)
        for last in (channels, groups * POINTS * 2, groups * POINTS)
    ]
    grad_output = torch.randn(batch, size, size, channels, generator=generator).to(dtype)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups, 1.0, False)
    call = run(formulation, tensors, geometry, grad_output)

    def with_or_without_gradients():
        with torch.set_grad_enabled(run is not forward):
            return call()

    results = [grad_output] if run is forward else tensors
    return with_or_without_gradients, sum(tensor.nbytes for tensor in results)


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # freeing it is not part of the call
    return elapsed * 1e3


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that PyTorch has in use beyond those before the call, at their peak, the result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    current = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            highest = max(highest, current)
    return highest


def peak_resident(call: Callable[[], object]) -> int:
    """Bytes of resident memory beyond those before the call, at their peak, as Linux counts them; buffers that were freed
    before are handed back first, so that they count when they are taken again."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = status("VmRSS")
    result = call()
    peak = status("VmHWM")
    del result
    return peak - before


def measure(formulations, run, batch: int, repeats: int) -> dict[str, dict]:
    results = {name: {"milliseconds": 0.0, "cold_milliseconds": 0.0, "shapes": []} for name in formulations}
    for shape in SHAPES:
        size, channels, _, calls = shape
        prepared, expected = {}, None
        for name, formulation in formulations.items():
            dtype = torch.bfloat16 if name == KERNEL_BFLOAT16 else torch.float32
            prepared[name], _ = make_call(formulation, run, batch, shape, dtype)
            result = prepared[name]()
            result = result if isinstance(result, torch.Tensor) else result[0]
            expected = result if expected is None else expected
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-3
            if not torch.allclose(result.float(), expected, atol=tolerance * float(expected.abs().max()), rtol=0):
                raise SystemExit(f"{name} computes something else at {size}x{size}x{channels}")
        times = {name: [] for name in formulations}
        for _ in range(repeats):
            for name, call in prepared.items():
                times[name].append((milliseconds(call), milliseconds(call)))
        for name, call in prepared.items():
            cold, warm = (statistics.median(column) for column in zip(*times[name], strict=True))
            results[name]["milliseconds"] += calls * warm
            results[name]["cold_milliseconds"] += calls * cold
            results[name]["shapes"].append(
                {"shape": [batch, size, size, channels], "milliseconds": warm, "peak_bytes": peak_memory(call)}
            )
    yardstick = next(iter(results.values()))
    for result in results.values():
        result["time_ratio"] = result["milliseconds"] / yardstick["milliseconds"]
        result["cold_time_ratio"] = result["cold_milliseconds"] / yardstick["cold_milliseconds"]
        by_shape = list(zip(result["shapes"], yardstick["shapes"], strict=True))
        result["time_ratio_by_shape"] = [s["milliseconds"] / y["milliseconds"] for s, y in by_shape]
        result["memory_ratio_worst_shape"] = max(s["peak_bytes"] / y["peak_bytes"] for s, y in by_shape)
    return results


def print_table(title: str, results: dict[str, dict]) -> None:
    header = f"{'ms':>9}{'time':>8}{'cold':>7}{'peak MiB':>10}{'memory':>8}   time by shape"
    print(f"\n{title}\n{'formulation':<40}{header}")
    for name, result in results.items():
        print(
            f"{name:<40}{result['milliseconds']:>9.1f}{result['time_ratio']:>8.3f}{result['cold_time_ratio']:>7.3f}"
            f"{max(s['peak_bytes'] for s in result['shapes']) / 2**20:>10.1f}"
            f"{result['memory_ratio_worst_shape']:>8.2f}   "
            + " ".join(f"{ratio:.3f}" for ratio in result["time_ratio_by_shape"]),
            flush=True,
        )


def measure_threads(repeats: int) -> dict:
    """How many times faster two threads are than one: in `speedups` by the quickest tenth of calls, in `medians` by the median.

    Of the kernel's backward pass at batch 1, for each shape, and last of arithmetic that needs no memory to speak of (PyTorch's
    `special.i0e`), which shows what the machine's two cores give at the time. `same`: whether the kernel's results are.

    The operator by itself, in inference mode: autograd's bookkeeping around it, some 50 us in one thread, is not part of it, and
    neither are the 8 us in which its own registration with autograd refuses to be differentiated again.
    """
    kernel, _ = get_dcnv3_kernel("cpu")
    calls = []
    for size, channels, groups, _ in SHAPES:
        tensors = [torch.randn(1, size, size, width) for width in (channels, channels, groups * 18, groups * 9)]
        calls.append(
            partial(kernel.ops.dcnv3_backward, *tensors, 3, 3, 1, 1, 1, 1, 1, 1, groups, 1.0, False, True, False)
        )
    arithmetic = torch.randn(1 << 17)
    calls.append(partial(torch.special.i0e, arithmetic, out=torch.empty_like(arithmetic)))
    speedups, medians, same = [], [], True
    for call in calls:
        times, results = {1: [], 2: []}, {}
        for _ in range(repeats):
            for threads in times:
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    for _ in range(4):  # OpenMP's threads have to wake up
                        results[threads] = call()
                    times[threads] += [milliseconds(call) for _ in range(10)]
        quick = {threads: statistics.quantiles(times[threads], n=10)[0] for threads in times}
        speedups.append(quick[1] / quick[2])
        medians.append(statistics.median(times[1]) / statistics.median(times[2]))
        same &= all(torch.equal(one, two) for one, two in zip(results[1], results[2], strict=True))
    return {"speedups": speedups, "medians": medians, "same": same}


def measure_kernels_memory(batch: int) -> int:
    """The kernel's largest use of resident memory beyond inputs and results, over the shapes, passes and dtypes."""
    highest = 0
    for shape in SHAPES:
        for run in (forward, backward):
            for dtype in (torch.float32, torch.bfloat16):
                call, result_bytes = make_call(compiled_kernel, run, batch, shape, dtype)
                call()
                highest = max(highest, peak_resident(call) - result_bytes)
    return highest


def targets(everything: dict, tuned: bool) -> list[tuple[str, float, str, float, bool]]:
    """Name, value, comparison, limit and whether the target is met, of what was measured."""
    rows = []

    def at_most(name: str, value: float, limit: float) -> None:
        rows.append((name, value, "<=", limit, value <= limit))

    limits = {
        ("forward", 8): 0.12 if tuned else 0.08,
        ("forward", 1): 0.06,
        ("backward", 8): 0.11,
        ("backward", 1): 0.11,
    }
    for (name, batch), limit in limits.items():
        if (table := everything.get(f"{name}, batch {batch}")) is not None:
            at_most(f"{name}, batch {batch}: time / yardstick's", table[KERNEL]["time_ratio"], limit)
    for batch in (8, 1):
        if (table := everything.get(f"forward, batch {batch}")) is not None:
            ratio = table[KERNEL_BFLOAT16]["milliseconds"] / table[KERNEL]["milliseconds"]
            at_most(f"forward, batch {batch}: bfloat16's time / float32's", ratio, 1.0)
    if "memory" in everything:
        at_most("memory beyond inputs and results, MB", everything["memory"] / 1e6, 10)
    if "threads" in everything:
        *speedups, _ = everything["threads"]["speedups"]  # the last is not the kernel's
        for (size, *_), speedup in zip(SHAPES, speedups, strict=True):
            rows.append((f"backward, batch 1, {size} x {size}: 1 thread / 2", speedup, ">=", 1.7, speedup >= 1.7))
        same = everything["threads"]["same"]
        rows.append(("results with 1 and 2 threads the same, bit by bit", float(same), ">=", 1, same))
    return rows


def restart_with_tuned_malloc() -> None:
    """Starts the program again if malloc's settings, which are read at the start, are not those that keep memory."""
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_TOP_PAD_": str(1 << 26)}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, help="checkout of OpenGVLab/InternImage to compare with")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--passes", choices=list(PASSES), nargs="+", default=list(PASSES))
    parser.add_argument("--only", help="only formulations whose name contains this, beside the yardstick")
    parser.add_argument("--all", action="store_true", help="slower formulations too")
    parser.add_argument("--malloc-tuned", action="store_true", help="let malloc keep freed memory (glibc)")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    arguments = parser.parse_args()
    if arguments.malloc_tuned:
        restart_with_tuned_malloc()
    torch.set_num_threads(arguments.threads)

    if arguments.upstream is not None:
        yardstick = {"official dcnv3_core_pytorch": upstream(arguments.upstream)}
    else:
        yardstick = {"materialising (yardstick)": materialising}
    chosen = {**FORMULATIONS, **(MORE_FORMULATIONS if arguments.all else {})}
    kernel, reason = get_dcnv3_kernel("cpu")
    if kernel is None:
        print(f"no kernel: {reason}")
        chosen = {name: formulation for name, formulation in chosen.items() if formulation is not compiled_kernel}
    chosen = {name: formulation for name, formulation in chosen.items() if (arguments.only or "") in name}
    everything = {}
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {arguments.repeats} repetitions, "
        f"malloc {'tuned' if arguments.malloc_tuned else 'as it is'}"
    )
    for batch in arguments.batch:
        for name in arguments.passes:
            results = measure({**yardstick, **chosen}, PASSES[name], batch, arguments.repeats)
            print_table(f"{name}, batch {batch}", results)
            everything[f"{name}, batch {batch}"] = results
    if {KERNEL, KERNEL_BFLOAT16} <= set(chosen):
        everything["threads"] = measure_threads(10 * arguments.repeats)
        torch.set_num_threads(arguments.threads)
        if not arguments.malloc_tuned:  # which keeps all memory resident
            everything["memory"] = max(measure_kernels_memory(batch) for batch in arguments.batch)
        print()
        for name, value, comparison, limit, met in targets(everything, arguments.malloc_tuned):
            print(f"{name:<58}{value:>8.3f} {comparison} {limit:<6}{'met' if met else 'MISSED'}")
        print("1 thread / 2, for each size and for arithmetic alone:")
        for kind in ("speedups", "medians"):
            label = {"speedups": "quickest tenth of calls", "medians": "median"}[kind]
            print(f"  {label:<24}", *(f"{ratio:6.2f}" for ratio in everything["threads"][kind]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
