"""In: images with masks. Out: a segmenter of transformers on an InternImage backbone, its mean IoU, and a picture.

Without arguments the program takes handwritten digits on photographs (no download), trains a small UperNet to a mean IoU well
above 0.6 on held-out scenes, and writes model, metrics and a picture of predictions:

    python examples/semantic_segmentation.py

On your own images and masks, with a pretrained backbone:

    python examples/semantic_segmentation.py --dataset ade20k/ --reduce_labels --id2label ade20k.json --head upernet \
        --backbone OpenGVLab/internimage_t_1k_224 --output_dir outputs/ade20k --max_steps 160000 --learning_rate 6e-5 \
        --eval_strategy steps --eval_steps 16000 --save_strategy steps --save_steps 16000 --layer_decay 0.9 --bf16

`--dataset` is a folder with `images/train`, `images/validation` and masks of the same names in `annotations/train` and so on
(or `train/images` and `train/masks`; without splits, `images` and `masks`), a folder with a `metadata.jsonl` of the columns
`file_name` and `annotation_file_name`, or the id of a dataset on the Hub with the columns `image` and `annotation`. A mask is a
greyscale or palette image whose values are the classes, 0, 1, 2 and so on; 255 is ignored. For other values, such as 0 and 255
of a binary mask, `--mask_values 0 255` lists the values of the classes. All masks are read and checked before the first step.
All flags of `transformers.TrainingArguments` work, and those of `internimage_hf.training`; a YAML file with flags may come
first. `--resume_from_checkpoint last` resumes an interrupted run of the same `--output_dir`; `--model FOLDER` starts from a
trained or converted segmenter.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import (
    ExampleTrainingArguments,
    Head,
    HeadDataArguments,
    HeadTrainer,
    ModelArguments,
    RandomlyTransformed,
    build_head,
    check_image_column,
    choose_learning_rate,
    count_parameters,
    finish,
    load_head,
    make_backbone,
    model_type_of,
    train_evaluate_save,
)
from data import (
    Account,
    Data,
    InputError,
    Part,
    chosen_splits,
    read_image,
    run_program,
    some,
    train_and_evaluation,
    undecoded,
)
from drawing import panels
from flags import parse_flags
from masks import (
    MaskRules,
    class_names,
    find_names,
    ignored_label,
    load_pairs,
    masks_per_class,
    read_names,
    resized,
    survey,
)
from PIL import Image
from torch import nn
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    set_seed,
)

# imported from their own modules: without torchvision, transformers 5.17 does not export these classes
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil


EMBEDDED_TRAIN, EMBEDDED_EVAL, EMBEDDED_SIZE = 800, 100, 96  # scenes, scenes, pixels


@dataclass
class SegmentationDataArguments(HeadDataArguments):
    dataset: str = field(
        default="digits",
        metadata={"help": "a folder of images and masks, the id of a dataset on the Hub, or `digits` (embedded)"},
    )
    mask_column: str = field(default="annotation", metadata={"help": "column of the masks"})
    id2label: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with the classes' names by number; if absent, the dataset's own id2label.json, or the "
            "numbers that occur in the masks"
        },
    )
    ignore_index: int = field(
        default=255,
        metadata={
            "help": "value of the masks, 0 to 255 or 65535, that counts in neither loss nor metric; -1 for none"
        },
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "0 of the masks is no class, and 1 is the first one (ADE20K)"}
    )
    mask_values: list[str] | None = field(
        default=None,
        metadata={
            "help": "the values of the masks in the order of the classes, such as 0 255 for binary masks, or colours such as "
            "#000000 #ff0000; if absent, the values are the classes' numbers. A value that is listed is never ignored"
        },
    )
    ignore_other_values: bool = field(
        default=False,
        metadata={"help": "values that --mask_values does not list count in neither loss nor metric; else an error"},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "side of the square that the model sees; 512 if absent, or the model's own"}
    )
    min_scale: float | None = field(
        default=None,
        metadata={"help": "smallest size of a training image before the crop, 1 is --image_size; 0.5, digits 1"},
    )
    max_scale: float | None = field(
        default=None, metadata={"help": "largest size of a training image before the crop; 2, digits 1"}
    )


@dataclass
class SegmentationModelArguments(ModelArguments):
    head: str = field(
        default="upernet", metadata={"help": "the segmenter on the backbone", "choices": ["upernet", "mask2former"]}
    )


@dataclass
class SegmentationTrainingArguments(ExampleTrainingArguments):
    output_dir: str | None = "outputs/semantic_segmentation"
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 16
    num_train_epochs: float = 14
    metric_for_best_model: str | None = "mean_iou"


HEADS = {
    "upernet": Head(
        UperNetForSemanticSegmentation,
        UperNetConfig,
        SegformerImageProcessorPil,
        ["stage1", "stage2", "stage3", "stage4"],
        4e-3,
        {"hidden_size": 64, "auxiliary_channels": 32},
    ),
    "mask2former": Head(
        Mask2FormerForUniversalSegmentation,
        Mask2FormerConfig,
        Mask2FormerImageProcessorPil,
        ["stage1", "stage2", "stage3", "stage4"],
        5e-4,
        {
            "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "encoder_feedforward_dim": 128,
            "dim_feedforward": 128, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4,
            "num_queries": 20, "train_num_points": 1024, "init_std": 0.1,
        },
    ),
}  # fmt: skip


def load_columns(arguments: SegmentationDataArguments) -> Data:
    """Loads the dataset of `--dataset` with the columns `image` and `annotation`, both not decoded.

    Raises:
        InputError: if the dataset does not exist or lacks a column.
    """
    if arguments.dataset == "digits":
        from embedded_data import load_digit_scenes

        splits = load_digit_scenes(
            train=min(EMBEDDED_TRAIN, arguments.max_train_samples or EMBEDDED_TRAIN),
            evaluation=min(EMBEDDED_EVAL, arguments.max_eval_samples or EMBEDDED_EVAL),
            size=EMBEDDED_SIZE,
        )
        data = Data("digits", "digits on photographs", {name: undecoded(split) for name, split in splits.items()})
    else:
        data = load_pairs(arguments, arguments.mask_column)
    names = {arguments.image_column: "image", arguments.mask_column: "annotation"}
    if len(names) < 2:
        raise InputError(
            f"--image_column and --mask_column are both {arguments.image_column}; two columns were expected"
        )
    for column, flag in zip(names, ("image_column", "mask_column"), strict=True):
        check_image_column(data, column, flag)
    changed = {old: new for old, new in names.items() if old != new}
    data.splits = {
        split: dataset.select_columns(list(names)).rename_columns(changed) for split, dataset in data.splits.items()
    }
    return data


def mask_rules(arguments: SegmentationDataArguments) -> MaskRules:
    return MaskRules(
        arguments.ignore_index, arguments.reduce_labels, arguments.mask_values, arguments.ignore_other_values
    )


def load_data_and_account(arguments: SegmentationDataArguments, seed: int) -> tuple:
    """Reads all masks of all splits; returns the training images, the evaluation images, and their account.

    Rows have the columns `image` (PIL, RGB) and `mask` (see `MaskRules.mask`); evaluation rows also `full_mask`, the mask as
    int64.

    Raises:
        InputError: if an image, a mask or the set of classes cannot be used.
    """
    rules, data = mask_rules(arguments), load_columns(arguments)
    if arguments.dataset == "digits":
        from embedded_data import DIGIT_NAMES

        names, warning = ["background", *DIGIT_NAMES], None
    else:
        names, warning = find_names(arguments, arguments.id2label, lambda file: read_names(file, rules))
    warnings = [] if warning is None else [warning]
    warnings += survey(data, rules, chosen_splits(data.splits, arguments))
    labels, more = class_names(data, rules, names)
    parts = train_and_evaluation(data, arguments, seed)
    counts = {name: masks_per_class(part, rules, labels) for name, part in parts.items()}
    account = Account(
        data,
        labels,
        {name: Part(len(part), counts[name], "masks") for name, part in parts.items()},
        [*warnings, *more, *_warnings(data, parts, counts, rules)],
    )

    def read(row: dict[str, list]) -> dict[str, list]:
        return {
            "image": [read_image(*pair) for pair in zip(row["image"], row["name"], strict=True)],
            "mask": [rules.mask(*pair, len(labels)) for pair in zip(row["annotation"], row["mask_name"], strict=True)],
        }

    def read_with_full_mask(row: dict[str, list]) -> dict[str, list]:
        row = read(row)
        return {**row, "full_mask": [torch.from_numpy(mask.astype(np.int64)) for mask in row["mask"]]}

    return parts["train"].with_transform(read), parts["evaluation"].with_transform(read_with_full_mask), account


def _warnings(data: Data, parts: dict, counts: dict[str, dict[str, int]], rules: MaskRules) -> list[str]:
    """Returns warnings for classes that a part lacks.

    Raises:
        InputError: if a part has no class at all.
    """
    warnings = []
    for name, part in parts.items():
        if not any(counts[name].values()):
            raise InputError(
                f"{data.name}: all pixels of the {len(part)} masks of {name} are ignored; classes were expected"
            )
        empty = [
            mask
            for mask, values in zip(part["mask_name"], part["values"], strict=True)
            if (rules.classes(np.array(values, dtype=np.int64)) < 0).all()
        ]
        if empty:
            warnings.append(f"all pixels of {len(empty)} masks of {name} are ignored, the first is {empty[0]}")
    for text, one, other in (
        ("to evaluate, but in none to train", "evaluation", "train"),
        (
            "to train, but in none to evaluate: they are no part of the mean IoU unless predicted",
            "train",
            "evaluation",
        ),
    ):
        if classes := [name for name, count in counts[one].items() if count and not counts[other][name]]:
            warnings.append(f"{len(classes)} classes are in masks {text}: {some(classes)}")
    return warnings


def check_queries(model, part, rules: MaskRules) -> list[str]:
    """Returns a warning if masks have more classes than the head has queries; transformers drops the others."""
    queries = getattr(model.config, "num_queries", math.inf)
    classes = [
        int((rules.classes(np.array(values, dtype=np.int64)) >= 0).sum())
        for values in part.with_format(None)["values"]
    ]
    more = sum(number > queries for number in classes)
    if not more:
        return []
    return [
        f"{more} masks to train have more classes, {max(classes)} at most, than the head has queries, {queries}: the others are "
        "left out; --head_config_overrides '{\"num_queries\": ...}' gives it more"
    ]


def load_splits(arguments: SegmentationDataArguments, seed: int) -> tuple:
    """`load_data_and_account`, with the classes' names instead of the account."""
    train, evaluation, account = load_data_and_account(arguments, seed)
    return train, evaluation, list(account.classes)


