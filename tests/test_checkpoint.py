"""Tests of official names: key lists of all released models, the published layout, downstream checkpoints."""

import gzip
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification
from utils import FIXTURES, TINY, load_case

from internimage_hf import InternImageBackbone, InternImageConfig, InternImageForImageClassification
from internimage_hf.checkpoint import translate_config, translate_key, translate_state_dict


RELEASED = json.loads((FIXTURES / "released_models.json").read_text())


@pytest.mark.parametrize("variant", ["t", "s", "b", "l", "xl", "h", "g"])
def test_every_released_name_is_translated(variant):
    with gzip.open(FIXTURES / "state_dict_keys" / f"{variant}.json.gz", "rt") as file:
        official = {key: tuple(shape) for key, shape in json.load(file)}
    translated = translate_state_dict(official)
    with torch.device("meta"):
        model = InternImageForImageClassification(InternImageConfig.from_variant(variant))
    assert translated == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert translate_state_dict(translated) == translated, "our own names pass unchanged"
    published = {"model." + key.replace(".gamma", ".layer_scale"): shape for key, shape in official.items()}
    assert translate_state_dict(published) == translated


def test_batch_norm_names_are_translated():
    """BatchNorm and LayerNorm have different indices in the official nn.Sequential."""
    names = {
        "patch_embed.norm1.0.running_mean": "internimage.stem.norm1.running_mean",
        "levels.1.blocks.2.dcn.dw_conv.1.0.weight": "internimage.encoder.stages.1.layers.2.dcn.dw_norm.weight",
        "levels.0.downsample.norm.0.num_batches_tracked": "internimage.encoder.downsamples.0.norm.num_batches_tracked",
        "clip_projector.norm1_q.1.running_var": "internimage.pooler.attention.query_norm.running_var",
        "module.head.bias": "classifier.bias",
    }
    assert {name: translate_key(name) for name in names} == names


def test_backbone_of_downstream_checkpoint_is_translated():
    state_dict, expected = load_case("s_like")
    downstream = {
        f"backbone.{key}": tensor
        for key, tensor in state_dict.items()
        if key.split(".")[0] in ("patch_embed", "levels")
    }
    downstream |= {"decode_head.conv_seg.weight": torch.zeros(1), "auxiliary_head.convs.0.bn.bias": torch.zeros(1)}
    config = {**json.loads((FIXTURES / "s_like" / "config.json").read_text()), "type": "InternImage"}
    backbone = InternImageBackbone(InternImageConfig.from_dict({**config, "out_indices": (0, 1, 2, 3)})).eval()
    backbone.load_state_dict(translate_state_dict(downstream), strict=True)
    assert backbone.out_features == ["stage1", "stage2", "stage3", "stage4"]
    with torch.no_grad():
        maps = backbone(expected["pixel_values"]).feature_maps
    for i, feature_map in enumerate(maps, start=1):
        torch.testing.assert_close(feature_map, expected[f"stage{i}"], atol=1e-4, rtol=0)


def test_unknown_and_repeated_names_are_refused():
    with pytest.raises(ValueError, match=r"2 entries.*'extra\.bias'"):
        translate_state_dict({"head.bias": 0, "extra.bias": 0, "levels.0.blocks.0.attn.weight": 0})
    with pytest.raises(ValueError, match=r"'classifier\.bias'"):
        translate_state_dict({"head.bias": 0, "model.head.bias": 0})


def test_translate_config_leaves_argument_unchanged():
    ours = InternImageConfig(**TINY).to_dict()
    assert translate_config(ours) == ours
    official = RELEASED["internimage_h_22kto1k_640"]["config"]
    before = json.dumps(official)
    assert translate_config(translate_config(official)) == translate_config(official)
    assert json.dumps(official) == before


@pytest.mark.parametrize("name", ["hf_t_like", "hf_s_like"])
def test_published_folder_loads_with_official_outputs(name, caplog):
    """A folder in the layout of the authors' repositories: outputs equal theirs, and nothing is logged about keys."""
    folder = FIXTURES / name
    expected = load_file(folder / "expected.safetensors")
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").propagate = True
        try:
            classifier = AutoModelForImageClassification.from_pretrained(folder)
            base = AutoModel.from_pretrained(folder)
            backbone = InternImageBackbone.from_pretrained(folder, out_features=["stage2", "stage3"])
        finally:
            logging.getLogger("transformers").propagate = False
    assert caplog.text == ""
    assert classifier.config.architectures == ["InternImageForImageClassification"]
    with torch.no_grad():
        pixel_values = expected["pixel_values"]
        torch.testing.assert_close(classifier(pixel_values).logits, expected["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(base(pixel_values).pooler_output, expected["pooled"], atol=1e-4, rtol=0)
        for stage, feature_map in zip((2, 3), backbone(pixel_values).feature_maps, strict=True):
            torch.testing.assert_close(feature_map, expected[f"stage{stage}"], atol=1e-4, rtol=0)


def test_published_checkpoint_is_saved_under_new_names(tmp_path):
    model = AutoModelForImageClassification.from_pretrained(FIXTURES / "hf_s_like")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in config and "layer_scale_init_value" in config
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_published_checkpoint_takes_new_head():
    model = AutoModelForImageClassification.from_pretrained(
        FIXTURES / "hf_t_like",
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
        ignore_mismatched_sizes=True,
    )
    assert model.config.num_labels == 2 and model.classifier.out_features == 2
    assert model.config.id2label == {0: "cat", 1: "dog"}
