"""DINO's part of `convert.detection`: names, architecture and settings of a DINO or CB-DINO checkpoint."""

import argparse
import re
from typing import Any

import torch

from internimage_hf import InternImageCompositeConfig, InternImageDinoConfig, InternImageDinoForObjectDetection

from .conversion import Plan
from .detectors import (
    Detector,
    detector_backbone,
    field,
    image_processor,
    label_names,
    official_backbone,
    read_detector,
)
from .errors import ConversionError, listed
from .source import Source, check_kind, configuration_of, shape_of


_TRANSFORMER = r"bbox_head\.transformer\."
_ENCODER = _TRANSFORMER + r"encoder\.layers\.(\d+)\."
_DECODER = _TRANSFORMER + r"decoder\.layers\.(\d+)\."
_ATTENTION = r"(sampling_offsets|attention_weights|value_proj|output_proj)"
_W = r"\.(weight|bias)"
_PATTERNS = [
    (re.compile(pattern), target)
    for pattern, target in (
        (r"neck\.(?:0\.)?convs\.(\d+)\.conv\.weight", r"neck.convs.\1.weight"),
        (r"neck\.(?:0\.)?convs\.(\d+)\.gn" + _W, r"neck.norms.\1.\2"),
        (r"neck\.(?:0\.)?extra_convs\.(\d+)\.conv\.weight", r"neck.extra_convs.\1.weight"),
        (r"neck\.(?:0\.)?extra_convs\.(\d+)\.gn" + _W, r"neck.extra_norms.\1.\2"),
        (_TRANSFORMER + r"level_embeds", r"level_embedding.weight"),
        (_ENCODER + r"attentions\.0\." + _ATTENTION + _W, r"encoder.layers.\1.self_attn.\2.\3"),
        (_ENCODER + r"norms\.0" + _W, r"encoder.layers.\1.self_attn_layer_norm.\2"),
        (_ENCODER + r"norms\.1" + _W, r"encoder.layers.\1.final_layer_norm.\2"),
        (_ENCODER + r"ffns\.0\.layers\.0\.0" + _W, r"encoder.layers.\1.mlp.fc1.\2"),
        (_ENCODER + r"ffns\.0\.layers\.1" + _W, r"encoder.layers.\1.mlp.fc2.\2"),
        (_ENCODER + r"ffns\.0\.(fc1_\d+\.weight|fc1_\d+\.bias|fc2_\d+\.weight|fc2_bias)", r"encoder.layers.\1.mlp.\2"),
        (_DECODER + r"attentions\.0\.attn\.in_proj_(weight|bias)", r"decoder.layers.\1.self_attn.in_proj_\2"),
        (_DECODER + r"attentions\.0\.attn\.out_proj" + _W, r"decoder.layers.\1.self_attn.o_proj.\2"),
        (_DECODER + r"attentions\.1\." + _ATTENTION + _W, r"decoder.layers.\1.encoder_attn.\2.\3"),
        (_DECODER + r"norms\.0" + _W, r"decoder.layers.\1.self_attn_layer_norm.\2"),
        (_DECODER + r"norms\.1" + _W, r"decoder.layers.\1.encoder_attn_layer_norm.\2"),
        (_DECODER + r"norms\.2" + _W, r"decoder.layers.\1.final_layer_norm.\2"),
        (_DECODER + r"ffns\.0\.layers\.0\.0" + _W, r"decoder.layers.\1.mlp.fc1.\2"),
        (_DECODER + r"ffns\.0\.layers\.1" + _W, r"decoder.layers.\1.mlp.fc2.\2"),
        (_DECODER + r"ffns\.0\.(fc1_\d+\.weight|fc1_\d+\.bias|fc2_\d+\.weight|fc2_bias)", r"decoder.layers.\1.mlp.\2"),
        (_TRANSFORMER + r"decoder\.ref_point_head\.([02])" + _W, r"decoder.position_head.\1.\2"),
        (_TRANSFORMER + r"decoder\.norm" + _W, r"decoder.norm.\1"),
        (_TRANSFORMER + r"enc_output" + _W, r"proposal_projection.\1"),
        (_TRANSFORMER + r"enc_output_norm" + _W, r"proposal_norm.\1"),
        (_TRANSFORMER + r"query_embed\.weight", r"query_embedding.weight"),
        (r"bbox_head\.cls_branches\.(\d+)" + _W, r"class_branches.\1.\2"),
        (r"bbox_head\.reg_branches\.(\d+)\.0" + _W, r"box_branches.\1.layers.0.\2"),
        (r"bbox_head\.reg_branches\.(\d+)\.2" + _W, r"box_branches.\1.layers.1.\2"),
        (r"bbox_head\.reg_branches\.(\d+)\.4" + _W, r"box_branches.\1.layers.2.\2"),
        (r"bbox_head\.label_embedding\.weight", r"label_embedding.weight"),
    )
]
_SLICE = re.compile(r"(.+\.mlp)\.(fc1|fc2)_(\d+)\.(weight|bias)")
_FUSED = re.compile(r"(.+\.self_attn)\.in_proj_(weight|bias)")


