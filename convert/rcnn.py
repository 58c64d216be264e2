"""The part of `convert.detection` for Mask R-CNN and Cascade Mask R-CNN: names, architecture and settings."""

import math
import re
from typing import Any

import torch

from internimage_hf import InternImageRcnnConfig, InternImageRcnnForInstanceSegmentation

from .conversion import Plan
from .detectors import Detector, detector_backbone, field, image_processor, label_names, official_backbone
from .errors import ConversionError, listed
from .source import Source, configuration_of, shape_of


# Official names and ours; {} is a number, and {stage} the number of the stage, which the official Mask R-CNN lacks.
_NAMES = [
    ("neck.lateral_convs.{}.conv", "neck.lateral_convs.{}"),
    ("neck.fpn_convs.{}.conv", "neck.output_convs.{}"),
    ("neck.lateral_convs.{}.ln", "neck.lateral_norms.{}"),
    ("neck.fpn_convs.{}.ln", "neck.output_norms.{}"),
    ("rpn_head.rpn_conv", "proposal_head.conv"),
    ("rpn_head.rpn_cls", "proposal_head.classifier"),
    ("rpn_head.rpn_reg", "proposal_head.regressor"),
    ("roi_head.bbox_head.{stage}.shared_convs.{}.conv", "box_heads.{stage}.convs.{}"),
    ("roi_head.bbox_head.{stage}.shared_convs.{}.bn", "box_heads.{stage}.norms.{}"),
    ("roi_head.bbox_head.{stage}.shared_fcs.{}", "box_heads.{stage}.fcs.{}"),
    ("roi_head.bbox_head.{stage}.fc_cls", "box_heads.{stage}.classifier"),
    ("roi_head.bbox_head.{stage}.fc_reg", "box_heads.{stage}.regressor"),
    ("roi_head.mask_head.{stage}.convs.{}.conv", "mask_heads.{stage}.convs.{}"),
    ("roi_head.mask_head.{stage}.upsample", "mask_heads.{stage}.upsample"),
    ("roi_head.mask_head.{stage}.conv_logits", "mask_heads.{stage}.classifier"),
]
_KIND = r"weight|bias|running_mean|running_var|num_batches_tracked"


def _renamed(name: str, forward: bool, stages: int) -> str | None:
    """The name of a head's tensor in the other of the two layouts; None if it has none."""
    for official, ours in _NAMES:
        if stages == 1:
            official = official.replace("{stage}.", "")
            ours = ours.replace("{stage}", "0")
        source, target = (official, ours) if forward else (ours, official)
        pattern = re.escape(source).replace(r"\{stage\}", r"(\d+)").replace(r"\{\}", r"(\d+)")
        if match := re.fullmatch(rf"{pattern}\.({_KIND})", name):
            *numbers, kind = match.groups()
            return target.replace("{stage}", "{}").format(*numbers) + f".{kind}"
    return None


