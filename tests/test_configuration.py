"""Tests of `InternImageConfig`: fields, spellings, the paper's rules, bad values."""

import copy
import json

import pytest
from transformers import AutoConfig
from utils import FIXTURES, TINY

from internimage_hf import InternImageConfig


RELEASED = json.loads((FIXTURES / "released_models.json").read_text())


@pytest.mark.parametrize("name", [name for name in RELEASED if RELEASED[name]["config"]["num_classes"] == 1000])
def test_variant_is_the_released_architecture(name):
    variant = InternImageConfig.from_variant(name.split("_")[1])
    released = InternImageConfig.from_dict(RELEASED[name]["config"])
    released.image_size = RELEASED[name]["image_size"]
    assert variant.to_dict() == released.to_dict()
    assert InternImageConfig.from_variant(name.split("_")[1].upper(), drop_path_rate=0.25).drop_path_rate == 0.25


def test_stacking_rules_give_released_architectures():
    assert InternImageConfig.from_stacking_rules().to_dict() == InternImageConfig().to_dict()
    config = InternImageConfig.from_stacking_rules(channels=80, group_channels=16, depth=4, depth_stage3=21)
    assert (config.channels, config.depths, config.groups) == (80, [4, 4, 21, 4], [5, 10, 20, 40])
    assert config.hidden_sizes == [80, 160, 320, 640]