def _number_of_maps(head: dict[str, torch.Tensor]) -> int:
    """How many of the backbone's maps the neck takes; the convolutions for further levels have a name of their own."""
    return sum(re.fullmatch(r"neck\.(?:0\.)?convs\.\d+\.conv\.weight", name) is not None for name in head)


def _translated(detector: Detector, file: str) -> dict[str, torch.Tensor]:
    """The head's tensors under the names of `InternImageDinoForObjectDetection`.

    Raises:
        ConversionError: if a name is no DINO's, or parts of one tensor do not fit.
    """
    maps = _number_of_maps(detector.head)
    result: dict[str, torch.Tensor] = {}
    slices: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    unknown = []
    for official, tensor in detector.head.items():
        target = next((m.expand(target) for pattern, target in _PATTERNS if (m := pattern.fullmatch(official))), None)
        if target is None:
            unknown.append(official)
            continue
        check_kind(official, tensor)
        if match := re.fullmatch(r"neck\.extra_(convs|norms)\.(\d+)\.(\w+)", target):
            target = f"neck.{match[1]}.{maps + int(match[2])}.{match[3]}"
        if match := _FUSED.fullmatch(target):
            if tensor.ndim == 0 or tensor.shape[0] % 3:
                raise ConversionError(
                    f"{file}: {official} has the shape {tuple(tensor.shape)}, expected three equal parts"
                )
            thirds = zip(("q", "k", "v"), tensor.chunk(3), strict=True)
            found = {f"{match[1]}.{part}_proj.{match[2]}": third for part, third in thirds}
        elif match := _SLICE.fullmatch(target):
            slices.setdefault((match[1], match[2], match[4]), {})[int(match[3])] = tensor
            continue
        else:
            found = {target.replace(".mlp.fc2_bias", ".mlp.fc2.bias"): tensor}
        if twice := found.keys() & result.keys():
            raise ConversionError(f"{file}: {min(twice)} is given twice, the second time as {official}")
        result |= found
    if unknown:
        raise ConversionError(f"{file} has entries that no DINO has: {listed(unknown)}")
    for (prefix, layer, kind), parts in slices.items():  # of the G model's `EfficientFFN`
        name = f"{prefix}.{layer}.{kind}"
        dimension = 1 if layer == "fc2" else 0
        try:
            joined = torch.cat([parts[i] for i in range(len(parts))], dimension)
        except (IndexError, KeyError, RuntimeError) as error:
            shapes = ", ".join(f"{i}: {tuple(part.shape)}" for i, part in sorted(parts.items()))
            raise ConversionError(f"{file}: the slices of {name} do not fit together: {shapes}") from error
        if name in result:
            raise ConversionError(f"{file}: {name} is given whole and in slices")
        result[name] = joined
    return result


def make_plan(source: Source, arguments: argparse.Namespace) -> Plan:
    return plan_for(source, read_detector(source, arguments))


