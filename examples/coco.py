"""In: a folder in COCO's format (a JSON file per split, with images, categories and annotations). Out: checked splits.

Also COCO's formats of masks: polygons and run lengths are checked, and drawn as binary masks; masks become run lengths.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from data import EVAL_NAMES, METADATA, InputError, LeftOut, find_images


IN_FOLDER = "_annotations.coco.json"  # Roboflow writes this file among the images


@dataclass(slots=True)
class Annotation:
    """One object of a file; only its category has been checked.

    Attributes:
        name: its name in messages, such as "annotation 12".
        category: the number of its class; None if it has none.
        bbox, area, iscrowd, segmentation: the file's values.
    """

    name: str
    category: int | None
    bbox: object
    area: object = None
    iscrowd: object = None
    segmentation: object = None


@dataclass
class CocoImage:
    """An image and its objects; `width` and `height` are the file's values, unchecked."""

    path: Path
    width: object
    height: object
    annotations: list[Annotation] = field(default_factory=list)


@dataclass
class CocoData:
    """The content of a folder in COCO's format.

    Attributes:
        splits: the images of each used annotation file, by its name relative to the folder.
        train, evaluation: the names of the splits; `evaluation` is None if there is none.
        classes: names of all categories of all annotation files, used or not, in the order of their ids.
        layout: a description of how files and folders were interpreted.
        left_out: files and annotations that are in no split.
        warnings: contradictions in the data.
    """

    splits: dict[str, list[CocoImage]]
    train: str
    evaluation: str | None
    classes: list[str]
    layout: str
    left_out: LeftOut
    warnings: list[str]


def load_coco(
    root: Path,
    train_annotations: str | None = None,
    train_images: str | None = None,
    eval_annotations: str | None = None,
    eval_images: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
) -> CocoData | None:
    """Reads `annotations/instances_SPLIT.json` with images in `SPLIT/`, or `SPLIT/_annotations.coco.json` among the images.

    Categories are matched by name: files may number them differently. Ids of images and categories are compared as text: 10
    and "10" are the same id.

    Args:
        root: the folder.
        train_annotations, eval_annotations: annotation files, relative to it; otherwise the one whose split begins with
            "train", and the one that begins with "val", "dev", "test" or "eval", in this order.
        train_images, eval_images: folders of the images, relative to the root too.
        train_split, eval_split: names of the splits to choose.

    Returns:
        None if there are no annotation files.

    Raises:
        InputError: if a file, a folder or an image is absent, a choice is ambiguous, or a file's content is not in COCO's
            format.
    """
    files = {_relative(file, root): file for file in sorted(root.glob("annotations/instances_*.json"))}
    files |= {_relative(file, root): file for file in sorted(root.glob(f"*/{IN_FOLDER}"))}
    if not files and train_annotations is None and eval_annotations is None:
        return None
    train = _choose(root, files, "train", train_annotations, train_split, ("train",))
    evaluation = _choose(root, files, "eval", eval_annotations, eval_split, EVAL_NAMES)
    if train is None:
        raise InputError(
            f"--dataset {root} has no annotations to train on, only {', '.join(files)}; name the file by --train_annotations"
        )
    if train == evaluation:
        raise InputError(f"--dataset {root}: {train} is to be both trained and evaluated on; two files were expected")
    used = [name for name in (train, evaluation) if name is not None]
    folders = {
        train: _images_folder(root, files[train], train_images, "train"),
        evaluation: evaluation and _images_folder(root, files[evaluation], eval_images, "eval"),
    }
    contents = {name: _read(files[name]) for name in (*used, *(name for name in files if name not in used))}

    left_out, warnings, splits = LeftOut(), [], {}
    classes, numbers = _classes(files, contents, warnings)
    for name in used:
        images = _images(files[name], folders[name], root, contents[name])
        _annotate(files[name], contents[name], images, numbers[name], left_out, warnings)
        splits[name] = list(images.values())
    layout = "COCO annotations in " + " and ".join(
        f"{name} (images in {_relative(folders[name], root)})" for name in used
    )
    named = {os.path.normpath(image.path) for images in splits.values() for image in images}
    for name, content in contents.items():
        if name not in used:
            layout += f"; {name} ({len(content['images'])} images) is not used"
            for image in content["images"]:
                for folder in folders.values():
                    if folder is not None and isinstance(image.get("file_name"), str):
                        named.update(map(os.path.normpath, _places(image["file_name"], folder, root)))
    expected = {*METADATA, IN_FOLDER, *(file.name for file in files.values())}
    _count_unnamed({folder for folder in folders.values() if folder is not None}, named, expected, left_out)
    return CocoData(splits, train, evaluation, classes, layout, left_out, warnings)


