"""Conversion of detectors: released names and shapes, official configurations, folders for transformers, and back."""

import argparse
import gzip
import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_convert import convert, hub_here, only_error  # noqa: F401 (a fixture)
from transformers import AutoModelForObjectDetection, pipeline

# from where it is defined: transformers 5.17 offers a placeholder at the top where torchvision is absent
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from utils import FIXTURES, bare_environment, run_python

from convert import all as convert_all
from convert import backbone, detection, detectors, dino
from convert.released import RELEASED
from internimage_hf import (
    InternImageCompositeBackbone,
    InternImageConfig,
    InternImageDinoConfig,
    InternImageDinoForObjectDetection,
)


CASES = ("dino_tiny", "dino_tiny_efficient_ffn", "dino_tiny_cb")
PARAMETERS = {
    "dino_4scale_internimage_t_1x_coco": 48_736_828,
    "dino_4scale_internimage_l_1x_coco_layer_wise_lr": 241_033_214,
    "dino_4scale_internimage_l_1x_coco_0.1x_backbone_lr": 241_033_214,
    "dino_4scale_internimage_h_objects365_coco": 1_098_725_884,
    "dino_4scale_internimage_g_objects365_coco": 3_082_611_660,
    "dino_4scale_cbinternimage_h_objects365_coco": 2_178_558_124,
    "dino_4scale_cbinternimage_h_objects365_80classes": 2_178_558_124,
    "dino_4scale_cbinternimage_h_objects365_lvis": 2_180_865_889,
    "dino_4scale_cbinternimage_h_objects365_openimages": 2_179_628_779,
    "dino_4scale_cbinternimage_h_objects365_voc0712": 2_178_434_824,
    "dino_4scale_cbinternimage_h_objects365_20classes": 2_178_434_824,
}
CLASSES = {"lvis": 1203, "openimages": 601, "voc0712": 20, "20classes": 20}


