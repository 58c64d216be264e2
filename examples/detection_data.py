"""In: a folder in COCO's format or with metadata, or a Hub id. Out: checked and counted images with boxes, and with masks if asked.

Masks come from the polygons or run lengths of annotations, or from images whose values tell the instances (`InstanceRules`).
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from coco import (
    Annotation,
    CocoImage,
    box_of,
    decode_masks,
    encode_masks,
    load_coco,
    pixels_of,
    read_segmentation,
    to_run_lengths,
)
from common import HeadDataArguments, check_column, check_image_column
from data import (
    METADATA,
    Account,
    Data,
    InputError,
    LeftOut,
    Part,
    chosen_splits,
    encode_labels,
    file_name,
    load_data,
    read_image,
    train_and_evaluation,
    undecoded,
    upright_size,
)
from instance_masks import InstanceRules, read_instance_masks, read_names
from masks import find_names, load_pairs
from PIL import Image


EMBEDDED_TRAIN, EMBEDDED_EVAL, EMBEDDED_SIZE = 800, 100, 96  # scenes, scenes, pixels
TOLERANCE = 2  # pixels that a box may extend beyond its image without a warning
CATEGORY_FIELDS = ("category", "categories", "label", "labels", "category_id")
COCO_FLAGS = ("train_annotations", "train_images", "eval_annotations", "eval_images")
COLUMN_FLAGS = ("image_column", "objects_column")
MASK_FLAGS = ("mask_column", "id2label", "label_divisor", "ignore_index", "reduce_labels")


@dataclass
class DetectionDataArguments(HeadDataArguments):
    dataset: str = field(
        default="digits",
        metadata={"help": "a folder in COCO's format, or with metadata, the id of a dataset on the Hub, or `digits`"},
    )
    train_annotations: str | None = field(
        default=None, metadata={"help": "COCO annotations of the training images, relative to the folder"}
    )
    train_images: str | None = field(
        default=None, metadata={"help": "folder of the training images, relative to --dataset"}
    )
    eval_annotations: str | None = field(
        default=None, metadata={"help": "COCO annotations of the evaluation images, relative to --dataset"}
    )
    eval_images: str | None = field(
        default=None, metadata={"help": "folder of the evaluation images, relative to --dataset"}
    )
    objects_column: str = field(default="objects", metadata={"help": "column of the boxes and categories"})
    box_format: str = field(
        default="xywh",
        metadata={
            "help": "boxes of the data set: left, top, width, height; or left, top, right, bottom; in pixels",
            "choices": ["xywh", "xyxy"],
        },
    )
    leave_out_mismatched: bool = field(
        default=False,
        metadata={
            "help": "leave out images that are not of the width and height that the data set records for them, which are "
            "an error otherwise: where their boxes lie is not known"
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "side of the square that RT-DETR sees, shortest side for the others; 640 and 800, or that of --model, if absent"
        },
    )
    random_crop_scale: float | None = field(
        default=None,
        metadata={
            "help": "smallest part of an image's area that a random training crop has, 1 for none; 0.5, digits 1; "
            "objects of which a crop shows less than 30 % are not in it"
        },
    )


@dataclass
class InstanceDataArguments(DetectionDataArguments):
    """The flags of programs that need masks; `load_splits` reads masks if it gets these."""

    dataset: str = field(
        default="digits",
        metadata={
            "help": "a folder in COCO's format, of images and instance masks, or with metadata, the id of a dataset on the "
            "Hub, or `digits`"
        },
    )
    mask_column: str = field(default="annotation", metadata={"help": "column of the instance masks"})
    id2label: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with the classes' names by their numbers in the instance masks; if absent, the dataset's own "
            "id2label.json, or the numbers that occur"
        },
    )
    label_divisor: int | None = field(
        default=None,
        metadata={
            "help": "values of greyscale instance masks are class * label_divisor + instance (Cityscapes: 1000); if absent, "
            "they are the instances of one class"
        },
    )
    ignore_index: int = field(
        default=255, metadata={"help": "value of greyscale instance masks that is no instance, as 0 is; -1 for none"}
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "--id2label names the class 1 of the instance masks by 0 (ADE20K)"}
    )


class Detections(torch.utils.data.Dataset):
    """Images and their objects.

    An example has the `image` as from `datasets.Image(decode=False)`, its `name` for messages, an `image_id` from 0, and
    `objects`: lists of `bbox` (left, top, width, height in pixels), `category` (from 0), `area` and `iscrowd`, and with masks
    `segmentation`, run lengths of the image's size (`coco.decode_masks`).
    """

    def __init__(self, images: datasets.Dataset, objects: datasets.Dataset, name: str):
        self.images, self.objects, self.name = images, objects, name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image, objects = self.images[index]["image"], self.objects[index]["objects"]
        return {"image": image, "name": _image_name(image, index, self.name), "image_id": index, "objects": objects}


def _image_name(image: object, index: int, part: str) -> str:
    """Returns an image's name for messages: its file, or its index if the dataset has no file names."""
    path = image.get("path") if isinstance(image, dict) else None
    return path or f"image {index} of {part}"


