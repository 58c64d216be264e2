# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Operations on boxes: RoIAlign, non-maximum suppression, box deltas, IoU, and pasting of masks.

Boxes are (x1, y1, x2, y2). RoIAlign and non-maximum suppression are formulations in PyTorch, or torchvision's on GPUs where it is
installed and gives the same numbers (`_torchvision_ops`). Known as: mmcv's `roi_align` (aligned, with an adaptive number of
samples), `batched_nms` and `bbox_overlaps`, mmdetection's `delta2bbox`, `bbox2delta` and `_do_paste_mask`.
"""

import functools
import importlib
import math
from types import ModuleType

import torch
from torch import nn
from transformers.utils import is_torchvision_available, logging


logger = logging.get_logger(__name__)

# Entries of the largest intermediate tensor of a chunk.
_CHUNK = 2**24
# Boxes that non-maximum suppression takes at once.
_NMS_BLOCK = 256
# Deltas may change a size by a factor of at most 1000 / 16.
_MAX_LOG_RATIO = math.log(1000 / 16)


def _bin_weights(
    start: torch.Tensor, extent: torch.Tensor, bins: int, length: int, support: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights that RoIAlign's bins give to the pixels of one axis.

    A bin averages ceil(extent / bins) samples, each interpolated between two pixels: of a pixel at distance d it takes
    max(0, 1 - d). Samples up to one pixel outside take the border's value, those farther away count as zero. As
    everything happens on each axis for itself, a bin of the region is the outer product of two of these.

    Args:
        start: (regions,) where the regions begin, in pixels, the centre of the first pixel being 0.
        extent: (regions,) their sizes.
        bins: how many bins a region has.
        length: pixels of the axis.
        support: pixels that the largest bin reaches, one more than it has samples.

    Returns:
        Pixels (regions, bins, support) and weights of the same shape; the pixels of a bin follow each other.
    """
    bin_size = (extent / bins)[:, None, None]
    samples = torch.ceil(bin_size)
    sample = torch.arange(support - 1, device=start.device, dtype=start.dtype)
    bin_start = torch.arange(bins, device=start.device, dtype=start.dtype)[:, None] * bin_size
    positions = start[:, None, None] + bin_start + (sample + 0.5) * (bin_size / samples.clamp(min=1))
    counts = (sample < samples) & (positions >= -1) & (positions <= length)  # (regions, bins, samples)
    positions = positions.clamp(0, length - 1)
    # The samples of a bin are at most one pixel apart: they touch one pixel more than there are samples.
    pixels = positions[..., :1].floor() + torch.arange(support, device=start.device, dtype=start.dtype)
    shares = (1 - (positions[..., None] - pixels[..., None, :]).abs()).clamp(min=0)
    weights = (shares * counts[..., None]).sum(-2) / samples.clamp(min=1)
    return pixels.clamp(max=length - 1).long(), weights


def _roi_align(feature_map: torch.Tensor, rois: torch.Tensor, output_size: int, spatial_scale: float) -> torch.Tensor:
    channels, height, width = feature_map.shape[1:]
    # RoIAlign is a weighted sum of pixels: of rows of this matrix, which is a view if the map is channels-last
    pixels = feature_map.permute(0, 2, 3, 1).reshape(-1, channels)
    bins = output_size**2
    if len(rois) == 0:
        return feature_map.new_zeros(0, channels, output_size, output_size)
    image = rois[:, 0].long()
    left, top, right, bottom = (rois[:, 1:] * spatial_scale - 0.5).unbind(1)
    extents = torch.stack([bottom - top, right - left], 1)
    # regions with equally many samples per bin have equally long sums
    supports = (extents / output_size).ceil().clamp(min=1).long() + 1
    kinds, kind = supports.unique(dim=0, return_inverse=True)
    order = kind.argsort(stable=True)
    lengths = supports.prod(1)[order]  # of the sums of each region
    result, start = [], 0
    while start < len(rois):
        # as many regions as fit, and at least one
        fitting = int((bins * lengths[start:].cumsum(0) <= _CHUNK).sum())
        stop = start + max(fitting, 1)
        chunk = order[start:stop]
        indices, weights = [], []
        numbers = kind[chunk].bincount(minlength=len(kinds)).tolist()
        for members, (high, wide) in zip(chunk.split(numbers), kinds.tolist(), strict=True):
            rows, row_weights = _bin_weights(top[members], extents[members, 0], output_size, height, high)
            columns, column_weights = _bin_weights(left[members], extents[members, 1], output_size, width, wide)
            rows = (image[members, None, None] * height + rows) * width
            indices.append((rows[:, :, None, :, None] + columns[:, None, :, None, :]).flatten())
            weights.append((row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]).flatten())
        bag_lengths = lengths[start:stop].repeat_interleave(bins)
        # one call for all lengths: the gradient of each call is as large as the map
        sums = nn.functional.embedding_bag(
            torch.cat(indices),
            pixels,
            bag_lengths.cumsum(0) - bag_lengths,
            per_sample_weights=torch.cat(weights),
            mode="sum",
        )
        result.append(sums.view(-1, output_size, output_size, channels))
        start = stop
    return torch.cat(result)[order.argsort()].permute(0, 3, 1, 2)


