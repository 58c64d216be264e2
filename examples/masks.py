"""In: folders or datasets of images and masks. Out: checked pairs, the classes, and masks as class numbers."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from data import (
    EVAL_NAMES,
    METADATA,
    TRAIN_NAMES,
    Data,
    DataArguments,
    InputError,
    LeftOut,
    chosen_splits,
    find_images,
    load_data,
    one_line,
    open_image,
    some,
    upright_size,
)
from PIL import Image


IMAGES, MASKS = "images", ("annotations", "masks", "labels")
NAMES_FILE = "id2label.json"
IGNORED, NO_CLASS = -1, -2
LARGEST = 65535  # limits of a mask's values and of the number of classes
Names = TypeVar("Names")
LAYOUTS = (
    "images/train/ and annotations/train/, or train/images/ and train/masks/, or images/ and masks/, with masks of the images' "
    "names, or a metadata file with `file_name` and `annotation_file_name`, was expected"
)


# ------------------------------------------------------------------------------------------------------------------ folders


def load_pairs(arguments: DataArguments, mask_column: str) -> Data:
    """Loads the dataset of `--dataset`: folders of images and of masks, or any input of `data.load_data`.

    Folders become splits with the columns `image` and `annotation`. Beside such folders, metadata without the column
    `mask_column` is left out.

    Raises:
        InputError: if the dataset does not exist or has another layout, or an image has no mask or several.
    """
    expected, root = (*METADATA, NAMES_FILE), Path(arguments.dataset)
    if not root.is_dir():
        return load_data(arguments, class_folders=False)
    left_out = LeftOut()
    files = find_images(root, left_out, expected)
    metadata = [file for name in METADATA for file in root.rglob(name)]
    if not files or metadata:
        data = load_data(arguments, class_folders=False, expected=expected)
        if not files or all(mask_column in split.column_names for split in data.splits.values()):
            return data
    for file in metadata:
        left_out.add(f"without the column {mask_column}", file.relative_to(root))
    images, masks, mask_folder = _images_and_masks(files, left_out)
    if not images or not masks:
        raise InputError(
            f"--dataset {root} has {len(files)} images, but not in folders of images and of masks: {LAYOUTS}; {left_out}"
        )
    return _paired(arguments, root, images, masks, mask_folder, left_out)


def _images_and_masks(files: list[Path], left_out: LeftOut) -> tuple[dict, dict, str]:
    """Groups images and masks by the parts of their names, without `images` or `masks` and without the ending."""
    found: dict[str, dict[tuple, list[Path]]] = {kind: {} for kind in (IMAGES, *MASKS)}
    for file in files:
        folders = [part.lower() for part in file.parts[:-1][:2]]
        depth = next((depth for depth, name in enumerate(folders) if name in found), None)
        if depth is None:
            left_out.add("beside the folders of images and masks", file)
        else:
            key = (*file.parts[:depth], *file.parts[depth + 1 : -1], file.stem)
            found[folders[depth]].setdefault(key, []).append(file)
    images = found.pop(IMAGES)
    mask_folder = max(found, key=lambda kind: (len(found[kind].keys() & images.keys()), len(found[kind])))
    for kind, others in found.items():
        if kind != mask_folder:
            for file in (file for files in others.values() for file in files):
                left_out.add(f"in {kind}, since the masks are in {mask_folder}", file)
    return images, found[mask_folder], mask_folder


def _paired(
    arguments: DataArguments, root: Path, images: dict, masks: dict, mask_folder: str, left_out: LeftOut
) -> Data:
    import datasets

    for kind, files, others in (("mask", masks, images), ("image", images, masks)):
        for key, several in files.items():
            if len(several) > 1 and key in others:
                raise InputError(
                    f"{root / several[0]} and {root / several[1]} have one name, so that it is not clear which {kind} belongs "
                    f"to {others[key][0]}: one was expected"
                )
    first = {key[0] for key in images if len(key) > 1}
    has_splits = arguments.train_split != "all" and (
        any(name.lower() in TRAIN_NAMES or name in (arguments.train_split, arguments.eval_split) for name in first)
        or (bool(first) and all(name.lower() in EVAL_NAMES for name in first))
    )
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    alone: dict[str, list[Path]] = {}
    for key, files in images.items():
        split = key[0] if has_splits else "train"
        if has_splits and len(key) == 1:
            for file in files:
                left_out.add("beside the folders of the splits", file)
        elif key in masks:
            pairs.setdefault(split, []).append((files[0], masks[key][0]))
        else:
            alone.setdefault(split, []).extend(files)
    without = [file for key in sorted(masks.keys() - images.keys()) for file in masks[key]]
    with_masks = {key[0] if has_splits else "train" for key in masks}
    splits = [split for split in dict.fromkeys((*pairs, *alone)) if split in with_masks]
    used = chosen_splits(splits, arguments) if pairs else list(alone)
    for split, files in alone.items():
        if split in used:
            image = files[0]
            mask = Path(*(mask_folder if part.lower() == IMAGES else part for part in image.parts)).with_suffix(".png")
            there = f"; there are masks such as {some([str(root / file) for file in without], 1)}" if without else ""
            raise InputError(
                f"{len(files)} of the {len(files) + len(pairs.get(split, ()))} images of the split {split} have no mask, the "
                f"first is {root / image}: {root / mask}, or that name with another ending, was expected{there}"
            )
        reason = "without a mask, in a split that is not used" if split in with_masks else "in a split without masks"
        for file in files:
            left_out.add(reason, file)
    for file in without:
        left_out.add("masks without an image", file)
    features = datasets.Features({"image": datasets.Image(decode=False), "annotation": datasets.Image(decode=False)})
    result = {}
    for split in pairs:
        columns = {
            "image": [str(root / i) for i, _ in pairs[split]],
            "annotation": [str(root / m) for _, m in pairs[split]],
        }
        result[split] = datasets.Dataset.from_dict(columns, features=features)
    layout = f"images and {mask_folder} of the same names"
    if has_splits:
        layout += f"; the folders {some(sorted(pairs))} are taken for splits (--train_split, --eval_split)"
    return Data(arguments.dataset, layout, result, left_out)


# ------------------------------------------------------------------------------------------------------------------- values


@dataclass
class MaskRules:
    """The rules that turn a mask's values into classes.

    Attributes:
        ignore_index: the value of ignored pixels, which count in neither loss nor metric: 0 to 255 or 65535; -1 for none.
        reduce_labels: 0 is ignored too, and 1 is the first class.
        mask_values: the values in the order of the classes, as numbers, or all as colours such as `#ff0000`; None if the
            values are the classes' numbers. Listed values are never ignored.
        ignore_other_values: values missing in `mask_values` are ignored.

    Raises:
        InputError: if a value is out of range, or two attributes contradict each other.
    """

    ignore_index: int = 255
    reduce_labels: bool = False
    mask_values: Sequence[str | int] | None = None
    ignore_other_values: bool = False
    colours: bool = field(init=False, default=False)
    values: np.ndarray | None = field(init=False, default=None)

    def __post_init__(self):
        if not (-1 <= self.ignore_index <= 255 or self.ignore_index == LARGEST):
            raise InputError(
                f"--ignore_index must be 0 to 255, or {LARGEST}, or -1 to ignore no value, got {self.ignore_index}"
            )
        if self.mask_values is None:
            if self.ignore_other_values:
                raise InputError("--ignore_other_values is for masks whose classes --mask_values lists")
            return
        if self.reduce_labels:
            raise InputError(
                "--reduce_labels contradicts --mask_values: leave 0 out of the list, and give --ignore_index 0"
            )
        texts = [str(value) for value in self.mask_values]
        self.colours = any(text.startswith("#") for text in texts)
        self.values = np.array([self._parsed(text) for text in texts], dtype=np.int64)
        if len(texts) < 2 or len(set(self.values.tolist())) < len(texts):
            raise InputError(f"--mask_values must list at least two different values, got {' '.join(texts)}")

    def _parsed(self, text: str) -> int:
        try:
            value = int(text.removeprefix("#"), 16 if self.colours else 10)
        except ValueError:
            value = -1
        colour = text.startswith("#") and len(text) == 7
        if colour != self.colours or not 0 <= value <= (0xFFFFFF if self.colours else LARGEST):
            raise InputError(
                f"--mask_values must be numbers from 0 to {LARGEST}, or all colours such as #ff0000, got {text!r}"
            )
        return value

    def text(self, value: int) -> str:
        """Formats a value as in the flags."""
        return f"#{value:06x}" if self.colours else str(value)

    def read(self, source: object, name: str) -> np.ndarray:
        """Reads a mask's values, (height, width) of unsigned integers, after its EXIF orientation.

        A colour is 65536 * red + 256 * green + blue.

        Raises:
            InputError: if the source is no image, or its mode gives a pixel no single value.
        """
        image = open_image(source, name)
        expected = "a greyscale or palette image whose values are the classes was expected, or --mask_values with the classes' colours"
        if self.colours:
            if image.mode[0] in "IF":
                raise InputError(f"{name} has no colours (mode {image.mode}), but --mask_values lists colours")
            if image.mode in ("P", "1", "L"):
                image = image.convert("RGB")
        pixels = np.asarray(image)
        if image.mode in ("LA", "PA", "RGBA"):
            if (pixels[..., -1] != 255).any():
                raise InputError(f"{name} has transparent pixels (mode {image.mode}), which have no class; {expected}")
            if self.colours and image.mode != "RGBA":
                pixels = np.asarray(image.convert("RGBA"))
            pixels = pixels[..., :-1]
        elif pixels.ndim == 3 and image.mode != "RGB":
            raise InputError(f"{name} has the mode {image.mode}; {expected}")
        if self.colours:
            return pixels.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
        if pixels.ndim == 3:
            if (pixels != pixels[..., :1]).any():
                colour = pixels[(pixels != pixels[..., :1]).any(-1)][0]
                raise InputError(
                    f"{name} has colours (mode {image.mode}), such as #{bytes(colour.tolist()).hex()}; {expected}"
                )
            pixels = pixels[..., 0]
        if pixels.dtype.kind == "f" or pixels.min(initial=0) < 0 or pixels.max(initial=0) > LARGEST:
            raise InputError(
                f"{name} has values that are not whole numbers from 0 to {LARGEST} (mode {image.mode}); {expected}"
            )
        return pixels.astype(np.uint8 if pixels.max(initial=0) <= 255 else np.uint16)

    def summary(self, pixels: np.ndarray) -> list[int]:
        """Returns the values in a mask of `read`; at most a few of those that `mask_values` does not list."""
        values = np.flatnonzero(np.bincount(pixels.ravel())) if pixels.dtype.itemsize <= 2 else np.unique(pixels)
        if self.values is not None:
            listed = np.isin(values, self.values)
            values = np.concatenate([values[listed], values[~listed][:8]])
        return values.tolist()

    def classes(self, values: np.ndarray) -> np.ndarray:
        """Returns the classes of values as int64; `IGNORED` and `NO_CLASS` are negative."""
        values = values.astype(np.int64)
        if self.values is not None:
            order = np.argsort(self.values)
            places = order[np.searchsorted(self.values, values, sorter=order).clip(max=len(order) - 1)]
            ignored = self.ignore_other_values | ((values == self.ignore_index) & (not self.colours))
            others = np.where(ignored, IGNORED, NO_CLASS)
            return np.where(self.values[places] == values, places, others)
        if self.reduce_labels:
            return np.where((values == 0) | (values == self.ignore_index), IGNORED, values - 1)
        return np.where(values == self.ignore_index, IGNORED, values)

    def mask(self, source: object, name: str, num_labels: int) -> np.ndarray:
        """Returns the classes of a mask's pixels: (height, width) of uint8, or uint16 for more than 255 classes.

        Ignored pixels have the type's largest value, `ignored_label(num_labels)`.

        Raises:
            InputError: if the mask cannot be read, or a pixel is of no class.
        """
        pixels = self.read(source, name)
        if pixels.dtype.itemsize <= 2:
            classes = self.classes(np.arange(np.iinfo(pixels.dtype).max + 1))[pixels]
        else:
            values, places = np.unique(pixels, return_inverse=True)
            classes = self.classes(values)[places.reshape(pixels.shape)]
        wrong = (classes == NO_CLASS) | (classes >= num_labels)
        if wrong.any():
            raise InputError(f"{name} has the value {self.text(pixels[wrong][0])}; {self.expected(num_labels)}")
        dtype = np.uint8 if num_labels <= 255 else np.uint16
        return np.where(classes == IGNORED, ignored_label(num_labels), classes).astype(dtype)

    def expected(self, num_labels: int) -> str:
        """Describes the valid values, for messages."""
        if self.values is not None:
            text = f"{some([self.text(value) for value in self.values.tolist()], 20)} of --mask_values"
        else:
            first = int(self.reduce_labels)
            text = f"{first} to {num_labels - 1 + first} for the {num_labels} classes"
            if self.reduce_labels:
                text += ", or 0"
        ignored = (
            f", or {self.ignore_index} for pixels to ignore," if self.ignore_index >= 0 and not self.colours else ""
        )
        return f"{text}{ignored} were expected (--id2label, --ignore_index, --reduce_labels, --mask_values)"


def ignored_label(num_labels: int) -> int:
    """Returns the label of ignored pixels: the largest value of the masks' type."""
    return 255 if num_labels <= 255 else LARGEST