def load_splits(arguments: DetectionDataArguments, seed: int) -> tuple[Detections, Detections, Account]:
    """Loads the training and the evaluation images and their account; `Account.classes` are the categories' names.

    Objects have masks if `arguments` are `InstanceDataArguments`; objects without one are left out.

    Raises:
        InputError: if the dataset cannot be used (see `load_coco` and `data.load_data`), an object has no valid box, mask or
            category, or there are no objects.
    """
    root, coco, masks = Path(arguments.dataset), None, isinstance(arguments, InstanceDataArguments)
    if arguments.dataset != "digits" and root.is_dir():
        files = (getattr(arguments, flag) for flag in COCO_FLAGS)
        coco = load_coco(root, *files, arguments.train_split, arguments.eval_split)
    if coco is not None:
        _refuse((*COLUMN_FLAGS, *(MASK_FLAGS if masks else ())), arguments, "data sets with columns or instance masks",
                "has COCO annotations")  # fmt: skip
        data = Data(arguments.dataset, coco.layout, {}, coco.left_out)
        for name, images in coco.splits.items():
            data.splits[name] = _coco_split(name, images, coco.classes, arguments, data)
        classes, warnings = coco.classes, coco.warnings
        arguments = replace(arguments, train_split=coco.train, eval_split=coco.evaluation)
    else:
        _refuse(COCO_FLAGS, arguments, "COCO annotations in a folder", "has none")
        data, warnings = _load_columns(arguments), []
        if masks and _has_instance_masks(data, arguments):
            _refuse(("objects_column", "box_format"), arguments, "data sets with boxes", "has instance masks")
            classes = _objects_of_masks(data, arguments, warnings)
        else:
            if masks:
                _refuse(MASK_FLAGS, arguments, "data sets with instance masks", "has none")
            classes = _uniform_columns(data, arguments)
    parts = train_and_evaluation(data, arguments, seed)
    result, lines = {}, {}
    for name, part in parts.items():
        result[name] = _fit_to_images(name, part, classes, arguments, data, warnings)
        lines[name] = _count(name, result[name], classes, data)
    return result["train"], result["evaluation"], Account(data, classes, lines, warnings)


def _refuse(flags: Iterable[str], arguments: DetectionDataArguments, use: str, found: str) -> None:
    """
    Raises:
        InputError: if one of the flags is not at its default.
    """
    for flag in flags:
        if getattr(arguments, flag) != getattr(type(arguments), flag):
            raise InputError(f"--{flag} is for {use}; --dataset {arguments.dataset} {found}")


def refuse_mask_flags(arguments: InstanceDataArguments, head: str) -> None:
    """
    Raises:
        InputError: if a flag of masks is given; `head`, which the message names, reads none.
    """
    for flag in MASK_FLAGS:
        if getattr(arguments, flag) != getattr(InstanceDataArguments, flag):
            raise InputError(f"--{flag} is for heads with masks; {head} reads boxes alone")