# --------------------------------------------------------------------------------------------------- which files are meant


def _choose(
    root: Path, files: dict[str, Path], flag: str, file: str | None, split: str | None, words: Iterable[str]
) -> str | None:
    """Returns the name of a split's annotation file; adds one given by a flag to `files`."""
    if file is not None:
        if not (root / file).is_file():
            raise InputError(f"--{flag}_annotations {file} is not a file in {root}")
        name = _relative(root / file, root)
        files[name] = root / file
        return name
    if split is not None and split != "all":
        found = [name for name, path in files.items() if split in (_split_of(path), name)]
        if not found:
            raise InputError(
                f"--{flag}_split {split} is not a split of --dataset {root}, which has {', '.join(map(_split_of, files.values()))}"
            )
    else:
        by_word = ([n for n, path in files.items() if _split_of(path).lower().startswith(word)] for word in words)
        found = next((names for names in by_word if names), [])
    if len(found) > 1:
        raise InputError(
            f"{root} has several annotations for {'train' if flag == 'train' else 'validation'}, name one by "
            f"--{flag}_annotations: {', '.join(found)}"
        )
    return found[0] if found else None


def _split_of(file: Path) -> str:
    return file.parent.name if file.name == IN_FOLDER else file.stem.removeprefix("instances_")


def _images_folder(root: Path, file: Path, named: str | None, flag: str) -> Path:
    if named is not None:
        folder = root / named
    elif file.parent.name == "annotations":
        folder = root / _split_of(file)
    else:
        folder = file.parent
    if not folder.is_dir():
        raise InputError(f"the images of {file} are expected in {folder}; name their folder by --{flag}_images")
    return folder


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _places(name: str, folder: Path, root: Path) -> list[Path]:
    """Lists an image's possible paths: `file_name` is relative to the images' folder or to the root."""
    name = name.replace("\\", "/")
    return [folder / name, root / name]


def _count_unnamed(folders: set[Path], named: set[str], expected: set[str], left_out: LeftOut) -> None:
    for folder in sorted(folders):
        if not any(other != folder and folder.is_relative_to(other) for other in folders):
            for image in find_images(folder, left_out, expected):
                if os.path.normpath(folder / image) not in named:
                    left_out.add("images that no annotation file names", folder / image)


# ------------------------------------------------------------------------------------------------------------- their content


def _read(file: Path) -> dict[str, list[dict]]:
    """Reads the lists `images`, `annotations` and `categories` of a file; null means an empty list."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not in COCO's format: it is a {type(content).__name__}, an object was expected")
    if missing := {"images", "annotations", "categories"} - set(content):
        raise InputError(f"{file} is not in COCO's format: it has no {', '.join(sorted(missing))}")
    result = {}
    for key in ("images", "annotations", "categories"):
        entries = content[key] if content[key] is not None else []
        if not isinstance(entries, list):
            raise InputError(f"{file}: {key} is a {type(entries).__name__}, a list was expected")
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise InputError(f"{file}: {key}[{index}] is a {type(entry).__name__}, an object was expected")
        result[key] = entries
    return result


def _id(entry: dict, key: str, where: str) -> str:
    """Returns an id as text: "10" for 10, 10.0 and "10"."""
    value = entry.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InputError(f"{where}: {key} is {value!r}, a whole number or a text was expected")
    return str(value)


def _text(entry: dict, key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {key} is {value!r}, a text was expected")
    return value


def _is_text(entry: dict, key: str) -> bool:
    return isinstance(entry[key], str)


def _order(ids: Iterable[str]):
    """Returns the sort key of ids: numeric if all are numbers."""
    return int if all(identifier.removeprefix("-").isdecimal() for identifier in ids) else str


def _classes(
    files: dict[str, Path], contents: dict[str, dict], warnings: list[str]
) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Returns the categories' names of all files, and the class numbers of each file's category ids."""
    by_file: dict[str, dict[str, str]] = {}
    repeated = set()
    for name, content in contents.items():
        names = by_file.setdefault(name, {})
        for index, category in enumerate(content["categories"]):
            where = f"{files[name]}: categories[{index}]"
            identifier = _id(category, "id", where)
            text = _id(category, "name", where)  # some files use numbers as names
            if names.setdefault(identifier, text) != text:
                raise InputError(f"{where}: the id {identifier} has two names, {names[identifier]} and {text}")
        repeated |= {text for text, count in Counter(names.values()).items() if count > 1}
    first, of_id = {}, {}
    for names in by_file.values():
        for identifier, text in names.items():
            names[identifier] = f"{text} ({identifier})" if text in repeated else text
            first.setdefault(names[identifier], identifier)
            if of_id.setdefault(identifier, names[identifier]) != names[identifier]:
                of_id[identifier] += f" and {names[identifier]}"
                warnings.append(
                    f"the category id {identifier} is {of_id[identifier]} in different annotation files: categories are "
                    "matched by name"
                )
    order = _order(first.values())
    classes = sorted(first, key=lambda text: order(first[text]))
    number = {text: index for index, text in enumerate(classes)}
    return classes, {name: {i: number[text] for i, text in names.items()} for name, names in by_file.items()}


