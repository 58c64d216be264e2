"""In: the kernel's sources. Out: its variants, folders in the layout that the `kernels` library loads.

compile.py makes the shared library of a variant, package.py its folder. Both import torch only to compile, because hatch_build.py uses
this package without torch.
"""

from .compile import SOURCES, BuildError, possible_backends
from .package import build


__all__ = ["SOURCES", "BuildError", "build", "possible_backends"]