RUN_LENGTHS = {"size": datasets.List(datasets.Value("int64")), "counts": datasets.Value("string")}


def _features(classes: list[str], segmentation: object | None = None) -> datasets.Features:
    """Returns the features of `objects`, with masks of the given feature."""
    objects = {
        "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "category": datasets.List(datasets.ClassLabel(names=classes)),
        "area": datasets.List(datasets.Value("float32")),
        "iscrowd": datasets.List(datasets.Value("int64")),
    }
    if segmentation is not None:
        objects["segmentation"] = datasets.List(segmentation)
    return datasets.Features({"objects": objects})


def _unfitted(classes: list[str], arguments: DetectionDataArguments) -> datasets.Features:
    """Returns the features of `_checked`'s objects: a mask is the JSON text of a result of `read_segmentation`."""
    return _features(classes, datasets.Value("string") if isinstance(arguments, InstanceDataArguments) else None)


# ------------------------------------------------------------------------------------------------------------ single objects


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # refuses NaN too


def _checked(
    annotations: Iterable[Annotation],
    where: Callable[[], str],
    classes: list[str],
    arguments: DetectionDataArguments,
    left_out: LeftOut,
) -> dict[str, list]:
    """Returns an image's objects as lists of boxes (left, top, width, height), categories, areas, crowd flags, and masks if
    `arguments` ask for them (see `_unfitted`).

    Objects without a box or a mask, or with a box without area, are left out. With masks, the box of an object without one is
    that of its mask, and an unknown area is NaN.

    Raises:
        InputError: if a field has an invalid value.
    """
    masks = isinstance(arguments, InstanceDataArguments)
    objects = {"bbox": [], "category": [], "area": [], "iscrowd": [], **({"segmentation": []} if masks else {})}
    for annotation in annotations:

        def wrong(key: str, value: object, expected: str, annotation=annotation):
            text = repr(value)
            text = text if len(text) <= 80 else f"{text[:80]}..."
            return InputError(f"{where()}: {annotation.name}: {key} is {text}; {expected}")

        box, category, area, crowd = annotation.bbox, annotation.category, annotation.area, annotation.iscrowd
        segmentation, box_format = None, arguments.box_format
        if masks:
            try:
                segmentation = read_segmentation(annotation.segmentation)
            except ValueError as error:
                raise wrong("segmentation", annotation.segmentation, str(error)) from error
            if segmentation is None:
                reason = (
                    "with polygons of fewer than three points" if annotation.segmentation else "without a segmentation"
                )
                left_out.add(f"objects {reason}", f"{where()}: {annotation.name}")
                continue
        if box is None or (isinstance(box, (list, tuple)) and not box):
            if segmentation is None:
                left_out.add("objects without a box", f"{where()}: {annotation.name}")
                continue
            box, box_format = box_of(segmentation), "xywh"
        if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_number, box)):
            raise wrong("bbox", box, "four finite numbers were expected")
        x, y, width, height = map(float, box)
        if box_format == "xyxy":
            width, height = width - x, height - y
        if width < 0 or height < 0:
            other = "xyxy" if box_format == "xywh" else "xywh"
            terms = "left, top, width, height" if box_format == "xywh" else "left, top, right, bottom"
            raise wrong("bbox", box, f"{terms} were expected, which gives a box of {width:g} x {height:g}; --box_format "
                        f"{other} is for the other order")  # fmt: skip
        if width == 0 or height == 0:
            left_out.add("objects with a box of no width or height", f"{where()}: {annotation.name}")
            continue
        if not isinstance(category, int) or not 0 <= category < len(classes):
            raise wrong("category", category, "a category was expected")
        if area is None:
            area = math.nan if masks else width * height
        elif not _number(area) or area < 0:
            raise wrong("area", area, "a number of pixels, or null, was expected")
        if crowd is None:
            crowd = 0
        elif crowd not in (0, 1):  # accepts true and false too
            raise wrong("iscrowd", crowd, "0, 1 or null was expected")
        objects["bbox"].append([x, y, width, height])
        objects["category"].append(category)
        objects["area"].append(float(area))
        objects["iscrowd"].append(int(crowd))
        if masks:
            objects["segmentation"].append(json.dumps(segmentation))
    return objects