def resized(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes masks, (..., height, width), by nearest pixels."""
    rows = ((np.arange(height) + 0.5) * (mask.shape[-2] / height)).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * (mask.shape[-1] / width)).astype(np.int64)
    return mask[..., rows[:, None], columns]


# ------------------------------------------------------------------------------------------------------------------ classes


def numbered_names(file: Path, expected: str) -> dict[int, str]:
    """Reads a JSON object from whole numbers to names; `expected` ends the messages.

    Raises:
        InputError: if it is something else.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {one_line(error)}; {expected}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}; {expected}")
    names = {}
    for number, name in content.items():
        if not number.isdecimal() or not isinstance(name, str):
            raise InputError(f"{file} has the entry {number!r}: {name!r}; {expected}")
        names[int(number)] = name
    return names


def read_names(file: Path, rules: MaskRules) -> list[str]:
    """Reads the classes' names of a JSON file, by number; the ignored value's name is left out.

    Raises:
        InputError: if it is not a JSON object from the numbers 0, 1, ... to names.
    """
    expected = 'a JSON object such as {"0": "sky", "1": "sea"}, numbered from 0 without gaps, was expected'
    names = numbered_names(file, expected)
    if sorted(names) != list(range(len(names))):
        names.pop(rules.ignore_index, None)
    if sorted(names) != list(range(len(names))) or not 2 <= len(names) <= LARGEST:
        raise InputError(f"{file} has the numbers {some([str(number) for number in sorted(names)])}; {expected}")
    if rules.values is not None and len(names) != len(rules.values):
        raise InputError(f"{file} names {len(names)} classes, but --mask_values lists {len(rules.values)} values")
    return [names[number] for number in range(len(names))]


