"""Class names of the data sets that the released checkpoints know."""

import gzip
import json
from pathlib import Path

from internimage_hf.imagenet_labels import IMAGENET_1K_LABELS


_DATA = Path(__file__).parent / "data"


def class_names(data_set: str) -> list[str]:
    """The names of a data set's classes, in the order of their ids; no name occurs twice.

    ImageNet-22k's are WordNet's lemmas, with the synset's id where two synsets share them; the order of ids is that of
    the synsets (classification/meta_data/22k_class_to_idx.json). The segmentation data sets' are mmsegmentation's
    and the official code's; ids are those after ADE20K's "other" was taken out. The detection data sets' are mmdetection's
    (COCO, LVIS v1, Pascal VOC), and those of Open Images' `class-descriptions-boxable.csv`.
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
    """Names for `num_labels` classes: those of the data set if it has as many, `LABEL_0` ... otherwise."""
    names = class_names(data_set) if data_set is not None else []
    if len(names) != num_labels:
        names = [f"LABEL_{i}" for i in range(num_labels)]
    return dict(enumerate(names))
