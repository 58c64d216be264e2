"""Tests of the models: parity with the official implementation, and the common uses of a transformers model."""

import copy
import json
import logging
import math
import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification
from transformers.modeling_layers import GradientCheckpointingLayer
from utils import FIXTURES, MODEL_CASES, TINY, TINY_VARIANTS, load_case

from internimage_hf import (
    InternImageBackbone,
    InternImageConfig,
    InternImageForImageClassification,
    InternImageModel,
    use_dcnv3_backend,
)
from internimage_hf.checkpoint import translate_state_dict
from internimage_hf.compatibility import halve
from internimage_hf.modeling_internimage import (
    InternImageDeformableSampling,
    InternImageDownsample,
    InternImageLayer,
    InternImageStage,
    InternImageStem,
)


RELEASED = json.loads((FIXTURES / "released_models.json").read_text())
TOLERANCE = {torch.float32: 1e-4, torch.float64: 2e-6}  # as the golden outputs' notes give them


def tiny_config(variant: str = "pre_norm", **fields) -> InternImageConfig:
    return InternImageConfig(**{**TINY, **TINY_VARIANTS[variant], **fields})


def randomised(model: nn.Module) -> nn.Module:
    """Draws every parameter at random: the initial values (zero offsets, tiny layer scale) hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


# ---------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", MODEL_CASES)
def test_outputs_equal_official_model(case, dtype):
    state_dict, expected = load_case(case)
    config = InternImageConfig.from_dict(json.loads(((FIXTURES / case) / "config.json").read_text()))
    model = InternImageForImageClassification(config).eval()
    model.load_state_dict(translate_state_dict(state_dict), strict=True)
    model.to(dtype)
    with torch.no_grad():
        outputs = model(expected["pixel_values"].to(dtype), output_hidden_states=True)
        pooled = model.internimage(expected["pixel_values"].to(dtype)).pooler_output
    actual = {"logits": outputs.logits, "pooled": pooled}
    actual |= {f"stage{i}": outputs.hidden_states[i] for i in range(1, 5)}
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor, expected[name].to(dtype), atol=TOLERANCE[dtype], rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", [name for name in RELEASED if RELEASED[name]["config"]["num_classes"] == 1000])
def test_parameter_counts_equal_published(name):
    with torch.device("meta"):
        model = InternImageForImageClassification(InternImageConfig.from_variant(name.split("_")[1]))
        backbone = InternImageBackbone(model.config)
    assert model.num_parameters() == RELEASED[name]["num_parameters"]
    assert model.internimage.num_parameters() == RELEASED[name]["num_parameters_without_head"]
    assert backbone.num_parameters() == RELEASED[name]["num_backbone_parameters"]
    assert sum(buffer.numel() for buffer in model.buffers()) == RELEASED[name]["num_buffer_elements"]


# ------------------------------------------------------------------------------------------------- classes and outputs


@pytest.mark.parametrize("variant", TINY_VARIANTS)
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (65, 33), (8, 8), (1, 1)])
def test_outputs_have_documented_shapes(variant, size):
    height, width = size
    config = tiny_config(variant)
    model = InternImageForImageClassification(config).eval()
    pixel_values = torch.randn(2, 3, height, width)
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True)
        base = model.internimage(pixel_values)
    assert outputs.logits.shape == (2, 5) and outputs.logits.isfinite().all()
    sizes = []
    for _ in range(5):  # after each convolution of stride 2
        height, width = -(-height // 2), -(-width // 2)
        sizes.append((height, width))
    expected = [(2, 8, *sizes[1]), (2, 8, *sizes[1]), (2, 16, *sizes[2]), (2, 32, *sizes[3]), (2, 64, *sizes[4])]
    assert [tuple(state.shape) for state in outputs.hidden_states] == expected
    torch.testing.assert_close(base.last_hidden_state, outputs.hidden_states[-1])
    assert base.hidden_states is None


def test_model_without_pooling_layer_has_no_pooler_output():
    model = InternImageModel(tiny_config(), add_pooling_layer=False)
    assert model(torch.randn(1, 3, 32, 32)).pooler_output is None


@pytest.mark.parametrize("model_class", [InternImageModel, InternImageForImageClassification, InternImageBackbone])
def test_return_dict_and_output_hidden_states_follow_config(model_class):
    pixel_values = torch.randn(1, 3, 32, 32)
    model = model_class(tiny_config(out_features=["stage2", "stage4"])).eval()
    outputs = model(pixel_values)
    assert outputs.hidden_states is None
    assert model(pixel_values, output_hidden_states=None, return_dict=None).hidden_states is None
    as_tuple = model(pixel_values, return_dict=False)
    assert isinstance(as_tuple, tuple)
    first = as_tuple[0] if torch.is_tensor(as_tuple[0]) else as_tuple[0][0]
    torch.testing.assert_close(first, outputs[0] if torch.is_tensor(outputs[0]) else outputs[0][0])

    asking = model_class(tiny_config(output_hidden_states=True, return_dict=False)).eval()
    assert isinstance(asking(pixel_values), tuple)
    outputs = asking(pixel_values, return_dict=True, output_hidden_states=None)
    assert len(outputs.hidden_states) == 5
    assert asking(pixel_values, return_dict=True, output_hidden_states=False).hidden_states is None


def test_backbone_returns_requested_stages():
    names = ["stem", "stage1", "stage2", "stage3", "stage4"]
    config = tiny_config(out_features=names)
    backbone = AutoBackbone.from_config(config)
    assert type(backbone) is InternImageBackbone
    maps = backbone(torch.randn(2, 3, 64, 96)).feature_maps
    assert isinstance(maps, tuple)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    assert backbone.channels == [8, 8, 16, 32, 64] == backbone.num_features
    assert backbone.has_attentions is False
    for name in names:
        backbone.out_features = [name]
        assert backbone(torch.randn(1, 3, 32, 32)).feature_maps[0].shape[1] == backbone.channels[0]
    assert AutoBackbone.from_config(tiny_config()).out_features == ["stage4"]
    assert AutoBackbone.from_config(tiny_config(out_indices=[1, -1])).out_features == ["stage1", "stage4"]


def test_every_backbone_parameter_is_in_use():
    """Plain DDP stops at a parameter without a gradient: with the last stage used, there is none."""
    backbone = InternImageBackbone(tiny_config("res_post_norm"))
    sum(m.square().mean() for m in backbone(torch.randn(1, 3, 64, 64)).feature_maps).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_every_parameter_gets_gradient(variant):
    model = randomised(InternImageForImageClassification(tiny_config(variant)))
    model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 3])).loss.backward()
    # a constant added to all keys changes no softmax
    idle = {"internimage.pooler.attention.key.bias"}
    without = {n for n, p in model.named_parameters() if p.grad is None or (n not in idle and not p.grad.any())}
    assert without == set()


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        (None, 5, torch.tensor([1, 4])),
        ("single_label_classification", 5, torch.tensor([1, 4])),
        ("multi_label_classification", 5, torch.rand(2, 5).round()),
        ("regression", 1, torch.rand(2)),
        ("regression", 3, torch.rand(2, 3)),
    ],
)
def test_loss_follows_problem_type(problem_type, num_labels, labels):
    model = InternImageForImageClassification(tiny_config(num_labels=num_labels, problem_type=problem_type)).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    outputs = model(pixel_values, labels=labels)
    reference = {
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
        "regression": lambda logits, labels: nn.functional.mse_loss(logits.squeeze(), labels.squeeze()),
    }.get(problem_type, nn.functional.cross_entropy)
    torch.testing.assert_close(outputs.loss, reference(outputs.logits, labels))


def test_classifier_without_labels_returns_pooled_features():
    model = InternImageForImageClassification(tiny_config(num_labels=0)).eval()
    pixel_values = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(pixel_values).logits, model.internimage(pixel_values).pooler_output)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("model_class", [InternImageModel, InternImageForImageClassification, InternImageBackbone])
@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.randn(1, 4, 32, 32), "channel"),
        (torch.randn(1, 1, 32, 32), "channel"),
        (torch.randn(3, 32, 32), "shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "dtype"),
    ],
)
def test_bad_input_is_refused(model_class, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        model_class(tiny_config())(pixel_values)


def test_missing_input_is_refused():
    with pytest.raises(ValueError, match="pixel_values"):
        InternImageModel(tiny_config())()


def test_empty_batch_works_and_nan_stays_in_its_image():
    model = randomised(InternImageForImageClassification(tiny_config())).eval()
    assert model(torch.randn(0, 3, 64, 64)).logits.shape == (0, 5)
    pixel_values = torch.randn(3, 3, 64, 64)
    clean = model(pixel_values).logits
    pixel_values[1, 0, 10, 10] = float("nan")
    logits = model(pixel_values).logits
    assert logits[1].isnan().all()
    torch.testing.assert_close(logits[[0, 2]], clean[[0, 2]])


# --------------------------------------------------------------------------------------------------- numerical behaviour


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_batch_equals_single_images(variant):
    model = randomised(InternImageForImageClassification(tiny_config(variant))).eval()
    pixel_values = torch.randn(4, 3, 64, 48)
    with torch.no_grad():
        together = model(pixel_values).logits
        alone = torch.cat([model(image[None]).logits for image in pixel_values])
    torch.testing.assert_close(together, alone, atol=1e-4 * float(together.abs().max()), rtol=0)


def test_memory_format_does_not_change_outputs():
    model = randomised(InternImageForImageClassification(tiny_config())).eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = model(pixel_values).logits
    torch.testing.assert_close(model(pixel_values.contiguous(memory_format=torch.channels_last)).logits, expected)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_feature_maps_are_not_copied_into_another_layout(memory_format, monkeypatch):
    monkeypatch.setattr(InternImageDeformableSampling, "forward", lambda self, input, *args, **kwargs: input)
    model = InternImageForImageClassification(tiny_config()).eval()
    pixel_values = torch.randn(2, 3, 64, 96).contiguous(memory_format=memory_format)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        model(pixel_values)
    shapes = [event.input_shapes[0] for event in profiler.events() if event.name == "aten::clone"]
    copied = [shape for shape in shapes if shape[0] == len(pixel_values)]  # the others are weights
    assert copied == ([[2, 3, 64, 96]] if memory_format == torch.contiguous_format else [])


def test_layer_scale_and_drop_path_act_on_branch():
    layer = randomised(InternImageLayer(tiny_config("post_norm"), 8, 2, drop_path=0.5)).train()
    hidden_states = torch.randn(16, 4, 5, 8)
    branch = layer.norm1(layer.dcn(hidden_states)) * layer.layer_scale1
    torch.manual_seed(0)
    added = layer._add_branch(hidden_states, layer.dcn, layer.norm1, None, layer.layer_scale1) - hidden_states
    dropped = added.abs().amax((1, 2, 3)) == 0
    assert 0 < int(dropped.sum()) < 16
    torch.testing.assert_close(added[~dropped], 2 * branch[~dropped], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("variant", ["pre_norm", "res_post_norm", "clip"])
def test_gradient_checkpointing_keeps_gradients(variant, use_reentrant):
    model = randomised(InternImageForImageClassification(tiny_config(variant, drop_path_rate=0.3))).train()
    assert sum(isinstance(m, GradientCheckpointingLayer) for m in model.modules()) == sum(model.config.depths)
    state = copy.deepcopy(model.state_dict())  # BatchNorm's statistics move with every forward pass
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    gradients = []
    for checkpointing in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model(pixel_values, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def test_drop_path_rates_follow_type():
    def rates(**fields):
        layers = InternImageModel(tiny_config(**fields)).modules()
        return [getattr(m.drop_path, "drop_prob", 0.0) for m in layers if isinstance(m, InternImageLayer)]

    assert rates(drop_path_rate=0.5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates(drop_path_rate=0.5, drop_path_type="uniform") == [0.5] * 6
    model = randomised(InternImageModel(tiny_config(drop_path_rate=0.9, drop_path_type="uniform"))).train()
    pixel_values = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model(pixel_values)[0], model(pixel_values)[0])
    model.eval()
    assert torch.equal(model(pixel_values)[0], model(pixel_values)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, tmp_path):
    model = randomised(InternImageForImageClassification(tiny_config("res_post_norm"))).eval()
    model.save_pretrained(tmp_path)
    half = InternImageForImageClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    assert {p.dtype for p in half.parameters()} == {dtype}
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, logits = model(pixel_values).logits, half(pixel_values).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast_training_step_runs():
    model = randomised(InternImageForImageClassification(tiny_config("clip")))
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    expected = model(pixel_values, labels=labels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(pixel_values, labels=labels).loss
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    assert abs(loss - expected) < 0.1 * expected


# ----------------------------------------------------------------------------------------- initialisation and loading


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_initialisation_follows_official_code(variant):
    config = tiny_config(variant)
    for model in (
        InternImageForImageClassification(config),
        InternImageForImageClassification.from_pretrained(None, config=config, state_dict={}),
    ):
        for name, parameter in model.named_parameters():
            if any(part in name for part in (".offset.", ".mask.", ".center_feature_scale_proj.")):
                assert not parameter.any(), name
            elif "layer_scale" in name:
                assert (parameter == config.layer_scale_init_value).all(), name
            elif "norm" in name:
                assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
            elif name.endswith("_proj.weight") and ".dcn." in name:  # Xavier uniform
                bound = (6 / sum(parameter.shape)) ** 0.5
                assert parameter.abs().max() <= bound and parameter.std() > 0.4 * bound, name
            elif parameter.ndim == 4:  # a convolution: uniform in +-1/sqrt(fan in), as nn.Conv2d does
                bound = parameter[0].numel() ** -0.5
                assert parameter.abs().max() <= bound and parameter.std() > 0.4 * bound, name
            elif name.endswith("weight"):
                assert 0.01 < parameter.std() < 0.03, name


@pytest.mark.parametrize("variant", TINY_VARIANTS)
@pytest.mark.parametrize("model_class", [InternImageModel, InternImageForImageClassification, InternImageBackbone])
def test_save_and_load_round_trip_is_exact(model_class, variant, tmp_path):
    model = randomised(model_class(tiny_config(variant, out_features=["stage1", "stage4"]))).eval()
    model.save_pretrained(tmp_path)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_one_checkpoint_loads_into_every_class(tmp_path, caplog):
    classifier = randomised(InternImageForImageClassification(tiny_config(out_indices=[1, 2, 3, 4]))).eval()
    classifier.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = classifier(pixel_values, output_hidden_states=True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").propagate = True
        try:
            base = AutoModel.from_pretrained(tmp_path)
            backbone = InternImageBackbone.from_pretrained(tmp_path)
            again = AutoModelForImageClassification.from_pretrained(tmp_path)
            headless = InternImageModel.from_pretrained(tmp_path, add_pooling_layer=False)
        finally:
            logging.getLogger("transformers").propagate = False
    assert caplog.text == ""
    torch.testing.assert_close(base(pixel_values).last_hidden_state, expected.hidden_states[-1])
    torch.testing.assert_close(headless(pixel_values).last_hidden_state, expected.hidden_states[-1])
    torch.testing.assert_close(again(pixel_values).logits, expected.logits)
    for actual, state in zip(backbone(pixel_values).feature_maps, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(actual, state)


def test_checkpoint_takes_new_head(tmp_path):
    InternImageForImageClassification(tiny_config()).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape[0] == 3 and model.num_labels == 3
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3)


def test_base_model_checkpoint_loads_into_classifier(tmp_path):
    base = randomised(InternImageModel(tiny_config()))
    base.save_pretrained(tmp_path)
    model, info = InternImageForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(model.internimage.stem.conv1.weight, base.stem.conv1.weight)


def test_unused_res_post_norms_load_without_warning(tmp_path):
    """The official code saves these norms even where post norm or layer scale keeps it from using them."""
    config = tiny_config("post_norm", res_post_norm=True)
    model = InternImageForImageClassification(config)
    state_dict = dict(model.state_dict())
    for i, depth in enumerate(config.depths):
        for j in range(depth):
            state_dict[f"internimage.encoder.stages.{i}.layers.{j}.res_post_norm1.weight"] = torch.ones(8 * 2**i)
    _, info = InternImageForImageClassification.from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["missing_keys"]


def test_device_map_and_meta_device_load(tmp_path):
    pytest.importorskip("accelerate")
    model = randomised(InternImageForImageClassification(tiny_config())).eval()
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = InternImageForImageClassification.from_pretrained(tmp_path, device_map=device_map)
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)
    device_map = {
        "internimage.stem": "cpu",
        "internimage.encoder": "disk",
        "internimage.pooler": "cpu",
        "classifier": "cpu",
    }
    offloaded = InternImageForImageClassification.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(offloaded(pixel_values).logits, model(pixel_values).logits)

    with torch.device("meta"):
        on_meta = InternImageForImageClassification(tiny_config())
    outputs = on_meta(torch.empty(2, 3, 64, 64, device="meta"))
    assert outputs.logits.shape == (2, 5) and outputs.logits.is_meta
    on_meta.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(on_meta.eval()(pixel_values).logits, model(pixel_values).logits)


def test_input_embeddings_and_unsplit_layers_are_known():
    model = InternImageForImageClassification(tiny_config())
    assert model.get_input_embeddings() is model.internimage.stem.conv1
    assert model.get_input_embeddings() is model.internimage.get_input_embeddings()
    assert set(model._no_split_modules) <= {type(m).__name__ for m in model.modules()}
    in_layers = sum(p.numel() for m in model.modules() if isinstance(m, InternImageLayer) for p in m.parameters())
    assert in_layers > 0.5 * model.num_parameters()
    assert all(p.is_contiguous() for p in model.parameters())
    assert not [name for name, _ in model.named_buffers() if name not in model.state_dict()]


# ------------------------------------------------------------------------------------------------------ graph capture


@pytest.mark.parametrize("variant", ["res_post_norm", "clip"])
def test_export_takes_symbolic_batch_and_size(variant):
    model = randomised(InternImageForImageClassification(tiny_config(variant))).eval()
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {"pixel_values": torch.randn(2, 3, 64, 96)},
            dynamic_shapes={"pixel_values": {0: auto, 2: auto, 3: auto}},
            strict=False,
        )
        for shape in ((3, 3, 96, 64), (5, 3, 128, 160)):
            pixel_values = torch.randn(shape)
            torch.testing.assert_close(
                program.module()(pixel_values=pixel_values).logits, model(pixel_values).logits, atol=1e-4, rtol=1e-4
            )


def check_compiled(model: nn.Module, shapes: list[tuple[int, ...]], dynamic: bool | None = None) -> None:
    """Inductor's code gives what the model gives."""
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=dynamic)
    with torch.no_grad():
        for shape in shapes:
            pixel_values = torch.randn(shape)
            expected, actual = model(pixel_values), compiled(pixel_values)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4, msg=lambda m, s=shape: f"{s}: {m}")


