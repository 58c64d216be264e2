"""In: images with boxes. Out: a detector of transformers on an InternImage backbone, COCO's mAP, and a picture.

Without arguments the program takes handwritten digits on photographs (no download), trains a small RT-DETR to an mAP@50 well
above 0.5 on held-out scenes, and writes model, metrics and a picture of predictions:

    python examples/object_detection.py

On your own images in COCO's format, with a pretrained backbone:

    python examples/object_detection.py --dataset coco/ --backbone OpenGVLab/internimage_t_1k_224 --head rt_detr \
        --output_dir outputs/coco --num_train_epochs 12 --learning_rate 1e-4 --layer_decay 0.9 --bf16

`--dataset` is a folder with COCO annotations (`annotations/instances_train*.json` beside `train*/`, or
`train/_annotations.coco.json` among the images; the same for `val` or `valid`, else `test`; flags such as
`--train_annotations` name other files), a folder with a `metadata.jsonl`, or the id of a dataset on the Hub; the latter two have
a column `objects` with `bbox` and `category`. The program first prints the numbers of used and unused files and objects. All
flags of `transformers.TrainingArguments` work, and those of `internimage_hf.training`; a YAML file with flags may come first.
`--resume_from_checkpoint last` resumes an interrupted run of the same `--output_dir`; `--model FOLDER` starts from a trained
detector.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import (
    ExampleTrainingArguments,
    Head,
    HeadTrainer,
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
from detection_data import EMBEDDED_SIZE, DetectionDataArguments, load_splits, training_transform
from detection_results import MAX_DETECTIONS, CocoMetrics, detect, draw_detections
from flags import parse_flags
from transformers import (
    AutoModelForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    RTDetrConfig,
    RTDetrForObjectDetection,
    set_seed,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

# imported from their own modules: without torchvision, transformers 5.17 does not export these classes
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil


@dataclass
class DetectionModelArguments(ModelArguments):
    head: str = field(
        default="rt_detr",
        metadata={
            "help": "the detector on the backbone; deformable_detr takes longer to learn, detr some hundred epochs",
            "choices": ["rt_detr", "deformable_detr", "detr"],
        },
    )


@dataclass
class DetectionTrainingArguments(ExampleTrainingArguments):
    output_dir: str | None = "outputs/object_detection"
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    num_train_epochs: float = 8
    metric_for_best_model: str | None = "map"


HEADS = {
    "rt_detr": Head(
        RTDetrForObjectDetection,
        RTDetrConfig,
        RTDetrImageProcessorPil,
        ["stage2", "stage3", "stage4"],
        2e-3,
        {
            "d_model": 64, "encoder_hidden_dim": 64, "decoder_in_channels": [64, 64, 64], "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "num_queries": 30, "num_denoising": 30, "hidden_expansion": 0.5, "initializer_range": 0.1,
        },
    ),
    "deformable_detr": Head(
        DeformableDetrForObjectDetection,
        DeformableDetrConfig,
        DeformableDetrImageProcessorPil,
        ["stage2", "stage3", "stage4"],
        1e-3,
        {
            "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 1, "decoder_layers": 3,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 30, "dropout": 0.0,
            "with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 30, "auxiliary_loss": True,
            "init_std": 0.1,
        },
    ),
    "detr": Head(
        DetrForObjectDetection,
        DetrConfig,
        DetrImageProcessorPil,
        ["stage4"],
        5e-4,
        {
            "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 1, "decoder_layers": 3,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 10, "dropout": 0.0,
            "auxiliary_loss": True, "init_std": 0.1,
        },
    ),
}  # fmt: skip


def build_model(arguments: DetectionModelArguments, labels: list[str], image_size: int | None):
    """Builds the detector for `labels`, and its image processor.

    Args:
        arguments: the flags.
        labels: the categories' names.
        image_size: side of the images in pixels; None for the default.

    Raises:
        InputError: if `--model` is none of the heads on an InternImage backbone, or the images are too small for the head.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if arguments.model is not None:
        model = load_head(HEADS, arguments, **names)
        head = HEADS[model.config.model_type]
        if image_size is None:
            return model, head.processor.from_pretrained(arguments.model)
        check_queries(model, image_size)
        return model, head.processor(**_processor_fields(head, image_size))
    head = HEADS[arguments.head]
    backbone = make_backbone(arguments, head.out_features)
    fields = {} if arguments.backbone is not None else head.demo
    if head.config is RTDetrConfig:
        fields = {**fields, "encoder_in_channels": backbone.channels}
    elif head.config is DeformableDetrConfig and arguments.backbone is not None:
        fields = {"with_box_refine": True, "two_stage": True, "auxiliary_loss": True}
    elif arguments.backbone is not None:
        fields = {"auxiliary_loss": True}
    model = build_head(head.model, head.config, backbone, arguments, **names, **fields)
    side = image_size or (EMBEDDED_SIZE if arguments.backbone is None else None)
    if side is not None:
        check_queries(model, side)
    return model, head.processor(**_processor_fields(head, side))


