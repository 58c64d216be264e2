"""CB-InternImage: the maps of the official code, and what every backbone of transformers does."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoBackbone, AutoConfig, UperNetConfig, UperNetForSemanticSegmentation
from utils import FIXTURES, TINY, TINY_VARIANTS

from internimage_hf import InternImageCompositeBackbone, InternImageCompositeConfig, InternImageConfig
from internimage_hf.checkpoint import translate_config, translate_state_dict
from internimage_hf.training import layer_distances


def _golden(dtype: torch.dtype) -> tuple[InternImageCompositeBackbone, dict[str, torch.Tensor]]:
    folder = FIXTURES / "dino_tiny_cb"
    fields = json.loads((folder / "config.json").read_text())["model"]["backbone"]
    fields = translate_config({k: v for k, v in fields.items() if k not in ("type", "out_indices")})
    backbone = InternImageCompositeBackbone(
        InternImageCompositeConfig(**fields, out_features=["stage2", "stage3", "stage4"])
    )
    state_dict = torch.load(folder / "checkpoint.pth", weights_only=True)["state_dict"]
    backbone.load_state_dict(translate_state_dict(state_dict), strict=True)
    return backbone.to(dtype).eval(), load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 2e-6), (torch.float32, 3e-4)])
def test_both_encoders_give_the_official_maps(dtype, tolerance):
    backbone, expected = _golden(dtype)
    with torch.no_grad():
        outputs = backbone(expected["pixel_values"].to(dtype))
    for module, maps in enumerate((outputs.auxiliary_feature_maps, outputs.feature_maps)):
        for i, feature_map in enumerate(maps):
            wanted = expected[f"backbone.{module}.{i}"].to(dtype)
            torch.testing.assert_close(feature_map, wanted, atol=tolerance, rtol=0)


@pytest.fixture
def config() -> InternImageCompositeConfig:
    return InternImageCompositeConfig(**TINY, **TINY_VARIANTS["res_post_norm"], out_indices=[1, 2, 3, 4])


@pytest.mark.parametrize("size", [(64, 96), (33, 50), (7, 1)])
def test_any_image_size(config, size):
    backbone = InternImageCompositeBackbone(config).eval()
    torch.nn.init.ones_(backbone.connection_scales[0])
    with torch.no_grad():
        outputs = backbone(torch.randn(2, 3, *size), output_hidden_states=True)
    assert [m.shape for m in outputs.feature_maps] == [m.shape for m in outputs.auxiliary_feature_maps]
    assert [m.shape[1] for m in outputs.feature_maps] == config.hidden_sizes == backbone.channels
    assert len(outputs.hidden_states) == 5
    for feature_map, hidden_state in zip(outputs.feature_maps, outputs.hidden_states[1:], strict=True):
        assert torch.equal(feature_map, hidden_state)


def test_the_lead_begins_as_an_internimage_and_everything_learns(config):
    backbone = InternImageCompositeBackbone(config)
    pixel_values = torch.randn(1, 3, 32, 64)
    for scale in backbone.connection_scales:
        assert not scale.any()
    backbone.lead.load_state_dict(backbone.assistant.state_dict())
    outputs = backbone(pixel_values)
    for lead, assistant in zip(outputs.feature_maps, outputs.auxiliary_feature_maps, strict=True):
        assert torch.equal(lead, assistant)
    for scale in backbone.connection_scales:
        torch.nn.init.constant_(scale, 0.1)
    sum(feature_map.square().sum() for feature_map in backbone(pixel_values).feature_maps).backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_auto_classes_files_and_official_names(config, tmp_path):
    backbone = AutoBackbone.from_config(config).eval()
    assert type(backbone) is InternImageCompositeBackbone
    torch.nn.init.normal_(backbone.connection_scales[1])
    backbone.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == backbone.config.to_diff_dict()
    loaded = InternImageCompositeBackbone.from_pretrained(tmp_path)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert translate_state_dict(backbone.state_dict()).keys() == backbone.state_dict().keys()
    assert isinstance(config, InternImageConfig) and config.model_type == "internimage_composite"


def test_under_a_head_of_transformers(config, tmp_path):
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, hidden_size=8, use_auxiliary_head=False, num_labels=3)
    ).eval()
    pixel_values = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        logits = model(pixel_values).logits
        model.save_pretrained(tmp_path)
        again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)(pixel_values).logits
    assert logits.shape == (1, 3, 64, 32)
    assert torch.equal(logits, again)


def test_parameter_groups_know_the_layers_of_both_encoders(config):
    """Layer decay of a detector with a composite backbone: a connection counts as the stage that it leads to."""
    distances = layer_distances(InternImageCompositeBackbone(config))
    assert set(distances) == {name for name, _ in InternImageCompositeBackbone(config).named_parameters()}
    expected = {
        "stem.conv1.weight": 5,
        "assistant.stages.0.layers.0.mlp.fc1.weight": 5,
        "lead.stages.2.layers.1.mlp.fc1.weight": 2,
        "assistant.stages.3.layers.0.mlp.fc1.weight": 0,
        "lead.downsamples.1.conv.weight": 3,
        "connections.0.1.weight": 5,
        "connections.2.0.bias": 3,
        "connection_scales.3": 0,
    }
    assert {name: distances[name] for name in expected} == expected
