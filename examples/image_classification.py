"""In: images in classes. Out: a fine-tuned InternImage classifier, its accuracy, and a picture of its predictions.

Without arguments the program takes scikit-learn's handwritten digits (no download), trains a small InternImage to more than
97 % accuracy on the held-out fifth, and writes model, metrics and a picture of predictions:

    python examples/image_classification.py

On your own images, in one folder per class (or with a metadata.csv of the columns file_name and label), starting from a
checkpoint:

    python examples/image_classification.py --dataset photos/ --model OpenGVLab/internimage_t_1k_224 \
        --output_dir outputs/photos --num_train_epochs 20 --learning_rate 1e-4 --bf16 --gradient_checkpointing

`--dataset` also takes the id of a dataset on the Hub. Folders named `train`, `validation`, `test` and similar are splits if
they contain class folders. The program prints its interpretation of the data, and the unused files, before the first step. All
flags of `transformers.TrainingArguments` work, and `--layer_decay`, `--offset_lr_multiplier` and `--ema_decay` of the official
fine-tuning. A YAML file with flags may come first, for instance a recipe; later flags override it:

    python examples/image_classification.py examples/recipes/imagenet1k_t.yaml --per_device_train_batch_size 64

`--resume_from_checkpoint last` resumes an interrupted run of the same `--output_dir`.

On several devices, with the files in `examples/accelerate/` (with `--use_cpu` in several processes on CPUs):

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 8 examples/image_classification.py ...

`--streaming` reads the training images during training, without a download before. The stream has no end: it needs
`--max_steps`, and `--eval_strategy steps --save_strategy steps --eval_steps 1000 --save_steps 1000` to evaluate and save.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from augmentation import Mix, rand_augment, random_erasing
from common import (
    VARIANTS,
    ExampleTrainer,
    ExampleTrainingArguments,
    check_column,
    choose_learning_rate,
    count_parameters,
    finish,
    loading,
    train_evaluate_save,
)
from data import (
    Account,
    Data,
    InputError,
    Part,
    check_labels,
    chosen_splits,
    encode_labels,
    load_data,
    read_image,
    run_program,
    some,
    train_and_evaluation,
    undecoded,
)
from data import DataArguments as SharedDataArguments
from drawing import panels
from flags import parse_flags
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    pipeline,
    set_seed,
)

from internimage_hf import InternImageConfig, InternImageForImageClassification, InternImageImageProcessor
from internimage_hf.training import EndlessStream


# Names of the class column if no column is a `ClassLabel`, as in a CSV file.
LABEL_COLUMNS = ("label", "labels", "class", "category")


@dataclass
class DataArguments(SharedDataArguments):
    dataset: str = field(
        default="digits",
        metadata={"help": "a folder of class folders, the id of a dataset on the Hub, or `digits` (embedded)"},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "column of the images; found by its type if absent"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "column of the classes; found by its type or name if absent"}
    )
    image_size: int | None = field(default=None, metadata={"help": "side of the images; the model's own if absent"})
    random_crop_scale: float = field(
        default=0.6,
        metadata={"help": "smallest part of an image's area that a random training crop has; 1 for no crops"},
    )
    streaming: bool = field(
        default=False, metadata={"help": "read the images during training instead of downloading the dataset first"}
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "with --streaming: draw each image at random from this many read ahead"}
    )
    random_flip: bool | None = field(
        default=None, metadata={"help": "mirror half of the training images; by default all but digits"}
    )
    rand_augment: float | None = field(
        default=None, metadata={"help": "magnitude of RandAugment, 0 to 10: two operations on each training image"}
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "probability that a part of a training image is replaced by noise"}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "mixup: alpha of the weights' distribution; 0 for none"})
    cutmix_alpha: float = field(default=0.0, metadata={"help": "cutmix: alpha of the areas' distribution; 0 for none"})
    mixup_prob: float = field(default=1.0, metadata={"help": "probability that a batch is mixed at all"})
    mixup_switch_prob: float = field(
        default=0.5, metadata={"help": "probability of cutmix, where mixup and cutmix are on"}
    )

    def __post_init__(self):
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 10:
            raise InputError(f"--rand_augment must be from 0 to 10, got {self.rand_augment}")
        if not 0 <= self.random_erasing <= 1:
            raise InputError(f"--random_erasing must be from 0 to 1, got {self.random_erasing}")
        if not 0 < self.random_crop_scale <= 1:
            raise InputError(f"--random_crop_scale must be above 0 and at most 1, got {self.random_crop_scale}")
        for name in ("image_size", "shuffle_buffer_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        self.mix(2)  # raises for bad flags

    def mix(self, classes: int) -> Mix:
        return Mix(classes, self.mixup_alpha, self.cutmix_alpha, self.mixup_prob, self.mixup_switch_prob)


@dataclass
class ModelArguments:
    model: str | None = field(
        default=None,
        metadata={
            "help": "an InternImage checkpoint (folder or Hub id), or t, s, b, l, xl, h, g for one of these untrained; "
            "a small untrained model if absent"
        },
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "stochastic depth; the model's own if absent"}
    )


@dataclass
class ClassificationTrainingArguments(ExampleTrainingArguments):
    output_dir: str | None = "outputs/image_classification"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 64
    num_train_epochs: float = 8
    warmup_steps: float = 0.1
    metric_for_best_model: str | None = "accuracy"


class ClassificationTrainer(ExampleTrainer):
    """A Trainer with soft targets in training: mixed batches and smoothed labels."""

    def __init__(self, *args, mix: Mix, **kwargs):
        super().__init__(*args, **kwargs)
        self.mix = mix

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixel_values, targets = inputs["pixel_values"], inputs["labels"]
        if model.training:
            pixel_values, targets = self.mix(pixel_values, targets)
        outputs = model(pixel_values=pixel_values)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = cross_entropy(outputs.logits.float(), targets, label_smoothing=smoothing)
        return (loss, outputs) if return_outputs else loss


def load_digits() -> datasets.DatasetDict:
    """Loads scikit-learn's 1797 handwritten digits of 8x8 pixels as 32x32 RGB images; a stratified fifth is held out."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    images = [
        Image.fromarray((image * (255 / 16)).astype(np.uint8))
        .resize((32, 32), Image.Resampling.BICUBIC)
        .convert("RGB")
        for image in digits.images
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"digit {i}" for i in range(10)])}
    )
    dataset = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return dataset.train_test_split(test_size=0.2, stratify_by_column="label", seed=0)