def find_names(
    arguments: DataArguments, id2label: str | None, read: Callable[[Path], Names]
) -> tuple[Names | None, str | None]:
    """Finds the classes' names in `--id2label` or the dataset's `id2label.json`; returns what `read` returns of the file, or
    None, and a warning or None.

    Raises:
        InputError: if the file is not as `read` expects.
    """
    if id2label is not None:
        return read(Path(id2label)), None
    if Path(arguments.dataset).is_dir():
        own = Path(arguments.dataset) / NAMES_FILE
        return (read(own) if own.is_file() else None), None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = hf_hub_download(arguments.dataset, NAMES_FILE, repo_type="dataset")
    except (OSError, ValueError, EntryNotFoundError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None, None  # the Hub's repository has no such file
        return None, f"whether {arguments.dataset} has an {NAMES_FILE} could not be found out: {one_line(error)}"
    return read(Path(file)), None


def survey(data: Data, rules: MaskRules, used: Iterable[str | None]) -> list[str]:
    """Reads every mask of every split once and compares its size with its image's; returns warnings.

    The splits have the columns `image` and `annotation` and get three more: `name` and `mask_name` for messages, and `values`,
    the mask's values.

    Args:
        data: the dataset; its splits are changed.
        rules: the rules to read masks by.
        used: names of the splits to train and evaluate on. In other splits masks may be missing and sizes differ.

    Raises:
        InputError: if a mask cannot be read or is a JPEG file of several values; in a split of `used` also if a mask is missing
            or differs in size from its image.
    """
    import datasets

    warnings = []
    total = sum(len(split) for split in data.splits.values())
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        datasets.utils.tqdm(total=total, desc="Reading the masks") as progress,
    ):
        for split, dataset in data.splits.items():

            def look(index: int, split=split, dataset=dataset) -> "_Pair":
                pair = _Pair(dataset[index], f"row {index} of the split {split}", rules, sizes=split in used)
                progress.update()
                return pair

            pairs = list(pool.map(look, range(len(dataset))))
            columns = {"name": "string", "mask_name": "string", "values": datasets.List(datasets.Value("int64"))}
            for column, kind in columns.items():
                feature = datasets.Value(kind) if isinstance(kind, str) else kind
                dataset = dataset.add_column(column, [getattr(pair, column) for pair in pairs], feature=feature)
            data.splits[split] = dataset
            of_split = f"of the {len(pairs)} masks of the split {split}"
            if jpeg := [pair for pair in pairs if pair.jpeg]:
                raise InputError(
                    f"{len(jpeg)} {of_split} are JPEG files, which do not keep values: the first, {jpeg[0].mask_name}, has "
                    f"{len(jpeg[0].values)} of them; masks in PNG, or --mask_values, were expected"
                )
            if split not in used:
                continue
            if missing := [pair for pair in pairs if pair.size is None]:
                raise InputError(
                    f"{len(missing)} {of_split} are missing (null), the first is that of {missing[0].name}"
                )
            if other := [pair for pair in pairs if pair.size != pair.image_size]:
                raise InputError(
                    f"{len(other)} {of_split} have another size than their images, the first is {other[0].sizes()}"
                )
            if turned := [pair for pair in pairs if pair.doubtful()]:
                warnings.append(
                    f"{len(turned)} {of_split} are of images with an EXIF orientation, and their size does not tell whether "
                    f"they belong to the upright image, as is supposed; the first is {turned[0].mask_name}"
                )
    return warnings


