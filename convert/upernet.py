"""python -m convert.upernet SOURCE --output DIR: converts a UperNet checkpoint with an InternImage backbone."""

import argparse
import re
import sys

from transformers import UperNetConfig, UperNetForSemanticSegmentation
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from . import cli
from .backbone import backbone_config
from .classification import translated
from .conversion import Plan
from .errors import ConversionError
from .labels import id2label
from .source import Source, configuration_of, shape_of


# the norm of mmsegmentation's ConvModule is `bn`, of transformers' `batch_norm`
_PATTERNS = [
    (re.compile(r"(decode_head|auxiliary_head)\.conv_seg\.(weight|bias)"), r"\1.classifier.\2"),
    (re.compile(r"((?:decode_head|auxiliary_head)\..+)\.bn\.(\w+)"), r"\1.batch_norm.\2"),
    (re.compile(r"((?:decode_head|auxiliary_head)\..+\.conv)\.(weight|bias)"), r"\1.\2"),
]


def translate_segmentation(source: Source, ema: bool, patterns: list) -> tuple[dict, list[str]]:
    """Translates a segmenter's tensors, the head's by patterns; returns them and the unmatched names."""
    state_dict = source.read(ema)
    backbone = translated(source, {name: t for name, t in state_dict.items() if name.startswith("backbone.")})
    if not backbone:
        raise ConversionError(f"{source.file} has no backbone: no name begins with `backbone.`")
    head, unknown = {}, []
    for name, tensor in state_dict.items():
        if name.startswith("backbone."):
            continue
        for pattern, target in patterns:
            if match := pattern.fullmatch(name):
                head[match.expand(target)] = tensor
                break
        else:
            unknown.append(name)
    return {"backbone": backbone, "head": head}, unknown


def processor_options(source: Source) -> dict:
    """Returns fields for a segmenter's image processor: the evaluation size, and whether label 0 is no class."""
    released = source.released
    if released is None:
        return {"size": {"height": 512, "width": 512}, "do_reduce_labels": False}
    size = {"height": released.size, "width": released.width or released.size}
    return {"size": size, "do_reduce_labels": released.labels_begin_at_one}


def make_plan(source: Source, arguments: argparse.Namespace) -> Plan:
    parts, unknown = translate_segmentation(source, arguments.ema, _PATTERNS)
    if unknown:
        raise ConversionError(f"{source.file} has entries that no UperNet has: {', '.join(unknown[:5])}")
    head = parts["head"]
    state_dict = {f"backbone.{name}": tensor for name, tensor in parts["backbone"].items()} | head
    num_labels, hidden_size = shape_of(source.file, head, "decode_head.classifier.weight", 4)[:2]
    auxiliary = None
    if any(name.startswith("auxiliary_head.") for name in head):
        auxiliary = shape_of(source.file, head, "auxiliary_head.convs.0.conv.weight", 4)
    num_convs = len({name.split(".")[2] for name in head if name.startswith("auxiliary_head.convs.")})
    labels = id2label(source.released.labels if source.released is not None else None, num_labels)
    backbone = backbone_config(source, any("layer_scale" in name for name in parts["backbone"]))
    with configuration_of(source):
        config = UperNetConfig(
            backbone_config=backbone,
            hidden_size=hidden_size,
            pool_scales=list((source.config or {}).get("decode_head", {}).get("pool_scales", (1, 2, 3, 6))),
            use_auxiliary_head=auxiliary is not None,
            auxiliary_in_channels=auxiliary[1] if auxiliary is not None else None,
            auxiliary_channels=auxiliary[0] if auxiliary is not None else 256,
            auxiliary_num_convs=max(1, num_convs),
            auxiliary_concat_input=any(name.startswith("auxiliary_head.conv_cat.") for name in head),
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
        )
    processor = SegformerImageProcessorPil(**processor_options(source))
    return Plan("upernet", source, config, UperNetForSemanticSegmentation, state_dict, processor, 96)


def main(argv: list[str] | None = None) -> int:
    arguments = cli.parser("Converts a UperNet checkpoint with an InternImage backbone.").parse_args(argv)
    return cli.main(lambda: cli.run(make_plan, arguments, "upernet"))


if __name__ == "__main__":
    sys.exit(main())