def find_column(data: Data, split: str, given: str | None, kind: type, names: tuple[str, ...], flag: str) -> str:
    """Finds a column by its flag, its type, or a usual name; `data.layout` reports an ambiguous choice.

    Raises:
        InputError: if there is no such column.
    """
    features = data.splits[split].features
    if features is None:
        raise InputError(
            f"--streaming: {data.name} does not say which columns it has; without --streaming they are found"
        )
    if given is not None:
        return given
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = found or [name for name in features if name.lower() in names]
    if not found:
        raise InputError(
            f"--dataset {data.name}: no column of the split {split} is {kind.__name__} or called {' or '.join(names)}; "
            f"--{flag} was expected to name one of {some(list(features))}"
        )
    column = min(found, key=lambda name: name.lower() not in names)  # one with a usual name, or the first
    if len(found) > 1:
        data.layout += f"; --{flag} is {column}, others are {some([name for name in found if name != column])}"
    return column


def take_columns(data: Data, arguments: DataArguments) -> None:
    """Reduces all splits to the columns `image` and `label`; leaves out splits without labels, such as hidden tests.

    Raises:
        InputError: if a used split lacks a column.
    """
    train, _ = chosen_splits(data.splits, arguments)
    image = find_column(data, train, arguments.image_column, datasets.Image, ("image", "img"), "image_column")
    label = find_column(data, train, arguments.label_column, datasets.ClassLabel, LABEL_COLUMNS, "label_column")
    if image == label:
        raise InputError(f"--image_column and --label_column are both {image}; two columns were expected")
    for name, split in list(data.splits.items()):
        needed = name in (train, arguments.eval_split)
        columns = split.column_names or []
        is_stream = isinstance(split, datasets.IterableDataset)
        if not needed and not (
            image in columns and label in columns and (is_stream or any(has_label(value) for value in split[label]))
        ):
            data.layout += (
                f"; the split {name}{'' if is_stream else f' ({len(split)} images)'} has no labels and is not used"
            )
            del data.splits[name]
    check_column(data, image, "image_column")
    check_column(data, label, "label_column")
    for name, split in data.splits.items():
        split = split.select_columns([image, label])
        others = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
        data.splits[name] = split.rename_columns(others) if others else split


def has_label(value: object) -> bool:
    """Whether a label is a class, and not null, NaN or -1, the marks of a hidden label."""
    return value is not None and value == value and value != -1


