"""In: paths, Hub ids and flags. Out: datasets of images, not decoded yet, and an account of every file that is not used."""

import atexit
import csv
import gc
import io
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from internimage_hf.remote_code import replace_file


TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Pillow registers these endings without a decoder on every system.
_UNDECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class InputError(ValueError):
    """An input of the user cannot be used. The message is one line: file, field, value, and the expected value."""


def run_program(main: Callable[[], object]) -> None:
    """Runs a program's `main`; an `InputError` ends the program with one line and exit status 1."""
    try:
        main()
    except InputError as error:
        # A data loader's worker sends its traceback as the message; the last line is the original message.
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('data.InputError: ')}")
    leave_process_group()


def leave_process_group() -> None:
    """Ends a program that trains in several processes; does nothing in a single process.

    Gloo's threads keep the tensors of a collective for a moment after its end. Nothing waits for these threads while a model in
    DDP or DeepSpeed refers to the process group. A thread that releases a tensor during the interpreter's shutdown aborts the
    process. The process therefore ends by `os._exit`, as `multiprocessing` ends its processes, after the other threads and
    the `atexit` functions have ended and the output is flushed.
    """
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gc.collect()  # first: if a model in DDP holds the last reference, the group's destructor waits for threads that wait for Python
    torch.distributed.destroy_process_group()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


# ------------------------------------------------------------------------------------------------------------------- images


def image_endings() -> frozenset[str]:
    """Returns the lower-case file endings of the formats that Pillow can decode on this machine."""
    return frozenset(
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _UNDECODED
    )


def open_image(source: object, name: str | None = None) -> Image.Image:
    """Decodes an image and applies its EXIF orientation. The mode is unchanged.

    Args:
        source: a path, the bytes of a file, a PIL image, or a dictionary with `bytes` or `path`, as from `datasets` with
            `Image(decode=False)`.
        name: the name in error messages; by default the file's.

    Raises:
        InputError: if the source is no image, or a truncated one.
    """
    content = source
    if isinstance(source, dict):
        name = name or source.get("path")
        content = source["bytes"] if source.get("bytes") is not None else source.get("path")
    elif isinstance(source, (str, os.PathLike)):
        name = name or os.fspath(source)
    name = name or "an image without a file name"
    if content is None:
        raise InputError(f"{name}: there is no image (null)")
    try:
        if isinstance(content, Image.Image):
            image = content
        elif isinstance(content, (str, os.PathLike)) and "://" in os.fspath(content):
            import datasets

            return datasets.Image().decode_example(
                {"path": os.fspath(content), "bytes": None}
            )  # applies the orientation
        else:
            image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise many kinds
        raise InputError(f"{name} cannot be read as an image: {one_line(error)}") from error


