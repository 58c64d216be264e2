"""The benchmark of whole models, on tiny inputs."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "model_speed.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--device", "cuda"), "finds no GPU"), (("--device", "xla"), "cpu or cuda"), (("--batch", "0"), "--batch must")],
)
@pytest.mark.slow
def test_bad_arguments(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.slow
def test_all_measurements(tmp_path):
    # transformers' Swin takes no images of less than 224 pixels
    flags = [
        "--image_size",
        224,
        "--batch",
        1,
        "--train_batch",
        1,
        "--turns",
        1,
        "--threads",
        2,
        "--profile",
        "--parts",
    ]
    result = run(*flags, "--output", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "model_speed_cpu.json").read_text())
    rows = report["measurements"]
    assert {(row["dtype"], row["pass"]) for row in rows} == {
        (dtype, name) for dtype in ("float32", "bfloat16") for name in ("inference", "training")
    }
    assert {row["model"] for row in rows} == {
        "InternImage-T",
        "InternImage-T, materialising op",
        "ConvNeXt-T",
        "ConvNeXtV2-T",
        "Swin-T",
    }
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert report["not_measured"] == []
    assert len(report["parts"]) == 2 * 4 * 5
    for kinds in report["profiles"].values():
        assert kinds["InternImage-T"]["linear layers"] > 0
        assert kinds["InternImage-T"].keys() - {"DCNv3", "other"} >= {"norms", "activations", "convolutions"}
    table = (tmp_path / "model_speed_cpu.md").read_text()
    assert table in result.stdout
    assert "| ConvNeXt-T |" in table


@pytest.mark.slow
def test_time_is_bounded_and_what_is_missing_is_said(tmp_path):
    result = run("--image_size", 64, "--seconds", 1, "--output", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "model_speed_cpu.json").read_text())
    assert report["measurements"] == []
    assert len(report["not_measured"]) == 4