def load_splits(arguments: DataArguments, seed: int) -> tuple[dict, Account]:
    """Loads the images as `{"train": ..., "evaluation": ...}`, and their account.

    The columns are `image`, not decoded yet; `label`, a `ClassLabel` with the same names in both; and, unless the dataset is
    streamed from the Hub, `row`, the index in the split. With `--streaming` the datasets are iterable.

    Raises:
        InputError: if the dataset has no images, no classes or no training split, or an image has no class.
    """
    if arguments.dataset == "digits":
        splits = {name: undecoded(split) for name, split in load_digits().items()}
        data = Data("digits", "scikit-learn's handwritten digits", splits)
    else:
        data = load_data(arguments, class_folders=True, streaming=arguments.streaming)
    take_columns(data, arguments)
    train, evaluation = chosen_splits(data.splits, arguments)
    if arguments.streaming and evaluation is None:
        raise InputError(
            f"--streaming: {arguments.dataset} has no split `validation` or `test` with labels to evaluate on, only "
            f"{', '.join(data.splits)}; --eval_split names another"
        )
    if isinstance(data.splits[train], datasets.IterableDataset):
        return streamed_splits(data, arguments, train, evaluation)

    labels = encode_labels(data, "label")
    for name in {train, evaluation} - {None}:
        check_labels(data.splits[name], "label", name)
        if arguments.dataset != "digits":  # which are not broken
            data.splits[name] = data.splits[name].add_column("row", range(len(data.splits[name])))
    parts = train_and_evaluation(data, arguments, seed, label_column="label")
    account = Account(data, labels, {})
    for name, part in parts.items():
        counts = Counter(part["label"])
        account.parts[name] = Part(len(part), {label: counts[index] for index, label in enumerate(labels)})
    trained, evaluated = (account.parts[name].counts for name in ("train", "evaluation"))
    if unknown := [label for label in labels if evaluated[label] and not trained[label]]:
        account.warnings.append(
            f"no training image is of {some(unknown)}, but {sum(evaluated[label] for label in unknown)} images to evaluate "
            "are: the model cannot learn them"
        )
    if arguments.streaming:
        parts = {name: part.to_iterable_dataset(min(8, len(part))) for name, part in parts.items()}
    return parts, account


def streamed_splits(data: Data, arguments: DataArguments, train: str, evaluation: str) -> tuple[dict, Account]:
    """`load_splits` for a dataset streamed from the Hub.

    Raises:
        InputError: if the labels are no `ClassLabel`: their names would be known only at the end of the stream.
    """
    used = {"train": data.splits[train], "evaluation": data.splits[evaluation]}
    names: list[list[str]] = []
    for name, split in zip((train, evaluation), used.values(), strict=True):
        kind = (split.features or {}).get("label")
        if not isinstance(kind, datasets.ClassLabel):
            raise InputError(
                f"--streaming: the label column of the split {name} of {arguments.dataset} does not name its classes (it is "
                f"{kind}); a ClassLabel was expected, or no --streaming"
            )
        names.append(kind.names)
    labels = list(dict.fromkeys(name for part in names for name in part))
    limits = (arguments.max_train_samples, arguments.max_eval_samples)
    for (part, split), own, most in zip(list(used.items()), names, limits, strict=True):
        if own != labels:
            number = [labels.index(name) for name in own] + [-1]  # of -1
            features = datasets.Features({**split.features, "label": datasets.ClassLabel(names=labels)})
            split = split.map(
                lambda row, number=number: {"label": None if row["label"] is None else number[row["label"]]},
                features=features,
            )
        used[part] = split if most is None else split.take(most)
    data.layout += f"; trained on {train}, evaluated on {evaluation}"
    if unused := [name for name in data.splits if name not in (train, evaluation)]:
        data.layout += f"; not used: {some(unused)}"
    for part, most in zip(used, limits, strict=True):
        if most is not None:
            data.layout += f"; the first {most} of {part}"
    return used, Account(data, labels, dict.fromkeys(used, Part(None)))


