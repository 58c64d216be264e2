# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Mask R-CNN (https://arxiv.org/abs/1703.06870) and Cascade Mask R-CNN (https://arxiv.org/abs/1906.09756).

Known as: `MaskRCNN` and `CascadeRCNN` of mmdetection 2.28, in the configurations `mask_rcnn_internimage_*` and
`cascade_internimage_*` of OpenGVLab/InternImage. One class serves both: Mask R-CNN has one stage of box heads, Cascade Mask
R-CNN three, each of which starts from the boxes of the one before.

Boxes are (x1, y1, x2, y2) in pixels of the image without its padding, float32 at least, whatever the dtype of the model. Class
i of `config.id2label` is row i of the class logits; the last row is the background.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .compatibility import is_sharded_away, none_is_unset
from .configuration_internimage_rcnn import InternImageRcnnConfig
from .modeling_backbone import InternImageHeadPreTrainedModel, load_backbone
from .modeling_internimage import InternImageLayerNorm2d
from .region_ops import (
    box_giou,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    nms,
    roi_align,
    roi_align_masks,
)


# Of the feature pyramid's LayerNorms.
_FPN_EPS = 1e-5
# Of the smooth L1 loss of the proposals.
_RPN_BETA = 1 / 9
# Weight of the losses on the maps of a composite backbone's assisting encoder.
_AUXILIARY_WEIGHT = 0.5