def _images(file: Path, folder: Path, root: Path, content: dict) -> dict[str, CocoImage]:
    """Reads the images of a file by their ids."""
    images, of_path, missing = {}, {}, []
    for index, entry in enumerate(content["images"]):
        where = f"{file}: images[{index}]"
        name, identifier = _text(entry, "file_name", where), _id(entry, "id", where)
        path = next((path for path in _places(name, folder, root) if path.is_file()), None)
        if path is None:
            missing.append(name)
            continue
        if identifier in images:
            raise InputError(f"{where}: the id {identifier} is also that of {images[identifier].path}")
        key = os.path.normpath(path)
        if key in of_path:
            raise InputError(f"{where}: {path} is listed twice, with the ids {of_path[key]} and {identifier}")
        of_path[key] = identifier
        images[identifier] = CocoImage(path, entry.get("width"), entry.get("height"))
    if missing:
        raise InputError(
            f"{file} names {len(missing)} images which are not in {folder} (of {len(content['images'])}): "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    if not images:
        raise InputError(f"{file} lists no images")
    return images


def _annotate(
    file: Path,
    content: dict,
    images: dict[str, CocoImage],
    numbers: dict[str, int],
    left_out: LeftOut,
    warnings: list[str],
) -> None:
    """Adds the annotations to their images.

    Raises:
        InputError: if there are no annotations, or one names an image or a category that is not in the file.
    """
    entries, seen, repeated, unknown, unmatched = content["annotations"], {}, [], [], []
    as_text = {
        key: {_id(entry, "id", key): _is_text(entry, "id") for entry in content[key]}
        for key in ("images", "categories")
    }
    respelled = Counter()
    for index, entry in enumerate(entries):
        name = f"annotation {entry['id']}" if entry.get("id") is not None else f"annotations[{index}]"
        image, category = (_id(entry, key, f"{file}: {name}") for key in ("image_id", "category_id"))
        if image not in images:
            unmatched.append((name, image))
            continue
        if category not in numbers:
            unknown.append((name, category))
            continue
        respelled["image"] += _is_text(entry, "image_id") != as_text["images"][image]
        respelled["category"] += _is_text(entry, "category_id") != as_text["categories"][category]
        if entry.get("id") is not None:
            what = (image, category, entry.get("bbox"), entry.get("segmentation"))
            if name not in seen:
                seen[name] = what
            elif seen[name] == what:
                left_out.add("annotations that are listed twice", f"{file.name}: {name}")
                continue
            else:
                repeated.append(name)
        images[image].annotations.append(
            Annotation(
                name, numbers[category], *(entry.get(key) for key in ("bbox", "area", "iscrowd", "segmentation"))
            )
        )
    if unknown:
        raise InputError(
            f"{file}: {unknown[0][0]}: category_id {unknown[0][1]} is none of its {len(numbers)} categories "
            f"({', '.join(list(numbers)[:8])}){_more(unknown, 'such annotations')}"
        )
    if len(unmatched) == len(entries):
        ids = ", ".join(list(images)[:3])
        raise InputError(
            f"{file}: none of its {len(entries)} annotations names one of its {len(images)} images"
            + (f": image_id is {unmatched[0][1]} in {unmatched[0][0]}, and id {ids}, ... in images" if entries else "")
        )
    for name, _ in unmatched:
        left_out.add(f"annotations of images that {file.name} does not list", name)
    if unmatched:
        warnings.append(
            f"{file}: {len(unmatched)} of its {len(entries)} annotations are of images that it does not list, such as "
            f"{unmatched[0][0]} of the image {unmatched[0][1]}"
        )
    for kind, count in respelled.items():
        if count:
            warnings.append(
                f"{file}: the {kind} ids are text in one list and numbers in the other for {count} annotations; they are "
                "matched as they are spelled"
            )
    if repeated:
        warnings.append(
            f"{file}: {len(repeated)} annotations have the id of another one, such as {repeated[0]}; all are used"
        )


def _more(found: list, what: str) -> str:
    return f"; there are {len(found)} {what}" if len(found) > 1 else ""


# --------------------------------------------------------------------------------------------------------------------- masks

# A mask is kept as COCO's run lengths: {"size": [height, width], "counts": text}.
LARGEST_COORDINATE = 1e5  # pycocotools allocates memory by the length of a polygon's sides


def read_segmentation(value: object) -> list[list[float]] | dict | None:
    """Checks the `segmentation` of an annotation.

    Args:
        value: polygons, each [x, y, x, y, ...] in pixels; or run lengths with `size` [height, width] and `counts`, numbers or
            their text. Polygons of fewer than three points cover nothing and are skipped.

    Returns:
        The polygons, or the run lengths as text; None if there is nothing, or only polygons of fewer than three points.

    Raises:
        ValueError: if it is something else; the message says what was expected.
    """
    if value is None or (isinstance(value, (list, tuple, dict, str)) and not value):
        return None
    if isinstance(value, dict):
        # a column of run lengths has nulls inside where a row has none
        return None if all(part is None for part in value.values()) else _read_run_lengths(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError("polygons, or run lengths with `size` and `counts`, were expected")
    if isinstance(value[0], (int, float)):  # some files have one polygon without a list
        value = [value]
    polygons = []
    for polygon in value:
        if not isinstance(polygon, (list, tuple)) or len(polygon) % 2 or not all(map(_is_coordinate, polygon)):
            raise ValueError(
                f"polygons of pairs of numbers between -{LARGEST_COORDINATE:g} and {LARGEST_COORDINATE:g}, such as "
                "[[x, y, x, y, x, y]], were expected"
            )
        if len(polygon) >= 6:
            polygons.append([float(number) for number in polygon])
    return polygons or None


def _is_coordinate(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST_COORDINATE


def _read_run_lengths(value: dict) -> dict:
    from pycocotools import mask as coco_mask

    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError("run lengths with `size` [height, width] were expected")
    if isinstance(counts, (str, bytes)):
        text = counts if isinstance(counts, bytes) else counts.encode("utf-8")
        counts = _run_lengths_of(text)
    elif not isinstance(counts, (list, tuple)) or not all(isinstance(n, int) for n in counts):
        raise ValueError("run lengths with `counts`, whole numbers or their text, were expected")
    pixels = size[0] * size[1]
    if min(counts, default=0) < 0 or sum(counts) != pixels:  # pycocotools would write beyond the mask
        raise ValueError(
            f"`counts` that sum up to the {pixels} pixels of `size` {list(size)} were expected, not {sum(counts)}"
        )
    return as_text(coco_mask.frPyObjects({"size": list(size), "counts": list(counts)}, *size))


def _run_lengths_of(text: bytes) -> list[int]:
    """Decodes COCO's text of run lengths: five bits per character from "0" on, the lowest first; from the fourth number on,
    each is the difference from the last but one."""
    counts, value, shift = [], 0, 0
    for character in text:
        character -= 48
        if not 0 <= character < 64 or shift > 60:
            raise ValueError("`counts` in COCO's text of run lengths were expected")
        value |= (character & 31) << shift
        shift += 5
        if character & 32:
            continue
        if character & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("`counts` in COCO's text of run lengths were expected, which is cut off here")
    return counts


def as_text(run_lengths: dict) -> dict:
    """Run lengths of pycocotools, with the text as `str`: JSON and `datasets` take no bytes."""
    counts = run_lengths["counts"]
    return {
        "size": [int(side) for side in run_lengths["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def to_run_lengths(segmentation: list[list[float]] | dict, height: int, width: int) -> dict:
    """Returns run lengths of a result of `read_segmentation`; polygons are drawn in an image of this size."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        return segmentation
    return as_text(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))


def box_of(segmentation: list[list[float]] | dict) -> list[float]:
    """Returns left, top, width and height of a result of `read_segmentation`."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        return coco_mask.toBbox(segmentation).tolist()
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
    return [*points.min(0).tolist(), *np.ptp(points, axis=0).tolist()]


def pixels_of(run_lengths: dict) -> int:
    """Returns the number of pixels of a mask."""
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(run_lengths))


def encode_masks(masks: np.ndarray) -> list[dict]:
    """Returns the run lengths of binary masks, (masks, height, width)."""
    from pycocotools import mask as coco_mask

    if not len(masks):
        return []
    return [as_text(one) for one in coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))]


def decode_masks(run_lengths: Sequence[dict], height: int, width: int) -> np.ndarray:
    """Returns binary masks as uint8 (masks, height, width), from run lengths of this size."""
    from pycocotools import mask as coco_mask

    if not run_lengths:
        return np.zeros((0, height, width), dtype=np.uint8)
    return np.ascontiguousarray(coco_mask.decode(list(run_lengths)).transpose(2, 0, 1))
