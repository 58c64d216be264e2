"""transformers' own common model tests on our classes, with ConvNextV2 as the control."""

import subprocess
import sys

import pytest
from conftest import ROOT


RUNNER = ROOT.parent / "shared" / "transformers_suite" / "run.py"


@pytest.mark.skipif(not RUNNER.is_file(), reason="../shared/transformers_suite is not on this machine")
def test_every_test_that_convnextv2_passes():
    result = subprocess.run(
        [sys.executable, str(RUNNER), sys.executable, "--package-dir", str(ROOT), "-n", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
