"""Counts the instructions of the CUDA kernels' main shapes in their machine code; needs nvcc and nvdisasm, but no GPU.

    python benchmarks/sass_count.py [--json FILE]

The kernels are compiled for compute capability 9.0. For each of them the program looks for the cheapest way from the kernel's
entry to its exit that does a given amount of work, such as the softmax of one unit and the loads and stores that belong to it
(a unit is a group of one output pixel). Ways with different amounts of work tell what each of their parts costs from what a
thread costs once. The cheapest way is that of units whose points all lie inside the image (backward: and inside the window).
Instructions whose predicate is false count, as they take an issue slot.

Forward: one lane's instructions for its 16 bytes of one unit's output. A warp issues them for as many units at once as it has
such lanes for.

- start: instructions that a thread executes once, for the kernel's beginning and its tile
- prepare: from the unit's number to the first load of the input: sampling locations, softmax, weights
- loop: loads of the input, their conversion, the sum
- store: conversion of the sum and store
- sum: prepare, loop and store
- slow: instructions of the sum that run at a quarter of the rate or less (F2I, F2F, I2F, MUFU)

Backward: the instructions that a warp issues, divided by the number of units that it issues them for. (To compare the forward
kernel, multiply its figures by the lanes of a unit and divide by 32.)

- start: as above, per thread, with the zeros that the window gets
- prepare: sampling locations, softmax, weights, their way to shared memory
- loop: loads of the input, dot products with grad_output, sums in the window
- gradients: from the dot products to the gradients of offset and mask
- sum: prepare, loop and gradients
- slow: as above
- shared: instructions of the sum that read or write shared memory
- wavefronts: these, accesses to global memory and shuffles as wavefronts of the first-level cache. An access of 4, 8 or 16
  bytes a lane takes 1, 2 or 4 if no bank conflicts, fewer if lanes read the same bytes; a shuffle takes 1
- cell: to add a cell of the window to global memory

nvdisasm is looked for on the PATH, in the CUDA toolkit, and in the Python packages nvidia-cuda-nvdisasm and triton.
"""

import argparse
import heapq
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import harness


SOURCES = harness.KERNEL_PROJECT / "dcnv3_cuda"
ARCHITECTURE = "sm_90"
INPUT_LOADS = 4 * harness.POINTS  # of a unit: each lane loads each corner once
EXPONENTIALS = harness.POINTS  # one lane works out the softmax of a unit
LOAD, STORE, EXPONENTIAL = r"LDG\.E\.128", r"STG\.E\.128", r"MUFU\.EX2"
SLOW = r"(F2I|F2F|I2F|MUFU)\b"
# Of `window_backward_kernel`. A batch of units has one softmax, whose sum each lane inverts. Each step of the loop asks once
# whether all corners are inside. 16 lanes write the gradients of offset and mask of a unit. Each step that writes the window out
# has one addition.
RECIPROCAL, VOTE, WRITE, ADDITION = r"MUFU\.RCP", r"VOTE\.ALL", r"STG", r"REDG"
UNITS_OF_BATCH, WRITES_OF_BATCH, CELLS_OF_STEP = 16, 16, 4
SHARED, SHUFFLE = r"(?:LDS|STS)\b", r"SHFL"
ACCESS = r"(?:@\S+\s+)?(?:LDS|STS|LDG\.E|STG\.E)\b(?:\.(64|128))?"


