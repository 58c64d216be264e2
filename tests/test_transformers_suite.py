"""Runs transformers' common model tests on this package's classes, with ConvNextV2 as control; see `transformers_suite/run.py`."""

import subprocess
import sys

import pytest
from utils import ROOT


def run_suite(*options: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "transformers_suite" / "run.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(result.stdout)
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]


def test_quick_tests_that_convnextv2_passes():
    run_suite("--quick", "-n", "1")


@pytest.mark.slow
def test_all_tests_that_convnextv2_passes():
    run_suite()
