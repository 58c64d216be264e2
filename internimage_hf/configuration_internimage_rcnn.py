# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Configuration of Mask R-CNN and Cascade Mask R-CNN as the authors of InternImage trained them."""

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_backbone import backbone_config_from
from .configuration_base import InternImageBaseConfig, is_int, is_number
from .configuration_internimage import InternImageConfig


# What Cascade Mask R-CNN (`cascade_internimage_*_fpn_*_coco.py`) has different from Mask R-CNN.
_CASCADE: dict[str, Any] = {
    "box_stds": [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]],
    "box_iou_thresholds": [0.5, 0.6, 0.7],
    "stage_loss_weights": [1.0, 0.5, 0.25],
    "match_low_quality_boxes": False,
    "num_box_convs": 4,
    "num_box_fcs": 1,
    "box_loss": "giou",
    "box_loss_weight": 10.0,
    "rpn_box_loss": "smooth_l1",
    "rpn_allowed_border": 0,
    "rpn_post_nms_top_n_training": 2000,
}


class InternImageRcnnConfig(InternImageBaseConfig):
    r"""
    Configuration of an [`InternImageRcnnForInstanceSegmentation`]. The defaults are Mask R-CNN with InternImage-T; with
    `InternImageRcnnConfig.cascade()` they are Cascade Mask R-CNN. One entry of `box_stds` is one stage of box heads.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Of any model that `AutoBackbone` knows, with one feature
            map per entry of `feature_strides` but the last ones. By default InternImage-T as the authors trained it.
        feature_strides (`list[int]`, defaults to `[4, 8, 16, 32, 64]`): Strides of the backbone's maps, then of the levels
            that subsampling adds to the feature pyramid.
        fpn_hidden_size (`int`, defaults to 256): Channels of the feature pyramid.
        fpn_layer_norm (`bool`, defaults to `False`): Whether a LayerNorm takes the place of the bias of each convolution of the
            feature pyramid, as with FlashInternImage.
        anchor_scales (`list[float]`, defaults to `[8.0]`): Sides of the anchors over the stride of their level.
        anchor_ratios (`list[float]`, defaults to `[0.5, 1.0, 2.0]`): Heights of the anchors over their widths.
        rpn_pre_nms_top_n (`int`, defaults to 1000): Proposals per level before non-maximum suppression.
        rpn_post_nms_top_n (`int`, defaults to 1000): Proposals per image after it.
        rpn_pre_nms_top_n_training, rpn_post_nms_top_n_training (`int`, default to 2000 and 1000): The same in training.
        rpn_nms_threshold (`float`, defaults to 0.7): IoU of proposals above which the worse one is dropped.
        rpn_positive_iou, rpn_negative_iou (`float`, default to 0.7 and 0.3): IoU with an object from which an anchor is a
            positive example, and below which it is a negative one. The best anchors of an object with at least
            `rpn_negative_iou` are positive, too.
        rpn_num_samples (`int`, defaults to 256): Anchors per image that the loss samples, at most half of them positive.
        rpn_allowed_border (`int`, defaults to -1): Pixels by which an anchor may leave the image to take part in the loss;
            -1 for any number.
        rpn_box_loss (`"l1"` or `"smooth_l1"`): Box loss of the proposals; smooth L1 has the beta 1/9.
        finest_scale (`int`, defaults to 56): Regions of less than twice this size are pooled from the first level, of
            less than four times from the second, and so on.
        box_stds (`list[list[float]]`): Divisors of the box deltas of each stage.
        box_iou_thresholds (`list[float]`): IoU with an object from which a proposal is a positive example, per stage.
        stage_loss_weights (`list[float]`): Weight of each stage's losses.
        match_low_quality_boxes (`bool`, defaults to `True`): Whether the best proposals of an object are positive also
            where a better object overlaps them.
        num_samples (`int`, defaults to 512): Proposals per image that the box loss samples.
        positive_fraction (`float`, defaults to 0.25): The largest share of positive ones among them.
        num_box_convs (`int`, defaults to 0): 3x3 convolutions with BatchNorm in a box head.
        num_box_fcs (`int`, defaults to 2): Fully connected layers in a box head.
        box_hidden_size (`int`, defaults to 1024): Width of these.
        box_conv_size (`int`, defaults to 256): Channels of the box head's convolutions.
        class_agnostic_boxes (`bool`, defaults to `False`): Whether a box head predicts one box for all classes.
        box_loss (`"l1"` or `"giou"`): Loss of the boxes: on the deltas, or on the decoded boxes.
        box_loss_weight (`float`, defaults to 1.0): Weight of this loss.
        num_mask_convs (`int`, defaults to 4): 3x3 convolutions in a mask head.
        mask_hidden_size (`int`, defaults to 256): Channels of these.
        box_pool_size, mask_pool_size (`int`, default to 7 and 14): Sides of what the heads get of a region; masks are
            twice as large.
        score_threshold (`float`, defaults to 0.05): Detections need a higher score.
        nms_threshold (`float`, defaults to 0.5): IoU of detections of a class above which the worse one is dropped.
        max_detections (`int`, defaults to 100): Detections per image.
        batch_norm_eps (`float`, defaults to 1e-5): Epsilon of the BatchNorms of the box heads.

    Raises:
        ValueError: if a field has a value that no model can be built from; the message names field and value.
    """

    model_type = "internimage_rcnn"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    feature_strides: list[int] | tuple[int, ...] = (4, 8, 16, 32, 64)
    fpn_hidden_size: int = 256
    fpn_layer_norm: bool = False
    anchor_scales: list[float] | tuple[float, ...] = (8.0,)
    anchor_ratios: list[float] | tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms_top_n: int = 1000
    rpn_post_nms_top_n: int = 1000
    rpn_pre_nms_top_n_training: int = 2000
    rpn_post_nms_top_n_training: int = 1000
    rpn_nms_threshold: float = 0.7
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_num_samples: int = 256
    rpn_allowed_border: int = -1
    rpn_box_loss: str = "l1"
    finest_scale: int = 56
    box_stds: list[list[float]] | tuple[tuple[float, ...], ...] = ((0.1, 0.1, 0.2, 0.2),)
    box_iou_thresholds: list[float] | tuple[float, ...] = (0.5,)
    stage_loss_weights: list[float] | tuple[float, ...] = (1.0,)
    match_low_quality_boxes: bool = True
    num_samples: int = 512
    positive_fraction: float = 0.25
    num_box_convs: int = 0
    num_box_fcs: int = 2
    box_hidden_size: int = 1024
    box_conv_size: int = 256
    class_agnostic_boxes: bool = False
    box_loss: str = "l1"
    box_loss_weight: float = 1.0
    num_mask_convs: int = 4
    mask_hidden_size: int = 256
    box_pool_size: int = 7
    mask_pool_size: int = 14
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    batch_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = InternImageConfig.from_variant(
                "t",
                layer_scale_init_value=1.0,
                drop_path_rate=0.2,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            )
        self.backbone_config = backbone_config_from(self.backbone_config)
        for name in (
            "feature_strides",
            "anchor_scales",
            "anchor_ratios",
            "box_stds",
            "box_iou_thresholds",
            "stage_loss_weights",
        ):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        self._validate()
        self.box_stds = [list(stds) for stds in self.box_stds]
        super().__post_init__(**kwargs)

    @classmethod
    def cascade(cls, **kwargs) -> "InternImageRcnnConfig":
        """Cascade Mask R-CNN with three stages; `kwargs` are fields that differ from the authors'."""
        return cls(**{**_CASCADE, **kwargs})

    def _validate(self) -> None:
        require = self._require

        def are_positive(values: Any) -> bool:
            return (
                isinstance(values, (list, tuple)) and len(values) > 0 and all(is_number(v) and v > 0 for v in values)
            )

        require(
            isinstance(self.feature_strides, list)
            and len(self.feature_strides) > 0
            and all(is_int(stride, 1) for stride in self.feature_strides),
            "feature_strides",
            "a list of positive integers",
        )
        for name in (
            "fpn_hidden_size",
            "rpn_pre_nms_top_n",
            "rpn_post_nms_top_n",
            "rpn_pre_nms_top_n_training",
            "rpn_post_nms_top_n_training",
            "rpn_num_samples",
            "finest_scale",
            "num_samples",
            "num_box_fcs",
            "box_hidden_size",
            "box_conv_size",
            "mask_hidden_size",
            "box_pool_size",
            "mask_pool_size",
            "max_detections",
        ):
            require(is_int(getattr(self, name), 1), name, "a positive integer")
        for name in ("num_box_convs", "num_mask_convs"):
            require(is_int(getattr(self, name), 0), name, "an integer of at least 0")
        require(is_int(self.rpn_allowed_border, -1), "rpn_allowed_border", "an integer of at least 0, or -1")
        require(is_number(self.batch_norm_eps) and self.batch_norm_eps > 0, "batch_norm_eps", "a positive number")
        for name in ("anchor_scales", "anchor_ratios"):
            require(are_positive(getattr(self, name)), name, "a list of positive numbers")
        for name in (
            "rpn_nms_threshold",
            "rpn_positive_iou",
            "rpn_negative_iou",
            "positive_fraction",
            "score_threshold",
            "nms_threshold",
        ):
            require(is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, name, "a number in [0, 1]")
        require(
            isinstance(self.box_stds, list)
            and len(self.box_stds) > 0
            and all(are_positive(stds) and len(stds) == 4 for stds in self.box_stds),
            "box_stds",
            "a list of four positive numbers for each stage",
        )
        stages = len(self.box_stds)
        for name in ("box_iou_thresholds", "stage_loss_weights"):
            values = getattr(self, name)
            require(
                isinstance(values, list) and len(values) == stages and all(is_number(v) and v >= 0 for v in values),
                name,
                f"a list with a number of at least 0 for each of the {stages} stages that `box_stds` has",
            )
        require(self.rpn_box_loss in ("l1", "smooth_l1"), "rpn_box_loss", '"l1" or "smooth_l1"')
        require(self.box_loss in ("l1", "giou"), "box_loss", '"l1" or "giou"')
        require(is_number(self.box_loss_weight) and self.box_loss_weight >= 0, "box_loss_weight", "at least 0")
        for name in ("fpn_layer_norm", "match_low_quality_boxes", "class_agnostic_boxes"):
            require(isinstance(getattr(self, name), bool), name, "a bool")


__all__ = ["InternImageRcnnConfig"]
