"""In: a dataset's name. Out: the class names of the released checkpoints trained on it."""

import gzip
import json
from pathlib import Path

from internimage_hf.imagenet_labels import IMAGENET_1K_LABELS


_DATA = Path(__file__).parent / "data"


def class_names(data_set: str) -> list[str]:
    """Returns the names of a dataset's classes in the order of their ids; names are unique.

    ImageNet-22k: WordNet's lemmas, with the synset's id if two synsets share them, in the order of the synsets
    (classification/meta_data/22k_class_to_idx.json). Segmentation datasets: the names of mmsegmentation and the official code,
    without ADE20K's "other". Detection datasets: mmdetection's names (COCO, LVIS v1, Pascal VOC), and for Open Images those of
    its `class-descriptions-boxable.csv`.
    """
    if data_set == "imagenet-1k":
        return list(IMAGENET_1K_LABELS)
    if data_set == "imagenet-22k":
        with gzip.open(_DATA / "imagenet_22k_labels.txt.gz", "rt", encoding="utf-8") as file:
            return file.read().splitlines()
    for file in ("segmentation_labels.json", "detection_labels.json"):
        names = json.loads((_DATA / file).read_text(encoding="utf-8"))
        if data_set in names:
            return names[data_set]
    raise KeyError(data_set)


def id2label(data_set: str | None, num_labels: int) -> dict[int, str]:
    """Returns names for `num_labels` classes: the dataset's if their number is equal, else `LABEL_0` ..."""
    names = class_names(data_set) if data_set is not None else []
    if len(names) != num_labels:
        names = [f"LABEL_{i}" for i in range(num_labels)]
    return dict(enumerate(names))