def _checked_side(value: object, where: Callable[[], str], key: str) -> int | None:
    if value is None:
        return None
    if not _number(value) or value != int(value):
        raise InputError(f"{where()}: {key} is {value!r}; a whole number of pixels, or null, was expected")
    return int(value)


# ------------------------------------------------------------------------------------------------------- where they come from


def _coco_split(
    file: str, images: list[CocoImage], classes: list[str], arguments: DetectionDataArguments, data: Data
) -> datasets.Dataset:
    """Builds a split with the columns `image`, `width`, `height` (null if not recorded) and `objects`."""
    columns = {"image": [], "width": [], "height": [], "objects": []}
    for image in images:
        columns["image"].append(str(image.path))
        for key in ("width", "height"):
            columns[key].append(_checked_side(getattr(image, key), lambda image=image: f"{file}: {image.path}", key))
        columns["objects"].append(
            _checked(image.annotations, lambda: f"{data.name}/{file}", classes, arguments, data.left_out)
        )
    features = {
        "image": datasets.Image(decode=False),
        "width": datasets.Value("int64"),
        "height": datasets.Value("int64"),
    }
    return datasets.Dataset.from_dict(
        columns, features=datasets.Features({**features, **_unfitted(classes, arguments)})
    )


def _load_columns(arguments: DetectionDataArguments) -> Data:
    """Loads the embedded data, a folder with metadata or of images and masks, or a dataset of the Hub."""
    masks = isinstance(arguments, InstanceDataArguments)
    if arguments.dataset == "digits":
        from embedded_data import load_digit_scenes

        def scenes(most: int, limit: int | None) -> int:
            return most if limit is None else max(1, min(most, limit))

        splits = load_digit_scenes(
            train=scenes(EMBEDDED_TRAIN, arguments.max_train_samples),
            evaluation=scenes(EMBEDDED_EVAL, arguments.max_eval_samples),
            size=EMBEDDED_SIZE,
        )
        if masks:
            splits = {name: _with_digit_masks(split) for name, split in splits.items()}
        return Data("digits", "handwritten digits on photographs", {n: undecoded(s) for n, s in splits.items()})
    root = Path(arguments.dataset)
    try:
        if masks and root.is_dir() and not any(next(root.rglob(name), None) for name in METADATA):
            return load_pairs(arguments, arguments.mask_column)
        return load_data(arguments, class_folders=False)
    except InputError as error:
        if not root.is_dir():
            raise
        raise InputError(
            f"{error}; COCO annotations were looked for in annotations/instances_*.json and */_annotations.coco.json, "
            "--train_annotations names others"
        ) from error


def _with_digit_masks(split: datasets.Dataset) -> datasets.Dataset:
    """Gives the objects of `load_digit_scenes` their masks: a digit's pixels within its box, which no other digit shares."""
    rows = []
    for scene in split:
        objects, mask = scene["objects"], np.asarray(scene["annotation"])
        masks = np.zeros((len(objects["bbox"]), *mask.shape), dtype=bool)
        for one, (x, y, width, height), category in zip(masks, objects["bbox"], objects["category"], strict=True):
            window = slice(int(y), int(y + height)), slice(int(x), int(x + width))
            one[window] = mask[window] == 1 + category
        rows.append({**objects, "segmentation": encode_masks(masks)})
    kind = split.features["objects"] | {"segmentation": datasets.List(RUN_LENGTHS)}
    return split.remove_columns("objects").add_column("objects", rows, feature=kind)


def _has_instance_masks(data: Data, arguments: InstanceDataArguments) -> bool:
    """Whether the used splits have a column of masks, and none of objects."""
    used = [data.splits[name].column_names for name in chosen_splits(data.splits, arguments) if name is not None]
    return all(arguments.mask_column in names and arguments.objects_column not in names for names in used)