class Kernel(NamedTuple):
    """An instance of `team_forward_kernel` or of `window_backward_kernel` with floating-point sums."""

    name: str
    element: str
    group_channels: int
    backward: bool = False

    @property
    def stores(self) -> int:
        """Forward: the units to which a lane adds 16 bytes each, for every unit whose points it locates."""
        return self.group_channels * {"float": 4, "BFloat16": 2}[self.element] // 16

    @property
    def declaration(self) -> str:
        """The explicit instantiation, in C++."""
        arguments, tensor = f"{self.element}, {self.group_channels}, {harness.POINTS}", f"const {self.element}*"
        if self.backward:
            sums, result = "FloatingSums<float>", f"{self.element}*"
            tensors = f"{tensor}, {tensor}, {tensor}, {tensor}, {sums}, {result}, {result}"
            return f"template __global__ void window_backward_kernel<{arguments}, {sums}>(Problem<float>, {tensors});"
        tensors = f"{tensor}, {tensor}, {tensor}, {self.element}*"
        return f"template __global__ void team_forward_kernel<{arguments}>(Problem<float>, {tensors});"

    @property
    def mangled(self) -> str:
        """The name and the arguments, as they are in the binary's names."""
        function = "window_backward_kernel" if self.backward else "team_forward_kernel"
        element = {"float": "f", "BFloat16": "NS_8BFloat16E"}[self.element]
        return f"{function}I{element}Li{self.group_channels}ELi{harness.POINTS}E"

    def count(self, function: str) -> dict[str, float]:
        """The figures of this kernel, from its disassembly."""
        return count_backward(function, self.group_channels) if self.backward else count(function, self.stores)


KERNELS = [
    Kernel(f"{prefix}{dtype}, width {width}", element, width, bool(prefix))
    for prefix in ("", "backward, ")
    for dtype, element in (("bfloat16", "BFloat16"), ("float32", "float"))
    for width in (16, 32)
]


class Failure(Exception):
    """A tool is missing, fails, or writes code that this program does not understand; the message is for the user."""


# ----------------------------------------------------------------------------------------------- compiler, disassembler


def find_nvdisasm() -> str | None:
    if found := shutil.which("nvdisasm") or shutil.which("/usr/local/cuda/bin/nvdisasm"):
        return found
    for package, path in (("nvidia", "cu*/bin/nvdisasm"), ("triton", "backends/nvidia/bin/nvdisasm")):
        if (spec := importlib.util.find_spec(package)) and spec.submodule_search_locations:
            for folder in spec.submodule_search_locations:
                if files := sorted(Path(folder).glob(path)):
                    return str(files[-1])
    return None