@dataclass
class InternImageRcnnOutput(ModelOutput):
    """
    Detections are sorted by falling score and filled up to `config.max_detections` with the label -1 and zeros. In training
    mode with labels there are losses alone.

    Args:
        loss: sum of the losses, if there are labels.
        loss_dict: its weighted parts: `loss_rpn_cls`, `loss_rpn_bbox`, `loss_cls`, `loss_bbox`, `loss_mask`, the last three
            as `s0.loss_cls` ... where there are several stages; with `auxiliary.` before it, those on the maps of a composite
            backbone's assisting encoder.
        scores: (batch, max_detections).
        labels: (batch, max_detections), classes of `config.id2label`, or -1.
        boxes: (batch, max_detections, 4), x1, y1, x2, y2 relative to the image without its padding, in [0, 1].
        masks: (batch, max_detections, 28, 28), probabilities within the box for the detection's own class.
        hidden_states: of the backbone, on request.
        intermediates: on request, a dictionary: `feature_maps`, `rpn_logits` and `rpn_deltas` (tuples, one map per level),
            `proposals` (a tuple of (proposals, 5) per image: box and score); per stage `rois` ((regions, 5): index of the
            image, and box), `roi_features`, `class_logits` and `box_deltas`; `mask_rois`, and `mask_logits` per stage.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    scores: torch.FloatTensor | None = None
    labels: torch.LongTensor | None = None
    boxes: torch.FloatTensor | None = None
    masks: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    intermediates: dict[str, Any] | None = None


def _with_initialization(module: nn.Module, initialization: str | float) -> nn.Module:
    """A layer that tells `_init_weights` how to fill it: "xavier", "kaiming", or a standard deviation."""
    module.initialization = initialization
    return module


class InternImageRcnnFeaturePyramid(nn.Module):
    """Feature pyramid (https://arxiv.org/abs/1612.03144): maps of the backbone -> a map of equal width per stride."""

    def __init__(self, config: InternImageRcnnConfig, channels: list[int]):
        super().__init__()
        size, bias = config.fpn_hidden_size, not config.fpn_layer_norm
        self.num_extra_levels = len(config.feature_strides) - len(channels)
        self.lateral_convs = nn.ModuleList(
            _with_initialization(nn.Conv2d(c, size, 1, bias=bias), "xavier") for c in channels
        )
        self.output_convs = nn.ModuleList(
            _with_initialization(nn.Conv2d(size, size, 3, padding=1, bias=bias), "xavier") for _ in channels
        )
        if config.fpn_layer_norm:
            self.lateral_norms = nn.ModuleList(InternImageLayerNorm2d(size, eps=_FPN_EPS) for _ in channels)
            self.output_norms = nn.ModuleList(InternImageLayerNorm2d(size, eps=_FPN_EPS) for _ in channels)
        else:
            self.lateral_norms = self.output_norms = None

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        maps = self._convolved(self.lateral_convs, self.lateral_norms, feature_maps)
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + nn.functional.interpolate(maps[i], size=maps[i - 1].shape[2:], mode="nearest")
        maps = self._convolved(self.output_convs, self.output_norms, maps)
        for _ in range(self.num_extra_levels):
            maps.append(maps[-1][:, :, ::2, ::2])
        return tuple(maps)

    @staticmethod
    def _convolved(
        convs: nn.ModuleList, norms: nn.ModuleList | None, maps: tuple[torch.Tensor, ...] | list[torch.Tensor]
    ) -> list[torch.Tensor]:
        maps = [conv(feature_map) for conv, feature_map in zip(convs, maps, strict=True)]
        return maps if norms is None else [norm(m) for norm, m in zip(norms, maps, strict=True)]


class InternImageRcnnProposalHead(nn.Module):
    """Region proposal network: a logit and four deltas per anchor -> (N, anchors, H, W) and (N, anchors * 4, H, W)."""

    def __init__(self, config: InternImageRcnnConfig):
        super().__init__()
        size, anchors = config.fpn_hidden_size, len(config.anchor_ratios) * len(config.anchor_scales)
        self.conv = _with_initialization(nn.Conv2d(size, size, 3, padding=1), 0.01)
        self.classifier = _with_initialization(nn.Conv2d(size, anchors, 1), 0.01)
        self.regressor = _with_initialization(nn.Conv2d(size, anchors * 4, 1), 0.01)

    def forward(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states = nn.functional.relu(self.conv(feature_map))
        return self.classifier(hidden_states), self.regressor(hidden_states)


class InternImageRcnnBoxHead(nn.Module):
    """Class logits (R, labels + 1), the background last, and deltas (R, labels or 1, 4) of regions (R, C, 7, 7)."""

    def __init__(self, config: InternImageRcnnConfig):
        super().__init__()
        channels = config.fpn_hidden_size
        self.convs, self.norms, self.fcs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(config.num_box_convs):
            conv = nn.Conv2d(channels, config.box_conv_size, 3, padding=1, bias=False)
            self.convs.append(_with_initialization(conv, "kaiming"))
            self.norms.append(nn.BatchNorm2d(config.box_conv_size, eps=config.batch_norm_eps))
            channels = config.box_conv_size
        features = channels * config.box_pool_size**2
        for _ in range(config.num_box_fcs):
            self.fcs.append(_with_initialization(nn.Linear(features, config.box_hidden_size), "xavier"))
            features = config.box_hidden_size
        boxes = 1 if config.class_agnostic_boxes else config.num_labels
        self.classifier = _with_initialization(nn.Linear(features, config.num_labels + 1), 0.01)
        self.regressor = _with_initialization(nn.Linear(features, boxes * 4), 0.001)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden_states = conv(hidden_states)
            if len(hidden_states):  # the statistics of no regions would be NaN
                hidden_states = norm(hidden_states)
            hidden_states = nn.functional.relu(hidden_states)
        hidden_states = hidden_states.flatten(1)
        for fc in self.fcs:
            hidden_states = nn.functional.relu(fc(hidden_states))
        deltas = self.regressor(hidden_states)
        return self.classifier(hidden_states), deltas.view(len(deltas), self.regressor.out_features // 4, 4)


class InternImageRcnnMaskHead(nn.Module):
    """Mask logits of every class: (R, C, 14, 14) -> (R, labels, 28, 28)."""

    def __init__(self, config: InternImageRcnnConfig):
        super().__init__()
        channels, size = config.fpn_hidden_size, config.mask_hidden_size
        self.convs = nn.ModuleList()
        for _ in range(config.num_mask_convs):
            self.convs.append(_with_initialization(nn.Conv2d(channels, size, 3, padding=1), "kaiming"))
            channels = size
        self.upsample = _with_initialization(nn.ConvTranspose2d(channels, size, 2, stride=2), "kaiming")
        self.classifier = _with_initialization(nn.Conv2d(size, config.num_labels, 1), "kaiming")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            hidden_states = nn.functional.relu(conv(hidden_states))
        return self.classifier(nn.functional.relu(self.upsample(hidden_states)))


class InternImageRcnnPreTrainedModel(InternImageHeadPreTrainedModel):
    """Initialisation, and the layers that are not split over devices."""

    config: InternImageRcnnConfig
    config_class = InternImageRcnnConfig
    _no_split_modules = ["InternImageLayer", "InternImageRcnnBoxHead", "InternImageRcnnMaskHead"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As mmdetection does; the backbone fills itself."""
        if is_sharded_away(module):
            return
        super()._init_weights(module)
        initialization = getattr(module, "initialization", None)
        if initialization == "xavier":
            init.xavier_uniform_(module.weight)
        elif initialization == "kaiming":
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif initialization is not None:
            init.normal_(module.weight, std=initialization)
        if initialization is not None and module.bias is not None:
            init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------- anchors, matching, sampling


def _anchors(config: InternImageRcnnConfig, level: int, feature_map: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The anchors of a level, those of a cell after each other: (H * W * anchors, 4). Cells begin at multiples of the stride."""
    stride = config.feature_strides[level]
    device = feature_map.device
    height, width = feature_map.shape[2:]
    ratios = torch.tensor(config.anchor_ratios, dtype=dtype, device=device).sqrt()
    scales = torch.tensor(config.anchor_scales, dtype=dtype, device=device) * stride / 2
    half = (torch.stack([1 / ratios, ratios], 1)[:, None] * scales[:, None]).view(-1, 2)  # (anchors, width and height)
    y, x = torch.meshgrid(
        torch.arange(height, dtype=dtype, device=device) * stride,
        torch.arange(width, dtype=dtype, device=device) * stride,
        indexing="ij",
    )
    centers = torch.stack([x, y], -1).view(-1, 1, 2)
    return torch.cat([centers - half, centers + half], -1).view(-1, 4)


def _match(boxes: torch.Tensor, targets: torch.Tensor, positive: float, negative: float, rescue: bool) -> torch.Tensor:
    """Which object each box is an example of: i + 1 for object i, 0 for the background, -1 for neither.

    With `rescue`, the best boxes of an object are examples of it if their IoU is at least `negative`.
    """
    if len(targets) == 0 or len(boxes) == 0:
        return torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
    iou = box_iou(targets, boxes)
    best, which = iou.max(0)
    matched = torch.where(best < negative, 0, -1)
    matched = torch.where(best >= positive, which + 1, matched)
    if rescue:
        highest = iou.amax(1, keepdim=True)
        rescued = (iou == highest) & (highest >= negative)
        last = len(targets) - rescued.flip(0).int().argmax(0)  # of several objects the last one, plus 1
        matched = torch.where(rescued.any(0), last, matched)
    return matched


def _sample(matched: torch.Tensor, number: int, positive_fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws at most `number` boxes, of them at most that share positive: indices of positive and of negative ones."""

    def draw(candidates: torch.Tensor, limit: int) -> torch.Tensor:
        if len(candidates) <= limit:
            return candidates
        return candidates[torch.randperm(len(candidates), device=candidates.device)[:limit]]

    positive = draw((matched > 0).nonzero()[:, 0], int(number * positive_fraction))
    return positive, draw((matched == 0).nonzero()[:, 0], number - len(positive))


@dataclass
class _Sampled:
    """The regions of a batch that a stage's losses are computed on.

    Args:
        rois: (R, 5): index of the image, and box.
        labels: (R,), the number of classes for background.
        objects: (R,) the object of a positive region, counted over the batch, and -1.
        added: (R,) whether a region is an object's own box, which was added to the proposals.
    """

    rois: torch.Tensor
    labels: torch.Tensor
    objects: torch.Tensor
    added: torch.Tensor


def _rois(boxes: list[torch.Tensor]) -> torch.Tensor:
    """Boxes of several images with the index of their image: (R, 5)."""
    return torch.cat([nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])


class InternImageRcnnForInstanceSegmentation(InternImageRcnnPreTrainedModel):
    """Mask R-CNN, or Cascade Mask R-CNN, on any backbone: boxes, labels and masks of objects.

    The authors trained the BatchNorms of Cascade Mask R-CNN's box heads with statistics over all processes:
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)` does so here.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: InternImageRcnnConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = load_backbone(config.backbone_config)
        channels = list(self.backbone.channels)
        if len(channels) > len(config.feature_strides):
            raise ValueError(
                f"`feature_strides` must have an entry for each of the {len(channels)} maps of the backbone "
                f"(`backbone_config.out_features`), got {config.feature_strides}"
            )
        self.num_pooled_levels = len(channels)
        self.neck = InternImageRcnnFeaturePyramid(config, channels)
        self.proposal_head = InternImageRcnnProposalHead(config)
        self.box_heads = nn.ModuleList(InternImageRcnnBoxHead(config) for _ in config.box_stds)
        self.mask_heads = nn.ModuleList(InternImageRcnnMaskHead(config) for _ in config.box_stds)
        self.post_init()

    @none_is_unset
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        pixel_mask: torch.LongTensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_intermediates: bool = False,
        **kwargs,
    ) -> InternImageRcnnOutput:
        r"""
        Args:
            pixel_values: normalised images, (batch, channels, height, width), padded at the right and at the bottom.
            pixel_mask: (batch, height, width), 1 where the image is and 0 where it is padded; absent: nothing is padded.
            labels: one dictionary per image: `class_labels` (objects,), `boxes` (objects, 4), each centre x, centre y,
                width, height relative to the image without its padding, and `masks` (objects, height, width), of the size of
                `pixel_values`.
            output_hidden_states: whether to return the backbone's hidden states.
            output_intermediates: whether to return `intermediates`.
            return_dict (`bool`, *optional*): whether to return an output object and not a tuple.

        Returns:
            An [`InternImageRcnnOutput`].

        Raises:
            ValueError: if an argument has a wrong shape, dtype, device or value; the message names it.
        """
        sizes = self._sizes(pixel_values, pixel_mask)
        targets = None if labels is None else self._targets(labels, pixel_values, sizes)
        options = {} if output_hidden_states is None else {"output_hidden_states": output_hidden_states}
        features = self.backbone(pixel_values, return_dict=True, **options)
        maps = self.neck(features.feature_maps)
        rpn_outputs = [self.proposal_head(feature_map) for feature_map in maps]

        loss, losses = None, None
        if targets is not None:
            losses = self._losses(maps, rpn_outputs, sizes, targets)
            auxiliary = getattr(features, "auxiliary_feature_maps", None)
            if self.training and auxiliary is not None:
                auxiliary = self.neck(auxiliary)
                weighted = self._losses(auxiliary, [self.proposal_head(m) for m in auxiliary], sizes, targets)
                losses |= {f"auxiliary.{name}": _AUXILIARY_WEIGHT * value for name, value in weighted.items()}
            loss = sum(losses.values())
        intermediates = {} if output_intermediates else None
        detections = {}
        if targets is None or not self.training:
            detections = self._detect(maps, rpn_outputs, sizes, intermediates)
        return InternImageRcnnOutput(
            loss=loss,
            loss_dict=losses,
            **detections,
            hidden_states=features.hidden_states,
            intermediates=intermediates,
        )

    # ------------------------------------------------------------------------------------------------ checks of arguments

    @staticmethod
    def _sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
        """Height and width of the images without their padding: (N, 2)."""
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` must have the shape (batch, channels, height, width), got {tuple(pixel_values.shape)}"
            )
        batch, _, height, width = pixel_values.shape
        if pixel_mask is None:
            return torch.tensor([[height, width]] * batch, device=pixel_values.device).view(batch, 2)
        if pixel_mask.shape != (batch, height, width):
            raise ValueError(
                f"`pixel_mask` must have the shape {(batch, height, width)} that `pixel_values` has, got "
                f"{tuple(pixel_mask.shape)}"
            )
        if pixel_mask.device != pixel_values.device:
            raise ValueError(
                f"`pixel_mask` must be on {pixel_values.device}, where `pixel_values` are, got {pixel_mask.device}"
            )
        mask = pixel_mask.bool()
        sizes = torch.stack([mask[:, :, 0].sum(1), mask[:, 0, :].sum(1)], 1)
        if not sizes.all():
            empty = (~sizes.all(1)).nonzero()[0].item()
            raise ValueError(
                f"`pixel_mask[{empty}]` must mark an image that begins in the upper left corner, got none"
            )
        return sizes

    def _targets(
        self, labels: list[dict[str, torch.Tensor]], pixel_values: torch.Tensor, sizes: torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        """The labels of each image: `boxes` as corners in pixels, `class_labels`, `masks`."""
        if not isinstance(labels, (list, tuple)) or len(labels) != len(pixel_values):
            got = f"{len(labels)} of them" if isinstance(labels, (list, tuple)) else type(labels).__name__
            raise ValueError(f"`labels` must be a list of {len(pixel_values)} dictionaries, one per image, got {got}")
        dtype = torch.promote_types(self.dtype, torch.float32)
        targets = []
        for i, (label, size) in enumerate(zip(labels, sizes, strict=True)):
            tensors = {}
            for name in ("class_labels", "boxes", "masks"):
                tensor = label.get(name) if hasattr(label, "get") else None
                if not isinstance(tensor, torch.Tensor):
                    raise ValueError(f"`labels[{i}]` must have a tensor `{name}`, got {type(tensor).__name__}")
                if tensor.device != pixel_values.device:
                    raise ValueError(
                        f"`labels[{i}]['{name}']` must be on {pixel_values.device}, where `pixel_values` are, got "
                        f"{tensor.device}"
                    )
                tensors[name] = tensor
            classes, boxes, masks = tensors.values()
            number = len(classes) if classes.ndim == 1 else -1
            expected = {
                "class_labels": "(objects,)",
                "boxes": (max(number, 0), 4),
                "masks": (max(number, 0), *pixel_values.shape[2:]),
            }
            for name, shape in expected.items():
                fits = number >= 0 if name == "class_labels" else tuple(tensors[name].shape) == shape
                # a tensor of no boxes has no second dimension where it was made from an empty list
                if not fits and not (name != "class_labels" and number == 0 and tensors[name].numel() == 0):
                    raise ValueError(
                        f"`labels[{i}]['{name}']` must have the shape {shape}, got {tuple(tensors[name].shape)}"
                    )
            if classes.is_floating_point() or classes.dtype == torch.bool:
                raise ValueError(f"`labels[{i}]['class_labels']` must be integers, got {classes.dtype}")
            outside = (classes < 0) | (classes >= self.num_labels)
            if outside.any():
                raise ValueError(
                    f"`labels[{i}]['class_labels']` must be from 0 to {self.num_labels - 1} (`config.num_labels` is "
                    f"{self.num_labels}), got {classes[outside][0].item()}"
                )
            boxes = boxes.to(dtype).view(-1, 4)
            bad = ~(boxes.isfinite().all(1) & (boxes[:, 2:] > 0).all(1))
            if bad.any():
                first = bad.nonzero()[0].item()
                raise ValueError(
                    f"`labels[{i}]['boxes'][{first}]` must be finite numbers with a width and a height above 0, got "
                    f"{[round(value, 6) for value in boxes[first].tolist()]}"
                )
            boxes = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
            boxes = boxes * size.flip(0).repeat(2)
            targets.append({"boxes": boxes, "class_labels": classes.long(), "masks": masks})
        return targets

    # ----------------------------------------------------------------------------------------------- proposals and regions

    @torch.no_grad()
    def _proposals(
        self,
        rpn_outputs: list[tuple[torch.Tensor, torch.Tensor]],
        sizes: torch.Tensor,
        pre_nms_top_n: int,
        post_nms_top_n: int,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Boxes (proposals, 4) and scores (proposals,) of each image, by falling score."""
        boxes, scores, levels = [], [], []
        for level, (logits, deltas) in enumerate(rpn_outputs):
            dtype = torch.promote_types(logits.dtype, torch.float32)
            level_scores = logits.permute(0, 2, 3, 1).flatten(1).to(dtype).sigmoid()  # (N, H * W * anchors)
            level_deltas = deltas.permute(0, 2, 3, 1).reshape(len(deltas), -1, 4)
            best, index = level_scores.topk(min(pre_nms_top_n, level_scores.shape[1]))
            level_deltas = level_deltas.gather(1, index[..., None].expand(-1, -1, 4)).to(dtype)
            anchors = _anchors(self.config, level, logits, dtype)[index]
            boxes.append(clip_boxes(decode_boxes(anchors, level_deltas, (1.0, 1.0, 1.0, 1.0)), sizes[:, None]))
            scores.append(best)
            levels.append(torch.full_like(index[0], level))
        boxes, scores, levels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels)
        result = []
        for image_boxes, image_scores in zip(boxes, scores, strict=True):
            valid = (image_boxes[:, 2:] > image_boxes[:, :2]).all(1)
            image_boxes, image_scores = image_boxes[valid], image_scores[valid]
            kept = nms(image_boxes, image_scores, levels[valid], self.config.rpn_nms_threshold, limit=post_nms_top_n)
            result.append((image_boxes[kept], image_scores[kept]))
        return result

    def _pool(self, maps: tuple[torch.Tensor, ...], rois: torch.Tensor, output_size: int) -> torch.Tensor:
        """What a head gets of each region: (R, C, output_size, output_size), each from the level that its size asks for."""
        sizes = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0).prod(1).sqrt()
        levels = (sizes / self.config.finest_scale + 1e-6).log2().floor().clamp(0, self.num_pooled_levels - 1)
        order = levels.argsort(stable=True)
        pooled = [
            roi_align(maps[level], rois[levels == level], output_size, 1 / self.config.feature_strides[level])
            for level in range(self.num_pooled_levels)
        ]
        return torch.cat(pooled)[order.argsort()]

    def _refine(
        self, stage: int, rois: torch.Tensor, deltas: torch.Tensor, classes: torch.Tensor, sizes: torch.Tensor
    ) -> torch.Tensor:
        """The boxes that a stage makes of its regions, for one class each: (R, 4), within the image."""
        boxes = decode_boxes(rois[:, 1:], _of_class(deltas, classes).to(rois.dtype), self.config.box_stds[stage])
        return clip_boxes(boxes, sizes[rois[:, 0].long()])

    # ------------------------------------------------------------------------------------------------------------ inference

    def _detect(
        self,
        maps: tuple[torch.Tensor, ...],
        rpn_outputs: list[tuple[torch.Tensor, torch.Tensor]],
        sizes: torch.Tensor,
        intermediates: dict[str, Any] | None,
    ) -> dict[str, torch.Tensor]:
        """`scores`, `labels`, `boxes` and `masks` of the output. Fills `intermediates` if it is a dictionary."""
        config = self.config
        proposals = self._proposals(rpn_outputs, sizes, config.rpn_pre_nms_top_n, config.rpn_post_nms_top_n)
        rois = _rois([boxes for boxes, _ in proposals])
        stages = []
        for stage, head in enumerate(self.box_heads):
            features = self._pool(maps, rois, config.box_pool_size)
            logits, deltas = head(features)
            stages.append((rois, features, logits, deltas))
            if stage + 1 < len(self.box_heads):
                boxes = self._refine(stage, rois, deltas, logits[:, :-1].argmax(1), sizes)
                rois = torch.cat([rois[:, :1], boxes], 1)
        logits = torch.stack([logits for _, _, logits, _ in stages]).mean(0)
        scores = logits.to(rois.dtype).softmax(1)[:, :-1]
        boxes = decode_boxes(rois[:, None, 1:], deltas.to(rois.dtype), config.box_stds[-1])
        image = rois[:, 0].long()
        boxes = clip_boxes(boxes, sizes[image][:, None])

        batch, limit = len(sizes), config.max_detections
        detections = {
            "scores": scores.new_zeros(batch, limit),
            "labels": torch.full((batch, limit), -1, device=scores.device),
            "boxes": scores.new_zeros(batch, limit, 4),
        }
        found = []
        for i in range(batch):
            region, label = ((scores > config.score_threshold) & (image == i)[:, None]).nonzero().unbind(1)
            image_scores = scores[region, label]
            image_boxes = boxes[region, label if boxes.shape[1] > 1 else 0]
            kept = nms(image_boxes, image_scores, label, config.nms_threshold, limit=limit)
            number = len(kept)
            detections["scores"][i, :number] = image_scores[kept]
            detections["labels"][i, :number] = label[kept]
            detections["boxes"][i, :number] = image_boxes[kept] / sizes[i].flip(0).repeat(2)
            found.append(image_boxes[kept])

        mask_rois = _rois(found)
        valid = detections["labels"] >= 0
        features = self._pool(maps, mask_rois, config.mask_pool_size)
        mask_logits = [_of_class(head(features), detections["labels"][valid]) for head in self.mask_heads]
        probabilities = torch.stack([logits.to(rois.dtype).sigmoid() for logits in mask_logits]).mean(0)
        side = 2 * config.mask_pool_size
        detections["masks"] = scores.new_zeros(batch, limit, side, side)
        detections["masks"][valid] = probabilities
        if intermediates is not None:
            logits, deltas = zip(*rpn_outputs, strict=True)
            intermediates |= {"feature_maps": maps, "rpn_logits": logits, "rpn_deltas": deltas}
            intermediates["proposals"] = tuple(torch.cat([boxes, scores[:, None]], 1) for boxes, scores in proposals)
            names = ("rois", "roi_features", "class_logits", "box_deltas")
            intermediates |= dict(zip(names, zip(*stages, strict=True), strict=True))
            intermediates |= {"mask_rois": mask_rois, "mask_logits": tuple(mask_logits)}
        return detections

    # --------------------------------------------------------------------------------------------------------------- losses

    def _losses(
        self,
        maps: tuple[torch.Tensor, ...],
        rpn_outputs: list[tuple[torch.Tensor, torch.Tensor]],
        sizes: torch.Tensor,
        targets: list[dict[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """The weighted losses by name."""
        config = self.config
        losses = self._rpn_losses(maps, rpn_outputs, sizes, targets)
        proposals = self._proposals(
            rpn_outputs, sizes, config.rpn_pre_nms_top_n_training, config.rpn_post_nms_top_n_training
        )
        proposals = [boxes for boxes, _ in proposals]
        objects = torch.cat([target["boxes"] for target in targets])
        for stage, weight in enumerate(config.stage_loss_weights):
            sampled = self._sample_regions(stage, proposals, targets)
            logits, deltas = self.box_heads[stage](self._pool(maps, sampled.rois, config.box_pool_size))
            stage_losses = self._box_losses(stage, sampled, logits, deltas, objects)
            stage_losses["loss_mask"] = self._mask_loss(stage, maps, sampled, targets)
            prefix = f"s{stage}." if len(self.box_heads) > 1 else ""
            losses |= {f"{prefix}{name}": weight * loss for name, loss in stage_losses.items()}
            if stage + 1 < len(self.box_heads):
                with torch.no_grad():
                    is_background = sampled.labels == self.num_labels
                    classes = torch.where(is_background, logits[:, :-1].argmax(1), sampled.labels)
                    boxes = self._refine(stage, sampled.rois, deltas, classes, sizes)
                    image = sampled.rois[:, 0]
                    proposals = [boxes[(image == i) & ~sampled.added] for i in range(len(sizes))]
        return losses

    def _rpn_losses(
        self,
        maps: tuple[torch.Tensor, ...],
        rpn_outputs: list[tuple[torch.Tensor, torch.Tensor]],
        sizes: torch.Tensor,
        targets: list[dict[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        config = self.config
        logits = torch.cat([logits.permute(0, 2, 3, 1).flatten(1) for logits, _ in rpn_outputs], 1)
        deltas = torch.cat([d.permute(0, 2, 3, 1).reshape(len(d), -1, 4) for _, d in rpn_outputs], 1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        anchors = torch.cat([_anchors(config, level, feature_map, dtype) for level, feature_map in enumerate(maps)])
        total, class_loss, box_loss = 0, 0, 0
        for i, (size, target) in enumerate(zip(sizes, targets, strict=True)):
            inside = torch.ones_like(anchors[:, 0], dtype=torch.bool)
            if config.rpn_allowed_border >= 0:
                border = config.rpn_allowed_border
                inside = (anchors[:, :2] >= -border).all(1) & (anchors[:, 2:] < size.flip(0) + border).all(1)
            inside = inside.nonzero()[:, 0]
            matched = _match(
                anchors[inside], target["boxes"], config.rpn_positive_iou, config.rpn_negative_iou, rescue=True
            )
            positive, negative = _sample(matched, config.rpn_num_samples, 0.5)
            total += max(len(positive), 1) + max(len(negative), 1)
            sampled = inside[torch.cat([positive, negative])]
            is_object = (torch.arange(len(sampled), device=sampled.device) < len(positive)).to(dtype)
            class_loss = class_loss + nn.functional.binary_cross_entropy_with_logits(
                logits[i, sampled].to(dtype), is_object, reduction="sum"
            )
            wanted = encode_boxes(
                anchors[inside[positive]], target["boxes"][matched[positive] - 1], (1.0, 1.0, 1.0, 1.0)
            )
            predicted = deltas[i, inside[positive]].to(dtype)
            if config.rpn_box_loss == "l1":
                box_loss = box_loss + nn.functional.l1_loss(predicted, wanted, reduction="sum")
            else:
                box_loss = box_loss + nn.functional.smooth_l1_loss(predicted, wanted, reduction="sum", beta=_RPN_BETA)
        return {"loss_rpn_cls": class_loss / total, "loss_rpn_bbox": box_loss / total}

    @torch.no_grad()
    def _sample_regions(
        self, stage: int, proposals: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]
    ) -> _Sampled:
        """Matches proposals with objects, adds the objects' own boxes, and samples."""
        config = self.config
        boxes, labels, objects, added = [], [], [], []
        first = 0  # object of the image, counted over the batch
        for image_boxes, target in zip(proposals, targets, strict=True):
            own = target["boxes"]
            threshold = config.box_iou_thresholds[stage]
            matched = _match(image_boxes, own, threshold, threshold, rescue=config.match_low_quality_boxes)
            matched = torch.cat([torch.arange(1, len(own) + 1, device=own.device), matched])
            positive, negative = _sample(matched, config.num_samples, config.positive_fraction)
            sampled = torch.cat([positive, negative])
            index = matched[sampled] - 1
            boxes.append(torch.cat([own, image_boxes])[sampled])
            background = torch.full_like(negative, self.num_labels)
            labels.append(torch.cat([target["class_labels"][index[: len(positive)]], background]))
            objects.append(torch.where(index >= 0, index + first, -1))
            added.append(sampled < len(own))
            first += len(own)
        return _Sampled(_rois(boxes), torch.cat(labels), torch.cat(objects), torch.cat(added))

    def _box_losses(
        self, stage: int, sampled: _Sampled, logits: torch.Tensor, deltas: torch.Tensor, objects: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        config = self.config
        dtype = sampled.rois.dtype
        number = max(len(logits), 1)
        class_loss = nn.functional.cross_entropy(logits.to(dtype), sampled.labels, reduction="sum") / number
        positive = (sampled.objects >= 0).nonzero()[:, 0]
        predicted = _of_class(deltas[positive], sampled.labels[positive]).to(dtype)
        boxes, wanted = sampled.rois[positive, 1:], objects[sampled.objects[positive]]
        stds = config.box_stds[stage]
        if config.box_loss == "l1":
            box_loss = nn.functional.l1_loss(predicted, encode_boxes(boxes, wanted, stds), reduction="sum")
        else:
            box_loss = (1 - box_giou(decode_boxes(boxes, predicted, stds), wanted)).sum()
        return {"loss_cls": class_loss, "loss_bbox": config.box_loss_weight * box_loss / number}

    def _mask_loss(
        self,
        stage: int,
        maps: tuple[torch.Tensor, ...],
        sampled: _Sampled,
        targets: list[dict[str, torch.Tensor]],
    ) -> torch.Tensor:
        positive = sampled.objects >= 0
        rois, objects = sampled.rois[positive], sampled.objects[positive]
        logits = self.mask_heads[stage](self._pool(maps, rois, self.config.mask_pool_size))
        logits = _of_class(logits, sampled.labels[positive]).to(rois.dtype)
        masks = [mask for target in targets for mask in target["masks"]]
        wanted = roi_align_masks(masks, objects, rois[:, 1:], logits.shape[-1]) >= 0.5
        loss = nn.functional.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="sum")
        return loss / max(logits.numel(), 1)


def _of_class(predictions: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The entry of each row's class, or the only one: (R, classes, ...) and (R,) -> (R, ...)."""
    if predictions.shape[1] == 1:
        return predictions[:, 0]
    return predictions[torch.arange(len(predictions), device=predictions.device), classes]


__all__ = [
    "InternImageRcnnForInstanceSegmentation",
    "InternImageRcnnOutput",
    "InternImageRcnnPreTrainedModel",
]
