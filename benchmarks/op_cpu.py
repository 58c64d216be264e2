"""Compares formulations of DCNv3 in PyTorch on the CPU, at the shapes of InternImage-T's 30 calls for a 224 x 224 image.

    python benchmarks/op_cpu.py --batch 8 --threads 2 --upstream path/to/InternImage

`--upstream` names a checkout of OpenGVLab/InternImage, whose fallback `dcnv3_core_pytorch` then is the yardstick, after
`F.softmax` of the mask as its module applies it. Without it, the yardstick is a formulation of our own that materialises
every sampled point in the same way (`grid_sample` once, then a product and a sum), also after `F.softmax`.

Per formulation and pass the table gives the sum over all calls of the median times of each shape (each shape's time
counted as often as the model calls it), its ratio to the yardstick's, and the peak of memory in use beyond the inputs, of
the worst shape: the largest running sum of the allocations and frees that PyTorch's profiler records during one call.
Formulations take turns within each repetition, so that a slow moment of the machine hits all alike.
"""

import argparse
import importlib.util
import json
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


FORMULATIONS: dict[str, Formulation] = {
    "one grid_sample, fast softmax": materialising_fast_softmax,
    "loop of grid_samples": loop,
    "loop of grid_samples, channels first": loop_channels_first,
    "loop of gathers": gather,
    "embedding_bag in chunks (shipped)": shipped,
}


def compiled_kernel(input, offset, mask, geometry):
    return dcnv3_softmax(input, offset, mask, **geometry._asdict(), backend="kernel")


if get_dcnv3_kernel("cpu")[0] is not None:
    FORMULATIONS["kernel (make kernel)"] = compiled_kernel


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


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes in use beyond those before the call, at their peak, the result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    current = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            highest = max(highest, current)
    return highest


def measure(formulations, run, batch: int, dtype: torch.dtype, repeats: int) -> dict[str, dict]:
    results = {name: {"milliseconds": 0.0, "shapes": []} for name in formulations}
    for size, channels, groups, calls in SHAPES:
        generator = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(batch, size, size, last, generator=generator).to(dtype)
            for last in (channels, groups * POINTS * 2, groups * POINTS)
        ]
        grad_output = torch.randn(batch, size, size, channels, generator=generator).to(dtype)
        geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups, 1.0, False)
        times = {name: [] for name in formulations}
        expected = None
        for repeat in range(repeats + 1):
            for name, formulation in formulations.items():
                call = run(formulation, tensors, geometry, grad_output)
                with torch.set_grad_enabled(run is not forward):
                    start = time.perf_counter()
                    result = call()
                if repeat:  # the first one warms up, and is checked
                    times[name].append((time.perf_counter() - start) * 1e3)
                    continue
                result = result if isinstance(result, torch.Tensor) else result[0]
                expected = result if expected is None else expected
                tolerance = 1e-3 if dtype == torch.float32 else 0.1
                if not torch.allclose(result, expected, atol=tolerance * float(expected.abs().max()), rtol=0):
                    raise SystemExit(f"{name} computes something else at {size}x{size}x{channels}")
        for name, formulation in formulations.items():
            median = statistics.median(times[name])
            call = run(formulation, tensors, geometry, grad_output)
            with torch.set_grad_enabled(run is not forward):
                memory = peak_memory(call)
            results[name]["milliseconds"] += calls * median
            results[name]["shapes"].append(
                {"shape": [batch, size, size, channels], "milliseconds": median, "peak_bytes": memory}
            )
    return results


def print_table(title: str, results: dict[str, dict]) -> None:
    yardstick = next(iter(results.values()))
    print(f"\n{title}\n{'formulation':<40}{'ms':>9}{'time':>8}{'peak MiB':>10}{'memory':>8}   time by shape")
    for name, result in results.items():
        by_shape = zip(result["shapes"], yardstick["shapes"], strict=True)
        ratios = [(s["milliseconds"] / y["milliseconds"], s["peak_bytes"] / y["peak_bytes"]) for s, y in by_shape]
        result["time_ratio"] = result["milliseconds"] / yardstick["milliseconds"]
        result["memory_ratio_worst_shape"] = max(memory for _, memory in ratios)
        print(
            f"{name:<40}{result['milliseconds']:>9.1f}{result['time_ratio']:>8.2f}"
            f"{max(s['peak_bytes'] for s in result['shapes']) / 2**20:>10.1f}"
            f"{result['memory_ratio_worst_shape']:>8.2f}   " + " ".join(f"{time:.2f}" for time, _ in ratios)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, help="checkout of OpenGVLab/InternImage to compare with")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--passes", choices=list(PASSES), nargs="+", default=list(PASSES))
    parser.add_argument("--only", help="only formulations whose name contains this, beside the yardstick")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.upstream is not None:
        yardstick = {"official dcnv3_core_pytorch": upstream(arguments.upstream)}
    else:
        yardstick = {"materialising (yardstick)": materialising}
    chosen = {n: f for n, f in FORMULATIONS.items() if arguments.only is None or arguments.only in n}
    everything = {}
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {arguments.dtype}, {arguments.repeats} repetitions"
    )
    for batch in arguments.batch:
        for name in arguments.passes:
            results = measure(
                {**yardstick, **chosen}, PASSES[name], batch, getattr(torch, arguments.dtype), arguments.repeats
            )
            print_table(f"{name}, batch {batch}", results)
            everything[f"{name}, batch {batch}"] = results
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
