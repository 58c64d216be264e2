"""Mask R-CNN and Cascade Mask R-CNN: the numbers of the official code, and what transformers asks of such a model."""

import argparse
import copy
import functools
import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, TINY
from convert import detection
from convert.rcnn import official_state_dict
from convert.source import find
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    ConvNextV2Config,
    pipeline,
)

from internimage_hf import (
    InternImageCompositeConfig,
    InternImageConfig,
    InternImageDetectionImageProcessor,
    InternImageRcnnConfig,
    InternImageRcnnForInstanceSegmentation,
)


CASES = ("mask_rcnn_tiny", "cascade_tiny")
STAGES = ["stage1", "stage2", "stage3", "stage4"]


class Golden:
    """A small detector with the weights of a parity case, and what the official code computed with it."""

    def __init__(self, case: str):
        folder = FIXTURES / case
        self.official = torch.load(folder / "checkpoint.pth", weights_only=True)["state_dict"]
        source = find(str(folder / "checkpoint.pth"), str(folder / "config.json"), None)
        self.plan = detection.make_plan(source, argparse.Namespace(ema=False))
        model = self.plan.model_class(self.plan.config)
        model.load_state_dict(self.plan.state_dict, strict=True)
        self._model = model.eval()
        self.expected = load_file(folder / "expected.safetensors")
        self.gradient_norms = json.loads((folder / "gradient_norms.json").read_text())["loss"]
        self.config = json.loads((folder / "config.json").read_text())
        self.images = self.config["images"]
        batch, _, height, width = self.expected["pixel_values"].shape
        self.pixel_mask = torch.zeros(batch, height, width, dtype=torch.long)
        self.labels = []
        for i, image in enumerate(self.images):
            valid_height, valid_width = image["img_shape"]
            self.pixel_mask[i, :valid_height, :valid_width] = 1
            corners = torch.tensor(self.config["gt_boxes"][i], dtype=torch.float64)
            corners = corners / torch.tensor([valid_width, valid_height] * 2)
            boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
            masks = self.unpacked(f"gt_masks_packed.{i}", width)
            self.labels.append(
                {"class_labels": torch.tensor(self.config["gt_labels"][i]), "boxes": boxes, "masks": masks}
            )

    def unpacked(self, name: str, width: int) -> torch.Tensor:
        return torch.from_numpy(np.unpackbits(self.expected[name].numpy(), axis=-1)[..., :width]).bool()

    def model(self, dtype: torch.dtype = torch.float32) -> InternImageRcnnForInstanceSegmentation:
        return copy.deepcopy(self._model).to(dtype)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [tuple(image["ori_shape"]) for image in self.images]


golden = functools.cache(Golden)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_every_step_of_the_official_inference(case, dtype):
    data = golden(case)
    expected = data.expected
    maps, logits, pixels, mask_logits = (
        (2e-6, 1e-8, 1e-8, 1e-5) if dtype == torch.float64 else (3e-4, 2e-4, 5e-3, 3e-3)
    )
    with torch.no_grad():
        outputs = data.model(dtype)(expected["pixel_values"].to(dtype), data.pixel_mask, output_intermediates=True)
    steps = outputs.intermediates
    for i in range(5):
        close(steps["feature_maps"][i], expected[f"fpn.{i}"], maps)
        close(steps["rpn_deltas"][i], expected[f"rpn_deltas.{i}"], maps if dtype == torch.float64 else 2e-4)
    for i in range(len(data.images)):
        close(steps["proposals"][i], expected[f"proposals.{i}"], pixels)
    for stage in range(len(steps["rois"])):
        close(steps["rois"][stage], expected[f"stage{stage}.rois"], pixels)
        close(steps["class_logits"][stage], expected[f"stage{stage}.cls_logits"], logits)
        close(steps["box_deltas"][stage].flatten(1), expected[f"stage{stage}.bbox_deltas"], logits)
        close(steps["mask_logits"][stage], expected[f"stage{stage}.mask_logits"], mask_logits)
    close(steps["mask_rois"], expected["mask_rois"], pixels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_official_detections_and_masks(case, dtype):
    data = golden(case)
    with torch.no_grad():
        outputs = data.model(dtype)(data.expected["pixel_values"].to(dtype), data.pixel_mask)
    processor = InternImageDetectionImageProcessor()
    results = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=data.sizes)
    boxes_alone = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=data.sizes)
    for i, (result, (height, width)) in enumerate(zip(results, data.sizes, strict=True)):
        assert torch.equal(result["labels"], data.expected[f"detections.{i}.labels"])
        close(result["scores"], data.expected[f"detections.{i}.scores"], 1e-8 if dtype == torch.float64 else 2e-5)
        close(result["boxes"], data.expected[f"detections.{i}.boxes"], 1e-5 if dtype == torch.float64 else 5e-3)
        wanted = data.unpacked(f"detections.{i}.masks_packed", width)
        assert result["masks"].dtype == torch.bool and result["masks"].shape == (len(wanted), height, width)
        assert int((result["masks"] != wanted).sum()) <= (0 if dtype == torch.float64 else 8)
        assert torch.equal(boxes_alone[i]["boxes"], result["boxes"])


@pytest.mark.parametrize("case", CASES)
def test_official_losses_and_gradients(case):
    data = golden(case)
    model = data.model(torch.float64).train()
    outputs = model(data.expected["pixel_values"].double(), data.pixel_mask, data.labels)
    wanted = {
        name.removeprefix("loss."): loss.item()
        for name, loss in data.expected.items()
        if name.startswith("loss.") and not name.endswith(("acc", "total"))
    }
    assert {name: loss.item() for name, loss in outputs.loss_dict.items()} == pytest.approx(wanted, rel=5e-7)
    assert outputs.loss.item() == pytest.approx(data.expected["loss.total"].item(), rel=5e-7)
    assert outputs.scores is None, "no detections in training mode with labels"
    outputs.loss.backward()
    gradients = {p.data_ptr(): p.grad for p in model.parameters()}
    norms = {}
    for name, tensor in official_state_dict(model).items():
        if name in data.gradient_norms:
            gradient = gradients[tensor.data_ptr()]
            norms[name] = 0.0 if gradient is None else gradient.norm().item()
    assert norms == pytest.approx(data.gradient_norms, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_float32_training_step_and_evaluation_with_labels(case):
    data = golden(case)
    labels = [{**label, "boxes": label["boxes"].float()} for label in data.labels]
    model = data.model().train()
    outputs = model(data.expected["pixel_values"], data.pixel_mask, labels)
    assert outputs.loss.item() == pytest.approx(data.expected["loss.total"].item(), rel=1e-4)
    model.eval()
    with torch.no_grad():
        outputs = model(data.expected["pixel_values"], data.pixel_mask, labels)
    assert outputs.loss.isfinite() and outputs.scores.shape == (2, 15)


@pytest.mark.parametrize("case", CASES)
def test_the_official_dictionary_comes_back(case):
    data = golden(case)
    back = official_state_dict(data._model)
    assert back.keys() == data.official.keys()
    for name, tensor in data.official.items():
        assert torch.equal(back[name], tensor), name
    assert sum(p.numel() for p in data._model.parameters()) == data.config["num_parameters"]
