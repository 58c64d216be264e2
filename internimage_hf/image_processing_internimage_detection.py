# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""The test pipeline of the official detectors, and their training targets, from images and annotations of COCO's format.

Known as: `LoadAnnotations`, `Resize(keep_ratio=True)`, `Normalize` and `Pad(size_divisor=32)` of mmdetection.
"""

from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import AnnotationFormat, SizeDict
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import (
    DeformableDetrImageProcessorKwargs,
    DeformableDetrImageProcessorPil,
)
from transformers.utils import TensorType


def resized_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """The size, height before width, of an image that fits a short and a long side, as mmcv's `rescale_size` has it.

    Sides are rounded to the nearest pixel; transformers' rule truncates them, which moves every box a little.
    """
    scale = min(longest_edge / max(height, width), shortest_edge / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation without antialiasing, (channels, H, W) -> (channels, height, width).

    Images of uint8 get the pixels of OpenCV's `resize(INTER_LINEAR)`, its fixed-point arithmetic included: weights of 11
    bits, and rows summed with 4 bits less.
    """
    above, below, weight0, weight1 = _neighbours(image.shape[1], height)
    left, right, weight2, weight3 = _neighbours(image.shape[2], width)
    # OpenCV takes the border's pixel alone for columns that lie beyond it; for rows it adds the border's row to itself.
    outside = left == right
    weight2, weight3 = np.where(outside, 1, weight2), np.where(outside, 0, weight3)
    if image.dtype != np.uint8:
        dtype = np.result_type(image.dtype, np.float32)
        weights = [weight.astype(dtype) for weight in (weight0, weight1, weight2, weight3)]
        image = image[..., left] * weights[2] + image[..., right] * weights[3]
        return (image[:, above] * weights[0][:, None] + image[:, below] * weights[1][:, None]).astype(dtype)
    weights = [np.rint(weight * np.float32(2048)).astype(np.int32) for weight in (weight0, weight1, weight2, weight3)]
    image = image.astype(np.int32)
    image = (image[..., left] * weights[2] + image[..., right] * weights[3]) >> 4
    upper = (image[:, above] * weights[0][:, None]) >> 16
    lower = (image[:, below] * weights[1][:, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The two source positions of each target position along an axis, and their weights in float32."""
    positions = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    floor = np.floor(positions)
    fraction = positions - floor
    first = floor.astype(np.int64)
    return first.clip(0, source - 1), (first + 1).clip(0, source - 1), np.float32(1) - fraction, fraction


def resize_nearest(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """The nearest pixel at or before each position, as OpenCV's INTER_NEAREST has it: (..., H, W) -> (..., height, width)."""
    rows, columns = (
        np.minimum(np.floor(np.arange(target) * (source / target)).astype(np.int64), source - 1)
        for source, target in zip(masks.shape[-2:], (height, width), strict=True)
    )
    return masks[..., rows[:, None], columns]


class InternImageDetectionImageProcessorKwargs(DeformableDetrImageProcessorKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to 32):
        Images are padded at the right and at the bottom to multiples of it.
    top_k (`int`, *optional*, defaults to 300):
        How many detections of an image `post_process_object_detection` keeps of a DINO's.
    """

    size_divisor: int
    top_k: int


class InternImageDetectionImageProcessor(DeformableDetrImageProcessorPil):
    """The image processor of the detectors with an InternImage backbone.

    In go images, and for training one annotation per image, `{"image_id": ..., "annotations": [...]}` of COCO's format with
    `category_id` counted from 0. Out come `pixel_values`, `pixel_mask` and `labels`: `class_labels`, `boxes` (centre x,
    centre y, width, height, relative to the image without its padding), and on request `masks` (boxes, height, width of the
    padded batch). Crowds, and boxes of less than a pixel's width or height within the image, are left out, as the authors do.
    """

    size = {"shortest_edge": 800, "longest_edge": 1333}
    do_convert_rgb = True
    size_divisor = 32
    top_k = 300
    valid_kwargs = InternImageDetectionImageProcessorKwargs

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """As in transformers. `auto_map` is left out where this class is saved without its code."""
        if cls._auto_class is None:
            image_processor_dict = {name: v for name, v in image_processor_dict.items() if name != "auto_map"}
        return super().from_dict(image_processor_dict, **kwargs)

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any = None, **kwargs) -> np.ndarray:
        """Resizes (channels, height, width) bilinearly, whatever `resample` says.

        Args:
            image: uint8 or floats.
            size: `shortest_edge` and `longest_edge`, which the image has to fit, or `height` and `width`.

        Raises:
            ValueError: if `size` is another.
        """
        if size.shortest_edge and size.longest_edge:
            height, width = resized_size(*image.shape[-2:], size.shortest_edge, size.longest_edge)
        elif size.height and size.width:
            height, width = size.height, size.width
        else:
            raise ValueError(
                f"`size` must have `shortest_edge` and `longest_edge`, or `height` and `width`, got {size}"
            )
        return resize_bilinear(image, height, width)

    def _preprocess(
        self,
        images: list[np.ndarray],
        annotations: dict | list[dict] | None,
        return_segmentation_masks: bool | None,
        masks_path: Any,  # of panoptic annotations, which are refused
        do_resize: bool,
        size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float] | None,
        image_std: float | list[float] | None,
        do_pad: bool,
        pad_size: SizeDict | None,
        format: str | AnnotationFormat | None,
        size_divisor: int,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        if AnnotationFormat(format) != AnnotationFormat.COCO_DETECTION:
            raise ValueError(f"`format` must be {AnnotationFormat.COCO_DETECTION.value!r}, got {format!r}")
        if isinstance(annotations, dict):
            annotations = [annotations]
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(f"`annotations` must be one per image ({len(images)}), got {len(annotations)}")
        labels = []
        for i, annotation in enumerate(annotations or ()):
            labels.append(_target(annotation, images[i].shape[-2:], bool(return_segmentation_masks), i))

        processed = []
        for image in images:
            if do_resize:
                image = self.resize(image, size)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            processed.append(image)
        for image, label in zip(processed, labels, strict=False):
            height, width = image.shape[-2:]
            label["area"] = label["area"] * np.float32(height * width / np.prod(label["orig_size"]))
            label["size"] = np.array([height, width])
            if "masks" in label:
                label["masks"] = resize_nearest(label["masks"], height, width)

        data: dict[str, Any] = {}
        if do_pad:
            if pad_size is not None:
                height, width = pad_size.height, pad_size.width
            else:
                height, width = (
                    -(-max(image.shape[axis] for image in processed) // size_divisor) * size_divisor for axis in (1, 2)
                )
            if any(image.shape[1] > height or image.shape[2] > width for image in processed):
                largest = max((image.shape[1:] for image in processed), key=max)
                raise ValueError(f"`pad_size` must be at least the images' {largest}, got {(height, width)}")
            data["pixel_mask"] = [_padded(np.ones(image.shape[1:], np.int64), height, width) for image in processed]
            processed = [_padded(image, height, width) for image in processed]
            for label in labels:
                if "masks" in label:
                    label["masks"] = _padded(label["masks"], height, width)
        data["pixel_values"] = processed
        encoded = BatchFeature(data, tensor_type=return_tensors)
        if annotations is not None:
            encoded["labels"] = [BatchFeature(label, tensor_type=return_tensors) for label in labels]
        return encoded

    def post_process_object_detection(
        self,
        outputs,
        threshold: float = 0.5,
        target_sizes: TensorType | list[tuple[int, int]] | None = None,
        top_k: int | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Detections of each image, best first, as the official heads give them.

        Args:
            outputs: of an `InternImageDinoForObjectDetection` or an `InternImageRcnnForInstanceSegmentation`.
            threshold: scores must be above it.
            target_sizes: (height, width) of each original image, to which boxes are scaled; None for relative boxes.
            top_k: how many of all queries and classes to keep, of a DINO; None for the number that the checkpoint was
                evaluated with. An R-CNN has kept its number already.

        Returns:
            For each image `scores` (detections,), `labels` (detections,) and `boxes` (detections, 4) as (left, top, right,
            bottom), clipped to the image.

        Raises:
            ValueError: if `target_sizes` are not one per image.
        """
        if getattr(outputs, "pred_boxes", None) is not None:
            scores, labels, boxes, _ = self._best_queries(outputs, self.top_k if top_k is None else top_k)
        else:
            scores, labels, boxes = outputs.scores, outputs.labels, outputs.boxes
        sizes = _sizes(target_sizes, scores)
        results = []
        for i in range(len(scores)):
            kept = (labels[i] >= 0) & (scores[i] > threshold)
            scaled = boxes[i][kept] if sizes is None else boxes[i][kept] * sizes[i].flip(0).repeat(2).to(boxes)
            results.append({"scores": scores[i][kept], "labels": labels[i][kept], "boxes": scaled})
        return results

    @staticmethod
    def _best_queries(outputs, top_k: int) -> tuple[torch.Tensor, ...]:
        """The best pairs of query and class: scores, labels, boxes as relative corners, and queries."""
        scores = outputs.logits.to(outputs.pred_boxes.dtype).sigmoid().flatten(1)
        scores, pairs = scores.topk(min(top_k, scores.shape[1]), dim=1)
        queries = pairs.div(outputs.logits.shape[-1], rounding_mode="floor")
        center, size = outputs.pred_boxes.gather(1, queries[..., None].expand(-1, -1, 4)).chunk(2, -1)
        boxes = torch.cat([center - size / 2, center + size / 2], -1).clamp(min=0, max=1)
        return scores, pairs % outputs.logits.shape[-1], boxes, queries

    def post_process_instance_segmentation(
        self,
        outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: TensorType | list[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Detections with masks of each image, best first.

        Args:
            outputs: of an `InternImageRcnnForInstanceSegmentation`.
            threshold: scores must be above it.
            mask_threshold: a pixel belongs to an object from this probability on.
            overlap_mask_area_threshold: taken for the pipeline's sake and without effect: masks may overlap.
            target_sizes: (height, width) of each original image.

        Returns:
            For each image `scores`, `labels`, `boxes` as `post_process_object_detection` has them, `masks` (detections,
            height, width) of bool; and what the pipeline reads: `segmentation` (height, width), -1 or the position of the
            best detection there, and `segments_info`, a list of `id`, `label_id` and `score`.

        Raises:
            ValueError: if the outputs have no masks, or `target_sizes` are not one per image.
        """
        if getattr(outputs, "masks", None) is None:
            raise ValueError(f"`outputs` must have `masks`, those of a {type(outputs).__name__} have none")
        if target_sizes is None:
            raise ValueError("`target_sizes` must be the (height, width) of each original image, got None")
        from .region_ops import paste_masks

        sizes = _sizes(target_sizes, outputs.scores)
        results = []
        detections = self.post_process_object_detection(outputs, threshold, target_sizes)
        for i, (result, (height, width)) in enumerate(zip(detections, sizes.tolist(), strict=True)):
            kept = (outputs.labels[i] >= 0) & (outputs.scores[i] > threshold)
            masks = paste_masks(outputs.masks[i][kept], result["boxes"], height, width, mask_threshold)
            segmentation = torch.full((height, width), -1, dtype=torch.int32, device=masks.device)
            for number in reversed(range(len(masks))):
                segmentation[masks[number]] = number
            segments = [
                {"id": number, "label_id": label, "was_fused": False, "score": score}
                for number, (label, score) in enumerate(
                    zip(result["labels"].tolist(), result["scores"].tolist(), strict=True)
                )
            ]
            results.append({**result, "masks": masks, "segmentation": segmentation, "segments_info": segments})
        return results


def _sizes(target_sizes: TensorType | list[tuple[int, int]] | None, scores: torch.Tensor) -> torch.Tensor | None:
    if target_sizes is None:
        return None
    sizes = torch.as_tensor(target_sizes, device=scores.device)
    if sizes.shape != (len(scores), 2):
        raise ValueError(
            f"`target_sizes` must be the (height, width) of each of the {len(scores)} images, got {tuple(sizes.shape)}"
        )
    return sizes


def _padded(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Zeros at the right and at the bottom of (..., H, W)."""
    margins = [(0, 0)] * (array.ndim - 2) + [(0, height - array.shape[-2]), (0, width - array.shape[-1])]
    return np.pad(array, margins)


def _target(annotation: Any, size: tuple[int, int], with_masks: bool, image: int) -> dict[str, np.ndarray]:
    """The target of one image, from COCO's annotation, with `area` and `masks` of the original size.

    Raises:
        ValueError: if a field is missing or wrong; the message names the image, the object, the field and the value.
    """
    height, width = size
    if not isinstance(annotation, dict) or not isinstance(annotation.get("annotations"), (list, tuple)):
        raise ValueError(
            f"`annotations[{image}]` must be a dictionary with `image_id` and the list `annotations`, got "
            f"{sorted(annotation) if isinstance(annotation, dict) else type(annotation).__name__}"
        )
    classes, boxes, areas, masks = [], [], [], []
    for number, item in enumerate(annotation["annotations"]):
        place = f"`annotations[{image}]['annotations'][{number}]`"
        if not isinstance(item, dict):
            raise ValueError(f"{place} must be a dictionary, got {type(item).__name__}")
        for name in ("bbox", "category_id", *(("segmentation",) if with_masks else ())):
            if name not in item:
                raise ValueError(f"{place} must have `{name}`, it has {', '.join(map(str, item))}")
        if item.get("iscrowd"):
            continue
        try:
            left, top, box_width, box_height = (float(value) for value in item["bbox"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`bbox` of {place} must be four numbers (left, top, width, height), got {item['bbox']!r}"
            ) from error
        if not np.isfinite([left, top, box_width, box_height]).all() or box_width < 0 or box_height < 0:
            raise ValueError(
                f"`bbox` of {place} must be finite, with a width and height of at least 0, got {item['bbox']!r}"
            )
        category = item["category_id"]
        if not isinstance(category, (int, np.integer)) or isinstance(category, bool) or category < 0:
            raise ValueError(f"`category_id` of {place} must be an integer of at least 0, got {category!r}")
        right, bottom = min(left + box_width, width), min(top + box_height, height)
        left, top = max(left, 0.0), max(top, 0.0)
        area = item.get("area", box_width * box_height)
        if min(box_width, box_height, area) <= 0 or right - left < 1 or bottom - top < 1:
            continue
        classes.append(int(category))
        boxes.append([(left + right) / 2 / width, (top + bottom) / 2 / height])
        boxes[-1] += [(right - left) / width, (bottom - top) / height]
        areas.append(area)
        if with_masks:
            masks.append(_mask(item["segmentation"], height, width, f"`segmentation` of {place}"))
    target = {
        "image_id": np.asarray([annotation.get("image_id", image)], np.int64),
        "class_labels": np.asarray(classes, np.int64),
        "boxes": np.asarray(boxes, np.float32).reshape(-1, 4),
        "area": np.asarray(areas, np.float32),
        "iscrowd": np.zeros(len(classes), np.int64),
        "orig_size": np.asarray(size, np.int64),
    }
    if with_masks:
        target["masks"] = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
    return target


def _mask(segmentation: Any, height: int, width: int, place: str) -> np.ndarray:
    """A mask (height, width) of uint8 from polygons, or from COCO's run lengths, as numbers or as a string.

    Raises:
        ValueError: if it is neither, or of another size.
        ImportError: if there are polygons, and pycocotools is not installed.
    """
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(
                f"{place} must have the image's `size` {[height, width]}, got {segmentation.get('size')!r}"
            )
        counts = segmentation.get("counts")
        if isinstance(counts, (str, bytes)):
            counts = _run_lengths(counts.encode() if isinstance(counts, str) else counts)
        elif not isinstance(counts, (list, tuple)):
            raise ValueError(f"`counts` of {place} must be a list or a string, got {type(counts).__name__}")
        if (
            any(not isinstance(count, (int, np.integer)) or count < 0 for count in counts)
            or sum(counts) != height * width
        ):
            raise ValueError(f"`counts` of {place} must be integers of at least 0 that sum up to {height * width}")
        runs = np.repeat(np.arange(len(counts)) % 2, counts)
        return runs.astype(np.uint8).reshape(width, height).T
    if isinstance(segmentation, (list, tuple)) and segmentation:
        try:
            polygons = [np.asarray(polygon, np.float64).ravel().tolist() for polygon in segmentation]
        except (TypeError, ValueError):
            polygons = []
        if polygons and all(len(p) >= 6 and len(p) % 2 == 0 and np.isfinite(p).all() for p in polygons):
            try:
                from pycocotools import mask as coco_mask
            except ImportError as error:
                raise ImportError("masks of polygons need pycocotools: pip install pycocotools") from error
            return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
    raise ValueError(
        f"{place} must be polygons of at least three points, [x, y, x, y, ...], or run lengths with `size` and `counts`, "
        f"got {str(segmentation)[:60]}"
    )


def _run_lengths(text: bytes) -> list[int]:
    """The numbers in COCO's string: 5 bits a character from 48 on, the lowest first, each the difference from the last but one.

    pycocotools decodes them as well, but writes beyond the mask where a damaged string says so.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        value |= ((character - 48) & 31) << shift
        shift += 5
        if not (character - 48) & 32:
            if (character - 48) & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


__all__ = ["InternImageDetectionImageProcessor"]