def plan_for(source: Source, detector: Detector) -> Plan:
    """The conversion of a DINO.

    Raises:
        ConversionError: if names or shapes are none of a DINO's.
    """
    file, fields = source.file, detector.fields
    head = _translated(detector, str(file))

    def shape(name: str, dimensions: int) -> torch.Size:
        return shape_of(file, head, name, dimensions)

    def number_of(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in head if name.startswith(prefix)})

    def of_layers(which: str, attention: int, *path: str, default: Any) -> Any:
        """A field of the attention of the encoder's or the decoder's layers, which a list or the one dictionary holds."""
        layers = field(fields, "bbox_head", "transformer", which, "transformerlayers", "attn_cfgs")
        return (
            field(layers[attention] if isinstance(layers, list) and len(layers) > attention else layers, *path)
            or default
        )

    maps = _number_of_maps(detector.head)
    num_labels, width = shape("class_branches.0.weight", 2)
    released = source.released
    large = released is not None and released.variant in ("h", "g")
    denoising = field(fields, "bbox_head", "dn_cfg", default={})
    costs = field(fields, "train_cfg", "assigner", default={})
    with configuration_of(source):
        config = InternImageDinoConfig(
            backbone_config=detector_backbone(source, detector, [f"stage{i}" for i in range(5 - maps, 5)]),
            num_queries=shape("query_embedding.weight", 2)[0],
            d_model=width,
            encoder_layers=number_of("encoder.layers."),
            encoder_ffn_dim=shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
            encoder_attention_heads=of_layers("encoder", 0, "num_heads", default=8),
            encoder_n_points=of_layers("encoder", 0, "num_points", default=4),
            decoder_layers=number_of("decoder.layers."),
            decoder_ffn_dim=shape("decoder.layers.0.mlp.fc1.weight", 2)[0],
            decoder_attention_heads=of_layers("decoder", 1, "num_heads", default=8),
            decoder_n_points=of_layers("decoder", 1, "num_points", default=4),
            num_feature_levels=shape("level_embedding.weight", 2)[0],
            neck_groups=field(fields, "neck", "norm_cfg", "num_groups")
            or field(fields, "neck", 0, "norm_cfg", "num_groups", default=32),
            positional_embedding_temperature=field(
                fields, "bbox_head", "positional_encoding", "temperature", default=20
            ),
            num_denoising=field(denoising, "group_cfg", "num_dn_queries", default=1000 if large else 100),
            label_noise_ratio=field(denoising, "noise_scale", "label", default=0.5),
            box_noise_scale=field(denoising, "noise_scale", "box", default=1.0),
            class_cost=field(costs, "cls_cost", "weight", default=2.0),
            bbox_cost=field(costs, "reg_cost", "weight", default=5.0),
            giou_cost=field(costs, "iou_cost", "weight", default=2.0),
            class_loss_coefficient=field(fields, "bbox_head", "loss_cls", "loss_weight", default=1.0),
            bbox_loss_coefficient=field(fields, "bbox_head", "loss_bbox", "loss_weight", default=5.0),
            giou_loss_coefficient=field(fields, "bbox_head", "loss_iou", "loss_weight", default=2.0),
            focal_alpha=field(fields, "bbox_head", "loss_cls", "alpha", default=0.25),
            **label_names(source, num_labels),
        )
        if any("fc2_bias" in name for name in detector.head):
            config.official_ffn_slices = sum(
                name.startswith("bbox_head.transformer.encoder.layers.0.ffns.0.fc2_") and name.endswith(".weight")
                for name in detector.head
            )
    state_dict = {f"backbone.{name}": tensor for name, tensor in detector.backbone.items()} | head
    top_k = 100 if released is not None and released.name == "dino_4scale_internimage_t_1x_coco" else 300
    processor = image_processor(source, top_k=field(fields, "test_cfg", "max_per_img", default=top_k))
    return Plan(
        "dino",
        source,
        config,
        InternImageDinoForObjectDetection,
        state_dict,
        processor,
        _example_size(config.num_queries),
        ignored=detector.ignored,
    )