def build_model(arguments: ModelArguments, labels: list[str], image_size: int | None):
    """Builds the model with a new head for `labels`, and its image processor.

    Raises:
        InputError: if `--model` is no InternImage, or its image processor returns images of different sizes.
    """
    fields = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if arguments.drop_path_rate is not None:
        fields["drop_path_rate"] = arguments.drop_path_rate
    processor = None
    if arguments.model is None or arguments.model in VARIANTS:
        with loading("drop_path_rate", arguments.drop_path_rate):
            if arguments.model is None:
                small = {"channels": 32, "depths": [1, 1, 2, 1], "groups": [2, 4, 8, 16], "image_size": 32}
                config = InternImageConfig(**small, **fields)
            else:
                config = InternImageConfig.from_variant(arguments.model, **fields)
        model = AutoModelForImageClassification.from_config(config)
    else:
        with loading("model", arguments.model):
            model = AutoModelForImageClassification.from_pretrained(
                arguments.model, ignore_mismatched_sizes=True, **fields
            )
            if not isinstance(model, InternImageForImageClassification):
                raise InputError(f"--model {arguments.model} is a {type(model).__name__}; an InternImage was expected")
            if model.config.num_channels != 3:
                raise InputError(
                    f"--model {arguments.model} takes {model.config.num_channels} channels; 3 were expected, images are RGB"
                )
            if image_size is None:
                processor = AutoImageProcessor.from_pretrained(arguments.model)
    if processor is None:
        side = image_size or model.config.image_size
        processor = InternImageImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        model.config.image_size = side
    output_size(processor)
    return model, processor


def output_size(processor) -> tuple[int, int]:
    """Returns height and width of an image processor's images.

    Raises:
        InputError: if the size depends on the image: a batch needs images of one size.
    """
    for step, name in (("do_center_crop", "crop_size"), ("do_resize", "size")):
        size = getattr(processor, name, None)
        if getattr(processor, step, False) and size is not None and size.get("height") and size.get("width"):
            return size["height"], size["width"]
    raise InputError(
        f"the image processor of --model, {type(processor).__name__}, gives images of different sizes (`size` is "
        f"{dict(processor.size)}); a centre crop, a `size` of height and width, or --image_size was expected"
    )