def build_model(arguments: SegmentationModelArguments, data: SegmentationDataArguments, labels: list[str]):
    """Builds the segmenter for `labels`, and its image processor.

    Raises:
        InputError: if `--model` is none of the heads on an InternImage backbone.
    """
    fields = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    head_type = arguments.head if arguments.model is None else model_type_of(arguments.model)
    ignored = ignored_label(len(labels))
    fields["ignore_value" if head_type == "mask2former" else "loss_ignore_index"] = ignored
    processor = {"do_reduce_labels": data.reduce_labels}
    if head_type == "mask2former":
        processor["ignore_index"] = ignored
    side = data.image_size
    if side is not None and side < 1:
        raise InputError(f"--image_size must be at least 1, got {side}")
    if arguments.model is not None:
        model = load_head(HEADS, arguments, **fields)
        head = HEADS[head_type]
        if side is None:
            size = head.processor.from_pretrained(arguments.model).size
            return model, head.processor(size={"height": size["height"], "width": size["width"]}, **processor)
    else:
        head = HEADS[head_type]
        backbone = make_backbone(arguments, head.out_features)
        if arguments.backbone is None:
            fields |= head.demo
        model = build_head(head.model, head.config, backbone, arguments, **fields)
        side = side or (EMBEDDED_SIZE if arguments.backbone is None else 512)
    return model, head.processor(size={"height": side, "width": side}, **processor)