def released_tensors(name: str) -> dict[str, torch.Tensor]:
    """Zeros of the names and shapes of a released DINO, which need no memory."""
    config = re.sub(r"_(80classes|lvis|openimages|voc0712|20classes)$", "_coco", name)
    suffix = "_layer_wise_lr" if config.endswith("_1x_coco") else "_ss" if "objects365" in config else ""
    with gzip.open(FIXTURES / "detection_keys" / f"{config}{suffix}.json.gz", "rt") as file:
        shapes = dict(json.load(file))
    for key, shape in shapes.items():
        if re.match(r"bbox_head\.(cls_branches\.\d|label_embedding)\.", key):
            shape[0] = CLASSES.get(name.rsplit("_", 1)[-1], 80)
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def released_source(name: str, tensors: dict[str, torch.Tensor]) -> SimpleNamespace:
    return SimpleNamespace(
        read=lambda ema: dict(tensors), released=RELEASED[name], config=None, file=f"{name}.pth", unknown_fields=[]
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_released_dino_maps_without_remainder(name):
    tensors = released_tensors(name)
    plan = detection.make_plan(released_source(name, tensors), argparse.Namespace(ema=False))
    with torch.device("meta"):
        model = plan.model_class(plan.config)
    assert {k: v.shape for k, v in plan.state_dict.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert model.num_parameters() == PARAMETERS[name] and plan.ignored == ()
    assert plan.processor.top_k == (100 if name == "dino_4scale_internimage_t_1x_coco" else 300)
    large = RELEASED[name].variant in "hg"
    assert plan.config.num_denoising == (1000 if large else 100)
    assert dict(plan.processor.size) == {
        "shortest_edge": 1000 if large else 800,
        "longest_edge": 2000 if large else 1333,
    }
    assert plan.config.id2label[0] == {"lvis_v1": "aerosol_can", "open_images": "Tortoise", "voc": "aeroplane"}.get(
        RELEASED[name].labels, "person"
    )
    # and back, the G model's sliced feed-forward networks included
    official = dino.official_state_dict(model)
    assert {key: tensor.shape for key, tensor in official.items()} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.parametrize("name", [name for name in RELEASED if name.startswith("dino_4scale_flash_")])
def test_every_released_flash_dino_maps_without_remainder(name):
    """The heads are those of InternImage's DINO, the backbones FlashInternImage's, which have tests of their own."""
    released = RELEASED[name]
    variant = InternImageConfig.from_variant(
        released.variant, layer_scale_init_value=1.0, out_features=["stage2", "stage3", "stage4"]
    )
    with torch.device("meta"):
        model = InternImageDinoForObjectDetection(InternImageDinoConfig(backbone_config=variant, num_labels=80))
    official = dino.official_state_dict(model)
    assert any(".offset_mask." in key for key in official)
    tensors = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in official.items()}
    plan = detection.make_plan(released_source(name, tensors), argparse.Namespace(ema=False))
    with torch.device("meta"):
        model = plan.model_class(plan.config)
    assert {k: v.shape for k, v in plan.state_dict.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert plan.config.backbone_config.dcn_version == 4 and plan.config.id2label[0] == "person"
    assert plan.config.backbone_config.drop_path_rate == released.drop_path_rate
    assert dict(plan.processor.size) == {"shortest_edge": 800, "longest_edge": 1333}
    assert plan.processor.top_k == 300


def test_averages_of_the_training_hook_are_left_out():
    name = "dino_4scale_internimage_t_1x_coco"
    tensors = released_tensors(name) | {"ema_backbone_patch_embed_conv1_weight": torch.zeros(1)}
    plan = detection.make_plan(released_source(name, tensors), argparse.Namespace(ema=False))
    assert plan.ignored == ("ema_backbone_patch_embed_conv1_weight",)


@pytest.fixture(params=CASES)
def converted(request, tmp_path):
    folder, output = FIXTURES / request.param, tmp_path / "detector"
    arguments = (folder / "checkpoint.pth", "--config", folder / "config.json", "--output", output)
    assert convert(detection, *arguments) == 0
    return folder, output


def test_a_folder_for_the_auto_classes_and_back(converted, tmp_path):
    folder, output = converted
    model = AutoModelForObjectDetection.from_pretrained(output, dtype=torch.float64)
    assert type(model) is InternImageDinoForObjectDetection
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        outputs = model(expected["pixel_values"].double(), expected["pixel_mask"])
    torch.testing.assert_close(outputs.logits, expected["logits"][-1], atol=1e-8, rtol=0)
    torch.testing.assert_close(outputs.pred_boxes, expected["pred_boxes"][-1], atol=1e-8, rtol=0)
    processor = AutoImageProcessor.from_pretrained(output)
    sizes = [image["ori_shape"] for image in json.loads((folder / "config.json").read_text())["images"]]
    for i, found in enumerate(processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)):
        torch.testing.assert_close(found["boxes"], expected[f"detections.{i}.boxes"], atol=1e-5, rtol=0)
        torch.testing.assert_close(found["scores"], expected[f"detections.{i}.scores"], atol=1e-8, rtol=0)
        assert torch.equal(found["labels"], expected[f"detections.{i}.labels"])

    back = tmp_path / "back.pth"
    assert convert(detection, output, "--output", back, "--reverse") == 0
    official = torch.load(folder / "checkpoint.pth", weights_only=True)["state_dict"]
    reversed_state_dict = torch.load(back, weights_only=True)["state_dict"]
    assert reversed_state_dict.keys() == official.keys()
    assert all(torch.equal(reversed_state_dict[name], tensor) for name, tensor in official.items())


def test_the_pipeline_gives_readable_labels_and_pixels_of_the_image(converted):
    _, output = converted
    detector = pipeline("object-detection", model=str(output))
    detector.image_processor.size = {"shortest_edge": 96, "longest_edge": 160}
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    found = detector(image, threshold=0.0)
    assert len(found) == detector.image_processor.top_k
    assert all(one["label"] in detector.model.config.label2id and 0 < one["score"] < 1 for one in found)
    for box in (one["box"] for one in found):
        assert 0 <= box["xmin"] <= box["xmax"] <= 300 and 0 <= box["ymin"] <= box["ymax"] <= 200
    assert max(one["box"]["xmax"] for one in found) > 150


def test_the_backbone_of_a_composite_detector(tmp_path):
    folder = FIXTURES / "dino_tiny_cb"
    arguments = (folder / "checkpoint.pth", "--config", folder / "config.json", "--output", tmp_path / "backbone")
    assert convert(backbone, *arguments) == 0
    assert InternImageCompositeBackbone.from_pretrained(tmp_path / "backbone").config.model_type == (
        "internimage_composite"
    )


def test_detectors_are_among_all():
    assert convert_all.PLANS["detection"] is detection.make_plan
    assert {released.task for released in RELEASED.values()} <= convert_all.PLANS.keys()


def test_the_test_pipeline_of_a_configuration_gives_the_sizes():
    step = {"type": "MultiScaleFlipAug", "img_scale": [2000, 1000]}
    for config in ({"test_pipeline": [{}, step]}, {"data": {"test": {"pipeline": [step]}}}):
        source = SimpleNamespace(released=None, config=config)
        assert dict(detectors.image_processor(source).size) == {"shortest_edge": 1000, "longest_edge": 2000}


# --------------------------------------------------------------------------------------------------------- wrong input


def wrong_checkpoint(tmp_path, change) -> tuple:
    """A checkpoint whose tensors `change` has changed, and the command that converts it."""
    state_dict = torch.load(FIXTURES / "dino_tiny" / "checkpoint.pth", weights_only=True)["state_dict"]
    change(state_dict)
    torch.save({"state_dict": state_dict}, tmp_path / "wrong.pth")
    config = FIXTURES / "dino_tiny" / "config.json"
    return tmp_path / "wrong.pth", "--config", config, "--output", tmp_path / "detector"


def without_head(state_dict):
    for name in [name for name in state_dict if name.startswith("bbox_head.")]:
        del state_dict[name]


def rename(old: str, new: str):
    return lambda state_dict: state_dict.update({new: state_dict.pop(old)})


_FUSED = "bbox_head.transformer.decoder.layers.0.attentions.0.attn.in_proj_weight"
_FFN = "bbox_head.transformer.encoder.layers.0.ffns.0."


@pytest.mark.parametrize(
    "change, message",
    [
        (without_head, "is no detector that is known here"),
        (lambda s: s.clear() or s.update(a=torch.zeros(1)), "has no backbone"),
        (rename("bbox_head.cls_branches.0.bias", "bbox_head.fc_cls.bias"), "entries that no DINO has: bbox_head.fc_cls.bias"),
        (lambda s: s.pop("bbox_head.label_embedding.weight"), "lacks entries of the model: label_embedding.weight"),
        (lambda s: s.pop("bbox_head.transformer.query_embed.weight"), "query_embedding.weight is missing"),
        (lambda s: s.update({_FUSED: torch.zeros(4, 64)}), "in_proj_weight has the shape (4, 64), expected three equal parts"),
        (lambda s: s.update({_FFN + "fc1_0.weight": torch.zeros(8, 64)}), "fc1.weight is given whole and in slices"),
        (
            lambda s: s.update({_FFN + "fc3_0.weight": torch.zeros(8, 64)}),
            "entries that no DINO has",
        ),
        (lambda s: s.update({"bbox_head.cls_branches.0.weight": torch.zeros(9, 64)}), "label_embedding.weight has the shape (7, 64)"),
        (lambda s: s.update({"neck.convs.0.conv.weight": torch.zeros(64, 15, 1, 1)}), "neck.convs.0.weight has the shape"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_kind_is_one_line(change, message, tmp_path, capsys):
    assert convert(detection, *wrong_checkpoint(tmp_path, change)) == 1
    assert message in only_error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.pth"]


def test_a_truncated_file_is_one_line(tmp_path, capsys):
    content = (FIXTURES / "dino_tiny" / "checkpoint.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    config = FIXTURES / "dino_tiny" / "config.json"
    arguments = (tmp_path / "cut.pth", "--config", config, "--output", tmp_path / "detector")
    assert convert(detection, *arguments) == 1
    assert "cannot be read as a checkpoint" in only_error(capsys) and not (tmp_path / "detector").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bbox_head": {"dn_cfg": {"noise_scale": {"box": -1}}}}, "`box_noise_scale` must be a number of at least 0, got -1"),
        ({"bbox_head": {"transformer": {"encoder": {"transformerlayers": {"attn_cfgs": {"num_heads": 3}}}}}}, "`d_model`"),
        ({"test_cfg": {"max_per_img": "many"}}, "`max_per_img` must be a positive integer, got 'many'"),
        ({"backbone": []}, "`backbone` must be an object, got list"),
    ],
)  # fmt: skip
def test_wrong_fields_of_a_configuration_are_one_line(fields, message, tmp_path, capsys):
    official = json.loads((FIXTURES / "dino_tiny" / "config.json").read_text())["model"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model": {**official, **fields}}))
    checkpoint = FIXTURES / "dino_tiny" / "checkpoint.pth"
    assert convert(detection, checkpoint, "--config", config, "--output", tmp_path / "detector") == 1
    assert message in only_error(capsys) and not (tmp_path / "detector").exists()


# ------------------------------------------------------------------------------------------------------------ travelling

DETECT = """
    import importlib.util, json, sys
    kwargs = {}
    if sys.argv[1] == "without":
        assert importlib.util.find_spec("internimage_hf") is None
        kwargs = {"trust_remote_code": True}
    else:
        import internimage_hf
    import numpy as np
    from PIL import Image
    from transformers import pipeline
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    for repository, task in (("me/dino", "object-detection"), ("me/rcnn", "object-detection"), ("me/rcnn", "image-segmentation")):
        detector = pipeline(task, model=repository, **kwargs)
        detector.image_processor.size = {"shortest_edge": 96, "longest_edge": 160}
        found = detector(image, threshold=0.0)
        for one in found:
            one["score"] = round(one["score"], 5)
            if "mask" in one:
                one["mask"] = int(np.asarray(one["mask"]).sum())
        print(json.dumps([type(detector.model).__module__.split(".")[0], found]))
"""


def test_converted_detectors_detect_the_same_without_the_package(hub_here, tmp_path):  # noqa: F811
    for case, name in (("dino_tiny", "me/dino"), ("mask_rcnn_tiny", "me/rcnn")):
        folder = FIXTURES / case
        arguments = (folder / "checkpoint.pth", "--config", folder / "config.json", "--output", tmp_path / case)
        assert convert(detection, *arguments, "--push-to-hub", name, "--remote-code") == 0
    hub = hub_here
    options = {"DCNV3_BACKEND": "torch"}  # without the package there is no kernel
    with_package = run_python(DETECT, "with", **hub.environment(tmp_path / "with"), **options)
    bare = {**bare_environment(tmp_path), **hub.environment(tmp_path / "without"), **options}
    without = run_python(DETECT, "without", cwd=tmp_path, **bare)
    found = []
    for output, module in ((with_package, "internimage_hf"), (without, "transformers_modules")):
        lines = [json.loads(line) for line in output.splitlines()]  # and no question whether to trust
        assert [line[0] for line in lines] == [module] * 3
        found.append([line[1] for line in lines])
    assert found[0] == found[1] and all(len(detections) > 3 for detections in found[0])