class _Pair:
    """The names of an image and its mask, the mask's values, and with `sizes` both sizes (width, height).

    `size` is the mask's, None without a mask. `orientation` is the image's in EXIF; it is 1 if the mask has one too.
    """

    def __init__(self, row: dict, place: str, rules: MaskRules, sizes: bool):
        image, mask = row["image"], row["annotation"]
        self.name = (image or {}).get("path") or place
        self.mask_name = (mask or {}).get("path") or f"the mask of {self.name}"
        self.values, self.jpeg, self.size = [], False, None
        if mask is None or (mask.get("bytes") is None and mask.get("path") is None):
            return
        if rules.values is None and _head(mask) == b"\xff\xd8\xff":
            self.values = rules.summary(np.asarray(open_image(mask, self.mask_name).convert("L")))
            self.jpeg = len(self.values) > 1
            if self.jpeg:
                return
        pixels = rules.read(mask, self.mask_name)
        self.values = rules.summary(pixels)
        if sizes:
            self.size = pixels.shape[::-1]
            self.image_size = upright_size(image, self.name)
            self.orientation = 1 if _orientation(mask) > 1 else _orientation(image)

    def sizes(self) -> str:
        found, expected = (f"{width}x{height}" for width, height in (self.size, self.image_size))
        text = f"{self.mask_name} with {found} for {self.name} with {expected} (width x height)"
        if self.orientation >= 5 and self.size == self.image_size[::-1]:
            text += f", which is turned upright by its EXIF orientation {self.orientation}, as the mask is not"
        return f"{text}; the same size was expected"

    def doubtful(self) -> bool:
        """Whether the mask's size also fits the stored image, before its EXIF orientation."""
        return self.orientation > 1 and (self.orientation < 5 or self.size[0] == self.size[1])


