"""Fine-tunes InternImage on images in classes, evaluates it, and uses the result.

Without arguments it takes scikit-learn's handwritten digits (nothing is downloaded), builds a small InternImage, trains
it to more than 97 % accuracy on the fifth that it has not seen, and writes model, metrics and a picture of predictions:

    python examples/image_classification.py

On your own images, in one folder per class, starting from a checkpoint:

    python examples/image_classification.py --dataset photos/ --model OpenGVLab/internimage_t_1k_224 \
        --output_dir outputs/photos --num_train_epochs 20 --learning_rate 1e-4 --bf16 --gradient_checkpointing

`--dataset` also takes the id of a dataset on the Hub. All flags of `transformers.TrainingArguments` work, and
`--layer_decay`, `--offset_lr_multiplier` and `--ema_decay` as the authors fine-tuned. A YAML file with flags may come first,
such as one of the authors' recipes, and flags after it override it:

    python examples/image_classification.py examples/recipes/imagenet1k_t.yaml --per_device_train_batch_size 64

`--resume_from_checkpoint last` goes on where an interrupted run of the same `--output_dir` was.

On several devices, by the files in `examples/accelerate/` (with `--use_cpu` in several processes on CPUs):

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 8 examples/image_classification.py ...

`--streaming` reads the training images while it trains, nothing is downloaded first. The stream has no end: it needs
`--max_steps`, and `--eval_strategy steps --save_strategy steps --eval_steps 1000 --save_steps 1000` to evaluate and save.
"""

import random
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
    checkpoint_to_resume,
    choose_learning_rate,
    count_parameters,
    load_without_the_others,
)
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

from internimage_hf import InternImageConfig, InternImageImageProcessor
from internimage_hf.training import EndlessStream