def roi_align(feature_map: torch.Tensor, rois: torch.Tensor, output_size: int, spatial_scale: float) -> torch.Tensor:
    """Averages a map over the bins of regions (Mask R-CNN, https://arxiv.org/abs/1703.06870, section 3).

    Samples lie at pixel centres ("aligned"); a bin has ceil(its size) of them along each axis. The gradient is that of the
    map; regions get none.

    Args:
        feature_map: (batch, channels, height, width).
        rois: (regions, 5): index of the image, and x1, y1, x2, y2 in pixels of the image.
        output_size: bins along each axis.
        spatial_scale: size of the map over that of the image.

    Returns:
        (regions, channels, output_size, output_size), of the map's dtype.

    Raises:
        ValueError: if a region is not finite.
    """
    if not rois.isfinite().all():
        raise ValueError("`rois` must be finite: the weights of the model or its input are not")
    # coordinates and sums in float32 at least: bfloat16 has no fractions of a pixel beyond 256
    dtype = torch.promote_types(feature_map.dtype, torch.float32)
    rois = rois.detach().to(dtype)
    if ops := _torchvision_ops(feature_map.device.type):
        pooled = ops.roi_align(feature_map.to(dtype), rois, output_size, spatial_scale, sampling_ratio=0, aligned=True)
    else:
        pooled = _roi_align(feature_map.to(dtype), rois, output_size, spatial_scale)
    return pooled.to(feature_map.dtype)


def roi_align_masks(
    masks: list[torch.Tensor], index: torch.Tensor, boxes: torch.Tensor, output_size: int
) -> torch.Tensor:
    """`roi_align` of single-channel maps with large regions: two products of matrices per map.

    Args:
        masks: each (height, width); what is not zero counts as one.
        index: (regions,) the mask of each region.
        boxes: (regions, 4), in pixels of the masks.
        output_size: bins along each axis.

    Returns:
        (regions, output_size, output_size), of the boxes' dtype.
    """
    result = boxes.new_zeros(len(boxes), output_size, output_size)
    left, top, right, bottom = (boxes - 0.5).unbind(1)
    for i in index.unique().tolist():
        members = (index == i).nonzero()[:, 0]
        matrices = []
        for start, end, length in ((top, bottom, masks[i].shape[0]), (left, right, masks[i].shape[1])):
            extents = (end - start)[members]
            support = int((extents / output_size).ceil().clamp(min=1).max()) + 1
            pixels, weights = _bin_weights(start[members], extents, output_size, length, support)
            matrix = boxes.new_zeros(len(members), output_size, length)
            matrices.append(matrix.scatter_add_(2, pixels, weights))
        with torch.autocast(boxes.device.type, enabled=False):  # which would multiply in half precision
            result[members] = matrices[0] @ masks[i].bool().to(boxes.dtype) @ matrices[1].transpose(1, 2)
    return result