def _head(source: dict) -> bytes:
    """Reads the first bytes of a file; returns none for a URL or an unreadable file."""
    if source.get("bytes") is not None:
        return source["bytes"][:3]
    if "://" in source["path"]:
        return b""
    try:
        with open(source["path"], "rb") as file:
            return file.read(3)
    except OSError:
        return b""  # `open_image` will raise the error


def _orientation(source: dict) -> int:
    """Returns the EXIF orientation of a readable image, 1 to 8; 1 without one, or for a URL."""
    if source.get("bytes") is None and "://" in source["path"]:
        return 1
    with Image.open(io.BytesIO(source["bytes"]) if source.get("bytes") is not None else source["path"]) as image:
        orientation = image.getexif().get(0x0112, 1)
    return orientation if orientation in range(1, 9) else 1


def class_names(data: Data, rules: MaskRules, names: list[str] | None) -> tuple[list[str], list[str]]:
    """Checks the classes' names against the masks of all splits, or derives names from the masks; returns names and warnings.

    Args:
        data: the dataset after `survey`.
        rules: the rules that turn values into classes.
        names: the given names, or None.

    Raises:
        InputError: if a mask has a value of no class, the masks have fewer than two classes, or their values leave out more
            numbers than they have.
    """
    masks, first = Counter(), {}
    for split in data.splits.values():
        for name, values in zip(split["mask_name"], split["values"], strict=True):
            masks.update(values)
            for value in values:
                first.setdefault(value, name)
    values = np.array(sorted(masks), dtype=np.int64)
    classes = rules.classes(values)
    if names is None and rules.values is not None:
        names = [f"value {rules.text(value)}" for value in rules.values.tolist()]
    wrong = values[(classes == NO_CLASS) | (classes >= (LARGEST if names is None else len(names)))].tolist()
    if wrong:
        number = sum(not set(wrong).isdisjoint(values) for split in data.splits.values() for values in split["values"])
        value, file = wrong[0], first[wrong[0]]
        problem = f"{file}: a mask has the value {rules.text(value)}"
        if rules.values is None:
            number_of_class = rules.classes(np.array([value])).item()
            problem = (
                f"{file}: a mask has the class {number_of_class}, but there are {len(names or range(LARGEST))} classes"
            )
        if file.lower().endswith((".jpg", ".jpeg")):
            problem += " (JPEG changes values, PNG does not)"
        raise InputError(
            f"{problem}; {rules.expected(len(names or range(LARGEST)))}; {number} masks of {data.name} have such values, "
            f"{some([rules.text(value) for value in wrong])}"
        )
    present = sorted(set(classes[classes >= 0].tolist()))
    listed = [rules.text(value) for value in values.tolist()]
    if len(present) < 2:
        found = ", ".join(
            f"{text} (in {masks[value]} masks{', ignored' if kind == IGNORED else ''})"
            for text, value, kind in list(zip(listed, values.tolist(), classes.tolist(), strict=True))[:8]
        )
        advice = (
            f"; if all of them are classes, give --mask_values {' '.join(listed)}" if 2 <= len(listed) <= 8 else ""
        )
        if advice and rules.reduce_labels:
            advice += " in place of --reduce_labels"
        raise InputError(
            f"the masks of {data.name} have the values {found or '(none)'}, {len(present) or 'no'} "
            f"{'class' if present else 'classes'}; at least two classes were expected{advice}"
        )
    warnings = []
    if names is None:
        count = present[-1] + 1
        names = [f"class {number}" for number in range(count)]
        absent = sorted(set(range(count)) - set(present))
        if len(absent) > len(present):
            of_classes = [text for text, kind in zip(listed, classes.tolist(), strict=True) if kind >= 0]
            raise InputError(
                f"the masks of {data.name} have the values {some(of_classes)}, by which {len(absent)} of {count} classes would "
                f"be empty; values without gaps were expected, or all classes' names (--id2label), or --mask_values "
                f"{' '.join(of_classes[:8])}{' ...' if len(of_classes) > 8 else ''}"
            )
        if absent:
            warnings.append(
                f"{len(absent)} of {count} classes are in no mask: {some([names[number] for number in absent])}"
            )
    if rules.values is None and masks[rules.ignore_index] and rules.ignore_index < present[-1]:
        warnings.append(
            f"the value {rules.ignore_index} of {masks[rules.ignore_index]} masks is ignored (--ignore_index), though larger "
            "ones are classes"
        )
    return names, warnings


def masks_per_class(dataset, rules: MaskRules, labels: Sequence[str]) -> dict[str, int]:
    """Counts the masks of a split in which each class occurs, by its name."""
    counts: Counter[int] = Counter()
    for values in dataset["values"]:
        counts.update(set(rules.classes(np.array(values, dtype=np.int64)).tolist()))
    often = Counter(labels)
    return {f"{name} ({i})" if often[name] > 1 else name: counts[i] for i, name in enumerate(labels)}
