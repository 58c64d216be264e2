"""In: images and instance masks, images whose values tell the class and the instance. Out: objects with masks, and the classes."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from coco import Annotation, encode_masks
from data import Data, InputError, open_image, some, upright_size
from masks import LARGEST, MaskRules, numbered_names


CLASS = 2**20  # factor of the class in the number of a class and an instance


@dataclass
class InstanceRules:
    """The rules that turn an instance mask's values into objects.

    - Greyscale or palette, without `label_divisor`: the values are the instances of one class; 0 is the background.
    - Greyscale or palette, with it: value = class * label_divisor + instance. Smaller values are classes without instances.
    - Colours: red is the class, green the instance of it, from 1 on; blue is 0.

    A region of a class without an instance is a crowd of it if the class has instances elsewhere, and background otherwise.

    Attributes:
        label_divisor: see above.
        ignore_index: a value of greyscale masks without `label_divisor` that is background too; -1 for none.
        reduce_labels: the class 1 has the name of the number 0.

    Raises:
        InputError: if a value is out of range.
    """

    label_divisor: int | None = None
    ignore_index: int = 255
    reduce_labels: bool = False

    def __post_init__(self):
        if self.label_divisor is not None and not 1 < self.label_divisor <= LARGEST:
            raise InputError(f"--label_divisor must be 2 to {LARGEST}, got {self.label_divisor}")
        if not -1 <= self.ignore_index <= LARGEST:
            raise InputError(
                f"--ignore_index must be 0 to {LARGEST}, or -1 to ignore no value, got {self.ignore_index}"
            )

    def objects(self, source: object, name: str) -> "InstanceMask":
        """Reads an instance mask.

        Raises:
            InputError: if the source is no image, or its values are not as the rules expect.
        """
        pixels = np.asarray(open_image(source, name))
        coloured = pixels.ndim == 3 and pixels.shape[2] in (3, 4) and (pixels[..., :3] != pixels[..., :1]).any()
        ignored = False
        if coloured:
            if self.label_divisor is not None:
                raise InputError(
                    f"{name} has colours; greyscale was expected for --label_divisor {self.label_divisor}"
                )
            pixels = pixels.astype(np.int64)
            if pixels[..., 2].any() or (pixels[..., 3:] != 255).any():
                colour = pixels[(pixels[..., 2] > 0) | (pixels[..., 3:] != 255).any(-1)][0].tolist()
                raise InputError(
                    f"{name} has the colour {colour}; red for the class, green for the instance and no blue, or a greyscale or "
                    "palette image, were expected"
                )
            classes, instances = pixels[..., 0], pixels[..., 1]
        else:
            values = MaskRules(ignore_index=-1).read(source, name).astype(np.int64)
            if self.label_divisor is None:
                ignored = bool((values == self.ignore_index).any()) and self.ignore_index > 0
                instances = np.where(values == self.ignore_index, 0, values)
                classes = (instances > 0).astype(np.int64)
            else:
                classes, instances = np.divmod(values, self.label_divisor)
                without = classes == 0
                classes, instances = np.where(without, values, classes), np.where(without, 0, instances + 1)
        numbers = classes * CLASS + instances
        found = [number for number in np.unique(numbers).tolist() if number >= CLASS]
        run_lengths = [encode_masks((numbers == number)[None])[0] for number in found]
        regions = [
            (number // CLASS, number % CLASS == 0, runs) for number, runs in zip(found, run_lengths, strict=True)
        ]
        return InstanceMask(name, classes.shape, bool(coloured), ignored, regions)


@dataclass
class InstanceMask:
    """What an instance mask holds.

    Attributes:
        name: its name for messages.
        size: height and width.
        coloured, ignored: whether it has colours, and pixels of the ignored value.
        regions: the number of the class, whether it has no instance, and the run lengths.
    """

    name: str
    size: tuple[int, int]
    coloured: bool
    ignored: bool
    regions: list[tuple[int, bool, dict]] = field(default_factory=list)


def read_names(file: Path) -> dict[int, str]:
    """Reads the classes' names of a JSON file by their numbers.

    Raises:
        InputError: if it is not a JSON object from numbers to names.
    """
    return numbered_names(file, 'a JSON object such as {"1": "cat", "2": "dog"} was expected')


def read_instance_masks(
    data: Data, column: str, image_column: str, used: Iterable[str], rules: InstanceRules, names: dict[int, str] | None
) -> tuple[list[str], dict[str, list[list[Annotation]]], list[str]]:
    """Reads all masks of all splits.

    Args:
        data: the dataset; images and masks are `datasets.Image(decode=False)`. Its layout gets how the masks were read.
        column, image_column: the columns of masks and of images.
        used: names of the splits to train and evaluate on. In other splits masks may be missing and sizes differ.
        rules: the rules to read masks by.
        names: the classes' names by their numbers; None if there are none.

    Returns:
        The classes with instances in any split; the objects of each image of the used splits, without boxes; and warnings.

    Raises:
        InputError: if a mask is missing, cannot be read, or has another size than its image, a class has no name, or there is no
            instance.
    """
    masks = {
        split: _read(dataset, split, column, image_column, rules, split in used)
        for split, dataset in data.splits.items()
        if column in dataset.column_names
    }
    every = [mask for of_split in masks.values() for mask in of_split if mask is not None]
    first: dict[int, InstanceMask] = {}  # classes with instances, and a mask of each
    for mask in every:
        for number, without_instance, _ in mask.regions:
            if not without_instance:
                first.setdefault(number, mask)
    ignored = [mask.name for mask in every if mask.ignored]
    if not first:
        ignoring = (
            f"; {len(ignored)} of them have {rules.ignore_index}, which is ignored (--ignore_index)" if ignored else ""
        )
        raise InputError(f"none of the {len(every)} instance masks of {data.name} has an instance{ignoring}")
    if len({mask.coloured for mask in first.values()}) > 1:
        grey, coloured = (next(m.name for m in first.values() if m.coloured == kind) for kind in (False, True))
        raise InputError(f"{grey} is greyscale and {coloured} has colours; instance masks of one kind were expected")
    one_class = rules.label_divisor is None and not any(mask.coloured for mask in first.values())
    classes = _class_names(first, names, rules, one_class)
    index = {number: i for i, number in enumerate(classes)}
    kind = "colours tell class (red) and instance (green)"
    if one_class:
        kind = "values are the instances of one class"
    elif rules.label_divisor is not None:
        kind = f"values are class * {rules.label_divisor} + instance"
    data.layout += f"; instance masks in {column}, whose {kind}"
    objects = {
        split: [
            [
                Annotation(f"object {i}", index[number], bbox=None, iscrowd=int(without), segmentation=run_lengths)
                for i, (number, without, run_lengths) in enumerate(mask.regions)
                if number in index
            ]
            for mask in of_split
        ]
        for split, of_split in masks.items()
        if split in used
    }
    warnings = []
    if ignored:
        warnings.append(
            f"the value {rules.ignore_index} of {len(ignored)} instance masks is taken for background (--ignore_index), the first "
            f"is {ignored[0]}"
        )
    return list(classes.values()), objects, warnings


def _read(
    dataset, split: str, column: str, image_column: str, rules: InstanceRules, used: bool
) -> list[InstanceMask | None]:
    """Reads the masks of a split; None for a missing one of an unused split."""
    import datasets

    def read(index: int) -> InstanceMask | None:
        row = dataset[index]
        image, source = row[image_column], row[column]
        name = (image or {}).get("path") or f"row {index} of the split {split}"
        mask_name = (source or {}).get("path") or f"the instance mask of {name}"
        if source is None or (source.get("bytes") is None and source.get("path") is None):
            if used:
                raise InputError(f"the instance mask of {name} is missing (null)")
            return None
        mask = rules.objects(source, mask_name)
        progress.update()
        height, width = mask.size
        if used and (size := upright_size(image, name)) != (width, height):
            raise InputError(
                f"{mask_name} is {width}x{height}, but its image {name} is {size[0]}x{size[1]} (width x height); the same size was "
                "expected"
            )
        return mask

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        datasets.utils.tqdm(total=len(dataset), desc=f"Reading the instance masks of {split}") as progress,
    ):
        return list(pool.map(read, range(len(dataset))))


def _class_names(
    first: dict[int, InstanceMask], names: dict[int, str] | None, rules: InstanceRules, one_class: bool
) -> dict[int, str]:
    """Returns the names of the classes with instances, by their numbers, in order."""
    if one_class:
        if names is not None and len(names) != 1:
            raise InputError(
                f"--id2label names {len(names)} classes ({some(list(names.values()))}), but greyscale instance masks without "
                "--label_divisor have one; one name was expected"
            )
        return {1: "object" if names is None else next(iter(names.values()))}
    shift = int(rules.reduce_labels)
    if names is not None:
        for number, mask in first.items():
            if number - shift not in names:
                raise InputError(
                    f"{mask.name} has an instance of the class {number}, which --id2label does not name; "
                    f"{some([str(n + shift) for n in sorted(names)])} were expected"
                )
    return {number: f"class {number}" if names is None else names[number - shift] for number in sorted(first)}
