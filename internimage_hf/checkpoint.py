# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: configurations and state dicts with the official names. Out: the same values under this package's names.

Three official layouts exist: the released `.pth` files (OpenGVLab/InternImage and OpenGVLab/DCNv4), the authors' Hub
repositories (prefix `model.`, `gamma1` renamed to `layer_scale1`), and the backbone inside a detection or segmentation
checkpoint (prefix `backbone.`). All functions are pure and leave this package's names unchanged. `InternImageConfig`,
`from_pretrained` and the conversion scripts use them.
"""

import re
from typing import Any

import torch
from transformers.core_model_loading import WeightRenaming


BASE_MODEL_PREFIX = "internimage"

_CONFIG_NAMES = {
    "num_classes": "num_labels",
    "act_layer": "hidden_act",
    "drop_rate": "hidden_dropout_prob",
    "layer_scale": "layer_scale_init_value",
    "in_chans": "num_channels",
}
# Fields without a counterpart: DCNv3 has one definition here (`core_op`), gradient checkpointing is switched at run time
# (`with_cp`), and the other fields belong to mmdetection and mmsegmentation.
_CONFIG_DROPPED = ("core_op", "with_cp", "level2_post_norm", "type", "init_cfg", "pretrained", "frozen_stages")
_CONFIG_MARKERS = {*_CONFIG_NAMES, "core_op", "with_cp", "level2_post_norm"}
_ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu"}
# The version of the deformable convolution, by the official name of the operator and of the backbone's class.
_CORE_OPS = {"DCNv3": 3, "DCNv3_pytorch": 3, "DCNv4": 4}
_TYPES = {"InternImage": 3, "FlashInternImage": 4}


def is_official_config(config: dict[str, Any]) -> bool:
    """Whether a configuration has a field of the official code only."""
    return not _CONFIG_MARKERS.isdisjoint(config) or _is_backbone(config)


def _is_backbone(config: dict[str, Any]) -> bool:
    """Whether a configuration is a backbone's dictionary of mmdetection or mmsegmentation."""
    return isinstance(config.get("type"), str) and config["type"] in _TYPES


def translate_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translates the fields of an official or published configuration; a configuration of this package comes back equal.

    Sources: the keyword arguments of `InternImage.__init__` (classification/models/intern_image.py) and of
    `FlashInternImage.__init__` (flash_intern_image.py in OpenGVLab/DCNv4), the published `config.json`, and the backbone's
    dictionary in mmdetection or mmsegmentation configurations. The `out_indices` of that dictionary count stages from 0;
    here the stem is 0 and the first stage 1.

    Raises:
        ValueError: for an activation or core operator that the official code lacks, an operator that the class in `type`
            lacks, or a field given twice with different values.
    """
    if not is_official_config(config):
        return dict(config)

    translated: dict[str, Any] = {}
    versions = {config["type"]: _TYPES[config["type"]]} if _is_backbone(config) else {}
    if "core_op" in config:
        core_op = config["core_op"]
        if not isinstance(core_op, str) or core_op not in _CORE_OPS:
            raise ValueError(f"`core_op` must be one of {', '.join(map(repr, _CORE_OPS))}, got {core_op!r}")
        versions[core_op] = _CORE_OPS[core_op]
    if len(set(versions.values())) > 1:
        raise ValueError(f"`core_op` must be an operator of `type` {config['type']!r}, got {config['core_op']!r}")
    if versions:
        translated["dcn_version"] = next(iter(versions.values()))
    for name, value in config.items():
        if name in _CONFIG_DROPPED or name == "auto_map":  # recent versions of transformers cannot load its files
            continue
        if name == "act_layer":
            if value not in _ACTIVATIONS:
                raise ValueError(f"`act_layer` must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {value!r}")
            value = _ACTIVATIONS[value]
        elif name == "architectures":
            value = ["InternImageForImageClassification"]
        elif name == "out_indices" and _is_backbone(config):
            value = [index + 1 for index in value]
        name = _CONFIG_NAMES.get(name, name)
        if name in translated and translated[name] != value:
            raise ValueError(f"`{name}` is given twice, as {translated[name]!r} and as {value!r}")
        translated[name] = value
    # The official code ignores the block ids unless `level2_post_norm` is true.
    if "level2_post_norm" in config and not config["level2_post_norm"]:
        translated["level2_post_norm_block_ids"] = None
    return translated


_LAYER = r"levels\.(\d+)\.blocks\.(\d+)\."
_OUR_LAYER = r"encoder.stages.\1.layers.\2."
# The official code wraps each norm in an nn.Sequential with permutations. The norm's index is 1 after a permutation and 0
# otherwise; it differs between LayerNorm and BatchNorm.
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
        (_LAYER + r"dcn\.value_proj\.(weight|bias)", _OUR_LAYER + r"dcn.input_proj.\3"),
        (_LAYER + r"dcn\.offset_mask_dw\.(weight|bias)", _OUR_LAYER + r"dcn.dw_conv.\3"),
        # `translate_state_dict` splits this layer in two.
        (_LAYER + r"dcn\.offset_mask\.(weight|bias)", _OUR_LAYER + r"dcn.offset_mask.\3"),
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
    """Translates an official parameter or buffer name to the one of `InternImageForImageClassification`.

    The names of a CB-InternImage (`cb_modules.0.`, `cb_linears.0.1.`) are translated to those of
    `InternImageCompositeBackbone`. Other names come back unchanged, those of this package included.
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


