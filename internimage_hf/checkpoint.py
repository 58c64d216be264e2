# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Names of the official InternImage, in configurations and checkpoints, and ours.

Three layouts exist: the `.pth` files that the authors released (OpenGVLab/InternImage on GitHub), their Hub
repositories (the same names after `model.`, `gamma1` called `layer_scale1`), and the backbone inside a detection or
segmentation checkpoint (the same names after `backbone.`). All functions here are pure, pass our own names unchanged,
and serve `InternImageConfig`, `from_pretrained` and the conversion scripts alike.
"""

import re
from typing import Any

from transformers.core_model_loading import WeightRenaming


BASE_MODEL_PREFIX = "internimage"

_CONFIG_NAMES = {
    "num_classes": "num_labels",
    "act_layer": "hidden_act",
    "drop_rate": "hidden_dropout_prob",
    "layer_scale": "layer_scale_init_value",
    "in_chans": "num_channels",
}
# Fields without a counterpart: the op has one definition here, checkpointing is a choice at run time (`with_cp`), and
# the rest belongs to the frameworks that the official code was run in.
_CONFIG_DROPPED = ("core_op", "with_cp", "level2_post_norm", "type", "init_cfg", "pretrained", "frozen_stages")
_CONFIG_MARKERS = {*_CONFIG_NAMES, "core_op", "with_cp", "level2_post_norm"}
_ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
_CORE_OPS = ("DCNv3", "DCNv3_pytorch")


def is_official_config(config: dict[str, Any]) -> bool:
    """Whether a configuration uses a field name that only the official code has."""
    return not _CONFIG_MARKERS.isdisjoint(config) or config.get("type") == "InternImage"


def translate_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translates a configuration from the official or the published spelling; our own comes back equal.

    Known as: the keyword arguments of `InternImage.__init__` (classification/models/intern_image.py), the published
    `config.json`, and the backbone's dictionary in mmdetection or mmsegmentation configurations, whose `out_indices`
    count the stages from 0 while the stem is 0 here.

    Raises:
        ValueError: for an activation or core operator that the official code does not have either, or a field that
            is given twice with different values.
    """
    if not is_official_config(config):
        return dict(config)

    if (core_op := config.get("core_op", "DCNv3")) not in _CORE_OPS:
        raise ValueError(f"`core_op` must be one of {', '.join(map(repr, _CORE_OPS))}, got {core_op!r}")

    translated: dict[str, Any] = {}
    for name, value in config.items():
        if name in _CONFIG_DROPPED or name == "auto_map":  # the files that auto_map names cannot be loaded any more
            continue
        if name == "act_layer":
            if value not in _ACTIVATIONS:
                raise ValueError(f"`act_layer` must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {value!r}")
            value = _ACTIVATIONS[value]
        elif name == "architectures":
            value = ["InternImageForImageClassification"]
        elif name == "out_indices" and config.get("type") == "InternImage":
            value = [index + 1 for index in value]
        name = _CONFIG_NAMES.get(name, name)
        if name in translated and translated[name] != value:
            raise ValueError(f"`{name}` is given twice, as {translated[name]!r} and as {value!r}")
        translated[name] = value
    # The block ids count only where `level2_post_norm` says so.
    if "level2_post_norm" in config and not config["level2_post_norm"]:
        translated["level2_post_norm_block_ids"] = None
    return translated