def check_queries(model, side: int) -> None:
    """
    Raises:
        InputError: if a two-stage head has more queries than its maps of small images have positions, or the sizes of RT-DETR's
            maps do not fit together.
    """
    config = model.config
    if isinstance(config, RTDetrConfig):
        field_name, strides = "num_queries", config.feat_strides
        if side % max(strides):
            raise InputError(
                f"--image_size {side} is not a multiple of {max(strides)}, with which RT-DETR's maps fit together; "
                f"{max(1, round(side / max(strides))) * max(strides)} is"
            )
    elif isinstance(config, DeformableDetrConfig) and config.two_stage:
        field_name, strides = "two_stage_num_proposals", [8 * 2**level for level in range(config.num_feature_levels)]
    else:
        return
    places, queries = sum(math.ceil(side / stride) ** 2 for stride in strides), getattr(config, field_name)
    if places < queries:
        raise InputError(
            f"--image_size {side} is too small: {type(model).__name__} has {places} places in such images, fewer than "
            f"its {queries} queries; --head_config_overrides '{{\"{field_name}\": {places}}}' makes them fewer"
        )


def _processor_fields(head: Head, side: int | None) -> dict:
    """Returns the fields of the head's official resizing with another `side`, and ImageNet's mean and deviation."""
    fields = {"do_normalize": True, "image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if side is not None and head.processor is RTDetrImageProcessorPil:
        fields["size"] = {"height": side, "width": side}
    elif side is not None:
        fields["size"] = {"shortest_edge": side, "longest_edge": round(side * 1333 / 800)}
    return fields


class Collate:
    """Turns examples into a batch of the model's inputs by the head's image processor: resized, normalised, padded."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, examples: list[dict]) -> dict:
        annotations = [
            {
                "image_id": example["image_id"],
                "annotations": [
                    {"bbox": box, "category_id": category, "area": area, "iscrowd": crowd}
                    for box, category, area, crowd in zip(
                        *(example["objects"][name] for name in ("bbox", "category", "area", "iscrowd")), strict=True
                    )
                ],
            }
            for example in examples
        ]
        images = [read_image(example["image"], example["name"]) for example in examples]
        batch = self.processor(images=images, annotations=annotations, return_tensors="pt")
        return {**batch, "labels": [dict(label) for label in batch["labels"]]}


class DetectionTrainer(HeadTrainer):
    """Evaluation gathers detections and their images' ids from all processes, as tensors of a fixed shape."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, outputs, inputs = self.predict_batch(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        sizes = torch.stack([label["orig_size"] for label in inputs["labels"]])
        rows = sizes.new_full((len(sizes), MAX_DETECTIONS, 6), -1, dtype=torch.float32)
        for row, found in zip(
            rows, detect(self.processing_class, outputs, sizes, inputs.get("pixel_mask")), strict=True
        ):
            values = torch.cat([found["boxes"], found["scores"][:, None], found["labels"][:, None]], dim=1)
            row[: len(values)] = values
        return loss, rows, torch.cat([label["image_id"] for label in inputs["labels"]])


def draw_predictions(folder: Path, samples: list[dict], file: Path) -> None:
    """Loads the saved detector and writes a PNG of truth and predictions for examples of `Detections`."""
    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = HEADS[model.config.model_type].processor.from_pretrained(folder)
    names = model.config.id2label
    images, truth, found = [], [], []
    for sample in samples:
        image = read_image(sample["image"], sample["name"])
        inputs = processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        size = torch.tensor([[image.height, image.width]])
        result = detect(processor, outputs, size, inputs.get("pixel_mask"))[0]
        rows = zip(*(result[name].tolist() for name in ("boxes", "labels", "scores")), strict=True)
        images.append(image)
        found.append(
            [
                (x0, y0, x1 - x0, y1 - y0, f"{names[label]} {score:.0%}")
                for (x0, y0, x1, y1), label, score in rows
                if score > 0.4
            ]
        )
        objects = sample["objects"]
        truth.append(
            [(*box, names[category]) for box, category in zip(objects["bbox"], objects["category"], strict=True)]
        )
    draw_detections(images, truth, found, file)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the evaluation's metrics."""
    data_arguments, model_arguments, training_arguments = parse_flags(
        argv, DetectionDataArguments, DetectionModelArguments, DetectionTrainingArguments
    )
    set_seed(training_arguments.seed)
    train, evaluation, account = load_splits(data_arguments, training_arguments.seed)
    labels = list(account.classes)
    checkpoint = model_arguments.model or model_arguments.backbone
    choose_learning_rate(training_arguments, checkpoint, untrained=HEADS[model_arguments.head].learning_rate)
    model, processor = build_model(model_arguments, labels, data_arguments.image_size)
    trainer = DetectionTrainer(
        model=model,
        args=training_arguments,
        train_dataset=RandomlyTransformed(train, training_transform(data_arguments), training_arguments.seed),
        eval_dataset=evaluation,
        data_collator=Collate(processor),
        compute_metrics=CocoMetrics(evaluation.objects["objects"], labels),
        processing_class=processor,
    )
    training, metrics = train_evaluate_save(trainer, account)
    folder = Path(training_arguments.output_dir)
    samples = [evaluation[index] for index in range(min(data_arguments.picture_samples, len(evaluation)))]
    finish(
        trainer,
        lambda file: draw_predictions(folder, samples, file),
        {
            "dataset": f"{data_arguments.dataset}: {len(train)} images to train, {len(evaluation)} to evaluate, "
            f"{len(labels)} categories",
            "model": f"{trainer.model_class.__name__}, {count_parameters(model):,} parameters, saved in {folder}",
            "mAP": f"{metrics['eval_map']:.3f} (at IoU 0.5: {metrics['eval_map_50']:.3f}) on the held-out images",
            "training": f"{training['train_runtime']:.0f} s",
        },
    )
    return metrics


if __name__ == "__main__":
    run_program(main)
