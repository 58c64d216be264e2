"""What the converters of all detectors share: the tensors' two parts, the backbone's configuration, settings by name."""

import argparse
import dataclasses
import re
from typing import Any

import torch

from internimage_hf import (
    InternImageBackbone,
    InternImageCompositeBackbone,
    InternImageConfig,
    InternImageDetectionImageProcessor,
)

from .backbone import config_for
from .classification import joined_for_the_official_code, official_name, translated
from .errors import ConversionError
from .labels import id2label
from .source import Source


# Of mmdetection's hook for averaged weights, which swaps before it saves: the ordinary names hold the averages.
_EMA = re.compile(r"ema_\w+")


@dataclasses.dataclass
class Detector:
    """A detector's tensors and settings, as a converter finds them.

    Args:
        backbone: tensors under the names of the backbone's class, without a prefix.
        head: tensors under the official names: everything else.
        ignored: names of the file that no model has a use for.
        fields: the official dictionary of the model; empty for a released name.
    """

    backbone: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    ignored: tuple[str, ...]
    fields: dict[str, Any]


def read_detector(source: Source, arguments: argparse.Namespace) -> Detector:
    """Reads the source.

    Raises:
        ConversionError: if it cannot be read, or has no backbone.
    """
    tensors = source.read(arguments.ema)
    ignored = tuple(name for name in tensors if _EMA.fullmatch(name))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    backbone = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    if not backbone:
        raise ConversionError(f"{source.file} has no backbone: no name begins with `backbone.`")
    return Detector(
        translated(source, backbone),
        {name: tensor for name, tensor in tensors.items() if name not in backbone},
        ignored,
        model_fields(source.config) if source.config is not None else {},
    )


def model_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The official dictionary of the model, which a configuration is or has as its entry `model`."""
    return config["model"] if isinstance(config.get("model"), dict) else config


def field(fields: dict[str, Any], *path: str | int, default: Any = None) -> Any:
    """What lies at a path of names and positions in nested dictionaries and lists; the default where the path ends."""
    for name in path:
        if (isinstance(fields, dict) and isinstance(name, str) and name in fields) or (
            isinstance(fields, list) and isinstance(name, int) and name < len(fields)
        ):
            fields = fields[name]
        else:
            return default
    return fields


def detector_backbone(source: Source, detector: Detector, stages: list[str]) -> InternImageConfig:
    """The backbone's configuration, of one InternImage or of two ("CB"), with the stages that the head takes."""
    config = config_for(source, detector.backbone)
    config.out_features = stages
    return config


def label_names(source: Source, num_labels: int) -> dict[str, dict]:
    """`id2label` and `label2id` of a configuration: names of the released checkpoint's data set, or of COCO for 80 classes."""
    data_set = source.released.labels if source.released is not None else None
    if data_set is None and num_labels == 80:
        data_set = "coco"
    names = id2label(data_set, num_labels)
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def image_processor(source: Source, **options: Any) -> InternImageDetectionImageProcessor:
    """The image processor: sides of the evaluation images by the released name, by the configuration, or 800 and 1333.

    Raises:
        ConversionError: if `top_k`, which is the official `max_per_img`, is no positive integer.
    """
    top_k = options.get("top_k", 1)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ConversionError(
            f"the configuration of {source.file} is wrong: `max_per_img` must be a positive integer, got {top_k!r}"
        )
    short, long = 800, 1333
    if source.released is not None:
        short, long = source.released.size, source.released.width
    for pipeline in (
        (source.config or {}).get("test_pipeline"),
        field(source.config or {}, "data", "test", "pipeline"),
    ):
        for step in pipeline if isinstance(pipeline, list) else ():
            scale = step.get("img_scale") if isinstance(step, dict) else None
            if isinstance(scale, (list, tuple)) and len(scale) == 2 and all(isinstance(side, int) for side in scale):
                short, long = sorted(scale)
    return InternImageDetectionImageProcessor(size={"shortest_edge": short, "longest_edge": long}, **options)


def official_backbone(backbone: InternImageBackbone | InternImageCompositeBackbone) -> dict[str, torch.Tensor]:
    """A backbone's tensors under the official names of a detector.

    Raises:
        ConversionError: if a name has no counterpart.
    """
    result = {}
    composite = isinstance(backbone, InternImageCompositeBackbone)
    for name, tensor in joined_for_the_official_code(backbone.config, backbone.state_dict()).items():
        part, _, rest = name.partition(".")
        if part == "connections":
            stage, below, kind = rest.split(".")
            official = f"cb_linears.{stage}.{int(below) + 1}.{kind}"
        elif part == "connection_scales":
            official = f"cb_modules.1.gamma{rest}"
        elif part in ("assistant", "lead"):
            module = ("assistant", "lead").index(part)
            official = f"cb_modules.{module}.{official_name(backbone.config, f'encoder.{rest}')}"
        else:
            official = ("cb_modules.0." if composite else "") + official_name(backbone.config, name)
        result[f"backbone.{official}"] = tensor
    return result