def run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Failure(f"{command[0]} cannot be run: {error}") from error
    if result.returncode:
        raise Failure(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def compile_kernels(kernels: list[Kernel], folder: Path) -> tuple[dict[str, str], dict[str, dict[str, int]], str]:
    """Returns the disassembly, and registers and spills, of each function by its name in the binary, and nvcc's version."""
    sys.path.insert(0, str(harness.KERNEL_PROJECT))
    from builder.compile import cuda_version, find_nvcc

    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    if nvcc is None:
        raise Failure("no nvcc: neither CUDA_HOME, CUDA_PATH, /usr/local/cuda nor the PATH has one")
    if nvdisasm is None:
        raise Failure("no nvdisasm: install nvidia-cuda-nvdisasm, triton or the CUDA toolkit")
    source, binary = folder / "kernels.cu", folder / "kernels.cubin"
    lines = [f'#include "{header}.h"' for header in ("team_forward", "window_backward")]
    lines += ["namespace dcnv3 {", *(kernel.declaration for kernel in kernels), "}"]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["-std=c++20", "-O3", "-cubin", f"-arch={ARCHITECTURE}", "--extended-lambda", "--expt-relaxed-constexpr"]
    log = run([nvcc, *flags, "-Xptxas=-v", f"-I{SOURCES}", str(source), "-o", str(binary)])
    version = ".".join(map(str, cuda_version(nvcc)))
    return functions_of(run([nvdisasm, "-c", str(binary)])), resources_of(log), version


def functions_of(disassembly: str) -> dict[str, str]:
    """The lines of each function in the output of `nvdisasm -c`, by the function's name."""
    parts = re.split(r"^\.text\.(\S+):$", disassembly, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def resources_of(log: str) -> dict[str, dict[str, int]]:
    """Registers and bytes of spills of each function in the output of `ptxas -v`."""
    pattern = r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return {
        name: {"registers": int(registers), "spilled": int(stores) + int(loads)}
        for name, stores, loads, registers in re.findall(pattern, log, re.DOTALL)
    }


# ------------------------------------------------------------------------------------------------------------ counting


class Block(NamedTuple):
    """Instructions that are executed one after another, and the blocks that may follow; None is the kernel's exit."""

    instructions: list[str]
    following: list[int | None]


def blocks_of(function: str) -> list[Block]:
    """The blocks of a function's disassembly; the first is its entry.

    Raises:
        Failure: for a jump whose target is not known.
    """
    bodies, labels = [[]], {}
    for line in function.splitlines():
        if label := re.fullmatch(r"(\.L_\w+):", line.strip()):
            if bodies[-1]:
                bodies.append([])
            labels[label[1]] = len(bodies) - 1
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            bodies[-1].append(found[1])
            if re.match(r"(@\S+ )?\s*(BRA|EXIT)\b", found[1]):
                bodies.append([])
    blocks = []
    for number, body in enumerate(bodies):
        guard, last = re.fullmatch(r"(@\S+)?\s*(.*)", body[-1] if body else "NOP").groups()
        following = [number + 1 if number + 1 < len(bodies) else None]
        if re.match(r"(BRX|JMX|JMP|CALL|RET)\b", last):
            raise Failure(f"the target of the instruction {last} is not known")
        if last.startswith("EXIT"):
            following = [*(following if guard else []), None]
        elif last.startswith("BRA"):
            target = labels[re.search(r"`\((\S+)\)", last)[1]]
            always = guard is None and re.match(r"BRA `", last)
            following = [target] if always else [*following, target]
        blocks.append(Block(body, following))
    return blocks


def is_instruction(instruction: str, pattern: str) -> bool:
    return re.match(rf"(@\S+\s+)?{pattern}", instruction) is not None


def cheapest_way(blocks: list[Block], work: Mapping[str, int]) -> list[int]:
    """The numbers of the blocks of the shortest sequence of instructions from the entry to the exit.

    Args:
        work: how many instructions of each pattern the sequence must contain.

    Raises:
        Failure: if there is none.
    """
    patterns = list(work)
    done_by = [tuple(sum(is_instruction(i, p) for i in block.instructions) for p in patterns) for block in blocks]
    wanted = tuple(work.values())
    # Dijkstra's algorithm. A place is a block and the work done before it.
    queue, before = [(0, 0, (0,) * len(patterns), None)], {}
    while queue:
        cost, number, done, previous = heapq.heappop(queue)
        if (number, done) in before:
            continue
        before[number, done] = previous
        after = tuple(map(sum, zip(done, done_by[number], strict=True)))
        if any(a > w for a, w in zip(after, wanted, strict=True)):
            continue
        for following in blocks[number].following:
            if following is None:
                if after != wanted:
                    continue
                way, place = [], (number, done)
                while place is not None:
                    way.append(place[0])
                    place = before[place]
                return way[::-1]
            if (following, after) not in before:
                total = cost + len(blocks[number].instructions)
                heapq.heappush(queue, (total, following, after, (number, done)))
    raise Failure(f"no way through the kernel does the work {dict(work)}")


def instructions_of(blocks: list[Block], way: Iterable[int]) -> list[str]:
    return [instruction for number in way for instruction in blocks[number].instructions]


def slow_of(instructions: list[str]) -> int:
    return sum(is_instruction(instruction, SLOW) for instruction in instructions)


def count(function: str, stores: int) -> dict[str, float]:
    """The instructions of one lane, by part, from the disassembly of a forward kernel; all but `start` are per store."""
    blocks = blocks_of(function)

    def way(times: int) -> list[str]:
        work = {LOAD: INPUT_LOADS * stores * times, STORE: stores * times, EXPONENTIAL: EXPONENTIALS * times}
        return instructions_of(blocks, cheapest_way(blocks, work))

    one, two = way(1), way(2)
    unit = len(two) - len(one)
    places = {p: [n for n, i in enumerate(one) if is_instruction(i, p)] for p in (LOAD, STORE, "FFMA")}
    storing = 0
    for store in places[STORE]:
        last_sum = max(n for n in places["FFMA"] if n < store)
        storing += min([n for n in places[LOAD] if n > store], default=store + 1) - last_sum - 1
    between = places[STORE][-1] + 1 - places[LOAD][0]
    parts = {
        "prepare": (unit - between) / stores,
        "loop": (between - storing) / stores,
        "store": storing / stores,
        "sum": unit / stores,
        "slow": (slow_of(two) - slow_of(one)) / stores,
    }
    return {"start": len(one) - unit, **parts}


def count_backward(function: str, group_channels: int) -> dict[str, float]:
    """The instructions of a warp, by part, from the disassembly of a backward kernel; all but `start` and `cell` are per unit."""
    blocks = blocks_of(function)

    def way(batches: int, steps: int, additions: int = 0) -> list[int]:
        work = {RECIPROCAL: batches, WRITE: WRITES_OF_BATCH * batches, VOTE: steps, ADDITION: additions}
        return cheapest_way(blocks, work)

    one = way(1, 1)
    in_loop, in_batch = Counter(way(1, 2)), Counter(way(2, 1))
    in_loop.subtract(one)
    in_batch.subtract(one)
    in_loop, in_batch = (
        [n for n, block in enumerate(one) if blocks_of_cycle[block] > 0] for blocks_of_cycle in (in_loop, in_batch)
    )
    if not in_loop or in_loop[-1] - in_loop[0] + 1 != len(in_loop) or not in_batch[0] < in_loop[0] < in_batch[-1]:
        raise Failure("the loop over the units of a batch is not found")
    parts = {
        "prepare": instructions_of(blocks, one[in_batch[0] : in_loop[0]]),
        "loop": instructions_of(blocks, (one[n] for n in in_loop)),
        "gradients": instructions_of(blocks, one[in_loop[-1] + 1 : in_batch[-1] + 1]),
    }
    start = len(instructions_of(blocks, one)) - sum(map(len, parts.values()))
    workers = 32 // group_channels
    units = {"prepare": UNITS_OF_BATCH, "loop": workers, "gradients": UNITS_OF_BATCH}

    def per_unit(count_of: Callable[[list[str]], int]) -> float:
        return sum(count_of(instructions) / units[part] for part, instructions in parts.items())

    def wavefronts(instructions: list[str]) -> int:
        widths = [found[1] for i in instructions if (found := re.match(ACCESS, i))]
        shuffles = sum(is_instruction(i, SHUFFLE) for i in instructions)
        return sum({None: 1, "64": 2, "128": 4}[width] for width in widths) + shuffles

    few, many = (len(instructions_of(blocks, way(1, 1, additions))) for additions in (8, 16))
    return {
        "start": start,
        **{part: len(instructions) / units[part] for part, instructions in parts.items()},
        "sum": per_unit(len),
        "slow": per_unit(slow_of),
        "shared": per_unit(lambda instructions: sum(is_instruction(i, SHARED) for i in instructions)),
        "wavefronts": per_unit(wavefronts),
        "cell": (many - few) / 8 / (CELLS_OF_STEP * workers),
    }


def measure(kernels: list[Kernel]) -> dict[str, object]:
    """The compiler's version, the architecture, and all figures by the kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        functions, resources, version = compile_kernels(kernels, Path(folder))
    figures = {}
    for kernel in kernels:
        (name,) = (name for name in functions if kernel.mangled in name)
        figures[kernel.name] = kernel.count(functions[name]) | resources[name]
    return {"nvcc": version, "architecture": ARCHITECTURE, "kernels": figures}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args(argv)
    try:
        report = measure(KERNELS)
    except Failure as error:
        print(f"sass_count.py: {error}", file=sys.stderr)
        return 1
    for what in (False, True):
        figures = {kernel.name: report["kernels"][kernel.name] for kernel in KERNELS if kernel.backward == what}
        columns = list(next(iter(figures.values())))
        rows = [
            (name, *(f"{values[c]:.{int(c in ('cell', 'slow'))}f}" for c in columns))
            for name, values in figures.items()
        ]
        print("\n".join(harness.table((f"{ARCHITECTURE}, nvcc {report['nvcc']}", *columns), rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
