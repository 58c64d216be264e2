"""In: a detector's outputs. Out: boxes and masks in pixels of the images, COCO's metrics, and a picture."""

import contextlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from coco import decode_masks, encode_masks
from common import HeadTrainer
from data import read_image
from drawing import panels
from PIL import Image

from internimage_hf import InternImageDetectionImageProcessor


MAX_DETECTIONS = 100  # per image, COCO's limit


def detect(processor, outputs, sizes: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
    """Returns `boxes` (left, top, right, bottom in pixels), `scores` and `labels` of each image, best first.

    Args:
        processor: the head's image processor.
        outputs: the detector's outputs.
        sizes: (batch, 2), height and width of the images before resizing.
        pixel_mask: (batch, height, width), 0 for padding. Boxes of transformers' detectors are fractions of the padded image,
            those of this package's detectors are fractions of the image.
    """
    if pixel_mask is not None and not isinstance(processor, InternImageDetectionImageProcessor):
        inside = torch.stack([pixel_mask[:, :, 0].sum(1), pixel_mask[:, 0, :].sum(1)], dim=1)
        padded = torch.tensor(pixel_mask.shape[1:], device=pixel_mask.device)
        sizes = sizes * padded / inside
    found = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=sizes)
    result = []
    for one in found:
        order = one["scores"].argsort(descending=True)[:MAX_DETECTIONS]
        result.append({name: tensor[order] for name, tensor in one.items()})
    return result


def lists_of(found: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: found[name].tolist() for name in ("boxes", "scores", "labels")}


@torch.no_grad()
def detect_instances(processor, outputs, sizes: torch.Tensor) -> list[dict[str, list]]:
    """Returns what `CocoMetrics.of_instances` expects of each image, best first.

    Args:
        processor: an `InternImageDetectionImageProcessor`.
        outputs: of an `InternImageRcnnForInstanceSegmentation`.
        sizes: (batch, 2), height and width of the images before resizing.
    """
    result = []
    for i, size in enumerate(sizes.tolist()):  # one after the other: masks of the images' own size take much memory
        tensors = {name: getattr(outputs, name)[i : i + 1] for name in ("scores", "labels", "boxes", "masks")}
        found = processor.post_process_instance_segmentation(type(outputs)(**tensors), -1.0, target_sizes=[size])[0]
        result.append({**lists_of(found), "segmentation": encode_masks(found["masks"].cpu().numpy())})
    return result


class CocoMetrics:
    """COCO's average precision and recall by pycocotools.

    Called with detections (images, detections, [left, top, right, bottom, score, category]) and the images' ids. pycocotools
    returns -1 for a size without objects.

    Args:
        objects: the true objects of each image, as in `detection_data.Detections`; the index is the image's id.
        labels: the categories' names.
    """

    NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large",
             "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")  # fmt: skip

    def __init__(self, objects: Iterable[dict[str, list]], labels: list[str]):
        from pycocotools.coco import COCO

        self.truth = COCO()
        images, annotations = [], []
        keys = {
            "category": "category_id",
            "bbox": "bbox",
            "area": "area",
            "iscrowd": "iscrowd",
            "segmentation": "segmentation",
        }
        for image, row in enumerate(objects):
            images.append(
                {"id": image, "height": 0, "width": 0}
            )  # pycocotools takes the sizes of masks from their run lengths
            present = [key for key in keys if key in row]
            for values in zip(*(row[key] for key in present), strict=True):
                annotation = {keys[key]: value for key, value in zip(present, values, strict=True)}
                annotations.append({"id": len(annotations) + 1, "image_id": image, **annotation})
        self.truth.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(labels)],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth.createIndex()

    def __call__(self, prediction) -> dict[str, float]:
        detections, image_ids = prediction.predictions, prediction.label_ids
        rows = np.concatenate(
            [
                np.repeat(image_ids, detections.shape[1])[:, None],
                detections[..., :2].reshape(-1, 2),
                (detections[..., 2:4] - detections[..., :2]).reshape(-1, 2),
                detections[..., 4:].reshape(-1, 2),
            ],
            axis=1,
        )  # image, left, top, width, height, score, category
        return self._summary(rows[rows[:, 6] >= 0], image_ids, "bbox")

    def of_instances(self, found: dict[int, dict[str, list]]) -> dict[str, float]:
        """Returns the metrics of boxes, and those of masks with the prefix `mask_`.

        Args:
            found: by the images' ids, lists of `boxes` (left, top, right, bottom in pixels), `scores`, `labels` and
                `segmentation`, run lengths of the image's size.
        """
        rows, masks = [], []
        for image, one in found.items():
            for (x0, y0, x1, y1), score, label, segmentation in zip(
                *(one[name] for name in ("boxes", "scores", "labels", "segmentation")), strict=True
            ):
                rows.append([image, x0, y0, x1 - x0, y1 - y0, score, label])
                # without a box: pycocotools would take the box's area for the mask's
                masks.append({"image_id": image, "category_id": label, "score": score, "segmentation": segmentation})
        of_masks = self._summary(masks, found, "segm")
        return {
            **{f"mask_{name}": value for name, value in of_masks.items()},
            **self._summary(np.array(rows).reshape(-1, 7), found, "bbox"),
        }

    def _summary(self, results: np.ndarray | list[dict], image_ids: Iterable[int], kind: str) -> dict[str, float]:
        from pycocotools.cocoeval import COCOeval

        if len(results) == 0:
            return dict.fromkeys(self.NAMES, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.truth, self.truth.loadRes(results), kind)
            evaluation.params.imgIds = sorted({int(i) for i in image_ids})
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {name: float(value) for name, value in zip(self.NAMES, evaluation.stats, strict=True)}


