"""Tests of the GPU kernels on a CPU with ThreadSanitizer (races between lanes) and AddressSanitizer (accesses outside tensors)."""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
KERNELS = [ROOT / "dcnv3_cuda" / f"dcnv3_cuda_{name}.cu" for name in ("forward", "backward")]


def compile_with(
    sanitizer: str, program: Path, *sources: Path, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    command = [*COMPILER, "-std=c++20", "-O0", f"-fsanitize={sanitizer}", *flags]
    return subprocess.run(
        [*command, "-x", "c++", *map(str, sources), "-o", str(program)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A function that compiles the program for a sanitizer once. Skips the test if the compiler lacks the sanitizer."""
    folder, programs = tmp_path_factory.mktemp("sanitized"), {}

    def get(sanitizer: str) -> Path:
        if sanitizer not in programs:
            if platform.machine() != "x86_64":
                pytest.skip("the exchange between lanes relies on the order of memory writes of x86")
            if shutil.which(COMPILER[0]) is None:
                pytest.skip("no C++ compiler")
            source, trial, program = folder / "trial.cpp", folder / "trial", folder / sanitizer
            source.write_text("int main() {}")
            if compile_with(sanitizer, trial, source).returncode or subprocess.run([trial], check=False).returncode:
                pytest.skip(f"the compiler's {sanitizer} sanitizer does not work on this machine")
            flags = ("-DDCNV3_EMULATION", "-DDCNV3_EMULATION_THREADS", f"-I{EMULATION}", "-Wno-psabi")
            result = compile_with(sanitizer, program, EMULATION / "sanitize.cpp", *KERNELS, flags=flags)
            assert result.returncode == 0, result.stderr
            programs[sanitizer] = program
        return programs[sanitizer]

    return get


def check(program: Path, *cases: int) -> None:
    result = subprocess.run([program, *map(str, cases)], capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stdout + result.stderr[:4000]


def test_two_cases_have_no_races(sanitized):
    """One case with windows and one of the general kernels. The slow test runs all cases."""
    check(sanitized("thread"), 0, 6)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_every_case_passes_the_sanitizers(sanitized, sanitizer):
    check(sanitized(sanitizer))
