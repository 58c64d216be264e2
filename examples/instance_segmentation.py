"""In: images with instance masks. Out: a Mask2Former on an InternImage backbone, COCO's mask and box mAP, and a picture.

Without arguments the program takes handwritten digits on photographs (no download), trains a small Mask2Former to a mask mAP of
0.53 (0.78 at IoU 0.5) on held-out scenes, and writes model, metrics and a picture of predictions:

    python examples/instance_segmentation.py

On your own images in COCO's format, with a pretrained backbone:

    python examples/instance_segmentation.py --dataset coco/ --backbone OpenGVLab/internimage_t_1k_224 \
        --output_dir outputs/coco_instances --num_train_epochs 50 --learning_rate 1e-4 --layer_decay 0.9 --bf16

`--dataset` is a folder with COCO annotations, whose `segmentation` holds polygons or run lengths (the layouts of
object_detection.py); a folder with `images/train`, `images/validation` and instance masks of the same names in
`annotations/train` and so on (the layouts of semantic_segmentation.py); a folder with a `metadata.jsonl`, or the id of a dataset
on the Hub, with a column `objects` with `bbox`, `category` and `segmentation`, or a column `annotation` of instance masks.
The values of a greyscale or palette instance mask are the instances, 1, 2 and so on, of a single class; with
`--label_divisor 1000` they are class * 1000 + instance (Cityscapes); in a coloured mask, red is the class and green the
instance. Crowds are not trained on, and count neither as right nor as wrong in evaluation. All masks are read and checked before
the first step. All flags of `transformers.TrainingArguments` work, and those of `internimage_hf.training`; a YAML file with flags
may come first. `--resume_from_checkpoint last` resumes an interrupted run of the same `--output_dir`; `--model FOLDER` starts from
a trained or converted Mask2Former; for other classes, only its classifier is new.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from coco import box_of, decode_masks, encode_masks
from common import (
    ExampleTrainingArguments,
    Head,
    ModelArguments,
    RandomlyTransformed,
    build_head,
    choose_learning_rate,
    count_parameters,
    finish,
    load_head,
    make_backbone,
    train_evaluate_save,
)
from data import InputError, read_image, run_program
from detection_data import EMBEDDED_SIZE, InstanceDataArguments, load_splits, training_transform
from detection_results import MAX_DETECTIONS, CocoMetrics, InstanceTrainer, draw_predictions
from flags import parse_flags
from masks import resized
from PIL import Image
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, set_seed

# imported from its own module: without torchvision, transformers 5.17 does not export this class
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil


SIDE = 640  # pixels, of images for a head on a given backbone


@dataclass
class InstanceTrainingArguments(ExampleTrainingArguments):
    output_dir: str | None = "outputs/instance_segmentation"
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    num_train_epochs: float = 12
    metric_for_best_model: str | None = "mask_map"


HEADS = {
    "mask2former": Head(
        Mask2FormerForUniversalSegmentation,
        Mask2FormerConfig,
        Mask2FormerImageProcessorPil,
        ["stage1", "stage2", "stage3", "stage4"],
        1e-3,
        {
            "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "encoder_feedforward_dim": 128,
            "dim_feedforward": 128, "encoder_layers": 1, "decoder_layers": 4, "num_attention_heads": 4,
            "num_queries": 10, "train_num_points": 256, "init_std": 0.1,
            # after 200 steps 77 % of the matched queries have the right digit; 10 %, as by chance, with the authors' weight, 2
            "class_weight": 6.0,
        },
    ),
}  # fmt: skip


def build_model(arguments: ModelArguments, labels: list[str], image_size: int | None):
    """Builds the Mask2Former for `labels`, and its image processor.

    Args:
        arguments: the flags.
        labels: the classes' names.
        image_size: side of the squares that the model sees, in pixels; None for the default.

    Raises:
        InputError: if `--model` is no Mask2Former on an InternImage backbone, or the side is out of range.
    """
    if image_size is not None and image_size < 1:
        raise InputError(f"--image_size must be at least 1, got {image_size}")
    fields = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    head, side = HEADS["mask2former"], image_size
    if arguments.model is not None:
        model = load_head(HEADS, arguments, **fields)
        if side is None:
            size = head.processor.from_pretrained(arguments.model).size
            # a square, as `post_process_instance_segmentation` supposes that images are not padded
            side = size.get("height") or size.get("shortest_edge") or SIDE
    else:
        backbone = make_backbone(arguments, head.out_features)
        if arguments.backbone is None:
            fields |= head.demo
        model = build_head(head.model, head.config, backbone, arguments, **fields)
        side = side or (EMBEDDED_SIZE if arguments.backbone is None else SIDE)
    return model, head.processor(size={"height": side, "width": side})


def check_queries(model, part, name: str) -> list[str]:
    """Returns a warning if images have more objects than the model has queries; the loss leaves the others out."""
    queries = model.config.num_queries
    counts = [len(row["iscrowd"]) - sum(row["iscrowd"]) for row in part.objects["objects"]]
    more = sum(count > queries for count in counts)
    if not more:
        return []
    return [
        f"{more} images of {name} have more objects, {max(counts)} at most, than the model has queries, {queries}: the others are "
        "left out of the loss and cannot be found; --head_config_overrides '{\"num_queries\": ...}' gives a new head more"
    ]


class Collate:
    """Turns examples into a batch of the model's inputs by the image processor: resized and normalised.

    Crowds are no targets. `image_ids` and `sizes`, (batch, 2) of height and width of the images before resizing, are for the
    evaluation.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, examples: list[dict]) -> dict:
        images = [read_image(example["image"], example["name"]) for example in examples]
        batch = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        batch |= {"mask_labels": [], "class_labels": []}
        for image, example in zip(images, examples, strict=True):
            objects = example["objects"]
            kept = [i for i, crowd in enumerate(objects["iscrowd"]) if not crowd]
            masks = decode_masks([objects["segmentation"][i] for i in kept], image.height, image.width)
            masks = torch.from_numpy(resized_objects(masks, *batch["pixel_values"].shape[-2:]))
            batch["mask_labels"].append(masks.float())
            batch["class_labels"].append(torch.tensor([objects["category"][i] for i in kept], dtype=torch.int64))
        batch["image_ids"] = torch.tensor([example["image_id"] for example in examples])
        batch["sizes"] = torch.tensor([[image.height, image.width] for image in images])
        return batch