def _objects_of_masks(data: Data, arguments: InstanceDataArguments, warnings: list[str]) -> list[str]:
    """Converts the used splits with instance masks to the columns of `_coco_split`; returns the classes' names."""
    rules = InstanceRules(arguments.label_divisor, arguments.ignore_index, arguments.reduce_labels)
    names, warning = find_names(arguments, arguments.id2label, read_names)
    image_column, mask_column = arguments.image_column, arguments.mask_column
    used = [name for name in chosen_splits(data.splits, arguments) if name is not None]
    for column, flag in ((image_column, "image_column"), (mask_column, "mask_column")):
        check_image_column(Data(data.name, data.layout, {split: data.splits[split] for split in used}), column, flag)
    classes, objects, more = read_instance_masks(data, mask_column, image_column, used, rules, names)
    warnings += [*([] if warning is None else [warning]), *more]
    for name in used:
        split, rows = data.splits[name], []
        for index, annotations in enumerate(objects[name]):

            def where(index=index, split=split, name=name) -> str:
                return f"{data.name}, split {name}, {file_name(split, index, image_column)}"

            rows.append(_checked(annotations, where, classes, arguments, data.left_out))
        split = split.select_columns([image_column])
        if image_column != "image":
            split = split.rename_column(image_column, "image")
        data.splits[name] = split.add_column("objects", rows, feature=_unfitted(classes, arguments)["objects"])
    return classes


def _uniform_columns(data: Data, arguments: DetectionDataArguments) -> list[str]:
    """Converts the used splits to the columns of `_coco_split`; returns the categories' names of all splits."""
    image_column, column = arguments.image_column, arguments.objects_column
    used = [name for name in chosen_splits(data.splits, arguments) if name is not None]
    for name, flag in ((image_column, "image_column"), (column, "objects_column")):
        check_column(Data(data.name, data.layout, {split: data.splits[split] for split in used}), name, flag)
    found, kinds = {}, {}
    for name, split in data.splits.items():
        if column in split.column_names:
            kinds[name], found[name] = _annotations(name, split, arguments)
    flat = Data(data.name, data.layout, {})  # one row per object
    for name, rows in found.items():
        columns = {
            "row": [index for index, row in enumerate(rows) for _ in row],
            "category": [one.category for row in rows for one in row],
        }
        features = datasets.Features({"row": datasets.Value("int64"), "category": kinds[name]})
        flat.splits[name] = datasets.Dataset.from_dict(columns, features=features)
    classes = encode_labels(flat, "category")
    for name in used:
        split = data.splits[name]
        numbers = iter(flat.splits[name]["category"])
        sides = [side for side in ("width", "height") if _holds_numbers(split, side)]
        recorded = {
            side: list(split[side]) if len(sides) == 2 else [None] * len(split) for side in ("width", "height")
        }
        columns = {"width": [], "height": [], "objects": []}
        for index, row in enumerate(found[name]):

            def where(index=index, split=split, name=name) -> str:
                return f"{data.name}, split {name}, {file_name(split, index, image_column)}"

            for one in row:
                number = next(numbers)
                one.category = None if number is None or number < 0 else number
            for side in recorded:
                columns[side].append(_checked_side(recorded[side][index], where, side))
            columns["objects"].append(_checked(row, where, classes, arguments, data.left_out))
        split = split.select_columns([image_column])
        if image_column != "image":
            split = split.rename_column(image_column, "image")
        for side in ("width", "height"):
            split = split.add_column(side, columns[side], feature=datasets.Value("int64"))
        data.splits[name] = split.add_column(
            "objects", columns["objects"], feature=_unfitted(classes, arguments)["objects"]
        )
    return classes


def _holds_numbers(split: datasets.Dataset, column: str) -> bool:
    kind = (split.features or {}).get(column)
    return isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint", "float"))