class InstanceTrainer(HeadTrainer):
    """Evaluation keeps the instances of each image with their run lengths, and gathers them from all processes at the end.

    Args:
        metrics: computes the metrics of all instances.
    """

    def __init__(self, *, metrics: CocoMetrics, **kwargs):
        super().__init__(compute_metrics=self._metrics_of_all, **kwargs)
        self.metrics, self.found = metrics, {}

    def instances(self, outputs, inputs: dict) -> dict[int, dict[str, list]]:
        """Returns the instances in a batch, as `CocoMetrics.of_instances` expects them."""
        raise NotImplementedError

    def evaluation_loop(self, *args, **kwargs):
        self.found = {}
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, outputs, inputs = self.predict_batch(model, inputs)
        if not prediction_loss_only:
            self.found |= self.instances(outputs, inputs)
        one_value = loss.new_zeros(1)  # `Trainer` computes metrics only where there are predictions and labels
        return loss, one_value, one_value

    def _metrics_of_all(self, prediction) -> dict[str, float]:
        return self.metrics.of_instances(dict(gather_object(list(self.found.items()))))


def draw_predictions(
    samples: list[dict], predict: Callable[[Image.Image], dict[str, list]], names: dict[int, str], file: Path
) -> None:
    """Writes a PNG of truth and predictions, with masks where there are some.

    Args:
        samples: examples of `detection_data.Detections`.
        predict: returns what `CocoMetrics.of_instances` expects of an image, with or without `segmentation`.
        names: of the classes.
        file: the PNG's path.
    """
    images, truth, found, masks = [], [], [], ([], [])
    for sample in samples:
        objects, image = sample["objects"], read_image(sample["image"], sample["name"])
        result = predict(image)
        shown = [i for i, score in enumerate(result["scores"]) if score > 0.4]
        images.append(image)
        truth.append([(*box, names[c]) for box, c in zip(objects["bbox"], objects["category"], strict=True)])
        boxes = [result["boxes"][i] for i in shown]
        texts = [f"{names[result['labels'][i]]} {result['scores'][i]:.0%}" for i in shown]
        found.append([(x0, y0, x1 - x0, y1 - y0, t) for (x0, y0, x1, y1), t in zip(boxes, texts, strict=True)])
        if "segmentation" in result:
            masks[0].append(objects["segmentation"])
            masks[1].append([result["segmentation"][i] for i in shown])
    draw_detections(images, truth, found, file, masks if masks[0] else None)


def draw_detections(
    images: list[Image.Image],
    truth: list[list[tuple]],
    found: list[list[tuple]],
    file: Path,
    masks: tuple[list[list[dict]], list[list[dict]]] | None = None,
) -> None:
    """Writes a PNG: each image with its true boxes, and again with the predicted boxes.

    Args:
        images: RGB.
        truth, found: tuples of left, top, width and height in pixels, and a text, for each image.
        file: the PNG's path.
        masks: run lengths of the true and of the predicted masks of each image; they are drawn in a colour per object.
    """
    import matplotlib
    from matplotlib.patches import Rectangle

    colors = matplotlib.colormaps["hsv"].resampled(8)(range(8))[:, :3] * 255
    of_image = zip(*masks, strict=True) if masks is not None else [([], [])] * len(images)
    with panels(file, 2 * len(images), columns=6, width=2.2, height=2.4) as axes:
        for image, *both, segmentations in zip(images, truth, found, of_image, strict=True):
            for boxes, run_lengths, title, color in zip(
                both, segmentations, ("truth", "predicted"), ("lime", "red"), strict=True
            ):
                axis = next(axes)
                pixels = np.array(image)
                for i, mask in enumerate(decode_masks(run_lengths, image.height, image.width).astype(bool)):
                    pixels[mask] = pixels[mask] * 0.4 + colors[i % len(colors)] * 0.6
                axis.imshow(pixels)
                axis.set_title(title, fontsize=8)
                for x, y, width, height, name in boxes:
                    axis.add_patch(Rectangle((x, y), width, height, fill=False, color=color))
                    axis.text(x, y, name[:24], fontsize=6, color="white", backgroundcolor=(0, 0, 0, 0.6))