def random_resized_crop(image: Image.Image, height: int, width: int, min_scale: float) -> Image.Image:
    """Crops a random part with at least `min_scale` of the area and an aspect of 3/4 to 4/3, and resizes it."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(min_scale, 1.0)
        aspect = random.uniform(3 / 4, 4 / 3)
        crop_width, crop_height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < crop_width <= image.width and 0 < crop_height <= image.height:
            left = random.randint(0, image.width - crop_width)
            top = random.randint(0, image.height - crop_height)
            box = (left, top, left + crop_width, top + crop_height)
            return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def image_name(image: object, row: int | None) -> str | None:
    """Returns an image's name for messages; None, for the file's name, if it has a file."""
    return None if row is None or (isinstance(image, dict) and image.get("path")) else f"row {row} of its split"


def decoded(batch: dict) -> list[Image.Image]:
    """Reads the images of a batch.

    Raises:
        InputError: if an image cannot be read, or has no class (in a stream; other datasets are checked before).
    """
    rows = batch.get("row") or [None] * len(batch["image"])
    names = [image_name(image, row) for image, row in zip(batch["image"], rows, strict=True)]
    for image, name, label in zip(batch["image"], names, batch["label"], strict=True):
        if not has_label(label):
            name = name or (image.get("path") if isinstance(image, dict) else None) or "an image without a file name"
            raise InputError(f"{name} has no label (it is {label}); a class was expected")
    return [read_image(image, name) for image, name in zip(batch["image"], names, strict=True)]


def training_transform(processor, arguments: DataArguments):
    """Returns the transform of training batches: random crop, flip, RandAugment, image processor, erasing."""
    height, width = output_size(processor)
    flip = arguments.random_flip if arguments.random_flip is not None else arguments.dataset != "digits"

    def transform(batch):
        images = decoded(batch)
        if arguments.random_crop_scale < 1:
            images = [random_resized_crop(image, height, width, arguments.random_crop_scale) for image in images]
        if flip:
            images = [
                image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image
                for image in images
            ]
        if arguments.rand_augment is not None:
            images = [rand_augment(image, arguments.rand_augment) for image in images]
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        if arguments.random_erasing:
            pixel_values = torch.stack([random_erasing(image, arguments.random_erasing) for image in pixel_values])
        return {"pixel_values": pixel_values, "labels": batch["label"]}

    return transform


def evaluation_transform(processor):
    def transform(batch):
        pixel_values = processor(decoded(batch), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": batch["label"]}

    return transform


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def draw_predictions(images: list[Image.Image], truth: list[str], predictions: list[dict], file: Path) -> None:
    """Writes a PNG: each image with its predicted class, green if correct, red otherwise."""
    with panels(file, len(images), columns=6, width=2.0, height=2.3) as axes:
        for image, label, prediction, axis in zip(images, truth, predictions, axes, strict=False):
            axis.imshow(image)
            axis.set_title(
                f"{prediction['label'][:24]}\n{prediction['score']:.0%}",
                fontsize=9,
                color="green" if prediction["label"] == label else "red",
                parse_math=False,  # a class may be called $5
            )


def use_model(folder: Path, samples: dict[str, list], labels: list[str], file: Path) -> dict[str, str]:
    """Loads the saved model as classifier, pipeline and backbone; draws the predictions."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    images, truth = decoded(samples), [labels[label] for label in samples["label"]]
    predictions = [best[0] for best in classify(images, top_k=1)]

    stages = model.config.stage_names[1:]
    backbone = AutoBackbone.from_config(AutoConfig.from_pretrained(folder, out_features=stages)).eval()
    backbone.load_state_dict(
        {name: tensor for name, tensor in model.internimage.state_dict().items() if not name.startswith("pooler.")}
    )
    pixel_values = AutoImageProcessor.from_pretrained(folder)(images[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        feature_maps = backbone(pixel_values).feature_maps

    draw_predictions(images, truth, predictions, file)
    right = sum(best["label"] == label for best, label in zip(predictions, truth, strict=True))
    return {
        "pipeline": f"{right} of {len(predictions)} sample images right",
        "backbone": ", ".join(f"{name} {tuple(m.shape[1:])}" for name, m in zip(stages, feature_maps, strict=True)),
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the evaluation's metrics."""
    data_arguments, model_arguments, training_arguments = parse_flags(
        argv, DataArguments, ModelArguments, ClassificationTrainingArguments
    )
    set_seed(training_arguments.seed)
    choose_learning_rate(training_arguments, model_arguments.model, untrained=2e-3)
    if data_arguments.streaming and training_arguments.max_steps <= 0:
        raise InputError(f"--streaming needs --max_steps of at least 1, got {training_arguments.max_steps}")

    parts, account = load_splits(data_arguments, training_arguments.seed)
    train, evaluation, labels = parts["train"], parts["evaluation"], account.classes
    present = [label for label in labels if any((part.counts or {label: 1})[label] for part in account.parts.values())]
    if len(present) < 2:
        raise InputError(
            f"--dataset {data_arguments.dataset} has images of one class, {some(present)}; at least two classes were expected"
        )
    model, processor = build_model(model_arguments, labels, data_arguments.image_size)

    if data_arguments.streaming:
        train_dataset = EndlessStream(
            train,
            training_transform(processor, data_arguments),
            seed=training_arguments.seed,
            buffer_size=data_arguments.shuffle_buffer_size,
        )
        eval_dataset = evaluation.map(
            evaluation_transform(processor),
            batched=True,
            batch_size=training_arguments.per_device_eval_batch_size,
            remove_columns=list(evaluation.column_names),
        )
    else:
        train_dataset = train.with_transform(training_transform(processor, data_arguments))
        eval_dataset = evaluation.with_transform(evaluation_transform(processor))
    trainer = ClassificationTrainer(
        mix=data_arguments.mix(len(labels)),
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate,
        compute_metrics=accuracy,
        processing_class=processor,
    )
    training, metrics = train_evaluate_save(trainer, account)
    folder = Path(training_arguments.output_dir)

    def use(file: Path) -> dict[str, str]:
        if data_arguments.streaming:
            rows = list(evaluation.take(12))
            samples = {name: [row[name] for row in rows] for name in rows[0]}
        else:
            samples = evaluation.shuffle(seed=0)[: min(12, len(evaluation))]
        return use_model(folder, samples, labels, file)

    sizes = [account.parts[name].images for name in ("train", "evaluation")]
    sizes = "streamed" if data_arguments.streaming else f"{sizes[0]} images to train, {sizes[1]} to evaluate"
    finish(
        trainer,
        use,
        {
            "dataset": f"{data_arguments.dataset}: {sizes}, {len(labels)} classes",
            "model": f"{count_parameters(model):,} parameters, saved in {folder}",
            "accuracy": f"{metrics['eval_accuracy']:.1%} of the held-out images",
            "training": f"{training['train_runtime']:.0f} s",
        },
    )
    return metrics


if __name__ == "__main__":
    run_program(main)
