"""Mask R-CNN and Cascade Mask R-CNN: the numbers of the official code, and what transformers asks of such a model."""

import argparse
import copy
import functools
import gzip
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    ConvNextV2Config,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging
from utils import FIXTURES, bare_environment, run_python

from convert import detection
from convert.all import PLANS
from convert.errors import ConversionError
from convert.rcnn import official_state_dict
from convert.released import RELEASED
from convert.source import find
from internimage_hf import (
    InternImageCompositeConfig,
    InternImageConfig,
    InternImageDetectionImageProcessor,
    InternImageRcnnConfig,
    InternImageRcnnForInstanceSegmentation,
)
from internimage_hf.modeling_internimage_rcnn import InternImageRcnnFeaturePyramid, _sample


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


@pytest.mark.parametrize("case", CASES)
def test_the_command_line_writes_a_folder_that_detects_the_same(case, tmp_path):
    data, folder = golden(case), FIXTURES / case
    arguments = [str(folder / "checkpoint.pth"), "--config", str(folder / "config.json"), "--output"]
    assert detection.main([*arguments, str(tmp_path / "model")]) == 0
    model = AutoModelForInstanceSegmentation.from_pretrained(tmp_path / "model", dtype=torch.float64)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        outputs = model(data.expected["pixel_values"].double(), data.pixel_mask)
    results = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=data.sizes)
    for i, result in enumerate(results):
        close(result["boxes"], data.expected[f"detections.{i}.boxes"], 1e-5)
    assert detection.main([str(tmp_path / "model"), "--reverse", "--output", str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert back.keys() == data.official.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in data.official.items())


# --------------------------------------------------------------------------------------------------------- released models

PARAMETERS = {"t": 48_920_544, "s": 68_715_024, "b": 115_245_264, "l": 277_307_236, "xl": 387_448_974}
RELEASED_NAMES = [
    *(f"mask_rcnn_internimage_{variant}_fpn_{schedule}_coco" for variant in "tsb" for schedule in ("1x", "3x")),
    *(f"cascade_internimage_{variant}_fpn_{schedule}_coco" for variant in ("l", "xl") for schedule in ("1x", "3x")),
]


@pytest.mark.parametrize("name", RELEASED_NAMES)
def test_every_released_name_maps_without_remainder(name):
    listed = name.replace("3x" if name.startswith("mask") else "1x", "1x" if name.startswith("mask") else "3x")
    with gzip.open(FIXTURES / "detection_keys" / f"{listed}.json.gz", "rt") as file:
        official = {key: torch.zeros(()).expand(shape) for key, shape in json.load(file)}  # no memory
    averaged = {f"ema_{key.replace('.', '_')}": tensor for key, tensor in official.items()}
    source = SimpleNamespace(
        read=lambda ema: official | averaged,
        released=RELEASED[name],
        config=None,
        file=f"{name}.pth",
        unknown_fields=[],
    )
    plan = detection.make_plan(source, argparse.Namespace(ema=False))
    assert set(plan.ignored) == averaged.keys(), "the ordinary names hold the averaged weights"
    with torch.device("meta"):
        model = plan.model_class(plan.config)
    assert {key: t.shape for key, t in model.state_dict().items()} == {
        key: t.shape for key, t in plan.state_dict.items()
    }
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[RELEASED[name].variant]
    assert {key: t.shape for key, t in official_state_dict(model).items()} == {k: t.shape for k, t in official.items()}
    config = plan.config
    assert config.id2label[0] == "person" and len(config.id2label) == 80
    cascade = InternImageRcnnConfig.cascade() if name.startswith("cascade") else InternImageRcnnConfig()
    ours, authors = config.to_dict(), cascade.to_dict()
    for field in ("backbone_config", "id2label", "label2id", "transformers_version", "architectures", "dtype"):
        ours.pop(field, None), authors.pop(field, None)
    assert ours == authors
    assert plan.processor.size == {"shortest_edge": 800, "longest_edge": 1333}


def flash_names(variant: str, like: str) -> dict[str, torch.Tensor]:
    """The tensors of a detector on FlashInternImage: its pyramid has LayerNorms (`FPN_vitdet`), and its T layer scale."""
    with gzip.open(FIXTURES / "dcnv4_keys" / f"{variant}.json.gz", "rt") as file:
        shapes = {f"backbone.{key}": s for key, s in json.load(file) if not key.startswith(("head.", "conv_head."))}
    for key, shape in list(shapes.items()):
        if key.endswith("norm1.0.weight"):
            shapes |= {key.replace("norm1.0.weight", f"gamma{i}"): shape for i in (1, 2)}
    with gzip.open(FIXTURES / "detection_keys" / f"{like}.json.gz", "rt") as file:
        for key, shape in json.load(file):
            if key.startswith("neck.") and key.endswith("conv.bias"):
                shapes |= {key.replace("conv.bias", f"ln.{kind}"): shape for kind in ("weight", "bias")}
            elif not key.startswith("backbone."):
                shapes[key] = shape
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", [name for name in RELEASED if re.match("(mask_rcnn|cascade)_flash", name)])
def test_every_released_name_of_flash_internimage_maps_without_remainder(name):
    released = RELEASED[name]
    variant = released.variant.removeprefix("flash_")
    like = "cascade_internimage_l_fpn_3x_coco" if variant == "l" else f"mask_rcnn_internimage_{variant}_fpn_1x_coco"
    official = flash_names(variant, like)
    source = SimpleNamespace(
        read=lambda ema: dict(official), released=released, config=None, file=f"{name}.pth", unknown_fields=[]
    )
    plan = PLANS[released.task](source, argparse.Namespace(ema=False))
    with torch.device("meta"):
        model = plan.model_class(plan.config)
    assert {key: t.shape for key, t in model.state_dict().items()} == {
        key: t.shape for key, t in plan.state_dict.items()
    }
    assert {key: t.shape for key, t in official_state_dict(model).items()} == {k: t.shape for k, t in official.items()}
    assert plan.config.fpn_layer_norm and plan.config.backbone_config.dcn_version == 4
    assert plan.config.backbone_config.drop_path_rate == released.drop_path_rate
    assert plan.config.id2label[0] == "person" and plan.processor.size == {"shortest_edge": 800, "longest_edge": 1333}


def test_feature_pyramid_with_layer_norms():
    neck = InternImageRcnnFeaturePyramid(InternImageRcnnConfig(fpn_hidden_size=6, fpn_layer_norm=True), [4, 8, 16, 32])
    for norm in (*neck.lateral_norms, *neck.output_norms):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    maps = [torch.randn(2, 4 * 2**i, 2 ** (5 - i), 2 ** (4 - i)) for i in range(4)]

    def layer(conv, norm, feature_map):
        assert conv.bias is None
        feature_map = torch.nn.functional.conv2d(feature_map, conv.weight, padding=conv.padding).movedim(1, -1)
        mean, variance = feature_map.mean(-1, keepdim=True), feature_map.var(-1, keepdim=True, correction=0)
        return ((feature_map - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias).movedim(-1, 1)

    expected = [layer(*arguments) for arguments in zip(neck.lateral_convs, neck.lateral_norms, maps, strict=True)]
    for i in (3, 2, 1):
        expected[i - 1] = expected[i - 1] + expected[i].repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = [layer(*arguments) for arguments in zip(neck.output_convs, neck.output_norms, expected, strict=True)]
    expected.append(torch.nn.functional.max_pool2d(expected[-1], 1, stride=2))
    for actual, wanted in zip(neck(tuple(maps)), expected, strict=True):
        close(actual, wanted, 1e-5)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("test_cfg", "rcnn", "nms", "type"), "soft_nms", "`test_cfg.rcnn.nms.type` must be 'nms', got 'soft_nms'"),
        (
            ("roi_head", "bbox_roi_extractor", "roi_layer", "sampling_ratio"),
            2,
            "`roi_head.bbox_roi_extractor.roi_layer.sampling_ratio` must be 0, got 2",
        ),
        (("roi_head", "bbox_head", "loss_bbox", "type"), "CIoULoss", "must be 'L1Loss' or 'GIoULoss', got 'CIoULoss'"),
        (("test_cfg", "rcnn", "max_per_img"), 0, "`max_detections` must be a positive integer, got 0"),
        (
            ("roi_head", "bbox_head", "reg_decoded_bbox"),
            True,
            "`roi_head.bbox_head.reg_decoded_bbox` must be False, got True",
        ),
        (
            ("roi_head", "mask_roi_extractor", "featmap_strides"),
            [8, 16],
            "`roi_head.mask_roi_extractor.featmap_strides` must be [4, 8], got [8, 16]",
        ),
    ],
)
def test_a_setting_that_the_model_lacks_is_refused(path, value, message):
    folder = FIXTURES / "mask_rcnn_tiny"
    source = find(str(folder / "checkpoint.pth"), str(folder / "config.json"), None)
    fields = source.config["model"]
    for name in path[:-1]:
        fields = fields[name]
    fields[path[-1]] = value
    with pytest.raises(ConversionError, match=re.escape(message)):
        detection.make_plan(source, argparse.Namespace(ema=False))


