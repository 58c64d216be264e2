"""In: dcnv3_kernel/, and the folders of compiled variants that INTERNIMAGE_HF_KERNELS names, separated by colons. Out: a wheel with
the Triton variants and these compiled variants.

A wheel with a compiled variant is for the platform of its binaries. Without the variable the wheel is pure Python.
"""

import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


# The glibc version that the binaries need. tests/test_kernel_loader.py::test_the_binary_runs_on_older_systems checks it.
_GLIBC = "2_28"


class KernelVariants(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict) -> None:
        if version == "editable":  # a checkout has its variants in dcnv3_kernel/build
            return
        self._temporary = tempfile.TemporaryDirectory()
        folders = self._triton_variants(Path(self._temporary.name))
        for name in filter(None, os.environ.get("INTERNIMAGE_HF_KERNELS", "").split(":")):
            folders.append(Path(name).resolve())
        for folder in folders:
            if not (folder / "metadata.json").is_file():
                raise FileNotFoundError(f"INTERNIMAGE_HF_KERNELS names {folder}, which is no variant of a kernel")
            for file in sorted(folder.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    target = f"internimage_hf/_kernels/{folder.name}/{file.relative_to(folder).as_posix()}"
                    build_data["force_include"][str(file)] = target
            if any(folder.glob("*.so")):
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-manylinux_{_GLIBC}_{platform.machine().lower()}"

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        if version != "editable":
            self._temporary.cleanup()

    def _triton_variants(self, output: Path) -> list[Path]:
        """Builds the Triton variants. They consist of text, so this needs neither torch nor a compiler."""
        name, folder = "dcnv3_kernel_builder", Path(self.root) / "dcnv3_kernel" / "builder"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        builder = sys.modules[name] = importlib.util.module_from_spec(
            spec
        )  # its modules import each other by this name
        spec.loader.exec_module(builder)
        return builder.build("triton", output)
