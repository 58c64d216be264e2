"""In: the C++ and CUDA sources of a backend, and the compilers of this machine. Out: one shared library."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
STABLE_ABI = (2, 11)
TARGET_VERSION = f"0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"

BINDING = ["torch-ext/torch_binding.cpp"]
GPU_SOURCES = [
    *BINDING,
    "dcnv3_cuda/dcnv3_cuda.cu",
    "dcnv3_cuda/dcnv3_cuda_forward.cu",
    "dcnv3_cuda/dcnv3_cuda_backward.cu",
]
SOURCES = {
    "cpu": [
        *BINDING,
        "dcnv3_cpu/dcnv3_cpu.cpp",
        "dcnv3_cpu/dcnv3_cpu_baseline.cpp",
        "dcnv3_cpu/dcnv3_cpu_avx2.cpp",
        "dcnv3_cpu/dcnv3_cpu_avx512.cpp",
    ],
    "cuda": GPU_SOURCES,
    "emulation": GPU_SOURCES,  # the GPU kernels executed by a CPU; only tests load it
    "triton": [],
}
# Code for one architecture also runs on later minor versions. CUDA 13's name 11.0 is CUDA 12's 10.1.
CUDA_ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0"]
REGISTRATION = """#pragma once
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)
#define REGISTER_EXTENSION(NAME)  // loaded with torch.ops.load_library
#if defined(__linux__)
// std::shared_ptr reads this variable of glibc 2.32 and later. A definition in the library lets it run with older versions.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
"""


class BuildError(Exception):
    """A build failed; the message is for the user."""


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: the value of CXX, which may contain options, otherwise g++ or c++.

    Raises:
        BuildError: if CXX names a program that does not exist.
    """
    if command := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(command[0]) is None:
            raise BuildError(f"the environment variable CXX is {os.environ['CXX']!r}, but there is no {command[0]}")
        return command
    found = shutil.which("g++") or shutil.which("c++")
    return [found] if found else None


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (found := shutil.which(str(Path(home) / "bin" / "nvcc"))):
            return found
    return shutil.which("nvcc")


def cuda_version(nvcc: str) -> tuple[int, int]:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", output).groups()
    return int(major), int(minor)


def gpu_architectures() -> list[str]:
    """The compute capabilities of this machine's GPUs; without a GPU, all that the CUDA toolkit compiles for."""
    import torch

    if not torch.cuda.is_available():
        return [name for name in CUDA_ARCHITECTURES if name != "11.0" or cuda_version(find_nvcc()) >= (13, 0)]
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found)]


def possible_backends() -> list[str]:
    """The backends that this machine has the tools for; cuda only if torch was built for CUDA."""
    import torch

    compiler = find_compiler()
    if compiler is None or platform.system() != "Linux":
        print("no Linux or no C++ compiler here: nothing is compiled")
        return ["triton"]
    return ["triton", "cpu", *(["cuda"] if torch.version.cuda and find_nvcc() else [])]


def _run(command: list[str], what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"{what} failed:\n{' '.join(command)}\n{result.stdout}{result.stderr}")
    if text := (result.stdout + result.stderr).strip():
        print(text, file=sys.stderr)


def compile_library(
    backend: str, library: Path, unique_id: str, work: Path, architectures: list[str], verbose: bool
) -> None:
    """Compiles the sources of a backend in parallel and links them to `library`.

    Args:
        backend: "cpu", "cuda" or "emulation".
        unique_id: the namespace of the operators.
        work: a folder for temporary files.
        architectures: compute capabilities, for "cuda".

    Raises:
        BuildError: if a compiler or the linker fails.
    """
    import torch

    compiler = find_compiler()
    (work / "registration.h").write_text(REGISTRATION)
    torch_include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++20",
        "-O3",
        f"-I{work}",
        f"-I{torch_include}",
        f"-I{torch_include / 'torch/csrc/api/include'}",
        f"-DTORCH_EXTENSION_NAME={unique_id}",
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
        f"-D{backend.upper()}_KERNEL",
    ]
    host_flags = [
        f"-ffile-prefix-map={ROOT}=.",  # the binary contains no path of this machine
        f"-ffile-prefix-map={Path(torch.__file__).parent}=torch",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-tree-slp-vectorize",
        "-Wall",
        "-Wno-maybe-uninitialized",  # GCC gives this warning for its own intrinsics
        "-Wno-unknown-warning-option",  # clang does not know the option above
    ]
    if platform.machine() == "x86_64":
        host_flags.append("-march=x86-64-v2")
    if backend == "emulation":
        host_flags += ["-DDCNV3_EMULATION", f"-I{ROOT / 'tests/emulation'}", "-Wno-unknown-pragmas"]
        # A GPU faults at an address that is not aligned for its type. The emulation does too, by an illegal instruction.
        host_flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]

    def command(source: str) -> list[str]:
        if not source.endswith(".cu"):
            return [*compiler, *flags, *host_flags]
        if backend == "emulation":
            return [*compiler, *flags, *host_flags, "-x", "c++"]
        compute = [architecture.replace(".", "") for architecture in architectures]
        code = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in compute]
        code.append(f"-gencode=arch=compute_{compute[-1]},code=compute_{compute[-1]}")  # PTX for later architectures
        device_flags = ["--extended-lambda", "--expt-relaxed-constexpr", "--threads", "0"]
        if verbose:
            device_flags += ["-Xptxas", "-v"]
        host = [f"-Xcompiler={flag}" for flag in (*compiler[1:], *host_flags) if flag != "-Wall"]
        return [find_nvcc(), "-ccbin", compiler[0], *flags, *code, *device_flags, *host]

    def compile_one(source: str) -> str:
        target = work / (Path(source).name + ".o")
        _run([*command(source), "-c", str(ROOT / source), "-o", str(target)], f"compiling {source}")
        return str(target)

    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, len(SOURCES[backend])))) as pool:
        objects = list(pool.map(compile_one, SOURCES[backend]))
    torch_lib = Path(torch.__file__).parent / "lib"
    libraries = ["-Wl,--as-needed", f"-L{torch_lib}", "-ltorch_cpu", "-ltorch", "-lc10"]
    if backend == "cuda":
        # The function that returns torch's current stream is in libtorch_cuda.so, which a torch for CPUs lacks. A library of that
        # name with that function suffices for linking.
        if not (torch_lib / "libtorch_cuda.so").is_file():
            stub = work / "stub.cpp"
            stub.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }')
            soname = ["-Wl,-soname,libtorch_cuda.so", "-o", str(work / "libtorch_cuda.so")]
            _run([*compiler, "-shared", "-fPIC", str(stub), *soname], "making a stand-in for libtorch_cuda.so")
            libraries.append(f"-L{work}")
        libraries.append("-ltorch_cuda")
        libraries += [f"-L{Path(find_nvcc()).resolve().parents[1] / 'lib64'}", "-lcudart"]
    _run([*compiler, "-shared", *objects, "-o", str(library), *libraries], "linking")
