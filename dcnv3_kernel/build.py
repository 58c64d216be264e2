"""Builds the kernel on this machine, without kernel-builder: `python build.py [--backend cpu|cuda|triton] [--arch 9.0 ...]`.

In: the sources of this folder. Out: `build/<variant>/`, in the layout that the `kernels` library loads. The cpu and cuda backends
need torch in the running Python and a C++20 compiler, but not Python's headers; cuda also needs nvcc 12.8 or newer, but no GPU. The
Triton variants need neither torch nor a compiler. Without `--backend`, builds the backends whose tools this machine has, and cuda
only if torch was built for CUDA. Variants that are up to date are not built again.
"""

import argparse
import sys
from pathlib import Path

from builder import SOURCES, BuildError, build, possible_backends


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", choices=tuple(SOURCES), action="append", help="what to build; everything possible by default"
    )
    parser.add_argument(
        "--arch", nargs="+", metavar="9.0", help="compute capabilities for CUDA; by default this machine's, or all"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent / "build", help="folder of the variants"
    )
    parser.add_argument("--verbose", action="store_true", help="print the registers and spills of the CUDA kernels")
    arguments = parser.parse_args(argv)
    try:
        for backend in arguments.backend or possible_backends():
            build(backend, arguments.output, arguments.arch, arguments.verbose)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
