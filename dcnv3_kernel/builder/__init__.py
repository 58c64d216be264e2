"""In: the kernel's sources. Out: its variants, folders in the layout that the `kernels` library loads.

compile.py makes the shared library of a variant, package.py its folder. hatch_build.py imports this package where there is no torch,
so neither module imports torch until it compiles.
"""

from .compile import SOURCES, BuildError, possible_backends
from .package import build


__all__ = ["SOURCES", "BuildError", "build", "possible_backends"]