def test_scaling_rules_grow_depth_and_width():
    origin = InternImageConfig.from_scaling_rules(0)
    assert (origin.channels, origin.depths) == (64, [4, 4, 18, 4])
    for phi in (1, 2, 3, 4.5):
        config = InternImageConfig.from_scaling_rules(phi)
        assert abs(config.depths[2] - 18 * 1.09**phi) <= 0.5
        assert abs(config.channels - 64 * 1.36**phi) <= 8
        assert [width // groups for width, groups in zip(config.hidden_sizes, config.groups, strict=True)] == [16] * 4
    # the exponents are chosen for this: each step about doubles the cost
    assert abs(1.09 * 1.36**1.99 - 2) < 0.02
    deeper = InternImageConfig.from_scaling_rules(2, alpha=1.5, beta=1.0)
    assert (deeper.channels, deeper.depths) == (64, [9, 9, 40, 9])


OFFICIAL = {
    "num_classes": 7,
    "act_layer": "SiLU",
    "layer_scale": 1e-5,
    "drop_rate": 0.1,
    "with_cp": True,
    "core_op": "DCNv3",
    "level2_post_norm": False,
    "level2_post_norm_block_ids": [0],
    "channels": 16,
    "depths": [1, 1, 2, 1],
    "groups": [1, 2, 4, 8],
}


def test_official_spelling_equals_own_spelling():
    for config in (InternImageConfig(**OFFICIAL), InternImageConfig.from_dict(copy.deepcopy(OFFICIAL))):
        assert config.num_labels == 7 and config.hidden_act == "silu"
        assert config.layer_scale_init_value == 1e-5 and config.hidden_dropout_prob == 0.1
        assert config.level2_post_norm_block_ids is None
        assert not {"num_classes", "act_layer", "layer_scale", "with_cp", "core_op"} & config.to_dict().keys()
    assert InternImageConfig(num_classes=9).num_labels == 9
    with_block_ids = {**OFFICIAL, "level2_post_norm": True}
    assert InternImageConfig(**with_block_ids).level2_post_norm_block_ids == [0]


@pytest.mark.parametrize("name", ["hf_t_like", "hf_s_like"])
def test_published_config_is_translated(name, tmp_path):
    config = AutoConfig.from_pretrained(FIXTURES / name)
    assert type(config) is InternImageConfig
    assert config.num_labels == 10 and config.hidden_act == "gelu"
    assert not hasattr(config, "auto_map"), "it names files that the repositories' users cannot load"
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    again.name_or_path = config.name_or_path
    assert again.to_dict() == config.to_dict()


def test_json_round_trip_is_exact(tmp_path):
    config = InternImageConfig(
        channels=16,
        depths=(1, 2, 3, 1),
        groups=(1, 2, 4, 8),
        image_size=[64, 96],
        level2_post_norm_block_ids=(2, 0),
        id2label={0: "a", 1: "b", 2: "c"},
        drop_path_rate=0.3,
        drop_path_type="uniform",
        norm_layer="BN",
        out_features=["stem", "stage4"],
    )
    config.save_pretrained(tmp_path)
    again = InternImageConfig.from_pretrained(tmp_path)
    public = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    del public["transformers_version"]  # set on saving
    assert {name: getattr(again, name) for name in public} == public
    assert again.out_indices == [0, 4] and again.label2id == {"a": 0, "b": 1, "c": 2}
    # `out_indices` on loading replaces `out_features`
    assert InternImageConfig.from_pretrained(tmp_path, out_indices=[1, 2]).out_features == ["stage1", "stage2"]


def test_imagenet_labels_follow_class_numbers():
    config = InternImageConfig(num_labels=1000)
    assert "tabby cat" in config.id2label[281]
    assert len(config.label2id) == 1000 and config.label2id[config.id2label[999]] == 999
    own = InternImageConfig(id2label={i: f"thing {i}" for i in range(1000)})
    assert own.id2label[281] == "thing 281"
    assert InternImageConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert InternImageConfig.from_variant("t", num_labels=4).num_labels == 4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"depths": [1, 1, 1]}, "depths"),
        ({"groups": [2, 4, 8, 16, 32]}, "groups"),
        ({"depths": [1, 0, 1, 1]}, "depths"),
        ({"groups": [3, 8, 16, 32]}, r"groups\[0\]"),
        ({"groups": [4, 8, 16, 7]}, r"groups\[3\]"),
        ({"channels": 63}, "channels"),
        ({"channels": -64}, "channels"),
        ({"channels": 64.0}, "channels"),
        ({"num_channels": 0}, "num_channels"),
        ({"image_size": -1}, "image_size"),
        ({"image_size": [64]}, "image_size"),
        ({"dw_kernel_size": 4}, "dw_kernel_size"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"mlp_ratio": 0.001}, "mlp_ratio"),
        ({"cls_scale": -1.5}, "cls_scale"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob"),
        ({"drop_path_type": "cosine"}, "drop_path_type"),
        ({"norm_layer": "GN"}, "norm_layer"),
        ({"hidden_act": "gelo"}, "hidden_act"),
        ({"offset_scale": float("nan")}, "offset_scale"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
        ({"layer_scale_init_value": "big"}, "layer_scale_init_value"),
        ({"level2_post_norm_block_ids": [18]}, "level2_post_norm_block_ids"),
        ({"level2_post_norm_block_ids": [1, 1]}, "level2_post_norm_block_ids"),
        ({"post_norm": "yes"}, "post_norm"),
        ({"out_features": ["stage5"]}, "stage5"),
        ({"act_layer": "Swish"}, "act_layer"),
        ({"core_op": "DCNv5"}, "core_op"),
        ({"num_classes": 3, "num_labels": 4}, "num_labels"),
    ],
)
def test_bad_values_name_field(fields, named):
    with pytest.raises(ValueError, match=named):
        InternImageConfig(**fields)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"channels": 64, "group_channels": 24}, "group_channels"),
        ({"depth": 5, "depth_stage3": 4}, "depth_stage3"),
        ({"depth": 0}, "depth"),
    ],
)
def test_bad_rules_name_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        InternImageConfig.from_stacking_rules(**arguments)


def test_unknown_variant_and_bad_scaling_are_refused():
    with pytest.raises(ValueError, match=r"variant.*'m'"):
        InternImageConfig.from_variant("m")
    with pytest.raises(ValueError, match="phi"):
        InternImageConfig.from_scaling_rules(float("inf"))
    with pytest.raises(ValueError, match="beta"):
        InternImageConfig.from_scaling_rules(1, beta=0.5)


def test_tiny_config_of_the_tests_is_valid():
    assert InternImageConfig(**TINY).stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
