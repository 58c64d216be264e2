"""The example programs, on small inputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT
from PIL import Image
from safetensors.torch import load_file


def run_example(name: str, *arguments: object, expect: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert result.returncode == expect, result.stderr[-3000:]
    return result.stdout if expect == 0 else result.stderr


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of class folders: dark and bright noise of different sizes, one of them with an alpha channel."""
    rng = np.random.default_rng(0)
    for name, low, high in (("bright", 150, 256), ("dark", 0, 100)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(low, high, (60 + i, 80, 4 if i == 3 else 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_classification_on_a_folder_from_a_checkpoint_and_resume(photos, tmp_path):
    flags = [
        "--dataset", photos, "--model", FIXTURES / "hf_t_like", "--eval_fraction", 0.25, "--per_device_train_batch_size", 8,
        "--learning_rate", 1e-3, "--bf16", "--use_cpu", "--gradient_checkpointing", "--logging_strategy", "no", "--save_total_limit", 5,
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    output = run_example("image_classification.py", *flags, "--output_dir", whole, "--num_train_epochs", 3)
    assert "30 images to train, 10 to evaluate, 2 classes" in output
    assert (whole / "predictions.png").stat().st_size > 1000
    config = json.loads((whole / "config.json").read_text())
    assert config["id2label"] == {"0": "bright", "1": "dark"}
    assert json.loads((whole / "all_results.json").read_text())["eval_accuracy"] == 1.0

    # the same again, with nothing left but its second epoch's checkpoint
    run_example("image_classification.py", *flags, "--output_dir", parts, "--num_train_epochs", 3)
    epoch = 4  # steps
    keep = parts / f"checkpoint-{2 * epoch}"
    assert keep.is_dir()
    for other in parts.glob("checkpoint-*"):
        if other != keep:
            for file in other.iterdir():
                file.unlink()
            other.rmdir()
    run_example(
        "image_classification.py", *flags, "--output_dir", parts, "--num_train_epochs", 3, "--resume_from_checkpoint", "last"
    )  # fmt: skip
    expected = load_file(whole / f"checkpoint-{3 * epoch}" / "model.safetensors")
    actual = load_file(parts / f"checkpoint-{3 * epoch}" / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_classification_recipe_file_and_bad_flags(photos, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "num_train_epochs: 1\nlearning_rate: 0.001\nmax_steps: 1\neval_strategy: 'no'\nsave_strategy: 'no'\n"
    )
    common = ["--output_dir", tmp_path / "out", "--load_best_model_at_end", "false", "--image_size", 32]
    output = run_example(
        "image_classification.py", recipe, "--max_train_samples", 16, "--max_eval_samples", 8, *common
    )
    assert "16 images to train, 8 to evaluate, 10 classes" in output
    error = run_example("image_classification.py", "--dataset", photos, "--label_column", "kind", *common, expect=1)
    assert "--label_column kind is not a column" in error