def training_transform(arguments: SegmentationDataArguments, height: int, width: int, ignored: int = 255):
    """Returns `transform(example, seed)`: random size, crop, flip and colours, by albumentations.

    Raises:
        InputError: if the scales are out of range.
    """
    import albumentations as A

    digits = arguments.dataset == "digits"
    flip = arguments.random_flip if arguments.random_flip is not None else not digits
    low = arguments.min_scale if arguments.min_scale is not None else (1.0 if digits else 0.5)
    high = arguments.max_scale if arguments.max_scale is not None else (1.0 if digits else 2.0)
    if not 0 < low <= high:
        raise InputError(f"--min_scale must be above 0 and at most --max_scale, got {low} and {high}")
    side = min(height, width)
    steps = [
        A.SmallestMaxSize(max_size=list(range(max(round(low * side), 1), round(high * side) + 1))),
        A.PadIfNeeded(height, width, fill_mask=ignored),
        A.RandomCrop(height, width),
    ]
    if flip:
        steps.append(A.HorizontalFlip(p=0.5))
    if arguments.color_jitter if arguments.color_jitter is not None else arguments.dataset != "digits":
        steps += [A.RandomBrightnessContrast(p=0.5), A.HueSaturationValue(p=0.2)]
    augment = A.Compose(steps)

    def transform(example: dict, seed: int) -> dict:
        augment.set_random_seed(seed)
        result = augment(image=np.asarray(example["image"]), mask=example["mask"])
        return {"image": Image.fromarray(result["image"]), "mask": result["mask"]}

    return transform


