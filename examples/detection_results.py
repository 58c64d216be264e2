"""In: a detector's outputs. Out: boxes in pixels of the images, COCO's metrics, and a picture."""

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from drawing import panels
from PIL import Image


MAX_DETECTIONS = 100  # per image, COCO's limit


def detect(processor, outputs, sizes: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
    """Returns `boxes` (left, top, right, bottom in pixels), `scores` and `labels` of each image, best first.

    Args:
        processor: the head's image processor.
        outputs: the detector's outputs.
        sizes: (batch, 2), height and width of the images before resizing.
        pixel_mask: (batch, height, width), 0 for padding: the outputs' boxes are fractions of the padded image.
    """
    if pixel_mask is not None:
        inside = torch.stack([pixel_mask[:, :, 0].sum(1), pixel_mask[:, 0, :].sum(1)], dim=1)
        padded = torch.tensor(pixel_mask.shape[1:], device=pixel_mask.device)
        sizes = sizes * padded / inside
    found = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=sizes)
    result = []
    for one in found:
        order = one["scores"].argsort(descending=True)[:MAX_DETECTIONS]
        result.append({name: tensor[order] for name, tensor in one.items()})
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
        for image, row in enumerate(objects):
            images.append({"id": image})
            for box, category, area, crowd in zip(
                *(row[name] for name in ("bbox", "category", "area", "iscrowd")), strict=True
            ):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": category,
                        "bbox": box,
                        "area": area,
                        "iscrowd": crowd,
                    }
                )
        self.truth.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(labels)],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth.createIndex()

    def __call__(self, prediction) -> dict[str, float]:
        from pycocotools.cocoeval import COCOeval

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
        rows = rows[rows[:, 6] >= 0]
        if len(rows) == 0:
            return dict.fromkeys(self.NAMES, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.truth, self.truth.loadRes(rows), "bbox")
            evaluation.params.imgIds = sorted({int(i) for i in image_ids})
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {name: float(value) for name, value in zip(self.NAMES, evaluation.stats, strict=True)}


def draw_detections(images: list[Image.Image], truth: list[list[tuple]], found: list[list[tuple]], file: Path) -> None:
    """Writes a PNG: each image with its true boxes, and again with the predicted boxes.

    Args:
        images: RGB.
        truth, found: tuples of left, top, width and height in pixels, and a text, for each image.
        file: the PNG's path.
    """
    from matplotlib.patches import Rectangle

    with panels(file, 2 * len(images), columns=6, width=2.2, height=2.4) as axes:
        for image, *both in zip(images, truth, found, strict=True):
            for boxes, title, color in zip(both, ("truth", "predicted"), ("lime", "red"), strict=True):
                axis = next(axes)
                axis.imshow(image)
                axis.set_title(title, fontsize=8)
                for x, y, width, height, name in boxes:
                    axis.add_patch(Rectangle((x, y), width, height, fill=False, color=color))
                    axis.text(x, y, name[:24], fontsize=6, color="white", backgroundcolor=(0, 0, 0, 0.6))
