"""Counts the instructions of the CUDA kernels' main shapes in their machine code; needs nvcc and nvdisasm, but no GPU.

    python benchmarks/sass_count.py [--json FILE]

The kernels are compiled for compute capability 9.0. For each of them the program looks for the cheapest way from the kernel's
entry to its exit that does the work of one round: the softmax of the unit whose points the lane locates (a unit is a group of one output
pixel), and the loads and the stores for all units of its team. The work of a second round tells what each round costs from what
a thread costs once. The cheapest way is that of units whose points all lie inside the image. Instructions whose predicate is
false count, as they take an issue slot. All figures but `start` are divided by the number of units of a team: they are one
lane's instructions for its 16 bytes of one unit's output.

- start: instructions that a thread executes once, for the kernel's beginning and its tile
- prepare: from the unit's number to the first load of the input: sampling locations, softmax, weights
- loop: loads of the input, their conversion, the sum
- store: conversion of the sum and store
- sum: prepare, loop and store
- slow: instructions of the sum that run at a quarter of the rate or less (F2I, F2F, I2F, MUFU)

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
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import harness


SOURCES = harness.KERNEL_PROJECT / "dcnv3_cuda"
ARCHITECTURE = "sm_90"
KERNEL = "team_forward_kernel"
INPUT_LOADS = 4 * harness.POINTS  # of a unit: each lane loads each corner once
EXPONENTIALS = harness.POINTS  # one lane works out the softmax of a unit
LOAD, STORE, EXPONENTIAL = r"LDG\.E\.128", r"STG\.E\.128", r"MUFU\.EX2"
SLOW = r"(F2I|F2F|I2F|MUFU)\b"


class Kernel(NamedTuple):
    """An instance of `team_forward_kernel`."""

    name: str
    element: str
    group_channels: int

    @property
    def stores(self) -> int:
        """The units to which a lane adds 16 bytes each, for every unit whose points it locates."""
        return self.group_channels * {"float": 4, "BFloat16": 2}[self.element] // 16

    @property
    def arguments(self) -> str:
        return f"{self.element}, {self.group_channels}, {harness.POINTS}"

    @property
    def mangled(self) -> str:
        """The name and the arguments, as they are in the binary's names."""
        element = {"float": "f", "BFloat16": "NS_8BFloat16E"}[self.element]
        return f"{KERNEL}I{element}Li{self.group_channels}ELi{harness.POINTS}E"


KERNELS = [
    Kernel("bfloat16, width 16", "BFloat16", 16),
    Kernel("bfloat16, width 32", "BFloat16", 32),
    Kernel("float32, width 16", "float", 16),
    Kernel("float32, width 32", "float", 32),
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
    parameters = "(dcnv3::Problem<float>, const {0}*, const {0}*, const {0}*, {0}*)"
    lines = ['#include "team_forward.h"', "namespace dcnv3 {"]
    for kernel in kernels:
        lines.append(f"template __global__ void {KERNEL}<{kernel.arguments}>{parameters.format(kernel.element)};")
    source.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")
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


def cheapest_way(blocks: list[Block], work: Mapping[str, int]) -> list[str]:
    """The shortest sequence of instructions from the entry to the exit.

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
                return [i for n in reversed(way) for i in blocks[n].instructions]
            if (following, after) not in before:
                total = cost + len(blocks[number].instructions)
                heapq.heappush(queue, (total, following, after, (number, done)))
    raise Failure(f"no way through the kernel does the work {dict(work)}")


def count(function: str, stores: int) -> dict[str, float]:
    """The instructions of one lane, by part, from the disassembly of a forward kernel; all but `start` are per store."""
    blocks = blocks_of(function)

    def way(times: int) -> list[str]:
        work = {LOAD: INPUT_LOADS * stores * times, STORE: stores * times, EXPONENTIAL: EXPONENTIALS * times}
        return cheapest_way(blocks, work)

    one, two = way(1), way(2)
    unit = len(two) - len(one)
    places = {p: [n for n, i in enumerate(one) if is_instruction(i, p)] for p in (LOAD, STORE, "FFMA")}
    storing = 0
    for store in places[STORE]:
        last_sum = max(n for n in places["FFMA"] if n < store)
        storing += min([n for n in places[LOAD] if n > store], default=store + 1) - last_sum - 1
    between = places[STORE][-1] + 1 - places[LOAD][0]
    slow = Counter(re.search(SLOW, i)[1] for i in two if is_instruction(i, SLOW))
    slow.subtract(re.search(SLOW, i)[1] for i in one if is_instruction(i, SLOW))
    parts = {
        "prepare": (unit - between) / stores,
        "loop": (between - storing) / stores,
        "store": storing / stores,
        "sum": unit / stores,
        "slow": sum(slow.values()) / stores,
    }
    return {"start": len(one) - unit, **parts}


def measure(kernels: list[Kernel]) -> dict[str, object]:
    """The compiler's version, the architecture, and all figures by the kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        functions, resources, version = compile_kernels(kernels, Path(folder))
    figures = {}
    for kernel in kernels:
        (name,) = (name for name in functions if kernel.mangled in name)
        figures[kernel.name] = count(functions[name], kernel.stores) | resources[name]
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
    columns = list(next(iter(report["kernels"].values())))
    rows = [(name, *(f"{values[column]:.0f}" for column in columns)) for name, values in report["kernels"].items()]
    print("\n".join(harness.table((f"forward, {ARCHITECTURE}, nvcc {report['nvcc']}", *columns), rows)[1:]))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
