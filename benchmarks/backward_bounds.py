"""Lower bounds of the backward kernel's time on an H100, from counts; needs nvcc, nvdisasm and a C++ compiler, but no GPU.

    python benchmarks/backward_bounds.py [--json FILE]

The shapes are those of `op_gpu.py`. The tiles come from the kernels' launch plan, which the program compiles for the host; the
counts of instructions and wavefronts come from sass_count.py, for points inside the image and the window. Columns:

- tile: output pixels whose gradients a window sums, with 3 pixels more on each side
- warps: those that a multiprocessor holds at once, which its shared memory limits (228 KiB, of which a block takes 1 KiB more
  than it asks for). They are few, so latencies may matter more than any of the bounds
- adds: 16 bytes added to sums in global memory, per unit, if all cells of the windows inside the image are used
- adds before: the same for `backward_kernel`, which has no windows
- slots: instructions that a warp issues, per unit

The bounds, in microseconds, are the times that one resource needs if it never waits:

- issue: 132 multiprocessors with 4 schedulers, which issue an instruction a cycle at 1.755 GHz
- cache: first-level caches of these multiprocessors, one wavefront of 128 bytes a cycle: shared memory, shuffles, loads, stores.
  Too long where lanes read the same bytes
- window: the part of the sums in the window alone, where lanes do not
- atomics: the adds, at the second-level cache's peak. The peak is the fastest rate that was measured (4 images of 512 x 512,
  stage 1, float32: 36 rows of 128 bytes a unit in 1041 us) divided by the share of the peak that the profiler gave (94 %)
- memory: input, grad_output, offset, mask, the last two's gradients and the sums, each once, at 2.44 TB/s, as a copy was measured

The zeros for the sums, and their conversion to 16-bit types, are other kernels and not included.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import harness
import sass_count
from sass_count import Failure


MULTIPROCESSORS, CLOCK, SCHEDULERS, SHARED_MEMORY = 132, 1.755e9, 4, 228 * 1024
COPY_RATE = 2.44e12
ADDITION_RATE = 4 * 128 * 128 * 10 * 36 * 128 / 1041e-6 / 0.94
MARGIN = 3  # of a window; compiling the launch plan fails if it is another
PLAN = r"""
#include <cstdio>
#include <cstdlib>
#include "launch_plan.h"

static_assert(dcnv3::window_margin == MARGIN);

template <class T>
void print(const dcnv3::Shape& s, int multiprocessors) {
  const auto plan = dcnv3::plan_call<T>(s, true, true, multiprocessors);
  std::printf("[%d, %d, %d, %u, %u]\n", plan.windows, plan.problem.tile_width, plan.problem.tile_height, plan.grid, plan.shared_bytes);
}

int main(int, char** values) {
  dcnv3::Shape s{};
  s.batch = std::atoi(values[1]), s.height = s.width = s.height_out = s.width_out = std::atoi(values[2]);
  s.channels = std::atoi(values[3]), s.groups = std::atoi(values[4]), s.group_channels = s.channels / s.groups;
  s.kernel_h = s.kernel_w = 3, s.stride_h = s.stride_w = s.padding_h = s.padding_w = s.dilation_h = s.dilation_w = 1;
  s.points = 9, s.offset_scale = 1.0, s.softmax = true;
  s.offset_pitch = s.groups * 18, s.mask_pitch = s.groups * 9;
  std::atoi(values[5]) == 4 ? print<float>(s, std::atoi(values[6])) : print<dcnv3::BFloat16>(s, std::atoi(values[6]));
}
"""


class Tiles(NamedTuple):
    """The launch plan of a call: the tile in pixels, the number of blocks, the bytes of a block's shared memory."""

    width: int
    height: int
    blocks: int
    shared_bytes: int