def _example_size(num_queries: int) -> int:
    """The side of a square image that has enough positions, 1/64 + 1/256 ... of its pixels, for the queries."""
    return max(128, 32 * -(-int((num_queries * 64) ** 0.5) // 32))


# ----------------------------------------------------------------------------------------------------------- reverse


def official_state_dict(model: InternImageDinoForObjectDetection) -> dict[str, torch.Tensor]:
    """A model's tensors under the names of the official code.

    Raises:
        ConversionError: if a name has no counterpart.
    """
    config = model.config
    composite = isinstance(config.backbone_config, InternImageCompositeConfig)
    maps, neck = model.neck.num_maps, "neck.0." if composite else "neck."
    result: dict[str, torch.Tensor] = {}
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if name.startswith("backbone."):
            continue
        if match := re.fullmatch(r"neck\.(convs|norms)\.(\d+)\.(\w+)", name):
            level, part = int(match[2]), "conv" if match[1] == "convs" else "gn"
            group = f"convs.{level}" if level < maps else f"extra_convs.{level - maps}"
            result[f"{neck}{group}.{part}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)", name):
            if match[1].startswith("decoder.") and match[2] == "q":
                parts = [state_dict[f"{match[1]}.{part}_proj.{match[3]}"] for part in "qkv"]
                layer = match[1].removeprefix("decoder.").removesuffix(".self_attn")
                official = f"bbox_head.transformer.decoder.{layer}.attentions.0.attn.in_proj_{match[3]}"
                result[official] = torch.cat(parts)
        elif match := re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", name):
            prefix = f"bbox_head.transformer.{match[1]}.layers.{match[2]}.ffns.0"
            slices = getattr(config, "official_ffn_slices", None)
            result |= _official_ffn(prefix, match[3], match[4], tensor, slices)
        else:
            official = next((m.expand(t) for p, t in _REVERSE if (m := p.fullmatch(name))), None)
            if official is None:
                raise ConversionError(f"{name} has no counterpart in the official code")
            result[official] = tensor
    return official_backbone(model.backbone) | result


def _official_ffn(
    prefix: str, layer: str, kind: str, tensor: torch.Tensor, slices: int | None
) -> dict[str, torch.Tensor]:
    if slices is None:
        return {f"{prefix}.layers.{'0.0' if layer == 'fc1' else '1'}.{kind}": tensor}
    if layer == "fc2" and kind == "bias":
        return {f"{prefix}.fc2_bias": tensor}
    parts = tensor.chunk(slices, 1 if layer == "fc2" else 0)
    return {f"{prefix}.{layer}_{i}.{kind}": part for i, part in enumerate(parts)}


_OFFICIAL_LAYER = r"bbox_head.transformer.\1.layers.\2."
_REVERSE = [
    (re.compile(pattern), target)
    for pattern, target in (
        (r"level_embedding\.weight", r"bbox_head.transformer.level_embeds"),
        (r"(encoder)\.layers\.(\d+)\.self_attn\." + _ATTENTION + _W, _OFFICIAL_LAYER + r"attentions.0.\3.\4"),
        (r"(decoder)\.layers\.(\d+)\.encoder_attn\." + _ATTENTION + _W, _OFFICIAL_LAYER + r"attentions.1.\3.\4"),
        (r"(decoder)\.layers\.(\d+)\.self_attn\.o_proj" + _W, _OFFICIAL_LAYER + r"attentions.0.attn.out_proj.\3"),
        (r"(encoder|decoder)\.layers\.(\d+)\.self_attn_layer_norm" + _W, _OFFICIAL_LAYER + r"norms.0.\3"),
        (r"(encoder)\.layers\.(\d+)\.final_layer_norm" + _W, _OFFICIAL_LAYER + r"norms.1.\3"),
        (r"(decoder)\.layers\.(\d+)\.encoder_attn_layer_norm" + _W, _OFFICIAL_LAYER + r"norms.1.\3"),
        (r"(decoder)\.layers\.(\d+)\.final_layer_norm" + _W, _OFFICIAL_LAYER + r"norms.2.\3"),
        (r"decoder\.position_head\.([02])" + _W, r"bbox_head.transformer.decoder.ref_point_head.\1.\2"),
        (r"decoder\.norm" + _W, r"bbox_head.transformer.decoder.norm.\1"),
        (r"proposal_projection" + _W, r"bbox_head.transformer.enc_output.\1"),
        (r"proposal_norm" + _W, r"bbox_head.transformer.enc_output_norm.\1"),
        (r"query_embedding\.weight", r"bbox_head.transformer.query_embed.weight"),
        (r"class_branches\.(\d+)" + _W, r"bbox_head.cls_branches.\1.\2"),
        (r"box_branches\.(\d+)\.layers\.0" + _W, r"bbox_head.reg_branches.\1.0.\2"),
        (r"box_branches\.(\d+)\.layers\.1" + _W, r"bbox_head.reg_branches.\1.2.\2"),
        (r"box_branches\.(\d+)\.layers\.2" + _W, r"bbox_head.reg_branches.\1.4.\2"),
        (r"label_embedding\.weight", r"bbox_head.label_embedding.weight"),
    )
]