def _annotations(
    name: str, split: datasets.Dataset, arguments: DetectionDataArguments
) -> tuple[object, list[list[Annotation]]]:
    """Returns the feature of a split's categories, and its rows' objects, from dictionaries of lists or lists of
    dictionaries."""
    column = arguments.objects_column
    feature = split.features[column]
    fields = getattr(feature, "feature", feature)
    if not isinstance(fields, dict) or "bbox" not in fields:
        raise InputError(f"--objects_column {column} of the split {name} has no `bbox`, it is {feature}")
    category = next((key for key in CATEGORY_FIELDS if key in fields), None)
    if category is None:
        raise InputError(f"--objects_column {column} of the split {name} has no `category`, only {', '.join(fields)}")
    kind = fields[category]
    keys = {"bbox": "bbox", "category": category, "area": "area", "iscrowd": "iscrowd", "segmentation": "segmentation"}
    if not isinstance(arguments, InstanceDataArguments):
        del keys["segmentation"]
    elif "segmentation" not in fields:
        raise InputError(
            f"--objects_column {column} of the split {name} has no `segmentation`, only {', '.join(fields)}; polygons or run "
            "lengths were expected, or no such column beside one of instance masks (--mask_column)"
        )
    rows = []
    for index, value in enumerate(split.select_columns([column])[column]):
        if isinstance(value, dict):
            lists = {key: value.get(source) for key, source in keys.items()}
            lengths = {key: len(v) if isinstance(v, list) else 1 for key, v in lists.items() if v is not None}
            if len(set(lengths.values())) > 1 or any(not isinstance(v, list) for v in lists.values() if v is not None):
                raise InputError(
                    f"{arguments.dataset}, split {name}, {file_name(split, index, arguments.image_column)}: the fields of "
                    f"{column} have {', '.join(f'{n} {keys[k]}' for k, n in lengths.items())}; lists of one length were expected"
                )
            count = next(iter(lengths.values()), 0)
            value = [{source: lists[key][i] for key, source in keys.items() if key in lengths} for i in range(count)]
        rows.append(
            [
                Annotation(f"object {i}", **{key: (one or {}).get(source) for key, source in keys.items()})
                for i, one in enumerate(value or [])
            ]
        )
    return (kind.feature if isinstance(feature, dict) and hasattr(kind, "feature") else kind), rows


# ---------------------------------------------------------------------------------------------------------- boxes and images


def image_sizes(images: datasets.Dataset, name: str) -> Iterable[tuple[int, int]]:
    """Returns width and height of each image of the column `image`, after its EXIF orientation, from the files' heads.

    Raises:
        InputError: if an entry is no image.
    """

    def size(numbered: tuple[int, object]) -> tuple[int, int]:
        index, image = numbered
        return upright_size(image, _image_name(image, index, name))

    index = 0
    with ThreadPoolExecutor() as pool:
        for batch in images.select_columns(["image"]).iter(batch_size=64):
            yield from pool.map(size, enumerate(batch["image"], index))
            index += len(batch["image"])


