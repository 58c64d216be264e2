"""Tests of README.md and docs/: code runs as written, figures that follow from the code are right, the site builds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from utils import FIXTURES, ROOT, TINY, run_python

from internimage_hf import InternImageConfig, InternImageForImageClassification


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


# test_docs_tasks.py runs the sections of tasks.md one by one
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "tasks.md" and snippets(p)], ids=lambda page: page.name
)
def test_snippets_run(page, tmp_path):
    """Runs every Python snippet of a page in order in one interpreter, with a small checkpoint in place of the Hub's."""
    checkpoint = tmp_path / "checkpoint"
    config = InternImageConfig(**{**TINY, "num_labels": 1000, "image_size": 64})
    InternImageForImageClassification(config).save_pretrained(checkpoint)
    shutil.copy(FIXTURES / "hf_t_like" / "preprocessor_config.json", checkpoint)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    Image.fromarray(pixels).save(tmp_path / "cat.jpg")
    program = "\n".join(["import torch", *snippets(page)]).replace("OpenGVLab/internimage_t_1k_224", str(checkpoint))
    run_python(program, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_parameter_counts_equal_released_models():
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for name, released in json.loads((FIXTURES / "released_models.json").read_text()).items():
        assert f"| `OpenGVLab/{name}` | {released['num_parameters']:,} |" in page, name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, count in re.findall(r"\| `(OpenGVLab/\w+)` \| ([\d,]+) \|", readme):
        assert f"| `{name}` | {count} |" in page, name


def test_readme_counts_the_released_detectors_and_segmenters():
    from convert.released import RELEASED

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ((detectors, segmenters),) = re.findall(r"(\d+) detectors, (\d+) segmenters", readme)
    tasks = [released.task for released in RELEASED.values()]
    assert int(detectors) == tasks.count("detection")
    assert int(segmenters) == tasks.count("upernet") + tasks.count("mask2former")


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_links_of_the_readme_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_site_builds_without_warnings(tmp_path):
    """In strict mode, a link that leads nowhere or a name without a docstring ends the build."""
    pytest.importorskip("mkdocs", reason="needs `pip install internimage-hf[docs]`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # Material's advertisement of its successor
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout + result.stderr
    assert (tmp_path / "site" / "api" / "index.html").is_file()
    pages = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "site").rglob("*.html"))
    remote = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)", pages)
    assert remote == [], "the pages load from elsewhere"
