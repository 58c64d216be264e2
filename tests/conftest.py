"""Fixtures of several test files."""

import os


# Parallel tests and the programs that they start use one thread each: OpenMP's threads wait busily for each other, and several
# groups of threads on the same cores take five times as long. Tests of several threads set the number of threads themselves.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hub_server import Hub
from PIL import Image
from utils import ROOT, TINY

from internimage_hf import InternImageConfig, InternImageForImageClassification, InternImageImageProcessor


# No test may use the network by accident; tests with a server on this machine unset this themselves.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# test_transformers_suite.py runs transformers' tests in a tree of their own
collect_ignore = ["transformers_suite"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


# ------------------------------------------------------------------------------------------------ the example programs


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


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory) -> Path:
    """A small classifier of images of 32 x 32, with its image processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = InternImageConfig(**{**TINY, "depths": [1, 1, 1, 1], "image_size": 32})
    InternImageForImageClassification(config).save_pretrained(folder)
    InternImageImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder


class Programs:
    """The example programs as modules, imported on first use."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def programs():
    """The example programs, with `examples/` in `sys.path` as for a script of that folder."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        yield Programs()
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="session")
def scenes(programs):
    return programs.embedded_data.load_digit_scenes(train=9, evaluation=4, size=64)


@pytest.fixture(scope="session")
def coco_folder(scenes, tmp_path_factory) -> Path:
    """A folder in COCO's layout: ids with gaps, images of two sizes, an image without objects, crowds, rectangles as masks."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, name in (("train", "train2017"), ("validation", "val2017")):
        (root / name).mkdir()
        images, annotations = [], []
        for i, scene in enumerate(scenes[split]):
            scale = 1 + i % 2
            image = scene["image"].resize((64 * scale, 96 * scale))  # higher than wide
            image.save(root / name / f"{i:06}.jpg", quality=95)
            images.append(
                {"id": 1000 + 7 * i, "file_name": f"{i:06}.jpg", "width": image.width, "height": image.height}
            )
            if i == 1:
                continue
            for (x, y, width, height), category in zip(
                scene["objects"]["bbox"], scene["objects"]["category"], strict=True
            ):
                box = [x * scale, 1.5 * y * scale, width * scale, 1.5 * height * scale]
                right, bottom = box[0] + box[2], box[1] + box[3]
                annotations.append(
                    {
                        "id": 1 + len(annotations),
                        "image_id": images[-1]["id"],
                        "category_id": 3 + 5 * category,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": int(i == 2),
                        "segmentation": [[box[0], box[1], right, box[1], right, bottom, box[0], bottom]],
                    }
                )
        categories = [{"id": 3 + 5 * i, "name": f"the {i}"} for i in reversed(range(10))]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def mask_folder(scenes, tmp_path_factory) -> Path:
    """A folder in ADE20K's layout with palette masks: 0 is no class, 1 the background."""
    root = tmp_path_factory.mktemp("masks")
    for split, name in (("train", "training"), ("validation", "validation")):
        for kind in ("images", "annotations"):
            (root / kind / name).mkdir(parents=True)
        for i, scene in enumerate(scenes[split]):
            scene["image"].resize((96, 64)).save(root / "images" / name / f"{i}.jpg")
            mask = np.asarray(scene["annotation"].resize((96, 64), Image.Resampling.NEAREST)) + 1
            mask[:4] = 0
            palette = Image.fromarray(mask.astype(np.uint8)).convert("P")
            palette.putdata(mask.flatten().tolist())
            palette.save(root / "annotations" / name / f"{i}.png")
    names = {i: "background" if i == 0 else f"the {i - 1}" for i in range(11)}
    (root / "id2label.json").write_text(json.dumps(names))
    return root