# ------------------------------------------------------------------------------------------- what users do with the model


def tiny(**fields) -> InternImageRcnnForInstanceSegmentation:
    """A model that detects something whatever it sees."""
    backbone = InternImageConfig(channels=8, depths=[1, 1, 1, 1], groups=[1, 2, 4, 8], out_features=STAGES)
    settings = {
        "backbone_config": backbone,
        "fpn_hidden_size": 16,
        "box_hidden_size": 32,
        "mask_hidden_size": 16,
        "box_conv_size": 16,
        "id2label": {0: "cat", 1: "dog", 2: "cow"},
        "score_threshold": 0.0,
        "max_detections": 5,
        "rpn_post_nms_top_n": 50,
        "rpn_post_nms_top_n_training": 50,
    }
    model = InternImageRcnnForInstanceSegmentation(InternImageRcnnConfig(**{**settings, **fields}))
    for head in model.mask_heads:
        torch.nn.init.normal_(head.classifier.weight)
    return model.eval()


def objects(number: int, height: int, width: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Labels of one image."""
    generator = torch.Generator().manual_seed(number)
    sizes = 0.2 + 0.5 * torch.rand(number, 2, generator=generator)
    centers = sizes / 2 + (1 - sizes) * torch.rand(number, 2, generator=generator)
    masks = torch.rand(number, height, width, generator=generator) > 0.5
    labels = {
        "class_labels": torch.arange(number) % 3,
        "boxes": torch.cat([centers, sizes], 1),
        "masks": masks,
    }
    return {name: tensor.to(device) for name, tensor in labels.items()}


@pytest.fixture
def folder(tmp_path):
    tiny().save_pretrained(tmp_path)
    InternImageDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path)
    return tmp_path


def test_auto_classes_and_files(folder):
    assert type(AutoConfig.from_pretrained(folder)) is InternImageRcnnConfig
    assert type(AutoImageProcessor.from_pretrained(folder)) is InternImageDetectionImageProcessor
    pixel_values = torch.randn(1, 3, 64, 96)
    results = []
    for auto_class in (AutoModelForInstanceSegmentation, AutoModelForObjectDetection):
        model = auto_class.from_pretrained(folder)
        assert type(model) is InternImageRcnnForInstanceSegmentation
        with torch.no_grad():
            results.append(model(pixel_values))
    for name in ("scores", "labels", "boxes", "masks"):
        assert torch.equal(results[0][name], results[1][name])
    as_tuple = model(pixel_values, return_dict=False)
    assert torch.equal(as_tuple[0], results[0].scores)


@pytest.mark.parametrize("task", ["object-detection", "image-segmentation"])
def test_pipelines(task, folder, caplog):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 160, 3), dtype=np.uint8))
    logging.enable_propagation()
    try:
        run = pipeline(task, model=str(folder))
    finally:
        logging.disable_propagation()
    assert "not supported" not in caplog.text
    found = run([image, image.resize((50, 70))], threshold=0.0)
    assert [len(one) for one in found] == [5, 5]
    for one, (width, height) in zip(found, ((160, 100), (50, 70)), strict=True):
        for detected in one:
            assert detected["label"] in ("cat", "dog", "cow") and 0 < detected["score"] <= 1
            if task == "object-detection":
                box = detected["box"]
                assert 0 <= box["xmin"] <= box["xmax"] <= width and 0 <= box["ymin"] <= box["ymax"] <= height
            else:
                assert detected["mask"].size == (width, height)
        if task == "object-detection":
            assert max(detected["box"]["xmax"] for detected in one) > width / 2
        else:
            assert any(np.asarray(detected["mask"]).any() for detected in one)


def test_detections_are_filled_up_to_a_fixed_number():
    model = tiny(max_detections=200, score_threshold=0.2)
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 64))
    assert outputs.scores.shape == (2, 200) and outputs.masks.shape == (2, 200, 28, 28)
    empty = outputs.labels == -1
    assert empty.any() and not empty.all()
    for name in ("scores", "boxes", "masks"):
        assert not outputs[name][empty].any()
    assert (outputs.scores.diff(dim=1) <= 0).all() and (outputs.scores[~empty] > 0.2).all()
    processor = InternImageDetectionImageProcessor()
    results = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=[(64, 64)] * 2)
    assert sum(len(result["scores"]) for result in results) == int((~empty).sum())


def test_no_detection_at_all():
    model = tiny(score_threshold=1.0)
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 64, 64))
    assert (outputs.labels == -1).all()
    result = InternImageDetectionImageProcessor().post_process_instance_segmentation(outputs, target_sizes=[(30, 20)])
    assert result[0]["masks"].shape == (0, 30, 20) and result[0]["segments_info"] == []
    assert (result[0]["segmentation"] == -1).all()


@pytest.mark.parametrize("stages", [1, 3])
def test_images_without_objects_small_ones_and_a_batch_of_very_different_sizes(stages):
    fields = {"box_stds": [[0.1] * 4] * 3, "box_iou_thresholds": [0.5] * 3, "stage_loss_weights": [1.0] * 3}
    model = tiny(num_box_convs=1, **(fields if stages == 3 else {})).train()
    pixel_mask = torch.zeros(3, 96, 160, dtype=torch.long)
    for i, (height, width) in enumerate(((96, 160), (9, 7), (30, 150))):
        pixel_mask[i, :height, :width] = 1
    labels = [objects(3, 96, 160), objects(0, 96, 160), objects(1, 96, 160)]
    outputs = model(torch.randn(3, 3, 96, 160), pixel_mask, labels)
    outputs.loss.backward()
    assert all(loss.isfinite() for loss in outputs.loss_dict.values())
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad()
    outputs = model(torch.randn(1, 3, 9, 7), labels=[objects(0, 9, 7)])
    outputs.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == [], "as data-parallel training needs"
    assert outputs.loss.isfinite() and outputs.loss_dict["s0.loss_mask" if stages == 3 else "loss_mask"] == 0
    model.eval()
    with torch.no_grad():
        outputs = model(torch.randn(3, 3, 96, 160), pixel_mask)
        assert model(torch.randn(1, 3, 1, 1)).scores.isfinite().all()
    assert ((outputs.boxes >= 0) & (outputs.boxes <= 1)).all()


def test_sampling_follows_the_generator_of_torch():
    model = tiny(num_samples=8, rpn_num_samples=16).train()
    pixel_values, labels = torch.randn(1, 3, 64, 64), [objects(3, 64, 64)]

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(pixel_values, labels=labels).loss.item()

    assert loss(0) == loss(0) != loss(1)


def test_samples_are_at_most_as_many_as_configured():
    matched = torch.cat([torch.arange(1, 21), torch.zeros(30, dtype=torch.long), -torch.ones(9, dtype=torch.long)])
    positive, negative = _sample(matched, 16, 0.25)
    assert len(positive) == 4 and len(negative) == 12
    assert (matched[positive] > 0).all() and (matched[negative] == 0).all()
    positive, negative = _sample(matched, 1000, 0.5)
    assert len(positive) == 20 and len(negative) == 30


def test_a_composite_backbone_trains_on_the_maps_of_both_encoders():
    backbone = InternImageCompositeConfig(channels=8, depths=[1, 1, 1, 1], groups=[1, 2, 4, 8], out_features=STAGES)
    model = tiny(backbone_config=backbone)
    pixel_values, labels = torch.randn(1, 3, 64, 64), [objects(2, 64, 64)]
    model.backbone.lead.load_state_dict(model.backbone.assistant.state_dict())
    model.train()
    torch.manual_seed(0)
    losses = model(pixel_values, labels=labels).loss_dict
    assert {name.removeprefix("auxiliary.") for name in losses} == {
        "loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"
    }  # fmt: skip
    # connections begin at zero: both encoders give the same maps, and fewer regions than the loss samples are all taken
    assert losses["auxiliary.loss_cls"].item() == pytest.approx(0.5 * losses["loss_cls"].item(), rel=1e-5)
    model.eval()
    assert not any(name.startswith("auxiliary") for name in model(pixel_values, labels=labels).loss_dict)


def test_any_backbone_and_other_settings():
    backbone = ConvNextV2Config(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], out_features=STAGES[1:])
    model = tiny(
        backbone_config=backbone,
        feature_strides=[8, 16, 32, 64],
        anchor_scales=[4.0, 8.0],
        anchor_ratios=[1.0],
        class_agnostic_boxes=True,
        mask_pool_size=7,
        box_pool_size=5,
        num_mask_convs=1,
    )
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 96), output_hidden_states=True)
    assert outputs.masks.shape == (2, 5, 14, 14) and len(outputs.hidden_states) == 5
    model.train()
    assert model(torch.randn(1, 3, 64, 96), labels=[objects(2, 64, 96)]).loss.isfinite()


def test_a_new_class_list_renews_only_what_depends_on_it(folder):
    model, info = InternImageRcnnForInstanceSegmentation.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    renewed = {f"box_heads.0.{layer}" for layer in ("classifier", "regressor")} | {"mask_heads.0.classifier"}
    expected = {f"{layer}.{kind}" for layer in renewed for kind in ("weight", "bias")}
    assert {name for name, *_ in info["mismatched_keys"]} == expected
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert 0.005 < model.box_heads[0].classifier.weight.std() < 0.02 and not model.box_heads[0].classifier.bias.any()
    before = InternImageRcnnForInstanceSegmentation.from_pretrained(folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert name in expected or torch.equal(tensor, before[name]), name


def test_weights_begin_as_mmdetection_has_them():
    model = InternImageRcnnForInstanceSegmentation(InternImageRcnnConfig.cascade(box_hidden_size=256))
    head, mask_head = model.box_heads[2], model.mask_heads[1]
    for layer, std in (
        (model.neck.lateral_convs[3], (2 / (512 + 256)) ** 0.5),
        (model.proposal_head.classifier, 0.01),
        (head.classifier, 0.01),
        (head.regressor, 0.001),
        (head.fcs[0], (2 / (256 * 49 + 256)) ** 0.5),
        (head.convs[1], (2 / (256 * 9)) ** 0.5),
        (mask_head.convs[0], (2 / (256 * 9)) ** 0.5),
        (mask_head.classifier, (2 / 2) ** 0.5),  # fan out: two labels
    ):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    assert len(model.box_heads) == len(model.mask_heads) == 3
    assert model.backbone.encoder.stages[0].layers[0].layer_scale1.eq(1).all(), "the backbone fills itself"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype):
    model = tiny().train()
    pixel_values, labels = torch.randn(1, 3, 64, 64), [objects(2, 64, 64)]
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=enabled):
            losses.append(model(pixel_values, labels=labels).loss)
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)


def test_bfloat16_and_gradient_checkpointing():
    model = tiny().to(torch.bfloat16)
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))
    assert outputs.scores.dtype == outputs.boxes.dtype == outputs.masks.dtype == torch.float32
    model = tiny().train()
    labels = [objects(2, 64, 64)]
    pixel_values = torch.randn(1, 3, 64, 64)
    norms = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model.zero_grad()
        model(pixel_values, labels=labels).loss.backward()
        norms.append(model.backbone.stem.conv1.weight.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda label: label.pop("masks"), "`labels[0]` must have a tensor `masks`, got NoneType"),
        (
            lambda label: label["class_labels"].__setitem__(1, 3),
            "`labels[0]['class_labels']` must be from 0 to 2 (`config.num_labels` is 3), got 3",
        ),
        (
            lambda label: label["class_labels"].__setitem__(1, -1),
            "`labels[0]['class_labels']` must be from 0 to 2 (`config.num_labels` is 3), got -1",
        ),
        (
            lambda label: label.update(class_labels=label["class_labels"].float()),
            "`labels[0]['class_labels']` must be integers, got torch.float32",
        ),
        (
            lambda label: label["boxes"].__setitem__(1, torch.tensor([0.5, 0.5, 0.0, 0.25])),
            "`labels[0]['boxes'][1]` must be finite numbers with a width and a height above 0, got [0.5, 0.5, 0.0, 0.25]",
        ),
        (
            lambda label: label["boxes"].__setitem__((0, 0), float("nan")),
            "`labels[0]['boxes'][0]` must be finite numbers with a width and a height above 0, got [nan, ",
        ),
        (
            lambda label: label.update(boxes=label["boxes"][:1]),
            "`labels[0]['boxes']` must have the shape (2, 4), got (1, 4)",
        ),
        (
            lambda label: label.update(masks=label["masks"][:, :60]),
            "`labels[0]['masks']` must have the shape (2, 64, 96), got (2, 60, 96)",
        ),
        (
            lambda label: label.update(boxes=label["boxes"].to("meta")),
            "`labels[0]['boxes']` must be on cpu, where `pixel_values` are, got meta",
        ),
    ],
)
def test_wrong_labels_are_named(change, message):
    label = objects(2, 64, 96)
    change(label)
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny().train()(torch.randn(1, 3, 64, 96), labels=[label])


def test_wrong_arguments_are_named():
    model, pixel_values = tiny(), torch.randn(2, 3, 64, 96)
    for arguments, message in (
        ({"labels": [objects(1, 64, 96)]}, "`labels` must be a list of 2 dictionaries, one per image, got 1 of them"),
        ({"pixel_mask": torch.ones(2, 64, 95)}, "`pixel_mask` must have the shape (2, 64, 96)"),
        ({"pixel_mask": torch.zeros(2, 64, 96)}, "`pixel_mask[0]` must mark an image"),
        ({"pixel_mask": torch.ones(2, 64, 96, device="meta")}, "`pixel_mask` must be on cpu"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            model(pixel_values, **arguments)
    with pytest.raises(ValueError, match="`pixel_values` must have the shape"):
        model(pixel_values[0])


@pytest.mark.parametrize(
    "field, value",
    [
        ("feature_strides", [4, 8, 16]),
        ("feature_strides", [4, 0, 16, 32]),
        ("box_stds", [[0.1, 0.1, 0.2]]),
        ("box_iou_thresholds", [0.5, 0.6]),
        ("box_loss", "iou"),
        ("rpn_box_loss", "giou"),
        ("max_detections", 0),
        ("nms_threshold", 1.5),
        ("anchor_ratios", []),
        ("class_agnostic_boxes", "yes"),
        ("rpn_allowed_border", -2),
    ],
)
def test_wrong_fields_of_the_configuration_are_named(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` must .*got {re.escape(repr(value))}"):
        tiny(**{field: value})


# -------------------------------------------------------------------------------------------------------------- remote code

DETECT = """
    import importlib.util
    import sys
    import torch
    from safetensors.torch import load_file
    without = importlib.util.find_spec("internimage_hf") is None
    assert without == (sys.argv[2] == "without")
    if not without:
        import internimage_hf
        from convert import detection
        arguments = [sys.argv[1] + "/checkpoint.pth", "--config", sys.argv[1] + "/config.json", "--output", sys.argv[3]]
        assert detection.main([*arguments, "--remote-code", "--push-to-hub", "somebody/mask-rcnn"]) == 0
    from transformers import AutoModelForInstanceSegmentation, AutoModelForObjectDetection
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    kwargs = {"trust_remote_code": True} if without else {}
    processor = AutoImageProcessor.from_pretrained("somebody/mask-rcnn", **kwargs)
    expected = load_file(sys.argv[1] + "/expected.safetensors")
    pixel_mask = torch.zeros(2, 96, 96, dtype=torch.long)
    pixel_mask[0, :91, :96] = pixel_mask[1, :64, :77] = 1
    for auto_class in (AutoModelForInstanceSegmentation, AutoModelForObjectDetection):
        model = auto_class.from_pretrained("somebody/mask-rcnn", dtype=torch.float64, **kwargs)
        with torch.no_grad():
            outputs = model(expected["pixel_values"].double(), pixel_mask)
        results = processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=[(182, 192), (96, 115)])
        for i, result in enumerate(results):
            torch.testing.assert_close(result["boxes"], expected[f"detections.{i}.boxes"], atol=1e-5, rtol=0)
            assert result["masks"].any()
    print("detected by", type(model).__module__.split(".")[0], type(processor).__module__.split(".")[0])
"""


def test_convert_push_and_detect_with_and_without_the_package(hub, tmp_path):
    environment, folder = hub.environment(tmp_path), FIXTURES / "mask_rcnn_tiny"
    output = run_python(DETECT, folder, "with", tmp_path / "model", **environment)
    assert output.endswith("detected by internimage_hf internimage_hf\n")
    files = hub.repositories["somebody/mask-rcnn"]
    assert {path.name for path in (tmp_path / "model").iterdir()} <= files.keys()
    bare = bare_environment(tmp_path)
    output = run_python(DETECT, folder, "without", cwd=tmp_path, **environment, **bare)
    assert output == "detected by transformers_modules transformers_modules\n"