def compile_plan(folder: Path) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        raise Failure("no c++ on the PATH")
    source, program = folder / "plan.cpp", folder / "plan"
    source.write_text(PLAN, encoding="utf-8")
    emulation = harness.KERNEL_PROJECT / "tests" / "emulation"
    flags = [
        "-std=c++20",
        "-DDCNV3_EMULATION",
        "-Wno-psabi",
        f"-DMARGIN={MARGIN}",
        f"-I{emulation}",
        f"-I{sass_count.SOURCES}",
    ]
    sass_count.run([compiler, *flags, str(source), "-o", str(program)])
    return program


def tiles_of(program: Path, batch: int, call: harness.OperatorCall, size: int) -> Tiles:
    arguments = (batch, call.size, call.channels, call.groups, size, MULTIPROCESSORS)
    windows, *tiles = json.loads(sass_count.run([str(program), *map(str, arguments)]))
    if not windows:
        raise Failure(f"the launch plan has no windows for {call}")
    return Tiles(*tiles)


def cells_inside(size: int, tile: int) -> int:
    """The cells of all windows along one axis that are inside the image, for stride and padding 1."""
    ends = [(max(first - MARGIN, 0), min(first + tile + MARGIN, size)) for first in range(0, size, tile)]
    return sum(last - first for first, last in ends)


def bounds(
    counts: dict[str, float], batch: int, call: harness.OperatorCall, size: int, tiles: Tiles
) -> dict[str, float]:
    """The figures of one shape; all columns but the tile."""
    width = call.channels // call.groups
    workers, units = 32 // width, batch * call.size**2 * call.groups
    pixels, cells = tiles.width * tiles.height, (tiles.width + 2 * MARGIN) * (tiles.height + 2 * MARGIN)
    batches = -(-pixels * workers // sass_count.UNITS_OF_BATCH)
    once = counts["prepare"] + counts["gradients"]
    in_batches = tiles.blocks * batches * sass_count.UNITS_OF_BATCH  # with those that no pixel has
    slots = (
        in_batches * once
        + units * counts["loop"]
        + tiles.blocks * (counts["start"] + workers * cells * counts["cell"])
    )
    window = units * harness.POINTS * 2 * 4 / workers  # reads and writes of 16 bytes a lane
    wavefronts = units * counts["wavefronts"] + tiles.blocks * 2 * cells
    additions = (
        batch * call.groups * width / 4 * cells_inside(call.size, tiles.width) * cells_inside(call.size, tiles.height)
    )
    moved = units * ((2 * width + 2 * 27) * size + 4 * width)
    cycles = MULTIPROCESSORS * CLOCK / 1e6
    return {
        "warps": min(32, SHARED_MEMORY // (tiles.shared_bytes + 1024)),
        "adds": additions / units,
        "adds before": 36 * width / 4,
        "slots": slots / units,
        "issue": slots / SCHEDULERS / cycles,
        "cache": wavefronts / cycles,
        "window": window / cycles,
        "atomics": additions * 16 / ADDITION_RATE * 1e6,
        "memory": moved / COPY_RATE * 1e6,
    }


def measure() -> dict[str, dict[str, object]]:
    """The tile and the bounds of each shape and dtype."""
    kernels = [kernel for kernel in sass_count.KERNELS if kernel.backward]
    counts = sass_count.measure(kernels)["kernels"]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        program = compile_plan(Path(folder))
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            for model, (batch, pixels) in harness.GPU_MODELS.items():
                for stage, call in enumerate(harness.operator_calls(model.lower(), pixels), 1):
                    tiles = tiles_of(program, batch, call, size)
                    of_kernel = counts[f"backward, {dtype}, width {call.channels // call.groups}"]
                    tile = {"tile": f"{tiles.width} x {tiles.height}"}
                    figures[f"{model}, {dtype}, stage {stage}"] = tile | bounds(of_kernel, batch, call, size, tiles)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args(argv)
    try:
        figures = measure()
    except Failure as error:
        print(f"backward_bounds.py: {error}", file=sys.stderr)
        return 1
    columns = list(next(iter(figures.values())))
    rows = [
        (name, *(v if isinstance(v, str) else f"{v:.{int(c == 'adds')}f}" for c, v in values.items()))
        for name, values in figures.items()
    ]
    print("\n".join(harness.table(("backward", *columns), rows)[1:]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