_LAYER = r"levels\.(\d+)\.blocks\.(\d+)\."
_OUR_LAYER = r"encoder.stages.\1.layers.\2."
# A norm sits in an nn.Sequential with the permutations around it, hence the 0 or 1 (after a permutation) behind its
# name; LayerNorm and BatchNorm differ in that number.
_KEY_PATTERNS: list[tuple[re.Pattern, str]] = [
    (re.compile(rf"(?:module\.)?(?:model\.)?{pattern}"), target)
    for pattern, target in (
        (r"patch_embed\.conv([12])\.(weight|bias)", r"stem.conv\1.\2"),
        (r"patch_embed\.norm([12])\.[01]\.(\w+)", r"stem.norm\1.\2"),
        (_LAYER + r"(norm[12]|res_post_norm[12])\.0\.(weight|bias)", _OUR_LAYER + r"\3.\4"),
        (_LAYER + r"(?:gamma|layer_scale)([12])", _OUR_LAYER + r"layer_scale\3"),
        (_LAYER + r"mlp\.(fc[12])\.(weight|bias)", _OUR_LAYER + r"mlp.\3.\4"),
        (_LAYER + r"dcn\.dw_conv\.0\.(weight|bias)", _OUR_LAYER + r"dcn.dw_conv.\3"),
        (_LAYER + r"dcn\.dw_conv\.1\.[01]\.(\w+)", _OUR_LAYER + r"dcn.dw_norm.\3"),
        (_LAYER + r"dcn\.(offset|mask|input_proj|output_proj)\.(weight|bias)", _OUR_LAYER + r"dcn.\3.\4"),
        (
            _LAYER + r"dcn\.center_feature_scale_proj_(weight|bias)",
            _OUR_LAYER + r"dcn.center_feature_scale_proj.\3",
        ),
        (r"levels\.(\d+)\.norm\.0\.(weight|bias)", r"encoder.stages.\1.norm.\2"),
        (r"levels\.(\d+)\.post_norms\.(\d+)\.0\.(weight|bias)", r"encoder.stages.\1.post_norms.\2.\3"),
        (r"levels\.(\d+)\.downsample\.conv\.weight", r"encoder.downsamples.\1.conv.weight"),
        (r"levels\.(\d+)\.downsample\.norm\.[01]\.(\w+)", r"encoder.downsamples.\1.norm.\2"),
        (r"conv_head\.0\.weight", r"pooler.conv.weight"),
        (r"conv_head\.1\.0\.(\w+)", r"pooler.norm.\1"),
        (r"dcnv3_head_x4\.0\.(weight|bias)", r"pooler.stage4_proj.\1"),
        (r"dcnv3_head_x3\.(weight|bias)", r"pooler.stage3_proj.\1"),
        (r"clip_projector\.norm1_q\.[01]\.(\w+)", r"pooler.attention.query_norm.\1"),
        (r"clip_projector\.norm1_k\.[01]\.(\w+)", r"pooler.attention.key_norm.\1"),
        (r"clip_projector\.norm1_v\.[01]\.(\w+)", r"pooler.attention.value_norm.\1"),
        (r"clip_projector\.cross_dcn\.q[._](weight|bias)", r"pooler.attention.query.\1"),
        (r"clip_projector\.cross_dcn\.k[._](weight|bias)", r"pooler.attention.key.\1"),
        (r"clip_projector\.cross_dcn\.v[._](weight|bias)", r"pooler.attention.value.\1"),
        (r"clip_projector\.cross_dcn\.proj\.(weight|bias)", r"pooler.attention.output_proj.\1"),
        (r"fc_norm\.[01]\.(\w+)", r"pooler.norm.\1"),
    )
]
_HEAD_PATTERN = re.compile(r"(?:module\.)?(?:model\.)?head\.(weight|bias)")
_OUR_KEY = re.compile(
    rf"({BASE_MODEL_PREFIX}\.)?(stem|encoder|pooler)\.|classifier\.|(assistant|lead|connections|connection_scales)\."
)
# CB-InternImage: two backbones without heads, the second without a stem, and what joins them.
_COMPOSITE_PATTERN = re.compile(r"(?:module\.)?cb_(?:modules\.(\d)\.(.+)|linears\.(\d)\.(\d)\.(weight|bias))")


def translate_key(key: str) -> str:
    """Translates one parameter or buffer name to that of `InternImageForImageClassification`.

    The names of a CB-InternImage (`cb_modules.0.`, `cb_linears.0.1.`) become those of `InternImageCompositeBackbone`. Any
    other name, ours included, comes back unchanged.
    """
    if match := _COMPOSITE_PATTERN.fullmatch(key):
        return _translate_composite_key(key, *match.groups())
    if match := _HEAD_PATTERN.fullmatch(key):
        return f"classifier.{match[1]}"
    for pattern, target in _KEY_PATTERNS:
        if match := pattern.fullmatch(key):
            return f"{BASE_MODEL_PREFIX}.{match.expand(target)}"
    return key


def _translate_composite_key(
    key: str, module: str | None, rest: str | None, stage: str | None, below: str | None, kind: str | None
) -> str:
    if module is None:  # the connection of a stage with itself is the identity: the file has no entry 0
        return f"connections.{stage}.{int(below) - 1}.{kind}" if below != "0" else key
    if module == "1" and (match := re.fullmatch(r"gamma(\d)", rest)):
        return f"connection_scales.{match[1]}"
    part = translate_key(rest).removeprefix(f"{BASE_MODEL_PREFIX}.")
    if module == "0" and part.startswith("stem."):
        return part
    if module in ("0", "1") and part.startswith("encoder."):
        return f"{('assistant', 'lead')[int(module)]}.{part.removeprefix('encoder.')}"
    return key


def translate_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Translates a released state dict; the values are passed on as they are.

    A classification checkpoint, as `.pth` or in the published layout, gets the names of
    `InternImageForImageClassification`. Of a downstream checkpoint, known by keys that begin with `backbone.`, the
    backbone's part alone is taken and gets the names of `InternImageBackbone`, or of `InternImageCompositeBackbone`.

    Raises:
        ValueError: if a name belongs to neither layout nor to ours, or two names become one.
    """
    backbone = {key.removeprefix("backbone."): value for key, value in state_dict.items() if key[:9] == "backbone."}
    translated: dict[str, Any] = {}
    unknown = []
    for key, value in (backbone or state_dict).items():
        new_key = translate_key(key)
        if not _OUR_KEY.match(new_key):
            unknown.append(key)
            continue
        if backbone:
            new_key = new_key.removeprefix(f"{BASE_MODEL_PREFIX}.")
        if new_key in translated:
            raise ValueError(f"two entries of the state dict are {new_key!r}, the second is {key!r}")
        translated[new_key] = value
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"the state dict has {len(unknown)} entries that no InternImage has: {shown}")
    return translated


class OfficialNames(WeightRenaming):
    """`translate_key` as a step of transformers' weight loading.

    It only works on the way in: a transform that transformers sees in use is undone when the model is saved, and a
    fine-tuned model would go back to names that only this package and the unmaintained code can read.
    """

    __slots__ = ()

    def __init__(self):
        super().__init__("official InternImage names", "ours")  # shown in messages alone

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return translate_key(source_key), None


__all__ = ["OfficialNames", "is_official_config", "translate_config", "translate_key", "translate_state_dict"]
