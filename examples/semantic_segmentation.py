"""Trains a segmenter of transformers on an InternImage backbone, measures its mean IoU, and uses the result.

Without arguments it takes handwritten digits on photographs (nothing is downloaded), trains a small UperNet to a mean IoU
well above 0.6 on scenes that it has not seen, and writes model, metrics and a picture of predictions:

    python examples/semantic_segmentation.py

On your own images and masks, with a pretrained backbone:

    python examples/semantic_segmentation.py --dataset ade20k/ --reduce_labels --id2label ade20k.json --head upernet \
        --backbone OpenGVLab/internimage_t_1k_224 --output_dir outputs/ade20k --max_steps 160000 --learning_rate 6e-5 \
        --eval_strategy steps --eval_steps 16000 --save_strategy steps --save_steps 16000 --layer_decay 0.9 --bf16

`--dataset` is a folder with `images/train`, `images/validation` and masks of the same names in `annotations/train` and so on
(or `train/images` and `train/masks`; without splits, `images` and `masks`), a folder for `datasets`' imagefolder with a
`metadata.jsonl`, or the id of a dataset on the Hub; the latter two have the columns `image` and `annotation`. A mask is a
greyscale or palette image whose values are the classes. All flags of `transformers.TrainingArguments` work, and those of
`internimage_hf.training`; a YAML file with flags may come first. `--resume_from_checkpoint last` goes on where an
interrupted run of the same `--output_dir` was; `--model FOLDER` starts from a segmenter that was trained or converted before.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from common import (
    DataArguments,
    ExampleTrainingArguments,
    HeadTrainer,
    ModelArguments,
    RandomlyTransformed,
    build_head,
    check_column,
    choose_learning_rate,
    count_parameters,
    finish,
    load_head,
    make_backbone,
    model_type_of,
    train_and_held_out,
    train_evaluate_save,
)
from flags import parse_flags
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    set_seed,
)

# from where they are defined: they need no torchvision, and transformers 5.17 hides them where it is absent
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.utils import logging


logger = logging.get_logger(__name__)

EMBEDDED_TRAIN, EMBEDDED_EVAL, EMBEDDED_SIZE = 800, 100, 96  # scenes, scenes, pixels
SPLITS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "test", "testing")}
MASKS = ("annotations", "masks", "labels")


@dataclass
class SegmentationDataArguments(DataArguments):
    dataset: str = field(
        default="digits",
        metadata={"help": "a folder of images and masks, an imagefolder, the id of a dataset on the Hub, or `digits`"},
    )
    mask_column: str = field(default="annotation", metadata={"help": "column of the masks"})
    id2label: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with the classes' names by number; if absent, the dataset's own id2label.json, or the "
            "numbers that occur in the training masks"
        },
    )
    ignore_index: int = field(
        default=255, metadata={"help": "value of the masks, 0 to 255, that counts in neither loss nor metric"}
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "0 of the masks is no class, and 1 is the first one (ADE20K)"}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "side of the square that the model sees; 512 if absent, or the model's own"}
    )
    min_scale: float | None = field(
        default=None,
        metadata={"help": "smallest size of a training image before the crop, 1 is --image_size; 0.5, digits 1"},
    )
    max_scale: float | None = field(default=None, metadata={"help": "largest size, likewise; 2, digits 1"})


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


@dataclass
class Head:
    """What the program has to know of a segmenter."""

    model: type
    config: type
    processor: type
    learning_rate: float  # of an untrained one
    demo: dict  # configuration over the small untrained backbone


HEADS = {
    "upernet": Head(
        UperNetForSemanticSegmentation,
        UperNetConfig,
        SegformerImageProcessorPil,
        4e-3,
        {"hidden_size": 64, "auxiliary_channels": 32},
    ),
    "mask2former": Head(
        Mask2FormerForUniversalSegmentation,
        Mask2FormerConfig,
        Mask2FormerImageProcessorPil,
        5e-4,
        {
            "feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "encoder_feedforward_dim": 128,
            "dim_feedforward": 128, "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4,
            "num_queries": 20, "train_num_points": 1024, "init_std": 0.1,
        },
    ),
}  # fmt: skip


def _folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of masks of each split in `root`; empty if there are none."""
    found = {}
    for split, names in SPLITS.items():
        pairs = [(root / "images" / name, root / masks / name) for name in names for masks in MASKS]
        pairs += [(root / name / "images", root / name / masks) for name in names for masks in MASKS]
        for images, masks in pairs:
            if images.is_dir() and masks.is_dir():
                found[split] = (images, masks)
                break
    if not found:
        for masks in MASKS:
            if (root / "images").is_dir() and (root / masks).is_dir():
                return {"train": (root / "images", root / masks)}
    return found


