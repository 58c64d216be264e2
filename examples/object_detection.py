"""Trains a detector of transformers on an InternImage backbone, measures COCO's mAP, and uses the result.

Without arguments it takes handwritten digits on photographs (nothing is downloaded), trains a small RT-DETR to an
mAP@50 well above 0.5 on scenes that it has not seen, and writes model, metrics and a picture of predictions:

    python examples/object_detection.py

On your own images in COCO's format, with a pretrained backbone:

    python examples/object_detection.py --dataset coco/ --backbone OpenGVLab/internimage_t_1k_224 --head rt_detr \
        --output_dir outputs/coco --num_train_epochs 12 --learning_rate 1e-4 --layer_decay 0.9 --bf16

`--dataset` is a folder with COCO annotations (`annotations/instances_train*.json` beside `train*/`, or
`train/_annotations.coco.json` among the images; likewise `val` or `valid`; `--train_annotations` and so on name anything
else), a folder for `datasets`' imagefolder with a `metadata.jsonl`, or the id of a dataset on the Hub; the latter two have
a column `objects` with `bbox` and `category`. All flags of `transformers.TrainingArguments` work, and those of
`internimage_hf.training`; a YAML file with flags may come first. `--resume_from_checkpoint last` goes on where an
interrupted run of the same `--output_dir` was; `--model FOLDER` starts from a detector that was trained before.
"""

import contextlib
import io
import json
import math
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
    train_and_held_out,
    train_evaluate_save,
)
from flags import parse_flags
from PIL import Image
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

# from where they are defined: they need no torchvision, and transformers 5.17 hides them where it is absent
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil


EMBEDDED_TRAIN, EMBEDDED_EVAL, EMBEDDED_SIZE = 800, 100, 96  # scenes, scenes, pixels
MAX_DETECTIONS = 100  # per image, as COCO counts them


@dataclass
class DetectionDataArguments(DataArguments):
    dataset: str = field(
        default="digits",
        metadata={"help": "a folder in COCO's format, an imagefolder, the id of a dataset on the Hub, or `digits`"},
    )
    train_annotations: str | None = field(
        default=None, metadata={"help": "COCO annotations of the training images, relative to the folder"}
    )
    train_images: str | None = field(default=None, metadata={"help": "folder of the training images, likewise"})
    eval_annotations: str | None = field(
        default=None, metadata={"help": "COCO annotations of the evaluation images, likewise"}
    )
    eval_images: str | None = field(default=None, metadata={"help": "folder of the evaluation images, likewise"})
    objects_column: str = field(default="objects", metadata={"help": "column of the boxes and categories"})
    box_format: str = field(
        default="xywh",
        metadata={
            "help": "boxes of a Hub dataset: left, top, width, height; or left, top, right, bottom; in pixels",
            "choices": ["xywh", "xyxy"],
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "side of the square that RT-DETR sees, shortest side for the others; 640 and 800 if absent"},
    )
    random_crop_scale: float | None = field(
        default=None,
        metadata={
            "help": "smallest part of an image's area that a random training crop has, 1 for none; 0.5, digits 1"
        },
    )


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


@dataclass
class Head:
    """What the program has to know of a detector."""

    model: type
    config: type
    processor: type
    out_features: list[str]
    learning_rate: float  # of an untrained one
    demo: dict  # configuration over the small untrained backbone


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


def _coco_files(arguments: DetectionDataArguments) -> dict[str, tuple[Path, Path]]:
    """Annotations and image folder of each split that `--dataset` has; empty if there are none of COCO's format.

    Raises:
        ValueError: if a flag names what does not exist, or several files could be meant.
    """
    root = Path(arguments.dataset)
    named = {
        "train": (arguments.train_annotations, arguments.train_images),
        "validation": (arguments.eval_annotations, arguments.eval_images),
    }
    found = {}
    for split, pattern in (("train", "train*"), ("validation", "val*")):
        annotations, images = named[split]
        flag = "train" if split == "train" else "eval"
        if annotations is not None:
            file = root / annotations
            if not file.is_file():
                raise ValueError(f"--{flag}_annotations {annotations} is not a file in {root}")
        else:
            files = [
                *root.glob(f"annotations/instances_{pattern}.json"),
                *root.glob(f"{pattern}/_annotations.coco.json"),
            ]
            if len(files) > 1:
                raise ValueError(
                    f"{root} has several annotations for {split}, name one by --{flag}_annotations: "
                    f"{', '.join(str(file.relative_to(root)) for file in sorted(files))}"
                )
            if not files:
                continue
            file = files[0]
        if images is not None:
            folder = root / images
        elif file.parent.name == "annotations":
            folder = root / file.stem.removeprefix("instances_")
        else:
            folder = file.parent
        if not folder.is_dir():
            raise ValueError(f"the images of {file} are expected in {folder}; name their folder by --{flag}_images")
        found[split] = (file, folder)
    return found