@dataclass
class DataArguments:
    dataset: str = field(
        default="digits",
        metadata={"help": "a folder of class folders, the id of a dataset on the Hub, or `digits` (embedded)"},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "column of the images; found by its type if absent"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "column of the classes; found by its type if absent"}
    )
    eval_fraction: float = field(
        default=0.2, metadata={"help": "part held out for evaluation if the dataset has no validation or test split"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "train on this many images at most"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on this many images at most"})
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
            raise ValueError(f"--rand_augment must be from 0 to 10, got {self.rand_augment}")
        if not 0 <= self.random_erasing <= 1:
            raise ValueError(f"--random_erasing must be from 0 to 1, got {self.random_erasing}")
        if not 0 < self.random_crop_scale <= 1:
            raise ValueError(f"--random_crop_scale must be above 0 and at most 1, got {self.random_crop_scale}")


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
    """Cross-entropy with soft targets: in training, batches are mixed and labels smoothed."""

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
    """scikit-learn's 1797 handwritten digits of 8x8 pixels as 32x32 RGB images; the fifth held out is stratified."""
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


def load_splits(arguments: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training and the evaluation split, with the columns `image` and `label`; with `--streaming` they are iterable.

    Raises:
        ValueError: if the dataset has no images, no classes or no training split.
    """
    if arguments.dataset == "digits":
        splits = load_digits()
        if arguments.streaming:
            splits = datasets.IterableDatasetDict({name: s.to_iterable_dataset(8) for name, s in splits.items()})
    elif Path(arguments.dataset).is_dir():
        splits = datasets.load_dataset("imagefolder", data_dir=arguments.dataset, streaming=arguments.streaming)
    else:
        splits = datasets.load_dataset(arguments.dataset, streaming=arguments.streaming)
    if "train" not in splits:
        raise ValueError(f"--dataset {arguments.dataset} has no split `train`, only {', '.join(splits)}")

    def column_of_type(given: str | None, feature_type: type, flag: str) -> str:
        features = splits["train"].features or {}
        if given is not None:
            if given not in features:
                raise ValueError(f"--{flag} {given} is not a column of the dataset, which has {', '.join(features)}")
            return given
        names = [name for name, feature in features.items() if isinstance(feature, feature_type)]
        if not names:
            raise ValueError(f"no column is a {feature_type.__name__}; name one of {', '.join(features)} by --{flag}")
        return names[0]

    image_column = column_of_type(arguments.image_column, datasets.Image, "image_column")
    label_column = column_of_type(arguments.label_column, datasets.ClassLabel, "label_column")
    splits = splits.select_columns([image_column, label_column])
    splits = splits.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if arguments.streaming:
        if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
            raise ValueError(
                f"--streaming: the column {label_column} of {arguments.dataset} does not name its classes"
            )
        if held_out is None:
            raise ValueError(f"--streaming: {arguments.dataset} has no split `validation` or `test` to evaluate on")
        limits = {"train": arguments.max_train_samples, held_out: arguments.max_eval_samples}
        train, evaluation = (splits[name].take(n) if n is not None else splits[name] for name, n in limits.items())
        return train, evaluation
    if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
        splits = splits.class_encode_column("label")

    if held_out is None:
        splits = splits["train"].train_test_split(
            test_size=arguments.eval_fraction, stratify_by_column="label", seed=seed
        )
        held_out = "test"
    train, evaluation = splits["train"], splits[held_out]
    if arguments.max_train_samples is not None:
        train = train.shuffle(seed=seed).select(range(min(arguments.max_train_samples, len(train))))
    if arguments.max_eval_samples is not None:
        evaluation = evaluation.shuffle(seed=seed).select(range(min(arguments.max_eval_samples, len(evaluation))))
    return train, evaluation


def build_model(arguments: ModelArguments, labels: list[str], image_size: int | None):
    """The model with a new head for `labels`, and its image processor."""
    fields = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if arguments.drop_path_rate is not None:
        fields["drop_path_rate"] = arguments.drop_path_rate
    processor = None
    if arguments.model is None:
        config = InternImageConfig(
            channels=32, depths=[1, 1, 2, 1], groups=[2, 4, 8, 16], image_size=image_size or 32, **fields
        )
        model = AutoModelForImageClassification.from_config(config)
    elif arguments.model in VARIANTS:
        config = InternImageConfig.from_variant(arguments.model, **fields)
        model = AutoModelForImageClassification.from_config(config)
    else:
        model = AutoModelForImageClassification.from_pretrained(
            arguments.model, ignore_mismatched_sizes=True, **fields
        )
        processor = AutoImageProcessor.from_pretrained(arguments.model)
    if processor is None or image_size is not None:
        side = image_size or model.config.image_size
        processor = InternImageImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        model.config.image_size = side
    return model, processor


def random_resized_crop(image: Image.Image, height: int, width: int, min_scale: float) -> Image.Image:
    """A random part of the image of at least `min_scale` of its area and an aspect of 3/4 to 4/3, resized."""
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


def training_transform(processor, arguments: DataArguments):
    """What a batch of training examples goes through: random crop, mirroring, RandAugment, image processor, erasing."""
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    flip = arguments.random_flip if arguments.random_flip is not None else arguments.dataset != "digits"

    def transform(batch):
        images = [image.convert("RGB") for image in batch["image"]]
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
        images = [image.convert("RGB") for image in batch["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    return transform


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def draw_predictions(samples: datasets.Dataset, predictions: list[dict], labels: list[str], file: Path) -> None:
    """Writes a PNG: each image with its predicted class, green where that is the truth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 6
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, sample, prediction in zip(axes.flat, samples, predictions, strict=False):
        right = prediction["label"] == labels[sample["label"]]
        axis.imshow(sample["image"].convert("RGB"))
        axis.set_title(
            f"{prediction['label'][:24]}\n{prediction['score']:.0%}", fontsize=9, color="green" if right else "red"
        )
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def use_model(folder: Path, samples: datasets.Dataset, labels: list[str]) -> dict[str, object]:
    """Loads what was saved in the three ways people use it: classifier, pipeline, backbone."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    predictions = [best[0] for best in classify([image.convert("RGB") for image in samples["image"]], top_k=1)]

    config = AutoConfig.from_pretrained(folder, out_features=["stage1", "stage2", "stage3", "stage4"])
    backbone = AutoBackbone.from_config(config).eval()
    backbone.load_state_dict(
        {name: tensor for name, tensor in model.internimage.state_dict().items() if not name.startswith("pooler.")}
    )
    pixel_values = AutoImageProcessor.from_pretrained(folder)(samples["image"][0].convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        feature_maps = backbone(pixel_values["pixel_values"]).feature_maps

    draw_predictions(samples, predictions, labels, folder / "predictions.png")
    right = sum(p["label"] == labels[label] for p, label in zip(predictions, samples["label"], strict=True))
    return {
        "pipeline": f"{right} of {len(predictions)} sample images right",
        "backbone": ", ".join(
            f"{name} {tuple(m.shape[1:])}" for name, m in zip(config.out_features, feature_maps, strict=True)
        ),
        "picture": folder / "predictions.png",
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the evaluation's metrics."""
    data_arguments, model_arguments, training_arguments = parse_flags(
        argv, DataArguments, ModelArguments, ClassificationTrainingArguments
    )
    set_seed(training_arguments.seed)
    choose_learning_rate(training_arguments, model_arguments.model, untrained=2e-3)
    if data_arguments.streaming and training_arguments.max_steps <= 0:
        raise ValueError(f"--streaming needs --max_steps of at least 1, got {training_arguments.max_steps}")

    train, evaluation = load_splits(data_arguments, training_arguments.seed)
    labels = train.features["label"].names
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
            remove_columns=["image", "label"],
        )
    else:
        train_dataset = train.with_transform(training_transform(processor, data_arguments))
        eval_dataset = evaluation.with_transform(evaluation_transform(processor))
    mix = Mix(
        len(labels),
        data_arguments.mixup_alpha,
        data_arguments.cutmix_alpha,
        data_arguments.mixup_prob,
        data_arguments.mixup_switch_prob,
    )
    trainer = ClassificationTrainer(
        mix=mix,
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate,
        compute_metrics=accuracy,
        processing_class=processor,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_arguments))
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("all", {**result.metrics, **metrics})
    trainer.save_state()
    if trainer.is_world_process_zero():
        folder = Path(training_arguments.output_dir)
        if data_arguments.streaming:
            samples = datasets.Dataset.from_list(list(evaluation.take(12)), features=evaluation.features)
            sizes = "streamed"
        else:
            samples = evaluation.shuffle(seed=0).select(range(min(12, len(evaluation))))
            sizes = f"{len(train)} images to train, {len(evaluation)} to evaluate"
        load_without_the_others()
        summary = use_model(folder, samples, labels)
        summary = {
            "dataset": f"{data_arguments.dataset}: {sizes}, {len(labels)} classes",
            "model": f"{count_parameters(model):,} parameters, saved in {folder}",
            "accuracy": f"{metrics['eval_accuracy']:.1%} of the held-out images",
            "training": f"{result.metrics['train_runtime']:.0f} s",
            **summary,
        }
        print("\n" + "\n".join(f"{name:>9}  {value}" for name, value in summary.items()))
    if training_arguments.push_to_hub:  # by all processes: each may hold a part of the model
        trainer.push_to_hub()
    trainer.accelerator.end_training()  # leaves the process group
    return metrics


if __name__ == "__main__":
    main()