def _overlaps(boxes1: torch.Tensor, boxes2: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """IoU of all pairs: (boxes1, boxes2)."""
    # coordinate by coordinate, each contiguous
    left, top, right, bottom = boxes1.t().contiguous()[:, :, None]
    left2, top2, right2, bottom2 = boxes2.t().contiguous()[:, None]
    width = torch.minimum(right, right2).sub_(torch.maximum(left, left2)).clamp_(min=0)
    height = torch.minimum(bottom, bottom2).sub_(torch.maximum(top, top2)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (box_area(boxes1)[:, None] + box_area(boxes2)[None]).sub_(intersection)
    return intersection.div_(union.clamp_(min=eps) if eps else union)


def _nms(boxes: torch.Tensor, threshold: float, limit: int) -> torch.Tensor:
    """Non-maximum suppression of boxes in the order of their scores; indices of the first `limit` that stay."""
    kept = torch.zeros(0, dtype=torch.long, device=boxes.device)
    for start in range(0, len(boxes), _NMS_BLOCK):
        block = torch.arange(start, min(start + _NMS_BLOCK, len(boxes)), device=boxes.device)
        block = block[~(_overlaps(boxes[kept], boxes[block]) > threshold).any(0)]
        suppresses = (_overlaps(boxes[block], boxes[block]) > threshold).triu_(1)
        stays = torch.ones_like(block, dtype=torch.bool)
        while True:  # the first box that is undecided is decided by each round, and most others with it
            decided = ~(suppresses & stays[:, None]).any(0)
            if torch.equal(decided, stays):
                break
            stays = decided
        kept = torch.cat([kept, block[stays]])
        if len(kept) >= limit:
            break
    return kept[:limit]


def nms(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, threshold: float, limit: int | None = None
) -> torch.Tensor:
    """Non-maximum suppression within groups: drops boxes whose IoU with a better box of their group exceeds `threshold`.

    Args:
        boxes: (boxes, 4).
        scores: (boxes,).
        groups: (boxes,) of integers, for instance the class of each box.
        threshold: of the IoU.
        limit: how many boxes are wanted at most.

    Returns:
        The indices of the boxes that stay, by falling score; equal scores in the order of the boxes.
    """
    limit = len(boxes) if limit is None else limit
    ops = _torchvision_ops(boxes.device.type)
    order = scores.argsort(descending=True, stable=True)
    boxes, groups = boxes.detach()[order], groups[order]
    stays = torch.zeros_like(groups, dtype=torch.bool)
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        if ops:
            kept = ops.nms(boxes[members], scores[order[members]], threshold)
        else:
            kept = _nms(boxes[members], threshold, limit)
        stays[members[kept]] = True
    return order[stays][:limit]


@functools.cache
def _torchvision_ops(device_type: str) -> ModuleType | None:
    """torchvision's operations for a type of device, if it is installed and gives the numbers of this file.

    Not on CPUs: for 1000 regions of 256 channels on the maps of an 800 x 1333 image, one core takes 0.3 s by this file and
    1.9 s by torchvision's kernel (0.14), with differences below 1e-14 in float64.
    """
    if device_type == "cpu" or not is_torchvision_available():
        return None
    try:
        # Not an import statement: this file is a part of the remote code, whose imports transformers takes for requirements.
        ops = importlib.import_module("torchvision.ops")
        return ops if _gives_the_same_numbers(ops, device_type) else None
    except (ImportError, NotImplementedError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning(f"torchvision is installed, but its operations cannot be used on {device_type}: {reason}")
        return None


def _gives_the_same_numbers(ops: ModuleType, device_type: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    corners = 40 * torch.rand(64, 2, generator=generator)
    boxes = torch.cat([corners, corners + 1 + 30 * torch.rand(64, 2, generator=generator)], 1).to(device_type)
    scores = torch.rand(64, generator=generator).to(device_type)
    feature_map = torch.randn(1, 3, 16, 16, generator=generator).to(device_type)
    rois = nn.functional.pad(boxes, (1, 0))
    order = scores.argsort(descending=True)
    aligned = ops.roi_align(feature_map, rois, 4, 0.25, sampling_ratio=0, aligned=True)
    kept = ops.nms(boxes, scores, 0.5)
    return torch.equal(kept, order[_nms(boxes[order], 0.5, len(order))]) and torch.allclose(
        aligned, _roi_align(feature_map, rois, 4, 0.25), rtol=0, atol=1e-5
    )


def box_area(boxes: torch.Tensor) -> torch.Tensor:
    """The area of each box: (..., 4) -> (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """IoU of all pairs of (boxes1, 4) and (boxes2, 4): (boxes1, boxes2); boxes of no area have the IoU 0."""
    return _overlaps(boxes1, boxes2, eps=1e-6)


def box_giou(boxes1: torch.Tensor, boxes2: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (https://arxiv.org/abs/1902.09630) of boxes with their partners: (boxes, 4) twice -> (boxes,)."""
    intersection = (torch.minimum(boxes1[:, 2:], boxes2[:, 2:]) - torch.maximum(boxes1[:, :2], boxes2[:, :2])).clamp(0)
    hull = (torch.maximum(boxes1[:, 2:], boxes2[:, 2:]) - torch.minimum(boxes1[:, :2], boxes2[:, :2])).clamp(0)
    intersection, hull = intersection.prod(1), hull.prod(1).clamp(min=1e-6)
    union = (box_area(boxes1) + box_area(boxes2) - intersection).clamp(min=1e-6)
    return intersection / union - (hull - union) / hull


def encode_boxes(boxes: torch.Tensor, targets: torch.Tensor, stds: tuple[float, ...]) -> torch.Tensor:
    """The deltas (dx, dy, dw, dh) that turn boxes into targets, over `stds`: (boxes, 4) twice -> (boxes, 4)."""
    sizes, target_sizes = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shifts = ((targets[:, 2:] + targets[:, :2]) - (boxes[:, 2:] + boxes[:, :2])) / 2 / sizes
    return torch.cat([shifts, (target_sizes / sizes).log()], 1) / boxes.new_tensor(stds)


def decode_boxes(boxes: torch.Tensor, deltas: torch.Tensor, stds: tuple[float, ...]) -> torch.Tensor:
    """Applies deltas, the reverse of `encode_boxes`: (..., 4) and (..., 4) -> (..., 4); the two may broadcast."""
    deltas = deltas * deltas.new_tensor(stds)
    sizes = boxes[..., 2:] - boxes[..., :2]
    centers = (boxes[..., 2:] + boxes[..., :2]) / 2 + sizes * deltas[..., :2]
    halves = sizes * deltas[..., 2:].clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp() / 2
    return torch.cat([centers - halves, centers + halves], -1)


def clip_boxes(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Moves corners into the image: boxes (..., 4), sizes (..., 2) of height and width, which may broadcast."""
    limits = torch.stack([sizes[..., 1], sizes[..., 0], sizes[..., 1], sizes[..., 0]], -1).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limits)


def paste_masks(
    masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int, threshold: float = 0.5
) -> torch.Tensor:
    """Puts the masks of regions into their place in the image.

    The mask is interpolated between the centres of its pixels at the centres of the image's, and is 0 outside.

    Args:
        masks: probabilities, (masks, size, size).
        boxes: (masks, 4), in pixels of the image.
        height, width: of the image.
        threshold: the probability from which on a pixel belongs to the object, in (0, 1].

    Returns:
        bool, (masks, height, width).
    """
    result = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    masks, boxes = masks.to(boxes.dtype), boxes.to(masks.device)
    side = masks.shape[-1]
    pixels = torch.arange(side, dtype=boxes.dtype, device=boxes.device)
    for mask, box, target, (left, top, right, bottom) in zip(masks, boxes, result, boxes.tolist(), strict=True):
        if not (right > left and bottom > top):
            continue
        ranges, matrices = [], []
        for low, high, start, end, length in (
            (top, bottom, box[1], box[3], height),
            (left, right, box[0], box[2], width),
        ):
            margin = (high - low) / side  # beyond the box the mask falls to 0 over half a pixel of its own
            first, last = max(math.floor(low - margin), 0), min(math.ceil(high + margin), length)
            centers = torch.arange(first, max(last, first), dtype=boxes.dtype, device=boxes.device) + 0.5
            positions = (centers - start) / (end - start) * side - 0.5
            matrices.append((1 - (positions[:, None] - pixels).abs()).clamp(min=0))
            ranges.append(slice(first, max(last, first)))
        with torch.autocast(boxes.device.type, enabled=False):
            target[ranges[0], ranges[1]] = matrices[0] @ mask @ matrices[1].T >= threshold
    return result


__all__ = [
    "box_area",
    "box_giou",
    "box_iou",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "nms",
    "paste_masks",
    "roi_align",
    "roi_align_masks",
]
