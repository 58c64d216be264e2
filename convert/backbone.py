"""python -m convert.backbone SOURCE --output DIR: converts the InternImage backbone of any checkpoint.

The source is a downstream checkpoint, with tensors named `backbone.…`, or a classification checkpoint.
"""

import argparse
import sys

import torch

from internimage_hf import (
    InternImageBackbone,
    InternImageCompositeBackbone,
    InternImageCompositeConfig,
    InternImageConfig,
)
from internimage_hf.checkpoint import BASE_MODEL_PREFIX, translate_config, translate_key

from . import cli
from .classification import config_from, translated
from .conversion import Plan
from .source import Source, configuration_of


def backbone_config(source: Source, has_layer_scale: bool) -> InternImageConfig:
    """Returns the backbone's configuration, from the official fields or the released checkpoint's name.

    The tensors decide on layer scale: downstream models of the variant T have it, the classification model has not.
    """
    with configuration_of(source):
        if source.config is not None:
            fields = source.config.get("model", source.config)  # of a detector's or segmenter's whole configuration
            if isinstance(fields, dict):
                fields = fields.get("backbone", fields)
            if not isinstance(fields, dict):
                raise TypeError(f"`backbone` must be an object, got {type(fields).__name__}")
            fields = translate_config({key: value for key, value in fields.items() if key != "num_classes"})
            for unrelated in ("num_labels", "architectures", "id2label", "label2id"):
                fields.pop(unrelated, None)
            fields.pop("out_indices", None)
            config = config_from(source, fields)
        else:
            fields = {"drop_path_rate": source.released.drop_path_rate, "image_size": source.released.size}
            if source.released.task != "classification":
                fields |= {"use_clip_projector": False, "layer_scale_init_value": 1.0 if has_layer_scale else None}
            config = InternImageConfig.from_variant(source.released.variant, num_labels=2, **fields)
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return config


def config_for(source: Source, tensors: dict[str, torch.Tensor]) -> InternImageConfig:
    """The configuration of a backbone of these tensors: of one InternImage, or of the two of a CB-InternImage."""
    config = backbone_config(source, any("layer_scale" in name for name in tensors))
    if any(name.startswith("assistant.") for name in tensors):
        fields = {**config.to_dict(), "model_type": InternImageCompositeConfig.model_type}
        config = InternImageCompositeConfig.from_dict(fields)
    return config


def backbone_tensors(source: Source, ema: bool) -> tuple[dict, tuple[str, ...]]:
    """Returns the backbone's tensors under the names of `InternImageBackbone`, and the names of the file's other tensors."""
    tensors = source.read(ema)
    if any(name.startswith("backbone.") for name in tensors):  # a downstream checkpoint
        ignored = tuple(name for name in tensors if not name.startswith("backbone."))
    else:
        heads = (f"{BASE_MODEL_PREFIX}.pooler.", "pooler.", "classifier.")
        ignored = tuple(name for name in tensors if translate_key(name).startswith(heads))
    state_dict = translated(source, {name: tensor for name, tensor in tensors.items() if name not in set(ignored)})
    prefix = f"{BASE_MODEL_PREFIX}."
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}, ignored


def make_plan(source: Source, arguments: argparse.Namespace) -> Plan:
    state_dict, ignored = backbone_tensors(source, arguments.ema)
    config = config_for(source, state_dict)
    composite = isinstance(config, InternImageCompositeConfig)
    model_class = InternImageCompositeBackbone if composite else InternImageBackbone
    return Plan("backbone", source, config, model_class, state_dict, None, ignored=ignored)


def main(argv: list[str] | None = None) -> int:
    arguments = cli.parser("Takes the InternImage backbone out of a checkpoint.").parse_args(argv)
    return cli.main(lambda: cli.run(make_plan, arguments, "backbone"))


if __name__ == "__main__":
    sys.exit(main())
