"""Tests of build.py: the compilers of CUDA and HIP accept the sources, and the binaries need nothing that users lack."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]


def build(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "build.py", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_unknown_architecture_and_backend_are_refused():
    result = build("--backend", "cuda", "--arch", "ninety")
    assert result.returncode != 0 and ("compute capability" in result.stderr or "no nvcc" in result.stderr)
    result = build("--backend", "metal")
    assert result.returncode != 0 and "--backend" in result.stderr


def test_what_is_damaged_is_built_again(tmp_path):
    def triton_build():
        result = build("--backend", "triton", "--output", tmp_path)
        assert result.returncode == 0, result.stderr
        return ["up to date" in line for line in result.stdout.splitlines()]

    assert triton_build() == [False] * 3
    assert triton_build() == [True] * 3
    (tmp_path / "torch-rocm" / "triton_kernels.py").unlink()
    assert triton_build() == [True, False, True]
    (tmp_path / "torch-xpu" / "layers.py").write_text("raise SystemExit")
    (tmp_path / "torch-cuda" / "metadata.json").write_text('{"id": "_dcnv3')
    assert triton_build() == [False, True, False]
    (tmp_path / "torch-xpu" / "__pycache__").mkdir()
    (tmp_path / "torch-xpu" / "__pycache__" / "layers.pyc").write_text("")
    assert triton_build() == [True] * 3


def test_triton_variants_are_built_without_torch(tmp_path):
    """hatch_build.py builds them in an environment that has hatchling only."""
    program = f"""
import sys
sys.modules["torch"] = None
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from builder import build
build("triton", Path({str(tmp_path)!r}))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    for device in ("cuda", "rocm", "xpu"):
        files = {file.name for file in (tmp_path / f"torch-{device}").iterdir()}
        assert {"triton_kernels.py", "triton_launch.py", "metadata.json"} <= files


def test_the_compiler_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    result = build("--backend", "cpu", "--output", tmp_path)
    assert result.returncode == 1 and "CXX is 'no-such-compiler -m64'" in result.stderr
    monkeypatch.setenv("CXX", "false --an-option")  # the program `false`, which fails
    result = build("--backend", "cpu", "--output", tmp_path)
    assert result.returncode == 1 and "\nfalse --an-option -std=c++20 " in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_clang_builds_the_code_of_all_instruction_sets(tmp_path, monkeypatch):
    if shutil.which("clang++") is None:
        pytest.skip("no clang++")
    monkeypatch.setenv("CXX", "clang++")
    result = build("--backend", "cpu", "--output", tmp_path)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    (library,) = tmp_path.glob("*/*.so")
    disassembly = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert platform.machine() != "x86_64" or ("%zmm" in disassembly and "vfmadd" in disassembly)
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/dcnv3={tmp_path}")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "(cpu or instruction_sets) and not compile"]
    result = subprocess.run(
        [*command, ROOT / "tests" / "test_dcnv3_kernel.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout


def test_build_toml_names_every_source():
    """kernel-builder copies only the files that build.toml lists."""
    tomllib = pytest.importorskip("tomllib")
    content = tomllib.loads((ROOT / "build.toml").read_text())
    assert content["general"]["edition"] == 5
    assert content["torch"]["stable-abi"] == dict.fromkeys(content["general"]["backends"], "2.11")
    for kernel in content["kernel"].values():
        folder = (ROOT / kernel["src"][0]).parent
        assert {ROOT / name for name in kernel["src"]} == {f for f in folder.iterdir() if f.is_file()}
    listed = {ROOT / name for name in content["torch"]["src"]}
    assert listed == {f for f in (ROOT / "torch-ext").iterdir() if f.is_file()}
    assert {kernel["backend"] for kernel in content["kernel"].values()} == set(content["general"]["backends"])


@pytest.mark.parametrize("capabilities", [["9.0"], pytest.param(["8.0", "12.0"], marks=pytest.mark.slow)])
def test_cuda_compiles_without_warnings_or_spills(capabilities, tmp_path):
    """Needs neither a GPU nor a torch for CUDA. An architecture takes a quarter of a minute and more."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").is_file():
        pytest.skip("no nvcc")
    result = build("--backend", "cuda", "--arch", *capabilities, "--verbose", "--output", tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert not re.findall(r"^.*\bwarning\b.*$", output, re.MULTILINE)

    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores", output, re.DOTALL
    )
    assert {architecture for _, architecture, _ in kernels} == {f"sm_{c.replace('.', '')}" for c in capabilities}
    # The main paths: group widths of 16 and 32, 9 points, or 8 without the centre.
    main = [
        (name, a, int(spilled))
        for name, a, spilled in kernels
        if re.search(r"_kernelI\w+?Li(2|4|8|16|32)ELi[89]E", name)
    ]
    # architectures; dtypes, widths, points; forward, backward, backward with fixed-point sums
    assert len(main) == len(capabilities) * (3 * 2 * 2) * 3
    assert [kernel for kernel in main if kernel[2]] == []

    (folder,) = tmp_path.iterdir()
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["backend"] == {
        "type": "cuda",
        "archs": [*capabilities[:-1], f"{capabilities[-1]}+PTX"],
    } and re.fullmatch(r"torch-stable-abi211-cu\d+-\w+-linux", folder.name)
    (library,) = folder.glob("*.so")
    # Torch loads the libraries that the binary needs, and they have all of its symbols.
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    assert all(re.match(r"lib(torch|torch_cpu|torch_cuda|c10|cudart|stdc\+\+|gcc_s|m|c)\.so", name) for name in needed)
    paths = [str(Path(torch.__file__).parent / "lib"), "/usr/local/cuda/lib64", os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}
    ldd = subprocess.run(["ldd", "-r", library], capture_output=True, text=True, env=environment, check=False)
    missing = set(re.findall(r"undefined symbol: (\w+)", ldd.stdout + ldd.stderr))
    assert missing <= {"aoti_torch_get_current_cuda_stream"}
    kernel_abi_check = pytest.importorskip("kernel_abi_check")
    binary = kernel_abi_check.ObjectFile(library)
    assert binary.check_manylinux("manylinux_2_28") == [] and binary.check_python_abi("3.9") == []


@pytest.mark.slow
@pytest.mark.parametrize("source", ["dcnv3_cuda_forward.cu", "dcnv3_cuda_backward.cu"])
def test_hip_compiles(tmp_path, source):
    """Compiles the kernels without the bindings, because only ROCm builds of torch have the headers for ROCm."""
    if shutil.which("hipcc") is None:
        pytest.skip("no hipcc")
    command = ["hipcc", "--offload-arch=gfx90a", "-std=c++20", "-O3", "-Wall", "-x", "hip", "-DUSE_ROCM"]
    command += ["-c", ROOT / "dcnv3_cuda" / source, "-o", tmp_path / "kernel.o"]
    environment = {**os.environ, "HIP_PLATFORM": "amd"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