def resized_objects(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes masks, (masks, height, width), by nearest pixels; a mask that would vanish keeps the pixel of its centre."""
    small = resized(masks, height, width)
    for index in np.flatnonzero(~small.any((1, 2))):
        y, x = (places.mean() for places in masks[index].nonzero())
        small[index, int(y * height / masks.shape[1]), int(x * width / masks.shape[2])] = 1
    return small


@torch.no_grad()
def detect(outputs, sizes: torch.Tensor) -> list[dict[str, list]]:
    """Finds the instances of each image, best first, by the rule of Mask2Former's authors (`instance_inference`).

    The score is the class's probability times the mean probability of the mask's pixels. In contrast to the image processor's
    `post_process_instance_segmentation`, masks are thresholded at the images' own size.

    Args:
        outputs: of a `Mask2FormerForUniversalSegmentation`.
        sizes: (batch, 2), height and width of the images before resizing.

    Returns:
        Lists of `scores`, `labels`, `segmentation` (run lengths) and `boxes` (left, top, right, bottom in pixels) of the
        instances with at least one pixel.
    """
    result = []
    probabilities = outputs.class_queries_logits.float().softmax(-1)[..., :-1]
    for classes, queries, size in zip(
        probabilities, outputs.masks_queries_logits.float(), sizes.tolist(), strict=True
    ):
        scores, best = classes.flatten().topk(min(MAX_DETECTIONS, classes.numel()))
        found = {"scores": [], "labels": [], "boxes": [], "segmentation": []}
        masks = {}  # by their queries, which several classes may share
        for query in (best // classes.shape[-1]).unique().tolist():
            logits = torch.nn.functional.interpolate(queries[None, None, query], size=size, mode="bilinear")[0, 0]
            inside = logits > 0
            if inside.any():
                masks[query] = encode_masks(inside[None].cpu().numpy())[0], logits[inside].sigmoid().mean()
        for score, index in zip(scores, best.tolist(), strict=True):
            query, label = divmod(index, classes.shape[-1])
            if query not in masks:
                continue
            run_lengths, certainty = masks[query]
            x, y, width, height = box_of(run_lengths)
            found["scores"].append((score * certainty).item())
            found["labels"].append(label)
            found["boxes"].append([x, y, x + width, y + height])
            found["segmentation"].append(run_lengths)
        order = sorted(range(len(found["scores"])), key=found["scores"].__getitem__, reverse=True)
        result.append({name: [values[i] for i in order] for name, values in found.items()})
    return result


class Mask2FormerTrainer(InstanceTrainer):
    def instances(self, outputs, inputs: dict) -> dict[int, dict[str, list]]:
        return dict(zip(inputs["image_ids"].tolist(), detect(outputs, inputs["sizes"]), strict=True))


def draw(folder: Path, samples: list[dict], file: Path) -> None:
    """Loads the saved model and writes a PNG of truth and predictions for examples of `Detections`."""
    head = HEADS["mask2former"]
    model = head.model.from_pretrained(folder).eval()
    processor = head.processor.from_pretrained(folder)

    @torch.no_grad()
    def predict(image: Image.Image) -> dict[str, list]:
        outputs = model(pixel_values=processor(images=[image], return_tensors="pt")["pixel_values"])
        return detect(outputs, torch.tensor([[image.height, image.width]]))[0]

    draw_predictions(samples, predict, model.config.id2label, file)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the evaluation's metrics."""
    data_arguments, model_arguments, training_arguments = parse_flags(
        argv, InstanceDataArguments, ModelArguments, InstanceTrainingArguments
    )
    set_seed(training_arguments.seed)
    train, evaluation, account = load_splits(data_arguments, training_arguments.seed)
    labels = list(account.classes)
    checkpoint = model_arguments.model or model_arguments.backbone
    choose_learning_rate(training_arguments, checkpoint, untrained=HEADS["mask2former"].learning_rate)
    model, processor = build_model(model_arguments, labels, data_arguments.image_size)
    account.warnings += [*check_queries(model, train, "train"), *check_queries(model, evaluation, "evaluation")]
    trainer = Mask2FormerTrainer(
        model=model,
        args=training_arguments,
        train_dataset=RandomlyTransformed(train, training_transform(data_arguments), training_arguments.seed),
        eval_dataset=evaluation,
        data_collator=Collate(processor),
        metrics=CocoMetrics(evaluation.objects["objects"], labels),
        processing_class=processor,
    )
    training, metrics = train_evaluate_save(trainer, account)
    folder = Path(training_arguments.output_dir)
    samples = [evaluation[index] for index in range(min(data_arguments.picture_samples, len(evaluation)))]
    finish(
        trainer,
        lambda file: draw(folder, samples, file),
        {
            "dataset": f"{data_arguments.dataset}: {len(train)} images to train, {len(evaluation)} to evaluate, "
            f"{len(labels)} classes",
            "model": f"{trainer.model_class.__name__}, {count_parameters(model):,} parameters, saved in {folder}",
            "mask mAP": f"{metrics['eval_mask_map']:.3f} (at IoU 0.5: {metrics['eval_mask_map_50']:.3f}) on the held-out images",
            "box mAP": f"{metrics['eval_map']:.3f} (at IoU 0.5: {metrics['eval_map_50']:.3f})",
            "training": f"{training['train_runtime']:.0f} s",
        },
    )
    return metrics


if __name__ == "__main__":
    run_program(main)