class Collate:
    """Turns examples into a batch of the model's inputs by the head's image processor: resized and normalised.

    Evaluation examples also have a `full_mask` of their image's size, for the metric.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, examples: list[dict]) -> dict:
        batch = dict(self.processor(images=[example["image"] for example in examples], return_tensors="pt"))
        height, width = batch["pixel_values"].shape[-2:]
        masks = [torch.from_numpy(resized(example["mask"], height, width).astype(np.int64)) for example in examples]
        if isinstance(self.processor, SegformerImageProcessorPil):
            batch["labels"] = torch.stack(masks)
        else:  # one binary mask per class of an image
            batch["class_labels"] = [mask.unique() for mask in masks]
            batch["class_labels"] = [found[found != self.processor.ignore_index] for found in batch["class_labels"]]
            batch["mask_labels"] = [
                (mask == found[:, None, None]).float()
                for mask, found in zip(masks, batch["class_labels"], strict=True)
            ]
        if "full_mask" in examples[0]:
            batch["full_masks"] = [example["full_mask"] for example in examples]
        return batch


class OneValueBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that uses its running statistics for a batch with one value per channel.

    UperNet pools a map to a single pixel. With one image in the batch the variance is 0, and PyTorch refuses to train.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and input.numel() == input.shape[1]:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


class SegmentationTrainer(HeadTrainer):
    """Evaluation gathers three numbers of pixels per image and class: correct, true, predicted."""

    def __init__(self, *, model, **kwargs):
        super().__init__(model=model, **kwargs)
        for module in model.modules():
            if type(module) is nn.BatchNorm2d and module.track_running_stats:
                module.__class__ = OneValueBatchNorm2d

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = self.of_counted_pixels(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def of_counted_pixels(self, loss: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Returns the loss; 0 for a batch of ignored pixels only, for which UperNet's mean would be NaN."""
        if "labels" not in inputs:
            return loss
        config = self.accelerator.unwrap_model(self.model).config
        return torch.where((inputs["labels"] != config.loss_ignore_index).any(), loss, 0.0)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = dict(inputs)
        masks = inputs.pop("full_masks")
        loss, outputs, inputs = self.predict_batch(model, inputs)
        loss = self.of_counted_pixels(loss, inputs)
        if prediction_loss_only:
            return loss, None, None
        config = self.accelerator.unwrap_model(model).config
        ignore_index = getattr(config, "loss_ignore_index", getattr(config, "ignore_value", None))
        predicted = self.processing_class.post_process_semantic_segmentation(
            outputs, target_sizes=[tuple(mask.shape) for mask in masks]
        )
        areas = torch.stack(
            [
                class_areas(one, mask.to(one.device), config.num_labels, ignore_index)
                for one, mask in zip(predicted, masks, strict=True)
            ]
        )
        return loss, areas, areas.new_zeros(len(areas))  # `Trainer` computes metrics only with labels


