"""python -m convert.classification SOURCE --output DIR: converts a classification checkpoint, with --reverse back again."""

import argparse
import re
import sys
from typing import Any

import torch

from internimage_hf import InternImageConfig, InternImageForImageClassification, InternImageImageProcessor
from internimage_hf.checkpoint import join_offset_mask, translate_config, translate_key, translate_state_dict

from . import cli, reverse
from .conversion import Plan
from .errors import ConversionError
from .labels import id2label
from .source import Source, check_kind, configuration_of, shape_of


def image_processor(image_size: int | list[int]) -> InternImageImageProcessor:
    """Returns the image processor for a side, or for a height and a width."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return InternImageImageProcessor(
        size={"shortest_edge": max(height, width)}, crop_size={"height": height, "width": width}
    )


def translated(source: Source, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the source's tensors under this package's names."""
    for name, tensor in tensors.items():
        if ".offset_mask." in name and not tensor.is_meta:  # This layer is split, which needs an ordinary tensor.
            check_kind(name, tensor)
    try:
        return translate_state_dict(tensors)
    except ValueError as error:
        raise ConversionError(f"{source.file}: {error}") from error


def config_from(source: Source, fields: dict[str, Any]) -> InternImageConfig:
    """Builds the configuration and reports unknown fields, such as misspelt names: transformers would keep them silently."""
    source.unknown_fields = sorted(
        fields.keys() - InternImageConfig().to_dict().keys() - InternImageConfig().__dict__.keys()
    )
    return InternImageConfig(**fields)


def make_plan(source: Source, arguments: argparse.Namespace) -> Plan:
    state_dict = translated(source, source.read(arguments.ema))
    if "classifier.weight" not in state_dict:
        raise ConversionError(f"{source.file} has no classifier; a backbone is converted by convert.backbone")
    num_labels = shape_of(source.file, state_dict, "classifier.weight", 2)[0]
    data_set = source.released.labels if source.released is not None else None
    if data_set is None and num_labels in (1000, 21841):
        data_set = "imagenet-1k" if num_labels == 1000 else "imagenet-22k"
    labels = id2label(data_set, num_labels)
    names = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    with configuration_of(source):
        if source.config is not None:
            fields = translate_config(source.config)
            for derived in ("num_labels", "architectures", "transformers_version", "torch_dtype", "_name_or_path"):
                fields.pop(derived, None)
            if source.released is not None:
                fields.setdefault("image_size", source.released.size)
            config = config_from(source, {**fields, **names})
        else:
            config = InternImageConfig.from_variant(
                source.released.variant, **{"image_size": source.released.size, **names}
            )
    return Plan(
        "classification",
        source,
        config,
        InternImageForImageClassification,
        state_dict,
        image_processor(config.image_size),
    )


# ----------------------------------------------------------------------------------------------------------- reverse