def plan_for(source: Source, detector: Detector) -> Plan:
    """The conversion of a Mask R-CNN or Cascade Mask R-CNN.

    Raises:
        ConversionError: if names or shapes are none of theirs, or the configuration has a setting that the model lacks.
    """
    file, fields = source.file, detector.fields
    indices = {m[1] for name in detector.head if (m := re.match(r"roi_head\.bbox_head\.(\d+)\.", name))}
    stages = max(len(indices), 1)
    head, unknown = {}, []
    for official, tensor in detector.head.items():
        name = _renamed(official, True, stages)
        if name is None:
            unknown.append(official)
        else:
            head[name] = tensor
    if unknown:
        raise ConversionError(f"{file} has entries that no Mask R-CNN has: {listed(unknown)}")

    def shape(name: str, dimensions: int) -> torch.Size:
        return shape_of(file, head, name, dimensions)

    def number_of(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in head if name.startswith(prefix)})

    maps = number_of("neck.lateral_convs.")
    width = shape("neck.lateral_convs.0.weight", 4)[0]
    num_labels = shape("box_heads.0.classifier.weight", 2)[0] - 1  # the last row is the background
    convs = number_of("box_heads.0.convs.")
    pooled = shape("box_heads.0.convs.0.weight", 4)[0] if convs else width
    if num_labels < 1:
        raise ConversionError(f"{file} has no class but the background")
    with configuration_of(source):
        _check_settings(fields, stages)
        settings = {
            "backbone_config": detector_backbone(source, detector, [f"stage{i}" for i in range(5 - maps, 5)]),
            "fpn_hidden_size": width,
            "fpn_layer_norm": any(name.startswith("neck.lateral_norms.") for name in head),
            "num_box_convs": convs,
            "num_box_fcs": number_of("box_heads.0.fcs."),
            "box_hidden_size": shape("box_heads.0.fcs.0.weight", 2)[0],
            "box_pool_size": math.isqrt(shape("box_heads.0.fcs.0.weight", 2)[1] // pooled),
            "class_agnostic_boxes": shape("box_heads.0.regressor.weight", 2)[0] == 4 and num_labels > 1,
            "num_mask_convs": number_of("mask_heads.0.convs."),
            "mask_hidden_size": shape("mask_heads.0.upsample.weight", 4)[1],
            **({"box_conv_size": pooled} if convs else {}),
            **_settings(fields, stages),
            **label_names(source, num_labels),
        }
        config = InternImageRcnnConfig(**settings) if stages == 1 else InternImageRcnnConfig.cascade(**settings)
    state_dict = {f"backbone.{name}": tensor for name, tensor in detector.backbone.items()} | head
    return Plan(
        "rcnn",
        source,
        config,
        InternImageRcnnForInstanceSegmentation,
        state_dict,
        image_processor(source),
        ignored=detector.ignored,
    )


def _stage(value: Any, stage: int) -> Any:
    """The settings of a stage: Cascade Mask R-CNN has a list of them."""
    return value[stage] if isinstance(value, list) and stage < len(value) else value


# Settings of the official configurations with the one value that the model is built for, by their paths.
_FIXED: list[tuple[tuple[str, ...], tuple]] = [
    (("neck", "type"), ("FPN", "FPN_vitdet")),
    (("neck", "use_residual"), (True,)),
    (("neck", "add_extra_convs"), (False,)),
    (("rpn_head", "anchor_generator", "center_offset"), (0.0,)),
    (("rpn_head", "bbox_coder", "target_means"), ([0.0] * 4,)),
    (("rpn_head", "bbox_coder", "target_stds"), ([1.0] * 4,)),
    (("rpn_head", "loss_cls", "loss_weight"), (1.0,)),
    (("rpn_head", "loss_bbox", "type"), ("L1Loss", "SmoothL1Loss")),
    (("rpn_head", "loss_bbox", "loss_weight"), (1.0,)),
    (("roi_head", "bbox_roi_extractor", "roi_layer", "type"), ("RoIAlign",)),
    (("roi_head", "bbox_roi_extractor", "roi_layer", "sampling_ratio"), (0,)),
    (("roi_head", "mask_roi_extractor", "roi_layer", "type"), ("RoIAlign",)),
    (("roi_head", "mask_roi_extractor", "roi_layer", "sampling_ratio"), (0,)),
    (("train_cfg", "rpn", "sampler", "pos_fraction"), (0.5,)),
    (("test_cfg", "rpn", "nms", "type"), ("nms",)),
    (("test_cfg", "rpn", "min_bbox_size"), (0,)),
    (("test_cfg", "rcnn", "nms", "type"), ("nms",)),
    (("test_cfg", "rcnn", "mask_thr_binary"), (0.5,)),
]
_FIXED_OF_STAGES: list[tuple[tuple[str, str], tuple[str, ...], tuple]] = [
    (("roi_head", "bbox_head"), ("bbox_coder", "target_means"), ([0.0] * 4,)),
    (("roi_head", "bbox_head"), ("loss_cls", "loss_weight"), (1.0,)),
    (("roi_head", "bbox_head"), ("loss_bbox", "type"), ("L1Loss", "GIoULoss")),
    (("roi_head", "mask_head"), ("loss_mask", "loss_weight"), (1.0,)),
    (("train_cfg", "rcnn"), ("sampler", "add_gt_as_proposals"), (True,)),
]


def _check_settings(fields: dict[str, Any], stages: int) -> None:
    """Raises ValueError for a setting that the model lacks, for instance soft non-maximum suppression."""
    found = [(path, field(fields, *path), allowed) for path, allowed in _FIXED]
    for place, path, allowed in _FIXED_OF_STAGES:
        for stage in range(stages):
            found.append(((*place, *path), field(_stage(field(fields, *place), stage), *path), allowed))
    strides = field(fields, "rpn_head", "anchor_generator", "strides")
    for name in ("bbox_roi_extractor", "mask_roi_extractor"):
        pooled = field(fields, "roi_head", name, "featmap_strides", default=[])
        expected = (strides or InternImageRcnnConfig.feature_strides)[: len(pooled)]
        found.append((("roi_head", name, "featmap_strides"), pooled, (list(expected),)))
    for stage in range(stages):
        head = _stage(field(fields, "roi_head", "bbox_head"), stage)
        is_giou = field(head, "loss_bbox", "type") == "GIoULoss"
        # the loss of overlaps is one on boxes, the others are on deltas
        decoded = field(head, "reg_decoded_bbox", default=None if head is None else False)
        found.append((("roi_head", "bbox_head", "reg_decoded_bbox"), decoded, (is_giou,)))
    for path, value, allowed in found:
        value = list(value) if isinstance(value, tuple) else value
        if value is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"`{'.'.join(path)}` must be {expected}, got {value!r}")