def load_folders(splits: dict[str, tuple[Path, Path]]) -> datasets.DatasetDict:
    """Folders of images and of masks of the same names as the columns `image` and `annotation`.

    Raises:
        ValueError: if an image has no mask.
    """
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    result = {}
    for split, (images, masks) in splits.items():
        mask_of = {file.stem: file for file in sorted(masks.iterdir()) if file.is_file()}
        files = [file for file in sorted(images.iterdir()) if file.suffix.lower() in Image.registered_extensions()]
        for file in files:
            if file.stem not in mask_of:
                raise ValueError(f"the image {file} has no mask of its name in {masks}")
        columns = {"image": [str(f) for f in files], "annotation": [str(mask_of[f.stem]) for f in files]}
        result[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(result)


def _classes(mask: Image.Image) -> np.ndarray:
    """A mask's values.

    Raises:
        ValueError: if the mask is not an image of classes 0 to 255.
    """
    values = np.asarray(mask)
    if values.ndim != 2 or values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise ValueError(
            f"a mask must be a greyscale or palette image with values 0 to 255, got mode {mask.mode} and shape "
            f"{values.shape}"
        )
    return values.astype(np.uint8)


def mask_reader(arguments: SegmentationDataArguments, num_labels: int):
    """`read(mask)`: (height, width) uint8, the classes from 0 as the model counts them, and `--ignore_index`.

    Raises (when called):
        ValueError: if a mask has a value that is no class.
    """

    def read(mask: Image.Image) -> np.ndarray:
        values = _classes(mask)
        if arguments.reduce_labels:
            ignored = (values == 0) | (values == arguments.ignore_index)
            values = np.where(ignored, arguments.ignore_index, values - 1).astype(np.uint8)
        present = np.unique(values[values != arguments.ignore_index])
        if present.size and present[-1] >= num_labels:
            raise ValueError(
                f"a mask has the class {present[-1]}, but there are {num_labels} classes, numbered from 0: see --id2label, "
                "--ignore_index and --reduce_labels"
            )
        return values

    return read


def load_labels(arguments: SegmentationDataArguments, train: datasets.Dataset) -> list[str]:
    """The classes' names: from `--id2label`, the dataset's own `id2label.json`, or numbers as in the training masks.

    Raises:
        ValueError: if the names are not numbered from 0, or are more than masks can tell apart.
    """
    file = arguments.id2label
    if file is None and Path(arguments.dataset).is_dir():
        own = Path(arguments.dataset) / "id2label.json"
        file = own if own.is_file() else None
    elif file is None:
        with contextlib.suppress(EntryNotFoundError):
            file = hf_hub_download(arguments.dataset, "id2label.json", repo_type="dataset")
    if file is None:
        largest = 0
        masks = train.select_columns(["annotation"])
        for row in datasets.utils.tqdm(masks, desc="Looking for the classes in the masks"):
            values = _classes(row["annotation"])
            largest = max(largest, int(values[values != arguments.ignore_index].max(initial=0)))
        return [f"class {i}" for i in range(largest + (0 if arguments.reduce_labels else 1))]
    names = {int(number): name for number, name in json.loads(Path(file).read_text(encoding="utf-8")).items()}
    if sorted(names) != list(range(len(names))) or len(names) > 255:
        raise ValueError(f"{file} must name at most 255 classes, numbered from 0 without gaps, got {sorted(names)}")
    return [names[i] for i in range(len(names))]


def load_splits(
    arguments: SegmentationDataArguments, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """The training and the evaluation split, with the columns `image` and `mask`, and the classes' names.

    Raises:
        ValueError: if the dataset has no images, no masks or no training split.
    """
    if not 0 <= arguments.ignore_index <= 255:
        raise ValueError(f"--ignore_index must be 0 to 255, got {arguments.ignore_index}")
    if arguments.dataset == "digits":
        from embedded_data import load_digit_scenes

        splits = load_digit_scenes(
            train=min(EMBEDDED_TRAIN, arguments.max_train_samples or EMBEDDED_TRAIN),
            evaluation=min(EMBEDDED_EVAL, arguments.max_eval_samples or EMBEDDED_EVAL),
            size=EMBEDDED_SIZE,
        ).remove_columns("objects")
    elif Path(arguments.dataset).is_dir():
        folders = _folders(Path(arguments.dataset))
        splits = load_folders(folders) if folders else datasets.load_dataset("imagefolder", data_dir=arguments.dataset)
    else:
        splits = datasets.load_dataset(arguments.dataset, arguments.dataset_config)
    check_column(splits, arguments.image_column, "image_column")
    check_column(splits, arguments.mask_column, "mask_column")
    splits = splits.select_columns([arguments.image_column, arguments.mask_column])
    names = {arguments.image_column: "image", arguments.mask_column: "annotation"}
    splits = splits.rename_columns({old: new for old, new in names.items() if old != new})
    train, evaluation = train_and_held_out(splits, arguments, seed)
    if arguments.dataset == "digits":
        from embedded_data import DIGIT_NAMES

        labels = ["background", *DIGIT_NAMES]
    else:
        labels = load_labels(arguments, train)
    read = mask_reader(arguments, len(labels))

    def transform(batch: dict[str, list]) -> dict[str, list]:
        return {
            "image": [image.convert("RGB") for image in batch["image"]],
            "mask": [read(mask) for mask in batch["annotation"]],
        }

    def with_full_mask(batch: dict[str, list]) -> dict[str, list]:
        batch = transform(batch)
        return {**batch, "full_mask": [torch.from_numpy(mask.astype(np.int64)) for mask in batch["mask"]]}

    return train.with_transform(transform), evaluation.with_transform(with_full_mask), labels


def build_model(arguments: SegmentationModelArguments, data: SegmentationDataArguments, labels: list[str]):
    """The segmenter for `labels`, and its image processor.

    Raises:
        ValueError: if `--model` is none of the heads on an InternImage backbone.
    """
    fields = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    head_type = arguments.head if arguments.model is None else model_type_of(arguments.model)
    fields["ignore_value" if head_type == "mask2former" else "loss_ignore_index"] = data.ignore_index
    processor = {"do_reduce_labels": data.reduce_labels}
    if head_type == "mask2former":
        processor["ignore_index"] = data.ignore_index
    side = data.image_size
    if arguments.model is not None:
        model = load_head({name: head.model for name, head in HEADS.items()}, arguments, **fields)
        head = HEADS[head_type]
        if side is None:
            size = head.processor.from_pretrained(arguments.model).size
            return model, head.processor(size={"height": size["height"], "width": size["width"]}, **processor)
    else:
        head = HEADS[head_type]
        backbone = make_backbone(arguments, ["stage1", "stage2", "stage3", "stage4"])
        if arguments.backbone is None:
            fields |= head.demo
        model = build_head(head.model, head.config, backbone, arguments, **fields)
        side = side or (EMBEDDED_SIZE if arguments.backbone is None else 512)
    return model, head.processor(size={"height": side, "width": side}, **processor)


def training_transform(arguments: SegmentationDataArguments, height: int, width: int):
    """`transform(example, seed)`: random size, crop, mirroring and colours, by albumentations."""
    import albumentations as A

    digits = arguments.dataset == "digits"
    flip = arguments.random_flip if arguments.random_flip is not None else not digits
    low = arguments.min_scale if arguments.min_scale is not None else (1.0 if digits else 0.5)
    high = arguments.max_scale if arguments.max_scale is not None else (1.0 if digits else 2.0)
    if not 0 < low <= high:
        raise ValueError(f"--min_scale must be above 0 and at most --max_scale, got {low} and {high}")
    side = min(height, width)
    steps = [
        A.SmallestMaxSize(max_size=list(range(max(round(low * side), 1), round(high * side) + 1))),
        A.PadIfNeeded(height, width, fill_mask=arguments.ignore_index),
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
    """Examples to a batch of the model's inputs, by the head's image processor: resized and normalised.

    Examples to evaluate have a `full_mask` of their image's size besides, which the metric is measured with.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, examples: list[dict]) -> dict:
        images = [example["image"] for example in examples]
        masks = [example["mask"] for example in examples]
        if isinstance(self.processor, SegformerImageProcessorPil):
            batch = dict(self.processor(images=images, return_tensors="pt"))
            # not by the processor: that of transformers 5.17 needs torchvision for it
            size = (self.processor.size["width"], self.processor.size["height"])
            resized = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
            batch["labels"] = torch.from_numpy(np.stack(resized).astype(np.int64))
        else:  # the masks have been reduced when they were read
            batch = dict(
                self.processor(images=images, segmentation_maps=masks, do_reduce_labels=False, return_tensors="pt")
            )
        if "full_mask" in examples[0]:
            batch["full_masks"] = [example["full_mask"] for example in examples]
        return batch


class SegmentationTrainer(HeadTrainer):
    """Evaluation gathers, for each image, three numbers of pixels for each class: right, true, predicted."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = dict(inputs)
        masks = inputs.pop("full_masks")
        loss, outputs, inputs = self.predict_batch(model, inputs)
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
        return loss, areas, areas.new_zeros(len(areas))  # without labels there are no metrics


def class_areas(predicted: torch.Tensor, mask: torch.Tensor, num_labels: int, ignore_index: int) -> torch.Tensor:
    """Numbers of pixels of each class that are right, that are of the class, and that were predicted to be.

    Args:
        predicted, mask: (height, width) of integers. Where the mask is `ignore_index`, nothing counts.

    Returns:
        (3, num_labels) of int64.
    """
    counted = mask != ignore_index
    predicted, mask = predicted[counted], mask[counted]
    return torch.stack(
        [torch.bincount(part, minlength=num_labels) for part in (mask[mask == predicted], mask, predicted)]
    )


def segmentation_metrics(prediction) -> dict[str, float]:
    """Mean IoU and mean accuracy over the classes that occur, and the part of all pixels that is right."""
    right, true, predicted = prediction.predictions.sum(0).astype(np.float64)
    union = true + predicted - right
    return {
        "mean_iou": float((right[union > 0] / union[union > 0]).mean()),
        "mean_accuracy": float((right[true > 0] / true[true > 0]).mean()),
        "overall_accuracy": float(right.sum() / true.sum()),
    }


def draw_predictions(folder: Path, samples: datasets.Dataset, ignore_index: int, file: Path) -> None:
    """Loads the saved segmenter and writes a PNG: each image, its true mask, and the predicted one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    head = HEADS[model_type_of(folder)]
    model = head.model.from_pretrained(folder).eval()
    processor = head.processor.from_pretrained(folder)
    colors = plt.get_cmap("nipy_spectral", model.config.num_labels)
    columns = 2
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(rows, 3 * columns, figsize=(6.4 * columns, 2.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, sample in enumerate(samples):
        image, mask = sample["image"], sample["mask"]
        with torch.no_grad():
            outputs = model(pixel_values=processor(images=[image], return_tensors="pt")["pixel_values"])
        predicted = processor.post_process_semantic_segmentation(outputs, target_sizes=[mask.shape])[0].numpy()
        row, column = divmod(number, columns)
        for axis, content, title in (
            (axes[row, 3 * column], image, "image"),
            (axes[row, 3 * column + 1], np.ma.masked_equal(mask, ignore_index), "truth"),
            (axes[row, 3 * column + 2], predicted, "predicted"),
        ):
            axis.imshow(content, cmap=colors, vmin=0, vmax=model.config.num_labels - 1, interpolation="nearest")
            axis.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def without_single_image(train: datasets.Dataset, arguments: SegmentationTrainingArguments) -> datasets.Dataset:
    """A training set whose last batch has more than one image: UperNet normalises maps of one pixel over the batch.

    Raises:
        ValueError: if no batch can have two images.
    """
    if arguments.per_device_train_batch_size < 2 or len(train) < 2:
        raise ValueError(
            "UperNet is trained on batches of at least 2 images: got --per_device_train_batch_size "
            f"{arguments.per_device_train_batch_size} and {len(train)} images to train"
        )
    # several processes fill their last batches up
    if arguments.world_size == 1 and len(train) % arguments.train_batch_size == 1:
        logger.warning("the last training image is left out: alone in a batch it could not be normalised")
        return train.select(range(len(train) - 1))
    return train


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the evaluation's metrics."""
    data_arguments, model_arguments, training_arguments = parse_flags(
        argv, SegmentationDataArguments, SegmentationModelArguments, SegmentationTrainingArguments
    )
    set_seed(training_arguments.seed)
    train, evaluation, labels = load_splits(data_arguments, training_arguments.seed)
    choose_learning_rate(
        training_arguments,
        model_arguments.model or model_arguments.backbone,
        untrained=HEADS[model_arguments.head].learning_rate,
    )
    model, processor = build_model(model_arguments, data_arguments, labels)
    if isinstance(model, UperNetForSemanticSegmentation):
        train = without_single_image(train, training_arguments)
    transform = training_transform(data_arguments, processor.size["height"], processor.size["width"])
    trainer = SegmentationTrainer(
        model=model,
        args=training_arguments,
        train_dataset=RandomlyTransformed(train, transform, training_arguments.seed),
        eval_dataset=evaluation,
        data_collator=Collate(processor),
        compute_metrics=segmentation_metrics,
        processing_class=processor,
    )
    training, metrics = train_evaluate_save(trainer)
    folder = Path(training_arguments.output_dir)
    samples = evaluation.select(range(min(data_arguments.picture_samples, len(evaluation))))
    finish(
        trainer,
        lambda file: draw_predictions(folder, samples, data_arguments.ignore_index, file),
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
    main()
