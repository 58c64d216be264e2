"""DINO: the official code's maps, detections, losses, gradients and denoising batch; training; wrong input."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection, ResNetConfig
from utils import FIXTURES, TINY

from convert import dino
from convert import source as source_module
from convert.detection import make_plan
from internimage_hf import (
    InternImageCompositeConfig,
    InternImageConfig,
    InternImageDinoConfig,
    InternImageDinoForObjectDetection,
)
from internimage_hf import modeling_internimage_dino as modeling


CASES = ("dino_tiny", "dino_tiny_efficient_ffn", "dino_tiny_cb")
TRAINED_CASES = CASES[:2]
SMALL = {
    "num_queries": 10,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "neck_groups": 8,
    "num_denoising": 6,
    "num_labels": 3,
}


def small_config(**fields) -> InternImageDinoConfig:
    backbone = InternImageConfig(**TINY, layer_scale_init_value=1.0, out_features=["stage2", "stage3", "stage4"])
    return InternImageDinoConfig(**{"backbone_config": backbone, **SMALL, **fields})


def small_model(**fields) -> InternImageDinoForObjectDetection:
    torch.manual_seed(0)
    return InternImageDinoForObjectDetection(small_config(**fields))


def small_labels(*counts: int) -> list[dict[str, torch.Tensor]]:
    """Boxes within the image, for as many images."""
    generator = torch.Generator().manual_seed(1)
    labels = []
    for count in counts:
        sizes = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
        centers = sizes / 2 + (1 - sizes) * torch.rand(count, 2, generator=generator)
        classes = torch.randint(3, (count,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat([centers, sizes], -1)})
    return labels


class Golden:
    """A detector of the official code, converted, and what that code computed with it."""

    def __init__(self, case: str, dtype: torch.dtype):
        folder = FIXTURES / case
        source = source_module.find(str(folder / "checkpoint.pth"), str(folder / "config.json"), None)
        plan = make_plan(source, argparse.Namespace(ema=False))
        self.processor = plan.processor
        self.model = plan.model_class(plan.config)
        self.model.load_state_dict(plan.state_dict, strict=True)
        self.model.to(dtype).eval()
        self.expected = load_file(folder / "expected.safetensors")
        self.config = json.loads((folder / "config.json").read_text())
        self.images = self.expected["pixel_values"].to(dtype), self.expected["pixel_mask"]
        self.norms = folder / "gradient_norms.json"

    def labels(self) -> list[dict[str, torch.Tensor]]:
        labels = []
        for boxes, classes, image in zip(
            self.config["gt_boxes"], self.config["gt_labels"], self.config["images"], strict=True
        ):
            start, end = torch.tensor(boxes, dtype=torch.float64).chunk(2, -1)
            height, width = image["img_shape"]
            boxes = torch.cat([(start + end) / 2, end - start], -1) / torch.tensor([width, height, width, height])
            labels.append({"class_labels": torch.tensor(classes), "boxes": boxes})
        return labels

    def draws(self) -> modeling.DenoisingDraws:
        names = ("dn.draw_label_p", "dn.draw_label_new", "dn.draw_box_sign", "dn.draw_box_part")
        draws = [self.expected[name] for name in names]
        return modeling.DenoisingDraws(*(d.to(self.images[0].dtype) if d.is_floating_point() else d for d in draws))

    def close(self, actual: torch.Tensor, name: str, tolerance: float) -> None:
        expected = self.expected[name]
        torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=0)


# The official code in float64, and the same in float32; see the tolerances' table of the goldens.
TOLERANCES = {
    torch.float64: {"map": 2e-6, "logits": 1e-8, "boxes": 1e-8, "pixels": 1e-5, "scores": 1e-8, "loss": 5e-7},
    torch.float32: {"map": 3e-4, "logits": 2e-4, "boxes": 5e-5, "pixels": 5e-3, "scores": 2e-5, "loss": 1e-4},
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_the_official_code(case, dtype):
    golden, tolerance = Golden(case, dtype), TOLERANCES[dtype]
    assert golden.model.num_parameters() == golden.config["num_parameters"]
    with torch.no_grad():
        outputs = golden.model(*golden.images, output_intermediate=True)
        maps = golden.model.neck(golden.model.backbone(golden.images[0]).feature_maps)
    for i, feature_map in enumerate(maps):
        golden.close(feature_map, f"neck.{i}", tolerance["map"])
    golden.close(outputs.encoder_last_hidden_state, "encoder_memory", tolerance["map"])
    assert torch.equal(outputs.proposal_indices, golden.expected["topk_indices"])
    golden.close(outputs.proposal_logits, "topk_logits", tolerance["logits"])
    golden.close(outputs.proposal_boxes, "topk_boxes", tolerance["boxes"])
    references = torch.cat([outputs.proposal_boxes[:, None], outputs.intermediate_reference_points], 1)
    golden.close(references.transpose(0, 1), "decoder_references", tolerance["boxes"])
    golden.close(outputs.intermediate_hidden_states.transpose(0, 1), "decoder_hidden_states", tolerance["map"])
    golden.close(outputs.intermediate_logits.transpose(0, 1), "logits", tolerance["logits"])
    golden.close(outputs.intermediate_pred_boxes.transpose(0, 1), "pred_boxes", tolerance["boxes"])
    assert torch.equal(outputs.logits, outputs.intermediate_logits[:, -1])
    assert torch.equal(outputs.pred_boxes, outputs.intermediate_pred_boxes[:, -1])

    sizes = [image["ori_shape"] for image in golden.config["images"]]
    detections = golden.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for i, detection in enumerate(detections):
        golden.close(detection["scores"], f"detections.{i}.scores", tolerance["scores"])
        golden.close(detection["boxes"], f"detections.{i}.boxes", tolerance["pixels"])
        assert torch.equal(detection["labels"], golden.expected[f"detections.{i}.labels"])


def official_loss_name(name: str) -> tuple[str, float]:
    """The official name of a part of the loss, and its weight."""
    kind, *rest = name.removeprefix("loss_").split("_")
    official, weight = {"ce": ("loss_cls", 1), "bbox": ("loss_bbox", 5), "giou": ("loss_iou", 2)}[kind]
    for word in rest:
        official = {"dn": "dn_", "enc": "interm_"}.get(word, f"d{word}.") + official
    return official, weight


@pytest.mark.parametrize("dtype, norm_tolerance", [(torch.float64, 1e-6), (torch.float32, 5e-3)])
@pytest.mark.parametrize("kind", ["loss", "dn_loss"])
@pytest.mark.parametrize("case", TRAINED_CASES)
def test_losses_and_gradients_are_those_of_the_official_code(case, kind, dtype, norm_tolerance, monkeypatch):
    golden, tolerance = Golden(case, dtype), TOLERANCES[dtype]
    golden.model.train(kind == "dn_loss")  # the case has neither dropout nor stochastic depth
    monkeypatch.setattr(modeling, "draw_denoising", lambda *arguments: golden.draws())
    outputs = golden.model(*golden.images, golden.labels())
    found = {}
    for name, value in outputs.loss_dict.items():
        official, weight = official_loss_name(name)
        found[f"{kind}.{official}"] = value.item() * weight
    found[f"{kind}.total"] = outputs.loss.item()
    expected = {name: tensor.item() for name, tensor in golden.expected.items() if name.startswith(f"{kind}.")}
    assert found == pytest.approx(expected, rel=tolerance["loss"], abs=1e-12)

    outputs.loss.backward()
    gradients = InternImageDinoForObjectDetection(golden.model.config)
    for parameter, copy in zip(golden.model.parameters(), gradients.parameters(), strict=True):
        copy.data = parameter.grad
    norms = {name: tensor.norm().item() for name, tensor in dino.official_state_dict(gradients).items()}
    expected = json.loads(golden.norms.read_text())[kind]
    if kind == "loss":
        assert norms.pop("bbox_head.label_embedding.weight") == 0  # without denoising
    assert norms == pytest.approx(expected, rel=norm_tolerance, abs=1e-7)


@pytest.mark.parametrize("case", TRAINED_CASES)
def test_the_denoising_batch_is_that_of_the_official_code(case, monkeypatch):
    golden = Golden(case, torch.float64)
    monkeypatch.setattr(modeling, "draw_denoising", lambda *arguments: golden.draws())
    queries = modeling.denoising_queries(golden.labels(), golden.model.label_embedding, golden.model.config)
    golden.close(queries.content, "dn.label_query", 1e-8)
    golden.close((queries.anchors / (1 - queries.anchors)).log(), "dn.box_query", 1e-8)
    assert torch.equal(queries.attention_mask, golden.expected["dn.attention_mask"])
    assert queries.groups == golden.expected["dn.num_groups"]

    golden.model.train()
    with torch.no_grad():
        outputs = golden.model(*golden.images, golden.labels(), output_intermediate=True)
    for part, name, tolerance in (("logits", "dn.logits", 1e-8), ("pred_boxes", "dn.pred_boxes", 1e-8)):
        together = torch.cat([outputs[f"denoising_{part}"], outputs[f"intermediate_{part}"]], 2)
        golden.close(together.transpose(0, 1), name, tolerance)


def test_eager_and_sdpa_attention_agree():
    golden = Golden("dino_tiny", torch.float64)
    logits = {}
    for implementation in ("eager", "sdpa"):
        golden.model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = golden.model(*golden.images).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-12, rtol=0)


def test_draws_have_their_ranges():
    torch.manual_seed(0)
    draws = modeling.draw_denoising(2000, 3, torch.float32, torch.device("cpu"))
    assert set(draws.labels.tolist()) == {0, 1, 2} and set(draws.signs.flatten().tolist()) == {0, 1}
    for uniform in (draws.replace, draws.parts):
        assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.05


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("counts", [(2, 0), (0, 0), (3, 1)])
def test_every_parameter_has_a_gradient(counts):
    """As DistributedDataParallel wants it: with boxes, and where no image of the batch has one."""
    model = small_model().train()
    model(torch.randn(2, 3, 64, 96), labels=small_labels(*counts)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("fields", [{"num_denoising": 0}, {"auxiliary_loss": False}])
def test_every_parameter_has_a_gradient_where_a_loss_is_switched_off(fields):
    model = small_model(**fields).train()
    outputs = model(torch.randn(1, 3, 64, 64), labels=small_labels(2))
    assert any("_dn" in name for name in outputs.loss_dict) == ("num_denoising" not in fields)
    assert ("loss_ce_0" in outputs.loss_dict) == ("auxiliary_loss" not in fields)
    outputs.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_few_steps_learn_one_image():
    model = small_model(backbone_config=InternImageConfig(**TINY, out_features=["stage2", "stage3", "stage4"])).train()
    torch.manual_seed(0)
    pixel_values, labels = torch.randn(1, 3, 64, 64), small_labels(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_both_backbones_of_a_composite_one_are_trained():
    backbone = InternImageCompositeConfig(**TINY, out_features=["stage2", "stage3", "stage4"])
    model = small_model(backbone_config=backbone).train()
    torch.manual_seed(0)
    outputs = model(torch.randn(1, 3, 64, 64), labels=small_labels(2))
    parts = [name for name in outputs.loss_dict if name.endswith("_assistant")]
    assert len(parts) == len(outputs.loss_dict) / 2
    weights = {"ce": 1, "bbox": 5, "giou": 2}
    total = sum(
        value * weights[name.split("_")[1]] * (0.5 if name in parts else 1)
        for name, value in outputs.loss_dict.items()
    )
    torch.testing.assert_close(outputs.loss, total)
    outputs.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_loss_is_divided_by_the_mean_number_of_boxes_of_the_processes(monkeypatch):
    model = small_model(num_denoising=0).train()
    pixel_values, labels = torch.randn(1, 3, 64, 64), small_labels(2)
    alone = model(pixel_values, labels=labels).loss
    distributed = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        all_reduce=lambda counts: counts.mul_(6),  # two boxes here, ten there
        get_world_size=lambda: 2,
    )
    monkeypatch.setattr(torch, "distributed", distributed)
    torch.testing.assert_close(model(pixel_values, labels=labels).loss, alone / 3)


def test_low_precision():
    model = small_model().to(torch.bfloat16)
    pixel_values, labels = torch.randn(2, 3, 64, 96), small_labels(2, 1)
    outputs = model.train()(pixel_values, labels=labels)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16 and outputs.pred_boxes.dtype == torch.float32
    assert torch.isfinite(outputs.loss)
    model = small_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(pixel_values, labels=labels).loss)


def test_initial_weights_are_the_authors_however_the_model_is_made():
    made = small_model()
    loaded = InternImageDinoForObjectDetection.from_pretrained(None, config=small_config(), state_dict={})
    for model in (made, loaded):
        for layer in (*model.encoder.layers, *model.decoder.layers):
            attention = layer.encoder_attn if hasattr(layer, "encoder_attn") else layer.self_attn
            offsets = attention.sampling_offsets.bias.view(2, 4, 4, 2)
            assert (
                torch.equal(offsets[0, 0, :, 0], torch.tensor([1.0, 2, 3, 4]))
                and attention.sampling_offsets.weight.eq(0).all()
            )
            assert attention.attention_weights.weight.eq(0).all() and attention.value_proj.weight.std() > 0.1
        assert torch.allclose(model.class_branches[-1].bias.sigmoid(), torch.tensor(0.01))
        assert model.box_branches[0].layers[-1].weight.eq(0).all()
        assert 0.8 < model.query_embedding.weight.std() < 1.2 and 0.8 < model.level_embedding.weight.std() < 1.2


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize(
    "backbone",
    [
        InternImageConfig(**TINY, out_features=["stage3", "stage4"]),
        InternImageCompositeConfig(**TINY, out_features=["stage2", "stage3", "stage4"]),
        ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
    ],
    ids=["two maps", "composite", "resnet"],
)  # fmt: skip
def test_any_backbone(backbone, tmp_path):
    model = small_model(backbone_config=backbone).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values)
    assert expected.logits.shape == (1, 10, 3) and expected.pred_boxes.shape == (1, 10, 4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is InternImageDinoForObjectDetection
    assert type(loaded.config.backbone_config) is type(backbone)
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, expected.logits)


def test_the_default_is_the_released_architecture_with_internimage_t():
    with torch.device("meta"):
        model = InternImageDinoForObjectDetection(InternImageDinoConfig(num_labels=80))
    assert model.num_parameters() == 48_736_828


def test_new_classes_leave_the_rest_as_it_was(tmp_path):
    small_model().save_pretrained(tmp_path)
    loaded, info = InternImageDinoForObjectDetection.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    branches = {f"class_branches.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert {key for key, *_ in info["mismatched_keys"]} == branches | {"label_embedding.weight"}
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(loaded.class_branches[0].bias.sigmoid(), torch.tensor(0.01))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_queries": 0}, "`num_queries` must be a positive integer, got 0"),
        ({"d_model": 30}, "`d_model` must be a multiple of .*, got 30"),
        ({"encoder_attention_heads": 5}, r"`d_model` must be a multiple of `encoder_attention_heads` \(5\), got 32"),
        ({"num_denoising": -1}, "`num_denoising` must be an integer of at least 0, got -1"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\), got 1.0"),
        ({"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}, "must be above 0"),
        ({"num_feature_levels": 2}, r"`num_feature_levels` must be at least the number of the backbone's maps \(3"),
        ({"backbone_config": {"model_type": "none"}}, "must have the `model_type` of a backbone, got 'none'"),
        ({"backbone_config": "resnet"}, "must be a configuration or a dictionary, got str"),
        ({"activation_function": "none"}, "`activation_function` must be the name of an activation"),
    ],
)
def test_contradictory_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


# --------------------------------------------------------------------------------------------------------- wrong input


def boxes(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values).reshape(-1, 4)


@pytest.mark.parametrize(
    "label, message",
    [
        ({"class_labels": [0]}, r"`labels\[0\]` must have `class_labels` and `boxes`, `boxes` is missing"),
        (
            {"class_labels": torch.tensor([3]), "boxes": boxes([0.5, 0.5, 0.2, 0.2])},
            r"`labels\[0\]\['class_labels'\]` must be from 0 to 2 \(`config.num_labels`\), got 3",
        ),
        (
            {"class_labels": torch.tensor([-1]), "boxes": boxes([0.5, 0.5, 0.2, 0.2])},
            "must be from 0 to 2 .*, got -1",
        ),
        (
            {"class_labels": torch.tensor([0]), "boxes": boxes([10, 20, 30, 40])},
            r"relative to the image, from 0 to 1, got \[10.0, 20.0, 30.0, 40.0\]",
        ),
        (
            {"class_labels": torch.tensor([0]), "boxes": boxes([0.5, 0.5, -0.2, 0.2])},
            r"from 0 to 1, got \[0.5, 0.5, -0.2, 0.2\]",
        ),
        ({"class_labels": torch.tensor([0]), "boxes": boxes([float("nan")] * 4)}, "from 0 to 1, got .nan"),
        (
            {"class_labels": torch.tensor([0, 1]), "boxes": boxes([0.5, 0.5, 0.2, 0.2])},
            r"the shape \(boxes, 4\), got \(2,\) and \(1, 4\)",
        ),
        (
            {"class_labels": torch.tensor([0.5]), "boxes": boxes([0.5, 0.5, 0.2, 0.2])},
            "must be integers, got torch.float32",
        ),
    ],
)
def test_wrong_labels(label, message):
    with pytest.raises(ValueError, match=message):
        small_model()(torch.randn(1, 3, 64, 64), labels=[label])


def test_wrong_arguments():
    model = small_model()
    pixel_values = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match="You have to specify `pixel_values`"):
        model()
    with pytest.raises(ValueError, match=r"`labels` must be a list of one dictionary per image \(2\), got 1"):
        model(pixel_values, labels=small_labels(1))
    with pytest.raises(ValueError, match=r"`pixel_mask` must have the shape .* got \(2, 64, 32\)"):
        model(pixel_values, torch.ones(2, 64, 32))
    with pytest.raises(ValueError, match=r"large enough for 10 proposals .* 16 x 16 pixels have 7 positions"):
        model(torch.randn(1, 3, 16, 16))


def test_boxes_without_area_and_images_without_boxes_are_trained_on():
    model = small_model().train()
    torch.manual_seed(0)
    labels = [
        {"class_labels": torch.tensor([0]), "boxes": boxes([0.5, 0.5, 0.0, 0.0])},
        {"class_labels": torch.tensor([]), "boxes": torch.tensor([])},
    ]
    loss = model(torch.randn(2, 3, 64, 64), labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_images_of_very_different_sizes_do_not_disturb_each_other():
    """An image gives the same boxes alone and in a batch whose other image is much larger."""
    model = small_model().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.manual_seed(0)
    small = torch.randn(3, 64, 96, dtype=torch.float64)
    batch, mask = torch.zeros(2, 3, 256, 192, dtype=torch.float64), torch.zeros(2, 256, 192)
    batch[0, :, :64, :96], mask[0, :64, :96] = small, 1
    batch[1], mask[1] = torch.randn(3, 256, 192), 1
    with torch.no_grad():
        together, alone = model(batch, mask), model(batch[:1], mask[:1])
    torch.testing.assert_close(together.pred_boxes[:1], alone.pred_boxes, atol=1e-9, rtol=0)
    torch.testing.assert_close(together.logits[:1], alone.logits, atol=1e-9, rtol=0)