def test_compiled_convolutions_take_a_second_image_size():
    config = tiny_config()
    check_compiled(
        nn.Sequential(InternImageStem(config), InternImageDownsample(config, 8)).eval(),
        [(2, 3, 64, 64), (2, 3, 96, 96)],
    )


def test_compiled_convolutions_take_sizes_known_to_be_even():
    """The sum guards on it, as in the CLIP head and in detectors: the first image is even-sized, its sides are one symbol."""

    class Upsampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.downsample = InternImageDownsample(tiny_config(), 4)
            self.projection = nn.Conv2d(8, 16, kernel_size=1)

        def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
            upsampled = nn.functional.pixel_shuffle(self.projection(self.downsample(feature_map)), 2)
            return feature_map + upsampled[:, :, : feature_map.shape[2], : feature_map.shape[3]]

    check_compiled(Upsampled().eval(), [(2, 4, 16, 16), (2, 4, 24, 24)], dynamic=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("height, width", [(64, 96), (65, 97), (66, 67), (7, 5), (1, 2)])
def test_halving_is_the_same_convolution_in_compiled_graphs(height, width, dynamic):
    """The row and column that it adds for a compiler change nothing."""
    conv = nn.Conv2d(3, 4, kernel_size=3, stride=2, padding=1)
    pixel_values, shapes = torch.randn(2, 3, height, width), []

    def look(graph, inputs):
        shapes.extend(node.meta["example_value"].shape for node in graph.graph.nodes if "pad" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(halve, backend=look, dynamic=dynamic)
    torch.testing.assert_close(compiled(conv, pixel_values), conv(pixel_values), atol=1e-6, rtol=1e-6)
    if dynamic:
        assert len(shapes) == 2  # of symbols
    else:
        assert shapes == [(2, 3, height + height % 2, width + width % 2)]


def test_compiled_maps_keep_their_order_in_memory():
    """Channels are the fastest dimension of every buffer, so that no map is copied between two layers."""
    config = tiny_config(channels=24, groups=[3, 6, 12, 24], depths=[2, 1, 1, 1])
    stage = randomised(InternImageStage(config, 0, [0.0, 0.0])).eval()
    pixel_values = torch.randn(2, 24, 10, 12).to(memory_format=torch.channels_last)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = stage(pixel_values)
        actual, (code,) = run_and_get_code(torch.compile(stage), pixel_values)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    buffers = re.findall(r"empty_strided_cpu\(\((.*?)\), \((.*?)\),", code)
    buffers = [[tuple(map(int, re.findall(r"\d+", numbers))) for numbers in pair] for pair in buffers]
    maps = [(size, strides) for size, strides in buffers if size[0] == 2 and math.prod(size) == pixel_values.numel()]
    assert len(maps) >= 2, buffers
    assert all(strides[size.index(24)] == 1 for size, strides in maps), maps


@pytest.mark.parametrize("dcn_version", [3, 4])
@pytest.mark.parametrize(
    "reason_for_two",
    [None, "hook", "pre_hook", "backward_pre_hook", "global_hook", "forward_replaced", "wrapper", "parametrization"],
)
def test_compiled_code_has_one_matrix_product_for_offset_and_mask(dcn_version, reason_for_two, request):
    groups, widths = 3, []
    config = tiny_config(dcn_version=dcn_version)
    layer = randomised(InternImageLayer(config, 24, groups, drop_path=0.0))
    query = torch.randn(1, 5, 6, 24)
    if reason_for_two == "hook":
        layer.dcn.offset.register_forward_hook(lambda module, inputs, output: output * 2)
    elif reason_for_two == "pre_hook":
        layer.dcn.mask.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    elif reason_for_two == "backward_pre_hook":
        layer.dcn.mask.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,))
    elif reason_for_two == "global_hook":
        offset = layer.dcn.offset
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: output * 2 if module is offset else None
        )
        request.addfinalizer(handle.remove)
    elif reason_for_two == "forward_replaced":  # as accelerate does
        forward = layer.dcn.mask.forward
        layer.dcn.mask.forward = lambda query: forward(query) * 2
    elif reason_for_two == "wrapper":
        layer.dcn.mask = nn.Sequential(layer.dcn.mask, nn.Tanh())
    elif reason_for_two == "parametrization":
        layer.dcn.mask = torch.nn.utils.parametrizations.weight_norm(layer.dcn.mask)

    def look(graph, inputs):
        outputs = [node.meta["example_value"] for node in graph.graph.nodes if "linear" in str(node.target)]
        widths.extend(output.shape[-1] for output in outputs)
        return graph.forward

    torch._dynamo.reset()
    expected = layer(query)
    actual = torch.compile(layer, backend=look, dynamic=False)(query)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    if reason_for_two is None:
        # input projection, offset and mask (27 columns for each group and 7 of padding), output projection, MLP
        assert sorted(widths) == sorted([24, 88, 24, layer.mlp.fc1.out_features, 24])
    else:
        assert 88 not in widths and 18 * groups in widths
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(actual.square().sum(), parameters)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.slow  # each of them compiles a whole model for fixed and for symbolic sizes, a minute or more
@pytest.mark.parametrize(
    "model_class, backend, dynamic, variant",
    [
        (InternImageForImageClassification, "auto", None, "pre_norm"),
        (InternImageForImageClassification, "torch", None, "post_norm"),
        (InternImageForImageClassification, "torch", True, "batch_norm"),
        (InternImageForImageClassification, "auto", True, "clip"),
        (InternImageBackbone, "torch", None, "res_post_norm"),
        (InternImageBackbone, "auto", True, "pre_norm"),
    ],
)
def test_compiled_models_take_any_size(model_class, backend, dynamic, variant):
    fields = {"depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    if variant == "res_post_norm":
        fields["level2_post_norm_block_ids"] = [0]
    model = randomised(model_class(tiny_config(variant, **fields))).eval()
    shapes = [(2, 3, 64, 64), (2, 3, 96, 96), (3, 3, 75, 130), (1, 3, 128, 64), (2, 3, 224, 256), (4, 3, 97, 65)]
    with use_dcnv3_backend(backend):
        check_compiled(model, shapes, dynamic)


# Inductor's training step takes a minute or more to compile; that of the operator alone is among the tests of test_dcnv3.py.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_inference_and_training_equal_eager(backend):
    torch._dynamo.reset()
    model = randomised(InternImageForImageClassification(tiny_config(depths=[1, 1, 1, 1]))).eval()
    pixel_values, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True)(pixel_values).logits
        torch.testing.assert_close(logits, model(pixel_values).logits, atol=1e-4, rtol=1e-4)
    model(pixel_values, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend=backend)(pixel_values, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