def _fit_to_images(
    name: str,
    part: datasets.Dataset,
    classes: list[str],
    arguments: DetectionDataArguments,
    data: Data,
    warnings: list[str],
) -> Detections:
    """Compares recorded sizes, boxes and masks with the decoded images' sizes; leaves out objects wholly outside.

    Raises:
        InputError: if an image's size differs from the recorded one, or all boxes look like fractions.
    """

    def image_name(index: int) -> str:
        return _image_name(part[index]["image"], index, name)

    masks = isinstance(arguments, InstanceDataArguments)
    rows = list(part["objects"])
    unknown = [None] * len(part)
    recorded = list(
        zip(*(part[side] if side in part.column_names else unknown for side in ("width", "height")), strict=True)
    )
    kept, objects, mismatched, unrecorded, beyond, apart = [], [], [], 0, [], []
    for index, (width, height) in enumerate(image_sizes(part, name)):
        unrecorded += None in recorded[index]
        sizes = [("width and height are recorded as", recorded[index])] if None not in recorded[index] else []
        if masks:
            segmentations = [json.loads(text) for text in rows[index]["segmentation"]]
            text = "the run lengths of an object are for"
            sizes += [(text, tuple(one["size"][::-1])) for one in segmentations if isinstance(one, dict)]
        if other := [pair for pair in sizes if pair[1] != (width, height)]:
            mismatched.append((index, *other[0], (width, height)))
            if arguments.leave_out_mismatched:
                data.left_out.add("images of another size than is recorded", image_name(index))
                continue
        row = {key: [] for key in rows[index]}
        reaches = False
        for i, (x, y, w, h) in enumerate(rows[index]["bbox"]):
            if x >= width or y >= height or x + w <= 0 or y + h <= 0:
                data.left_out.add("objects outside their image", f"{image_name(index)}: {[x, y, w, h]}")
                continue
            one = {key: values[i] for key, values in rows[index].items()}
            if masks:
                if other:  # an error, after all images are compared
                    continue
                one["segmentation"] = to_run_lengths(segmentations[i], height, width)
                pixels = pixels_of(one["segmentation"])
                if not pixels:
                    data.left_out.add("objects without a pixel in their image", f"{image_name(index)}: {[x, y, w, h]}")
                    continue
                if math.isnan(one["area"]):
                    one["area"] = float(pixels)
                if overlap((x, y, w, h), box_of(one["segmentation"])) < 0.5:
                    apart.append(index)
            reaches |= min(x, y) < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE
            for key, value in one.items():
                row[key].append(value)
        if reaches:
            beyond.append(index)
        kept.append(index)
        objects.append(row)
    if mismatched and not arguments.leave_out_mismatched:
        index, text, old, new = mismatched[0]
        others = ", ".join(image_name(i) for i, *_ in mismatched[1:3]) + (", ..." if len(mismatched) > 3 else "")
        raise InputError(
            f"{image_name(index)}: {text} {old[0]} x {old[1]}, but the image "
            f"{'turned upright by its EXIF orientation ' if old == new[::-1] else ''}is {new[0]} x {new[1]}"
            + (f" (and {len(mismatched) - 1} more of {len(part)} images: {others})" if others else "")
            + ": where its boxes lie is not known; record the size of the images that the boxes were drawn on and save these images "
            "so, upright and without an orientation, or leave them out by --leave_out_mismatched"
        )
    boxes = [box for row in objects for box in row["bbox"]]
    if boxes and all(min(x, y) >= 0 and max(x + w, y + h) <= 1.001 for x, y, w, h in boxes):
        raise InputError(
            f"{data.name}: all {len(boxes)} boxes of {name} lie between 0 and 1, such as {boxes[0]}; pixels were expected, "
            "not fractions of the image"
        )
    if unrecorded and data.name != "digits" and "width" in part.column_names:
        warnings.append(
            f"{unrecorded} of {len(part)} images of {name} record no width and height: not compared with the images"
        )
    if beyond:
        warnings.append(
            f"{len(beyond)} of {len(part)} images of {name} have boxes that reach more than {TOLERANCE} pixels beyond the image, "
            f"such as {image_name(beyond[0])}: were they drawn on other images, or are they not {arguments.box_format} "
            "(--box_format)? They are cut at the border in training"
        )
    if apart:
        warnings.append(
            f"{len(apart)} of {len(boxes)} objects of {name} have a mask and a box that overlap by less than half of both, the "
            f"first in {image_name(apart[0])}: does the segmentation belong to another image or size?"
        )
    images = part.select_columns(["image"])
    if len(kept) < len(part):
        images = images.select(kept)
    features = _features(classes, RUN_LENGTHS if masks else None)
    return Detections(images, datasets.Dataset.from_dict({"objects": objects}, features=features), name)


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Returns the IoU of two boxes (left, top, width, height)."""
    (x0, y0, w0, h0), (x1, y1, w1, h1) = one, other
    width = max(0.0, min(x0 + w0, x1 + w1) - max(x0, x1))
    common = width * max(0.0, min(y0 + h0, y1 + h1) - max(y0, y1))
    return common / (w0 * h0 + w1 * h1 - common)


def _count(name: str, part: Detections, classes: list[str], data: Data) -> Part:
    """Returns the part's line of the account. Crowds are used neither in training nor in evaluation.

    Raises:
        InputError: if there are no objects.
    """
    counts, empty = np.zeros(len(classes), dtype=np.int64), 0
    for index, row in enumerate(part.objects["objects"]):
        crowd = np.asarray(row["iscrowd"], dtype=bool)
        categories = np.asarray(row["category"], dtype=np.int64)
        counts += np.bincount(categories[~crowd], minlength=len(classes))
        empty += not len(categories)
        for box in np.asarray(row["bbox"])[crowd] if crowd.any() else ():
            reason = "crowds, not trained on" if name == "train" else "crowds, neither right nor wrong in evaluation"
            data.left_out.add(reason, f"{part[index]['name']}: {box.tolist()}")
    if not counts.sum():
        raise InputError(
            f"--dataset {data.name}: {name} has {len(part)} images, but no objects to "
            f"{'train' if name == 'train' else 'evaluate'} on; {data.left_out}; {data.layout}"
        )
    return Part(len(part), dict(zip(classes, counts.tolist(), strict=True)), "objects", empty)


# ------------------------------------------------------------------------------------------------------------- augmentation


def training_transform(arguments: DetectionDataArguments) -> Callable[[dict, int], dict]:
    """Returns `transform(example, seed)` for examples of `Detections`: random crop, flip and colours, by albumentations.

    Crowds, and objects of which a crop shows less than 30 %, are left out.

    Raises:
        InputError: if `--random_crop_scale` is out of range.
    """
    import albumentations as A

    flip = arguments.random_flip if arguments.random_flip is not None else arguments.dataset != "digits"
    scale = arguments.random_crop_scale
    if scale is None:
        scale = 1.0 if arguments.dataset == "digits" else 0.5
    if not 0 < scale <= 1:
        raise InputError(f"--random_crop_scale must be above 0 and at most 1, got {scale}")
    margin = (1 - scale**0.5) / 2
    steps = []
    if margin > 0:
        steps.append(A.RandomCropFromBorders(margin, margin, margin, margin, p=0.5))
    if flip:
        steps.append(A.HorizontalFlip(p=0.5))
    if arguments.color_jitter if arguments.color_jitter is not None else arguments.dataset != "digits":
        steps += [A.RandomBrightnessContrast(p=0.5), A.HueSaturationValue(p=0.2)]
    boxes = A.BboxParams(
        format="coco", label_fields=["index"], clip=True, filter_invalid_bboxes=True, min_visibility=0.3
    )
    augment = A.Compose(steps, bbox_params=boxes)

    def transform(example: dict, seed: int) -> dict:
        objects = example["objects"]
        kept = [i for i, crowd in enumerate(objects["iscrowd"]) if not crowd]
        image = read_image(example["image"], example["name"])
        content = {"image": np.asarray(image), "bboxes": [objects["bbox"][i] for i in kept], "index": kept}
        masks = "segmentation" in objects
        if masks and kept:  # albumentations takes no empty list of masks
            content["masks"] = decode_masks([objects["segmentation"][i] for i in kept], image.height, image.width)
        augment.set_random_seed(seed)
        result = augment(**content)
        indices = [int(index) for index in result["index"]]
        boxes = [list(map(float, box)) for box in result["bboxes"]]
        areas = [width * height for _, _, width, height in boxes]
        changed = {}
        if masks:  # boxes and areas are those of the masks; an object without a pixel in the crop is not in it
            run_lengths = encode_masks(result["masks"][[kept.index(i) for i in indices]]) if indices else []
            areas = list(map(pixels_of, run_lengths))
            indices, run_lengths, areas = (
                [value for value, area in zip(values, areas, strict=True) if area]
                for values in (indices, run_lengths, areas)
            )
            boxes, changed = list(map(box_of, run_lengths)), {"segmentation": run_lengths}
        return {
            **example,
            "image": Image.fromarray(result["image"]),
            "objects": {
                "bbox": boxes,
                "category": [objects["category"][i] for i in indices],
                "area": areas,
                "iscrowd": [0] * len(boxes),
                **changed,
            },
        }

    return transform