def load_coco(splits: dict[str, tuple[Path, Path]]) -> datasets.DatasetDict:
    """Files in COCO's format as the columns `image` and `objects`.

    Categories are numbered in the order of their ids, which need not be contiguous, over all splits.

    Raises:
        ValueError: if a file lacks what COCO's format has, or names an image that is absent.
    """
    contents, categories = {}, {}
    for split, (file, _) in splits.items():
        content = json.loads(file.read_text(encoding="utf-8"))
        if missing := {"images", "annotations", "categories"} - set(content):
            raise ValueError(f"{file} is not in COCO's format: it has no {', '.join(sorted(missing))}")
        contents[split] = content
        for category in content["categories"]:
            if categories.setdefault(category["id"], category["name"]) != category["name"]:
                raise ValueError(f"category {category['id']} has two names in the splits: see {file}")
    ids = sorted(categories)
    number = {identifier: i for i, identifier in enumerate(ids)}
    names = [categories[identifier] for identifier in ids]
    if len(set(names)) < len(names):
        names = [f"{name} ({identifier})" for name, identifier in zip(names, ids, strict=True)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=names)),
                "area": datasets.List(datasets.Value("float32")),
                "iscrowd": datasets.List(datasets.Value("int64")),
            },
        }
    )
    result = {}
    for split, (file, folder) in splits.items():
        by_image = {}
        for annotation in contents[split]["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        columns = {"image": [], "objects": []}
        for image in contents[split]["images"]:
            path = folder / image["file_name"]
            if not path.is_file():
                raise ValueError(f"{file} names the image {image['file_name']}, which is not in {folder}")
            annotations = by_image.get(image["id"], [])
            if unknown := {a["category_id"] for a in annotations} - set(number):
                raise ValueError(f"{file}: image {image['id']} has objects of unknown categories {sorted(unknown)}")
            columns["image"].append(str(path))
            columns["objects"].append(
                {
                    "bbox": [a["bbox"] for a in annotations],
                    "category": [number[a["category_id"]] for a in annotations],
                    "area": [a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations],
                    "iscrowd": [a.get("iscrowd", 0) for a in annotations],
                }
            )
        result[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(result)


def load_splits(arguments: DetectionDataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """The training and the evaluation split, and the categories' names.

    The splits have the columns `image`, `image_id` (numbered from 0) and `objects`: lists of `bbox` (x, y, width, height in
    pixels), `category` (numbered from 0), `area` and `iscrowd`.

    Raises:
        ValueError: if the dataset has no images, no objects or no training split.
    """
    if arguments.dataset == "digits":
        from embedded_data import load_digit_scenes

        splits = load_digit_scenes(
            train=min(EMBEDDED_TRAIN, arguments.max_train_samples or EMBEDDED_TRAIN),
            evaluation=min(EMBEDDED_EVAL, arguments.max_eval_samples or EMBEDDED_EVAL),
            size=EMBEDDED_SIZE,
        ).remove_columns("annotation")
    elif Path(arguments.dataset).is_dir():
        files = _coco_files(arguments)
        splits = load_coco(files) if files else datasets.load_dataset("imagefolder", data_dir=arguments.dataset)
    else:
        splits = datasets.load_dataset(arguments.dataset, arguments.dataset_config)
    check_column(splits, arguments.image_column, "image_column")
    check_column(splits, arguments.objects_column, "objects_column")
    splits = splits.select_columns([arguments.image_column, arguments.objects_column])
    names = {arguments.image_column: "image", arguments.objects_column: "objects"}
    splits = splits.rename_columns({old: new for old, new in names.items() if old != new})
    train, evaluation = train_and_held_out(splits, arguments, seed)

    objects = train.features["objects"]
    fields = getattr(objects, "feature", objects)  # a list of dictionaries, or a dictionary of lists
    if not isinstance(fields, dict) or "bbox" not in fields:
        raise ValueError(f"--objects_column {arguments.objects_column} has no `bbox`, it is {objects}")
    category = next((name for name in ("category", "categories", "label", "category_id") if name in fields), None)
    if category is None:
        raise ValueError(f"--objects_column {arguments.objects_column} has no `category`, only {', '.join(fields)}")
    kind = getattr(fields[category], "feature", fields[category])
    if isinstance(kind, datasets.ClassLabel):
        labels, number = list(kind.names), None
    else:  # names, or numbers that need not be contiguous
        values = sorted({v for part in (train, evaluation) for row in part["objects"] for v in _field(row, category)})
        labels, number = [str(value) for value in values], {value: i for i, value in enumerate(values)}

    def uniform(batch: dict[str, list]) -> dict[str, list]:
        rows = []
        for row in batch["objects"]:
            boxes = [list(map(float, box)) for box in _field(row, "bbox")]
            if arguments.box_format == "xyxy":
                boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]
            categories = _field(row, category)
            rows.append(
                {
                    "bbox": boxes,
                    "category": list(categories) if number is None else [number[value] for value in categories],
                    "area": _field(row, "area") or [width * height for _, _, width, height in boxes],
                    "iscrowd": _field(row, "iscrowd") or [0] * len(boxes),
                }
            )
        return {**batch, "objects": rows}

    train, evaluation = (
        split.add_column("image_id", list(range(len(split)))).with_transform(uniform) for split in (train, evaluation)
    )
    return train, evaluation, labels


def _field(objects: dict[str, list] | list[dict], name: str) -> list:
    """A field of each object of an image; empty if they have none of this name."""
    if isinstance(objects, dict):
        return objects.get(name, [])
    return [one[name] for one in objects if name in one]


def build_model(arguments: DetectionModelArguments, labels: list[str], image_size: int | None):
    """The detector for `labels`, and its image processor.

    Args:
        arguments, labels, image_size: the flags, the categories' names.

    Raises:
        ValueError: if `--model` is none of the heads on an InternImage backbone, or the images are too small for the head.
    """
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if arguments.model is not None:
        model = load_head({name: head.model for name, head in HEADS.items()}, arguments, **names)
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
        ValueError: if a head that begins with the best places of its maps has more queries than places in small images.
    """
    config = model.config
    if isinstance(config, RTDetrConfig):
        field_name, strides = "num_queries", config.feat_strides
    elif isinstance(config, DeformableDetrConfig) and config.two_stage:
        field_name, strides = "two_stage_num_proposals", [8 * 2**level for level in range(config.num_feature_levels)]
    else:
        return
    places, queries = sum(math.ceil(side / stride) ** 2 for stride in strides), getattr(config, field_name)
    if places < queries:
        raise ValueError(
            f"--image_size {side} is too small: {type(model).__name__} has {places} places in such images, fewer than "
            f"its {queries} queries; --head_config_overrides '{{\"{field_name}\": {places}}}' makes them fewer"
        )


def _processor_fields(head: Head, side: int | None) -> dict:
    """Resizing as the head's authors have it, with `side` in place of theirs, and ImageNet's mean and deviation."""
    fields = {"do_normalize": True, "image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    if side is not None and head.processor is RTDetrImageProcessorPil:
        fields["size"] = {"height": side, "width": side}
    elif side is not None:
        fields["size"] = {"shortest_edge": side, "longest_edge": round(side * 1333 / 800)}
    return fields


def training_transform(arguments: DetectionDataArguments):
    """`transform(example, seed)`: random crop, mirroring and colours, by albumentations. Boxes of crowds are left out."""
    import albumentations as A

    flip = arguments.random_flip if arguments.random_flip is not None else arguments.dataset != "digits"
    scale = arguments.random_crop_scale
    if scale is None:
        scale = 1.0 if arguments.dataset == "digits" else 0.5
    if not 0 < scale <= 1:
        raise ValueError(f"--random_crop_scale must be above 0 and at most 1, got {scale}")
    margin = (1 - scale**0.5) / 2
    steps = []
    if margin > 0:
        steps.append(A.RandomCropFromBorders(margin, margin, margin, margin, p=0.5))
    if flip:
        steps.append(A.HorizontalFlip(p=0.5))
    if arguments.color_jitter if arguments.color_jitter is not None else arguments.dataset != "digits":
        steps += [A.RandomBrightnessContrast(p=0.5), A.HueSaturationValue(p=0.2)]
    boxes = A.BboxParams(
        format="coco", label_fields=["category"], clip=True, filter_invalid_bboxes=True, min_visibility=0.3
    )
    augment = A.Compose(steps, bbox_params=boxes)

    def transform(example: dict, seed: int) -> dict:
        objects = example["objects"]
        kept = [i for i, crowd in enumerate(objects["iscrowd"]) if not crowd]
        augment.set_random_seed(seed)
        result = augment(
            image=np.asarray(example["image"].convert("RGB")),
            bboxes=[objects["bbox"][i] for i in kept],
            category=[objects["category"][i] for i in kept],
        )
        boxes = [list(map(float, box)) for box in result["bboxes"]]
        return {
            "image": Image.fromarray(result["image"]),
            "image_id": example["image_id"],
            "objects": {
                "bbox": boxes,
                "category": [int(category) for category in result["category"]],
                "area": [width * height for _, _, width, height in boxes],
                "iscrowd": [0] * len(boxes),
            },
        }

    return transform


class Collate:
    """Examples to a batch of the model's inputs, by the head's image processor: resized, normalised, padded."""

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
        images = [example["image"].convert("RGB") for example in examples]
        batch = self.processor(images=images, annotations=annotations, return_tensors="pt")
        return {**batch, "labels": [dict(label) for label in batch["labels"]]}


def detect(processor, outputs, sizes: torch.Tensor, pixel_mask: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
    """All `boxes` (left, top, right, bottom in pixels), `scores` and `labels` of each image, the best ones first.

    Args:
        processor: the head's.
        outputs: the detector's.
        sizes: (batch, 2), height and width of the images before resizing.
        pixel_mask: (batch, height, width), 0 where a batch was padded: boxes are fractions of the padded image.
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


class DetectionTrainer(HeadTrainer):
    """Evaluation gathers tensors of a fixed shape from all processes: the detections, and which image they belong to."""

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


class CocoMetrics:
    """COCO's average precision and recall by pycocotools, over the boxes of a dataset.

    Called with detections (images, detections, [left, top, right, bottom, score, category]) and the images' ids. -1 is
    pycocotools' figure where there is no object of a size.
    """

    NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large",
             "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")  # fmt: skip

    def __init__(self, dataset: datasets.Dataset, labels: list[str]):
        from pycocotools.coco import COCO

        self.truth = COCO()
        annotations = []
        for row in dataset.select_columns(["image_id", "objects"]):
            for box, category, area, crowd in zip(
                *(row["objects"][name] for name in ("bbox", "category", "area", "iscrowd")), strict=True
            ):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": row["image_id"],
                        "category_id": category,
                        "bbox": box,
                        "area": area,
                        "iscrowd": crowd,
                    }
                )
        self.truth.dataset = {
            "images": [{"id": i} for i in range(len(dataset))],
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


def draw_predictions(folder: Path, samples: datasets.Dataset, file: Path) -> None:
    """Loads the saved detector and writes a PNG: each image with its true boxes, and beside it with the predicted ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    processor = HEADS[model.config.model_type].processor.from_pretrained(folder)
    columns = 3
    rows = -(-len(samples) // columns)
    figure, axes = plt.subplots(rows, 2 * columns, figsize=(4.4 * columns, 2.4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, sample in enumerate(samples):
        image = sample["image"].convert("RGB")
        inputs = processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        found = detect(processor, outputs, torch.tensor([[image.height, image.width]]), inputs.get("pixel_mask"))[0]
        confident = found["scores"] > 0.4
        predicted = [
            (x0, y0, x1 - x0, y1 - y0, f"{model.config.id2label[int(label)]} {score:.0%}")
            for (x0, y0, x1, y1), label, score in zip(
                found["boxes"][confident].tolist(),
                found["labels"][confident].tolist(),
                found["scores"][confident].tolist(),
                strict=True,
            )
        ]
        true = [
            (*box, model.config.id2label[category])
            for box, category in zip(sample["objects"]["bbox"], sample["objects"]["category"], strict=True)
        ]
        row, column = divmod(number, columns)
        for axis, boxes, title, color in (
            (axes[row, 2 * column], true, "truth", "lime"),
            (axes[row, 2 * column + 1], predicted, "predicted", "red"),
        ):
            axis.imshow(image)
            axis.set_title(title, fontsize=8)
            for x, y, width, height, name in boxes:
                axis.add_patch(plt.Rectangle((x, y), width, height, fill=False, color=color))
                axis.text(x, y, name[:24], fontsize=6, color="white", backgroundcolor=(0, 0, 0, 0.6))
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the program; returns the evaluation's metrics."""
    data_arguments, model_arguments, training_arguments = parse_flags(
        argv, DetectionDataArguments, DetectionModelArguments, DetectionTrainingArguments
    )
    set_seed(training_arguments.seed)
    train, evaluation, labels = load_splits(data_arguments, training_arguments.seed)
    checkpoint = model_arguments.model or model_arguments.backbone
    choose_learning_rate(training_arguments, checkpoint, untrained=HEADS[model_arguments.head].learning_rate)
    model, processor = build_model(model_arguments, labels, data_arguments.image_size)
    trainer = DetectionTrainer(
        model=model,
        args=training_arguments,
        train_dataset=RandomlyTransformed(train, training_transform(data_arguments), training_arguments.seed),
        eval_dataset=evaluation,
        data_collator=Collate(processor),
        compute_metrics=CocoMetrics(evaluation, labels),
        processing_class=processor,
    )
    training, metrics = train_evaluate_save(trainer)
    folder = Path(training_arguments.output_dir)
    samples = evaluation.select(range(min(data_arguments.picture_samples, len(evaluation))))
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
    main()