def _official_patterns(config: InternImageConfig) -> list[tuple[str, str]]:
    """Maps this package's names to the official ones. A norm's index in its nn.Sequential depends on the kind of norm."""
    sequential = "0" if config.norm_layer == "BN" else "1"  # LayerNorm follows a permutation here
    tokens = "1" if config.norm_layer == "BN" else "0"  # BatchNorm follows a permutation here
    layer = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
    official = r"levels.\1.blocks.\2."
    patterns = [
        (r"stem\.norm([12])\.(\w+)", rf"patch_embed.norm\1.{sequential}.\2"),
        (r"stem\.(.+)", r"patch_embed.\1"),
        (layer + r"layer_scale([12])", official + r"gamma\3"),
        *(
            (
                (layer + r"dcn\.dw_conv\.(\w+)", official + r"dcn.offset_mask_dw.\3"),
                (layer + r"dcn\.input_proj\.(\w+)", official + r"dcn.value_proj.\3"),
            )
            if config.dcn_version == 4
            else ()
        ),
        (layer + r"(norm[12]|res_post_norm[12])\.(\w+)", official + r"\3.0.\4"),
        (layer + r"dcn\.dw_conv\.(\w+)", official + r"dcn.dw_conv.0.\3"),
        (layer + r"dcn\.dw_norm\.(\w+)", official + rf"dcn.dw_conv.1.{sequential}.\3"),
        (layer + r"dcn\.center_feature_scale_proj\.(\w+)", official + r"dcn.center_feature_scale_proj_\3"),
        (layer + r"(.+)", official + r"\3"),
        (r"encoder\.stages\.(\d+)\.norm\.(\w+)", r"levels.\1.norm.0.\2"),
        (r"encoder\.stages\.(\d+)\.post_norms\.(\d+)\.(\w+)", r"levels.\1.post_norms.\2.0.\3"),
        (r"encoder\.downsamples\.(\d+)\.norm\.(\w+)", rf"levels.\1.downsample.norm.{sequential}.\2"),
        (r"encoder\.downsamples\.(\d+)\.conv\.(\w+)", r"levels.\1.downsample.conv.\2"),
        (r"pooler\.conv\.(\w+)", r"conv_head.0.\1"),
        (r"pooler\.stage4_proj\.(\w+)", r"dcnv3_head_x4.0.\1"),
        (r"pooler\.stage3_proj\.(\w+)", r"dcnv3_head_x3.\1"),
        (r"pooler\.attention\.output_proj\.(\w+)", r"clip_projector.cross_dcn.proj.\1"),
        *(
            pattern
            for name in ("query", "key", "value")
            for pattern in (
                (rf"pooler\.attention\.{name}_norm\.(\w+)", rf"clip_projector.norm1_{name[0]}.{tokens}.\1"),
                (rf"pooler\.attention\.{name}\.weight", f"clip_projector.cross_dcn.{name[0]}.weight"),
                (rf"pooler\.attention\.{name}\.bias", f"clip_projector.cross_dcn.{name[0]}_bias"),
            )
        ),
        (r"pooler\.norm\.(\w+)", rf"fc_norm.{tokens}.\1" if config.use_clip_projector else r"conv_head.1.0.\1"),
        (r"classifier\.(\w+)", r"head.\1"),
    ]
    return patterns


def official_state_dict(model: InternImageForImageClassification) -> dict[str, torch.Tensor]:
    """Translates a model's tensors to the official names.

    Raises:
        ConversionError: if a name has no counterpart, or is not restored by the forward translation.
    """
    result = {}
    for name, tensor in joined_for_the_official_code(model.config, model.state_dict()).items():
        official = official_name(model.config, name.removeprefix("internimage."))
        if official in result or translate_key(official) != name:
            raise ConversionError(f"{name} has no counterpart in the official code")
        result[official] = tensor
    return result


def joined_for_the_official_code(
    config: InternImageConfig, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A state dict with DCNv4's sampling offsets and modulation masks in one layer `offset_mask`, as published."""
    state_dict = dict(state_dict)
    if config.dcn_version == 4:
        for name in [name for name in state_dict if ".dcn.offset." in name]:
            mask = state_dict.pop(name.replace(".offset.", ".mask."))
            state_dict[name.replace(".offset.", ".offset_mask.")] = join_offset_mask(state_dict.pop(name), mask)
    return state_dict


def official_name(config: InternImageConfig, name: str) -> str:
    """The official name of a tensor of `InternImageModel`, of the backbone, or of the classifier.

    Raises:
        ConversionError: if there is none.
    """
    for pattern, target in _official_patterns(config):
        if match := re.fullmatch(pattern, name):
            return match.expand(target)
    raise ConversionError(f"{name} has no counterpart in the official code")


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser("Converts a classification checkpoint of InternImage to a folder for transformers.")
    reverse.add_option(parser)
    classes = {InternImageForImageClassification: official_state_dict}
    return reverse.run(parser, argv, make_plan, "classification", classes, "model")


if __name__ == "__main__":
    sys.exit(main())