def _settings(fields: dict[str, Any], stages: int) -> dict[str, Any]:
    """What the official dictionary says and tensors do not; what it leaves out is as the authors have it."""

    def of_stages(*path: str) -> list:
        """A setting of all stages, or nothing where one lacks it."""
        values = [field(_stage(field(fields, *path[:2]), stage), *path[2:]) for stage in range(stages)]
        return [] if None in values else values

    losses = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "GIoULoss": "giou", None: None}
    box_losses, low_quality, numbers, fractions, weights = (
        of_stages("roi_head", "bbox_head", "loss_bbox", "type"),
        of_stages("train_cfg", "rcnn", "assigner", "match_low_quality"),
        of_stages("train_cfg", "rcnn", "sampler", "num"),
        of_stages("train_cfg", "rcnn", "sampler", "pos_fraction"),
        of_stages("roi_head", "bbox_head", "loss_bbox", "loss_weight"),
    )
    for name, values in (
        ("loss_bbox.type", box_losses),
        ("assigner.match_low_quality", low_quality),
        ("sampler.num", numbers),
        ("sampler.pos_fraction", fractions),
        ("loss_bbox.loss_weight", weights),
    ):
        if any(value != values[0] for value in values):
            raise ValueError(f"`{name}` must be the same in all stages, got {values}")

    def first(values: list) -> Any:
        return values[0] if values else None

    settings = {
        "feature_strides": field(fields, "rpn_head", "anchor_generator", "strides"),
        "anchor_scales": field(fields, "rpn_head", "anchor_generator", "scales"),
        "anchor_ratios": field(fields, "rpn_head", "anchor_generator", "ratios"),
        "rpn_pre_nms_top_n": field(fields, "test_cfg", "rpn", "nms_pre"),
        "rpn_post_nms_top_n": field(fields, "test_cfg", "rpn", "max_per_img"),
        "rpn_pre_nms_top_n_training": field(fields, "train_cfg", "rpn_proposal", "nms_pre"),
        "rpn_post_nms_top_n_training": field(fields, "train_cfg", "rpn_proposal", "max_per_img"),
        "rpn_nms_threshold": field(fields, "test_cfg", "rpn", "nms", "iou_threshold"),
        "rpn_positive_iou": field(fields, "train_cfg", "rpn", "assigner", "pos_iou_thr"),
        "rpn_negative_iou": field(fields, "train_cfg", "rpn", "assigner", "neg_iou_thr"),
        "rpn_num_samples": field(fields, "train_cfg", "rpn", "sampler", "num"),
        "rpn_allowed_border": field(fields, "train_cfg", "rpn", "allowed_border"),
        "rpn_box_loss": losses[field(fields, "rpn_head", "loss_bbox", "type")],
        "finest_scale": field(fields, "roi_head", "bbox_roi_extractor", "finest_scale"),
        "box_stds": of_stages("roi_head", "bbox_head", "bbox_coder", "target_stds"),
        "box_iou_thresholds": of_stages("train_cfg", "rcnn", "assigner", "pos_iou_thr"),
        "stage_loss_weights": field(fields, "roi_head", "stage_loss_weights"),
        "match_low_quality_boxes": first(low_quality),
        "num_samples": first(numbers),
        "positive_fraction": first(fractions),
        "box_loss": losses[first(box_losses)],
        "box_loss_weight": first(weights),
        "mask_pool_size": field(fields, "roi_head", "mask_roi_extractor", "roi_layer", "output_size"),
        "score_threshold": field(fields, "test_cfg", "rcnn", "score_thr"),
        "nms_threshold": field(fields, "test_cfg", "rcnn", "nms", "iou_threshold"),
        "max_detections": field(fields, "test_cfg", "rcnn", "max_per_img"),
    }
    return {name: value for name, value in settings.items() if value not in (None, [])}


def official_state_dict(model: InternImageRcnnForInstanceSegmentation) -> dict[str, torch.Tensor]:
    """A model's tensors under the names of the official code.

    Raises:
        ConversionError: if a name has no counterpart.
    """
    result = official_backbone(model.backbone)
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone."):
            continue
        official = _renamed(name, False, len(model.box_heads))
        if official is None:
            raise ConversionError(f"{name} has no counterpart in the official code")
        result[official] = tensor
    return result