def class_areas(predicted: torch.Tensor, mask: torch.Tensor, num_labels: int, ignore_index: int) -> torch.Tensor:
    """Counts the correct, the true and the predicted pixels of each class.

    Args:
        predicted, mask: (height, width) of integers. Pixels with the mask `ignore_index` do not count.

    Returns:
        (3, num_labels) of int64.
    """
    counted = mask != ignore_index
    predicted, mask = predicted[counted], mask[counted]
    return torch.stack(
        [torch.bincount(part, minlength=num_labels) for part in (mask[mask == predicted], mask, predicted)]
    )


def segmentation_metrics(prediction) -> dict[str, float]:
    """Computes mean IoU and mean accuracy over the occurring classes, and the fraction of correct pixels."""
    right, true, predicted = prediction.predictions.sum(0).astype(np.float64)
    union = true + predicted - right
    return {
        "mean_iou": float((right[union > 0] / union[union > 0]).mean()),
        "mean_accuracy": float((right[true > 0] / true[true > 0]).mean()),
        "overall_accuracy": float(right.sum() / true.sum()),
    }


def draw_predictions(folder: Path, samples, ignore_index: int, file: Path) -> None:
    """Loads the saved segmenter and writes a PNG: each image, its true mask, and the predicted one."""
    head = HEADS[model_type_of(folder)]
    model = head.model.from_pretrained(folder).eval()
    processor = head.processor.from_pretrained(folder)
    import matplotlib

    classes = model.config.num_labels
    colors = matplotlib.colormaps["nipy_spectral"].resampled(classes)
    with panels(file, 3 * len(samples), columns=6, width=2.13, height=2.3) as axes:
        for sample in samples:
            image, mask = sample["image"], sample["mask"]
            with torch.no_grad():
                outputs = model(pixel_values=processor(images=[image], return_tensors="pt")["pixel_values"])
            predicted = processor.post_process_semantic_segmentation(outputs, target_sizes=[mask.shape])[0].numpy()
            truth = np.ma.masked_equal(mask, ignore_index)
            for content, title in ((image, "image"), (truth, "truth"), (predicted, "predicted")):
                axis = next(axes)
                axis.imshow(content, cmap=colors, vmin=0, vmax=classes - 1, interpolation="nearest")
                axis.set_title(title, fontsize=8)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the evaluation's metrics."""
    data_arguments, model_arguments, training_arguments = parse_flags(
        argv, SegmentationDataArguments, SegmentationModelArguments, SegmentationTrainingArguments
    )
    set_seed(training_arguments.seed)
    if data_arguments.picture_samples < 1:
        raise InputError(f"--picture_samples must be at least 1, got {data_arguments.picture_samples}")
    train, evaluation, account = load_data_and_account(data_arguments, training_arguments.seed)
    labels, ignored = list(account.classes), ignored_label(len(account.classes))
    choose_learning_rate(
        training_arguments,
        model_arguments.model or model_arguments.backbone,
        untrained=HEADS[model_arguments.head].learning_rate,
    )
    model, processor = build_model(model_arguments, data_arguments, labels)
    account.warnings += check_queries(model, train, mask_rules(data_arguments))
    transform = training_transform(data_arguments, processor.size["height"], processor.size["width"], ignored)
    trainer = SegmentationTrainer(
        model=model,
        args=training_arguments,
        train_dataset=RandomlyTransformed(train, transform, training_arguments.seed),
        eval_dataset=evaluation,
        data_collator=Collate(processor),
        compute_metrics=segmentation_metrics,
        processing_class=processor,
    )
    training, metrics = train_evaluate_save(trainer, account)
    folder = Path(training_arguments.output_dir)
    samples = evaluation.select(range(min(data_arguments.picture_samples, len(evaluation))))
    finish(
        trainer,
        lambda file: draw_predictions(folder, samples, ignored, file),
        {
            "dataset": f"{data_arguments.dataset}: {len(train)} images to train, {len(evaluation)} to evaluate, "
            f"{len(labels)} classes",
            "model": f"{trainer.model_class.__name__}, {count_parameters(model):,} parameters, saved in {folder}",
            "mean IoU": f"{metrics['eval_mean_iou']:.3f} on the held-out images, {metrics['eval_overall_accuracy']:.1%} "
            "of their pixels right",
            "training": f"{training['train_runtime']:.0f} s",
        },
    )
    return metrics


if __name__ == "__main__":
    run_program(main)