# Sampling points of the models' deformable convolution; three rows of `offset_mask` for each: x, y and modulation.
_POINTS = 9


def split_offset_mask(key: str, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of DCNv4's layer `offset_mask` that give sampling offsets, and those that give the modulation mask.

    The published layer has 27 rows per group, 18 of sampling offsets before 9 of the mask, and then 0 to 7 rows of padding,
    which no output depends on.

    Args:
        key: the tensor's name, for the message.
        packed: weight (rows, channels) or bias (rows,).

    Returns:
        (groups * 18, channels) and (groups * 9, channels), or without the channels.

    Raises:
        ValueError: if there is no number of groups with so many rows.
    """
    groups = packed.shape[0] // (3 * _POINTS) if packed.ndim else 0
    if groups == 0 or packed.shape[0] != -(-groups * 3 * _POINTS // 8) * 8:
        raise ValueError(
            f"{key} must have 27 rows for each group and up to 7 rows of padding to a multiple of 8, "
            f"got the shape {tuple(packed.shape)}"
        )
    rows = packed[: groups * 3 * _POINTS].unflatten(0, (groups, 3 * _POINTS))
    return rows[:, : 2 * _POINTS].flatten(0, 1), rows[:, 2 * _POINTS :].flatten(0, 1)


def join_offset_mask(offset: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The inverse of `split_offset_mask`: the rows of DCNv4's layer `offset_mask`. The padding is zero."""
    groups = mask.shape[0] // _POINTS
    rows = torch.cat([part.unflatten(0, (groups, -1)) for part in (offset, mask)], dim=1).flatten(0, 1)
    return torch.cat([rows, rows.new_zeros(-len(rows) % 8, *rows.shape[1:])])


def translate_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Translates the names of a released state dict. The values stay the same objects, except DCNv4's `offset_mask`.

    DCNv4's layers `offset_mask` are split into `offset` and `mask`; see `split_offset_mask`.

    A classification checkpoint, as `.pth` or in the published layout, gets the names of
    `InternImageForImageClassification`. A downstream checkpoint, recognised by keys with the prefix `backbone.`, is reduced
    to its backbone and gets the names of `InternImageBackbone` or `InternImageCompositeBackbone`.

    Raises:
        ValueError: if a name is neither official nor of this package, two names are translated to the same one, or an
            `offset_mask` has a wrong number of rows.
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
        entries = {new_key: value}
        if ".dcn.offset_mask." in new_key:
            names = [new_key.replace(".offset_mask.", f".{name}.") for name in ("offset", "mask")]
            entries = dict(zip(names, split_offset_mask(key, value), strict=True))
        for name, entry in entries.items():
            if name in translated:
                raise ValueError(f"two entries of the state dict are {name!r}, the second is {key!r}")
            translated[name] = entry
    if unknown:
        shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"the state dict has {len(unknown)} entries that no InternImage has: {shown}")
    return translated


class OfficialNames(WeightRenaming):
    """`translate_key` as a step of transformers' weight loading.

    It works on loading only. transformers undoes a conversion that it has recorded as used when it saves the model; a
    fine-tuned model would get the official names back.
    """

    __slots__ = ()

    def __init__(self):
        super().__init__("official InternImage names", "ours")  # shown in messages only

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return translate_key(source_key), None


__all__ = [
    "OfficialNames",
    "is_official_config",
    "join_offset_mask",
    "split_offset_mask",
    "translate_config",
    "translate_key",
    "translate_state_dict",
]