def read_image(source: object, name: str | None = None) -> Image.Image:
    """Decodes an image by `open_image` and converts it to RGB, 8 bits per channel.

    16-bit greyscale is scaled; transparency is dropped.

    Raises:
        InputError: if the source is no image, is truncated, or has floating-point pixels, whose range is undefined.
    """
    image = open_image(source, name)
    if image.mode == "F":
        where = name or (source.get("path") if isinstance(source, dict) else source)
        raise InputError(f"{where} has floating-point pixels (mode F); images of 8 or 16 bits were expected")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if image.mode != "I" or pixels.max(initial=0) > 255:
            image = Image.fromarray((np.clip(pixels, 0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _metadata_behind_pixels(png: BinaryIO) -> bool:
    """Whether a PNG, read up to its first pixels, has a chunk with an orientation after the pixels."""
    start, pixels = png.tell(), False
    png.seek(8)
    while len(head := png.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        pixels |= kind == b"IDAT"
        name = png.read(min(length, 32)) if pixels and kind in (b"tEXt", b"zTXt", b"iTXt") else b""
        if (pixels and kind == b"eXIf") or name.startswith((b"Raw profile type exif", b"XML:com.adobe.xmp")):
            break
        png.seek(length + 4 - len(name), os.SEEK_CUR)
    else:
        head = b""
    png.seek(start)
    return bool(head)


def upright_size(source: object, name: str | None = None) -> tuple[int, int]:
    """Returns width and height of an image after its EXIF orientation, from the file's head where that suffices.

    Raises:
        InputError: if the source is no image.
    """
    content = source["bytes"] if isinstance(source, dict) and source.get("bytes") is not None else source
    path = content.get("path") if isinstance(content, dict) else content
    if isinstance(path, (str, os.PathLike)) and "://" in os.fspath(path):
        return open_image(source, name).size
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else path) as image:
            # Pillow would decode the whole PNG to look for an orientation after the pixels
            behind = image.format != "PNG" or _metadata_behind_pixels(image.fp)
            exif = image.getexif() if behind else Image.Image.getexif(image)
            turned = exif.get(0x0112) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception:
        return open_image(source, name).size  # raises the error for a broken image


def one_line(error: BaseException) -> str:
    """Returns an error's message without line breaks; its class name if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


# -------------------------------------------------------------------------------------------------------------------- files


class LeftOut:
    """Counts unused files and rows by reason, with the first few names of each."""

    EXAMPLES = 3

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: object) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.EXAMPLES:
            examples.append(str(name).encode("utf-8", "backslashreplace").decode())

    def __bool__(self) -> bool:
        return bool(self.counts)

    def reasons(self) -> str:
        """Such as "2 with the ending .heic (a.heic, b.heic); 1 hidden (.x.jpg)"; "" if there are none."""
        parts = []
        for reason, count in self.counts.most_common():
            examples = self.examples[reason]
            more = ", ..." if count > len(examples) else ""
            parts.append(f"{count} {reason} ({', '.join(examples)}{more})")
        return "; ".join(parts)

    def __str__(self) -> str:
        """Such as "3 left out: 2 with the ending .heic (a.heic, b.heic); 1 hidden (.x.jpg)"; "nothing is left out"."""
        return f"{sum(self.counts.values())} left out: {self.reasons()}" if self.counts else "nothing is left out"


def files_below(root: str | os.PathLike, left_out: LeftOut) -> Iterator[Path]:
    """Yields the files of a folder tree, relative to the folder and in no order; links are followed.

    Unreadable folders, folders already read under another name, pipes, sockets and devices go to `left_out`.
    """
    seen = set()

    def unreadable(error: OSError) -> None:
        left_out.add("folders that cannot be read", os.path.relpath(error.filename, root))

    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        relative = Path(os.path.relpath(folder, root))
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above, or a second link
            left_out.add("folders that were read under another name", relative)
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for file in files:
            path = os.path.join(folder, file)
            if os.path.isfile(path) or not os.path.exists(path):  # reading a broken link raises an error with its name
                yield relative / file
            else:
                left_out.add("no regular files", relative / file)


def unusable(name: PurePath, endings: Container[str]) -> str | None:
    """Returns the reason for `LeftOut` why a file is not used; None if its ending is one of `endings`."""
    if any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
        return "hidden"
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return "with a name that is not UTF-8"
    if name.suffix.lower() in endings:
        return None
    return f"with the ending {name.suffix}" if name.suffix else "without an ending"


def find_images(root: Path, left_out: LeftOut, expected: Iterable[str] = METADATA) -> list[Path]:
    """Lists the images of a folder tree, relative to the folder and sorted; links are followed.

    Hidden files and folders (`.name`, `__MACOSX`) and files of other formats go to `left_out`. Files named in `expected` are
    neither listed nor left out.
    """
    endings, expected, images = image_endings(), set(expected), []
    for name in sorted(files_below(root, left_out)):
        reason = unusable(name, endings)
        if name.name in expected and reason != "hidden":
            continue
        if reason is None:
            images.append(name)
        else:
            left_out.add(reason, name)
    return images


# ---------------------------------------------------------------------------------------------------------------- data sets


@dataclass
class DataArguments:
    """The flags about data of all training programs."""

    dataset: str = field(
        default="digits",
        metadata={"help": "a folder, the id of a dataset on the Hub, or `digits` (embedded)"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset on the Hub"})
    train_split: str | None = field(
        default=None,
        metadata={
            "help": "split, or folder of a split, to train on; `train` or `training` if absent; `all`: a folder's "
            "subfolders are classes and none of them is a split"
        },
    )
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "split, or folder of a split, to evaluate on; if absent the first of "
            f"{', '.join(EVAL_NAMES)} that there is, otherwise a part of the training images"
        },
    )
    eval_fraction: float = field(
        default=0.2, metadata={"help": "part held out for evaluation if the dataset has no split for it"}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "train on this many images at most"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on this many images at most"})


@dataclass
class Data:
    """A dataset as found.

    Attributes:
        name: as given by the user.
        layout: a description of how folders and columns were interpreted.
        splits: by the dataset's own names; image columns are `datasets.Image(decode=False)`.
        left_out: files and rows that are in no split.
    """

    name: str
    layout: str
    splits: dict
    left_out: LeftOut = field(default_factory=LeftOut)


def undecoded(dataset):
    """Replaces `datasets.Image()` by `datasets.Image(decode=False)`: `read_image` names a broken file in its error."""
    import datasets

    for name, kind in (dataset.features or {}).items():
        if isinstance(kind, datasets.Image) and kind.decode:
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def load_data(
    arguments: DataArguments, class_folders: bool, streaming: bool = False, expected: Iterable[str] = METADATA
) -> Data:
    """Loads the dataset of `--dataset`, a folder or a Hub id.

    Args:
        arguments: the flags.
        class_folders: accept images in one folder per class, as columns `image` and `label`. A folder may have metadata in any
            case: `metadata.csv`, `.jsonl` or `.parquet` with a column `file_name`.
        streaming: do not download a dataset of the Hub.
        expected: see `find_images`.

    Raises:
        InputError: if the dataset does not exist or has another layout.
    """
    import datasets

    if Path(arguments.dataset).is_dir():
        return load_folder(arguments, class_folders, expected)
    try:
        splits = datasets.load_dataset(arguments.dataset, arguments.dataset_config, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = (
            "" if "/" in arguments.dataset and Path(arguments.dataset).parts[0] != "/" else "; it is no folder either"
        )
        raise InputError(f"--dataset {arguments.dataset} cannot be loaded{hint}: {one_line(error)}") from error
    return Data(arguments.dataset, "a data set of the Hub", {name: undecoded(split) for name, split in splits.items()})


def load_folder(arguments: DataArguments, class_folders: bool, expected: Iterable[str] = METADATA) -> Data:
    """Loads a folder of images as a dataset; see `load_data`."""
    import datasets

    root, left_out = Path(arguments.dataset), LeftOut()
    images = find_images(root, left_out, expected)
    metadata = sorted(file.relative_to(root) for name in METADATA for file in root.rglob(name))
    if metadata:
        return _with_metadata(arguments, root, images, metadata, left_out)
    if not images:
        if (root / "dataset_dict.json").is_file():
            splits = dict(datasets.load_from_disk(str(root)))
            return Data(arguments.dataset, "saved by `save_to_disk`", {n: undecoded(s) for n, s in splits.items()})
        if any(root.rglob("*.parquet")):
            splits = datasets.load_dataset(str(root), arguments.dataset_config)
            return Data(arguments.dataset, "a folder of Parquet files", {n: undecoded(s) for n, s in splits.items()})
        raise InputError(f"--dataset {root} has no images; {left_out}")
    if not class_folders:
        raise InputError(
            f"--dataset {root} has {len(images)} images, but no {' or '.join(METADATA)} that says what is in them"
        )
    return _class_folders(arguments, root, images, left_out)


def _is_split(name: str, arguments: DataArguments) -> bool:
    known = (*TRAIN_NAMES, *EVAL_NAMES)
    return arguments.train_split != "all" and (
        name.lower() in known or name in (arguments.train_split, arguments.eval_split)
    )


def _class_folders(arguments: DataArguments, root: Path, images: list[Path], left_out: LeftOut) -> Data:
    """Reads images in `class/` or `split/class/`, or deeper; an image's folder is its class.

    The root's folders are splits if one of them is named `train` or `training` (or as `--train_split` says) and contains class
    folders.
    """
    import datasets

    split_of = {name for name in {image.parts[0] for image in images} if _is_split(name, arguments)}
    with_classes = {image.parts[0] for image in images if len(image.parts) > 2}
    train_names = (
        {arguments.train_split} if arguments.train_split else {n for n in split_of if n.lower() in TRAIN_NAMES}
    )
    has_splits = bool(train_names & with_classes & split_of)
    rows: dict[str, list[tuple[Path, str]]] = {}
    strays: dict[str, list[Path]] = {}
    for image in images:
        split, depth = (image.parts[0], 2) if has_splits else ("train", 1)
        if has_splits and split not in split_of:
            left_out.add("beside the folders of the splits", image)
        elif len(image.parts) <= depth:
            strays.setdefault(split, []).append(image)
        else:
            rows.setdefault(split, []).append((image, image.parent.name))
    if not rows:
        raise InputError(
            f"--dataset {root}: {images[0]} and {len(images) - 1} other images lie in no class folder; one folder per class was expected"
        )
    used = chosen_splits(rows, arguments)
    for split, files in strays.items():
        if has_splits and split not in used:
            for file in files:
                left_out.add("in no class folder", file)
            continue
        classes = sorted({label for name, label in rows.get(split, ())})
        raise InputError(
            f"{root / files[0]} lies beside the class folders {some(classes)} and so has no class"
            f"{f' ({len(files)} such images)' if len(files) > 1 else ''}: put it into the folder of its class, or elsewhere"
        )
    names = sorted({label for split in rows.values() for _, label in split})
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for split, pairs in rows.items():
        columns = {"image": [str(root / f) for f, _ in pairs], "label": [names.index(label) for _, label in pairs]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    layout = "class folders"
    if has_splits:
        layout += f" in the folders {some(sorted(rows))}, which are taken for splits (--train_split, --eval_split)"
    elif doubtful := sorted(split_of):
        layout += f"; {some(doubtful)} with images directly in them are classes, too"
    return Data(arguments.dataset, layout, splits, left_out)


def _with_metadata(
    arguments: DataArguments, root: Path, images: list[Path], files: list[Path], left_out: LeftOut
) -> Data:
    """Reads the images of `metadata.*`: `file_name` becomes the column `image`, `x_file_name` the column `x`."""
    import datasets

    rows, image_columns, named = [], set(), set()
    for file in files:
        for number, row in _metadata_rows(root / file):
            where = f"{root / file}, row {number}"
            found = {key: key.removesuffix("file_name").removesuffix("_") or "image" for key in row if key
                     and (key == "file_name" or key.endswith("_file_name"))}  # fmt: skip
            if "file_name" not in found:
                raise InputError(f"{where} has no `file_name`, only {some(list(map(str, row)))}")
            for key, column in found.items():
                path = file.parent / str(row.pop(key))
                if not (root / path).is_file():
                    raise InputError(f"{where}: {key} {str(path)!r} is no file in {root}")
                image_columns.add(column)
                named.add(Path(os.path.normpath(path)))
                row[column] = str(root / path)
                if column == "image":
                    row["_path"] = path
            rows.append(row)
    for image in images:
        if image not in named:
            left_out.add("in no metadata file", image)
    paths = [row.pop("_path") for row in rows]
    by_split = all(len(path.parts) > 1 and _is_split(path.parts[0], arguments) for path in paths)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    try:
        table = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    except Exception as error:  # pyarrow raises these for a column with values of several types
        raise InputError(
            f"the columns of {some([str(root / f) for f in files])} do not fit together: {one_line(error)}"
        ) from error
    for column in image_columns:
        table = table.cast_column(column, datasets.Image(decode=False))
    indices: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        indices.setdefault(path.parts[0] if by_split else "train", []).append(index)
    layout = f"metadata in {some(list(map(str, files)))}"
    if by_split:
        layout += f"; the folders {some(sorted(indices))} are taken for splits (--train_split, --eval_split)"
    return Data(arguments.dataset, layout, {name: table.select(rows) for name, rows in indices.items()}, left_out)


def _metadata_rows(file: Path) -> Iterable[tuple[int, dict]]:
    """Reads the rows of a metadata file, counted from 1 without the header; CSV values are text, "" is None."""
    try:
        if file.suffix == ".csv":
            with open(file, encoding="utf-8-sig", newline="") as stream:
                for number, row in enumerate(csv.DictReader(stream), 1):
                    if None in row or None in row.values():
                        raise InputError(f"{file}, row {number} has another number of fields than the header")
                    yield number, {key.strip(): value or None for key, value in row.items()}
        elif file.suffix == ".jsonl":
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{file}, row {number} is a {type(row).__name__}; a JSON object was expected")
                    yield number, row
        else:
            import pyarrow.parquet

            yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file} cannot be read: {one_line(error)}") from error


def some(names: Sequence[str], most: int = 8) -> str:
    """Lists the first few names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def chosen_splits(splits: Iterable[str], arguments: DataArguments) -> tuple[str, str | None]:
    """Returns the names of the training split and of the evaluation split, the latter None if there is none.

    Raises:
        InputError: if there is no training split, or a flag names a missing one.
    """
    names = list(splits)

    def find(flag: str, given: str | None, known: tuple[str, ...]) -> str | None:
        if given is not None:
            if given not in names:
                raise InputError(
                    f"--{flag} {given} is not a split of --dataset {arguments.dataset}, which has {some(names)}"
                )
            return given
        return next((name for word in known for name in names if name.lower() == word), None)

    given = None if arguments.train_split == "all" and "all" not in names else arguments.train_split
    train = find("train_split", given, TRAIN_NAMES)
    if train is None:
        raise InputError(
            f"--dataset {arguments.dataset} has no split `train`, only {some(names)}; name one by --train_split"
        )
    evaluation = find("eval_split", arguments.eval_split, tuple(n for n in EVAL_NAMES if n != train))
    if evaluation == train:
        raise InputError(
            f"--train_split and --eval_split are both {train}; two splits, or no --eval_split, were expected"
        )
    return train, evaluation


def train_and_evaluation(data: Data, arguments: DataArguments, seed: int, label_column: str | None = None) -> dict:
    """Returns the images as `{"train": ..., "evaluation": ...}`, limited to the flags' sizes.

    Without an evaluation split, `--eval_fraction` of the training images is held out. With `label_column`, each class gives at
    least one image, except its only one. `data.layout` then describes this.

    Raises:
        InputError: if a split is missing or empty, a flag is out of range, or there is a single image.
    """
    if not 0 < arguments.eval_fraction < 1:
        raise InputError(f"--eval_fraction must be between 0 and 1, got {arguments.eval_fraction}")
    for flag in ("max_train_samples", "max_eval_samples"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise InputError(f"--{flag} must be at least 1, got {value}")
    train, evaluation = chosen_splits(data.splits, arguments)
    for name, split in data.splits.items():
        if name not in (train, evaluation):
            data.layout += f"; the split {name} ({len(split)} images) is not used"
    if evaluation is not None:
        data.layout += f"; trained on {train}, evaluated on {evaluation}"
        parts = {"train": data.splits[train], "evaluation": data.splits[evaluation]}
    else:
        whole = data.splits[train]
        if len(whole) < 2:
            raise InputError(
                f"--dataset {data.name}: the split {train} has {len(whole)} images; at least two, or a split to evaluate "
                "on, were expected"
            )
        labels = list(whole[label_column]) if label_column is not None else [0] * len(whole)
        held = held_out(labels, arguments.eval_fraction, seed)
        rest = sorted(set(range(len(whole))) - set(held))
        data.layout += f"; {arguments.eval_fraction:.0%} of the training images are held out for evaluation"
        parts = {"train": whole.select(rest), "evaluation": whole.select(held)}
    for part, flag in (("train", "max_train_samples"), ("evaluation", "max_eval_samples")):
        if not len(parts[part]):
            raise InputError(
                f"--dataset {data.name}: the split {train if part == 'train' else evaluation} has no images"
            )
        most = getattr(arguments, flag)
        if most is not None and most < len(parts[part]):
            data.layout += f"; --{flag} leaves out {len(parts[part]) - most} images of {part}"
            parts[part] = parts[part].shuffle(seed=seed).select(range(most))
    return parts


def held_out(labels: list, fraction: float, seed: int) -> list[int]:
    """Draws indices to hold out for evaluation: this fraction of each label, at least one and at most all but one."""
    rng = np.random.default_rng(seed)
    by_label: dict[object, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    result = []
    for _, indices in sorted(by_label.items(), key=lambda item: str(item[0])):
        count = min(max(1, round(fraction * len(indices))), len(indices) - 1)
        result += rng.permutation(indices)[:count].tolist()
    return sorted(result) or [len(labels) - 1]


# ------------------------------------------------------------------------------------------------------------------- labels


def label_name(value: object) -> str | None:
    """Returns the class name of a label column's value; None for a missing label."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (list, dict, float)):
        raise InputError(f"the label {value!r} is no class; a name or a whole number was expected")
    return str(value)


def names_in_order(names: Iterable[str]) -> list[str]:
    """Sorts class names, as numbers if all are whole numbers."""
    names = set(names)
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def encode_labels(data: Data, column: str) -> list[str]:
    """Makes `column` of all splits a `ClassLabel` with the same names; returns the names.

    The names are those of all splits together. A common `ClassLabel` of all splits is kept, with its classes without images.
    A missing label (null, or -1 of a `ClassLabel`) becomes -1; see `check_labels`.

    Raises:
        InputError: if a label is neither a name nor a whole number, or a number without a class.
    """
    import datasets

    kinds = [split.features[column] for split in data.splits.values()]
    for (name, split), kind in zip(data.splits.items(), kinds, strict=True):
        if isinstance(kind, datasets.ClassLabel):
            _check_range(split, column, name, kind.names)
    if all(isinstance(kind, datasets.ClassLabel) and kind.names == kinds[0].names for kind in kinds):
        return list(kinds[0].names)
    texts: dict[str, list[str | None]] = {}
    for (name, split), kind in zip(data.splits.items(), kinds, strict=True):
        values = list(split[column])
        if isinstance(kind, datasets.ClassLabel):
            texts[name] = [None if value is None or value < 0 else kind.names[value] for value in values]
        else:
            texts[name] = [label_name(value) for value in values]
    if all(isinstance(kind, datasets.ClassLabel) for kind in kinds):
        names = list(dict.fromkeys(name for kind in kinds for name in kind.names))
    else:
        names = names_in_order(text for values in texts.values() for text in values if text is not None)
    number = {name: index for index, name in enumerate(names)}
    for name, split in data.splits.items():
        values = [-1 if text is None else number[text] for text in texts[name]]
        encoded = split.add_column("encoded label", values, feature=datasets.ClassLabel(names=names))
        data.splits[name] = encoded.remove_columns(column).rename_column("encoded label", column)
    return names


def _check_range(dataset, column: str, name: str, classes: Sequence[str]) -> None:
    for index, value in enumerate(dataset[column]):
        if value is not None and value >= len(classes):
            raise InputError(
                f"{file_name(dataset, index)} of the split {name} has the label {value} in the column {column}; a number from 0 to "
                f"{len(classes) - 1} was expected, the classes are {some(list(classes))}"
            )


def check_labels(dataset, column: str, name: str) -> None:
    """
    Raises:
        InputError: if an image of the split has no label.
    """
    missing = [index for index, value in enumerate(dataset[column]) if value is None or value < 0]
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(dataset)} images of the split {name} have no label in the column {column}, the first is "
            f"{file_name(dataset, missing[0])}; a class was expected"
        )


def file_name(dataset, index: int, column: str = "image") -> str:
    """Returns an image's name for messages: its file, or its row if the dataset has no file names."""
    value = dataset[index].get(column) if column in dataset.column_names else None
    path = value.get("path") if isinstance(value, dict) else None
    return path or f"row {index}"


# ------------------------------------------------------------------------------------------------------------------ account


def counted(counts: dict[str, int], unit: str, most: int = 20) -> str:
    """Describes counts of classes: all of them, or the fewest and the most of many; empty classes by name."""
    empty = [name for name, count in counts.items() if not count]
    present = {name: count for name, count in counts.items() if count}
    if not present:
        return f"no {unit}"
    if len(counts) <= most:
        text = ", ".join(f"{name} {count}" for name, count in present.items())
    else:
        low, high = min(present, key=present.get), max(present, key=present.get)
        text = f"{len(present)} of {len(counts)} classes, {present[low]} ({low}) to {present[high]} ({high}) each"
    return f"{unit} per class: {text}" + (f"; none of {some(empty)}" if empty else "")


@dataclass
class Part:
    """One line of the account: a split as it is used.

    Attributes:
        images: number of images; None for a stream.
        counts: number of images or objects per class; None if not counted.
        unit: the unit of `counts`.
        empty: number of images with none of this unit.
    """

    images: int | None
    counts: dict[str, int] | None = None
    unit: str = "images"
    empty: int = 0

    def __str__(self) -> str:
        images = "streamed, not counted" if self.images is None else f"{self.images} images"
        images += f", {self.empty} of them without {self.unit}" if self.empty else ""
        return images if self.counts is None else f"{images}; {counted(self.counts, self.unit)}"


@dataclass
class Account:
    """The summary of a program's data: printed before the first step, saved beside the model.

    Attributes:
        data: the dataset as found.
        classes: the names of all classes.
        parts: the splits as used, by name.
        warnings: contradictions in the data, one line each.
    """

    data: Data
    classes: Sequence[str]
    parts: dict[str, Part]
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [("data", f"{self.data.name}: {self.data.layout}")]
        lines += [("classes", f"{len(self.classes)}: {some(list(self.classes), 20)}")]
        lines += [(name, str(part)) for name, part in self.parts.items()]
        lines += [("left out", str(self.data.left_out))]
        lines += [("warning", text) for text in self.warnings]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:>{width}}  {text}" for name, text in lines)

    def as_json(self) -> dict:
        left_out = self.data.left_out
        return {
            "dataset": self.data.name,
            "layout": self.data.layout,
            "classes": list(self.classes),
            "parts": {
                name: {"images": part.images, "per class": part.counts, "unit": part.unit, "empty": part.empty}
                for name, part in self.parts.items()
            },
            "left out": {
                reason: {"count": count, "examples": left_out.examples[reason]}
                for reason, count in left_out.counts.items()
            },
            "warnings": self.warnings,
        }

    def write(self, folder: str | os.PathLike) -> None:
        """Saves the account as `data.json` in a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.as_json(), indent=1, ensure_ascii=False) + "\n"
        replace_file(Path(folder) / ACCOUNT, content.encode())


ACCOUNT = "data.json"


def check_resumed(output_dir: str | os.PathLike, checkpoint: str | os.PathLike, account: Account) -> None:
    """Compares the account of a checkpoint's run with that of the run that resumes it.

    Raises:
        InputError: if the checkpoint has other classes or another dataset.
    """
    new = account.as_json()
    config = Path(checkpoint) / "config.json"
    advice = (
        f"another --output_dir, or no --resume_from_checkpoint, was expected to train on --dataset {new['dataset']}"
    )
    if config.is_file():
        names = json.loads(config.read_text(encoding="utf-8")).get("id2label") or {}
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
        if names and names != new["classes"]:
            raise InputError(
                f"{checkpoint} was trained on the {len(names)} classes {some(names)}, the data set has the "
                f"{len(new['classes'])} classes {some(new['classes'])}; {advice}"
            )
    file = Path(output_dir) / ACCOUNT
    if Path(checkpoint).resolve().parent == Path(output_dir).resolve() and file.is_file():
        old = json.loads(file.read_text(encoding="utf-8"))
        differs = old["dataset"] != new["dataset"]
        if differs and old["parts"] != new["parts"]:
            raise InputError(f"{checkpoint} was trained on another data set, {old['dataset']}; {advice}")
        if differs:
            print(
                f"warning: {checkpoint} was trained on {old['dataset']}; {new['dataset']} is taken for the same, with the same "
                "classes and numbers of images",
                flush=True,
            )
        elif old["parts"] != new["parts"]:
            print(f"warning: {new['dataset']} is not as it was when {checkpoint} was written: see {file}", flush=True)
