"""python -m convert.mask2former SOURCE --output DIR: converts a Mask2Former checkpoint with an InternImage backbone."""

import argparse
import re
import sys

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from . import cli
from .backbone import backbone_config
from .conversion import Plan
from .errors import ConversionError
from .labels import id2label
from .source import Source, check_kind, shape_of
from .upernet import processor_options, translate_segmentation


_PD, _TM = "model.pixel_level_module.decoder", "model.transformer_module"
_ENCODER = r"pixel_decoder\.encoder\.layers\.(\d+)\."
_OUR_ENCODER = _PD + r".encoder.layers.\1."
_DECODER = r"transformer_decoder\.layers\.(\d+)\."
_OUR_DECODER = _TM + r".decoder.layers.\1."
_W = r"\.(weight|bias)"

# mmdetection's names and transformers'; fused self-attention keeps its name and is split afterwards
_PATTERNS = [
    (re.compile(r"decode_head\." + pattern), target)
    for pattern, target in (
        (r"pixel_decoder\.input_convs\.(\d)\.conv" + _W, _PD + r".input_projections.\1.0.\2"),
        (r"pixel_decoder\.input_convs\.(\d)\.gn" + _W, _PD + r".input_projections.\1.1.\2"),
        (r"pixel_decoder\.level_encoding\.weight", _PD + ".level_embed"),
        (
            _ENCODER + r"attentions\.0\.(sampling_offsets|attention_weights|value_proj|output_proj)" + _W,
            _OUR_ENCODER + r"self_attn.\2.\3",
        ),
        (_ENCODER + r"norms\.0" + _W, _OUR_ENCODER + r"self_attn_layer_norm.\2"),
        (_ENCODER + r"norms\.1" + _W, _OUR_ENCODER + r"final_layer_norm.\2"),
        (_ENCODER + r"ffns\.0\.layers\.0\.0" + _W, _OUR_ENCODER + r"fc1.\2"),
        (_ENCODER + r"ffns\.0\.layers\.1" + _W, _OUR_ENCODER + r"fc2.\2"),
        (r"pixel_decoder\.lateral_convs\.0\.conv\.weight", _PD + ".adapter_1.0.weight"),
        (r"pixel_decoder\.lateral_convs\.0\.gn" + _W, _PD + r".adapter_1.1.\1"),
        (r"pixel_decoder\.output_convs\.0\.conv\.weight", _PD + ".layer_1.0.weight"),
        (r"pixel_decoder\.output_convs\.0\.gn" + _W, _PD + r".layer_1.1.\1"),
        (r"pixel_decoder\.mask_feature" + _W, _PD + r".mask_projection.\1"),
        (r"query_feat\.weight", _TM + ".queries_features.weight"),
        (r"query_embed\.weight", _TM + ".queries_embedder.weight"),
        (r"level_embed\.weight", _TM + ".level_embed.weight"),
        (_DECODER + r"attentions\.0\.attn\.in_proj_(weight|bias)", _OUR_DECODER + r"cross_attn.in_proj_\2"),
        (_DECODER + r"attentions\.0\.attn\.out_proj" + _W, _OUR_DECODER + r"cross_attn.out_proj.\2"),
        (_DECODER + r"attentions\.1\.attn\.in_proj_(weight|bias)", _OUR_DECODER + r"self_attn.in_proj_\2"),
        (_DECODER + r"attentions\.1\.attn\.out_proj" + _W, _OUR_DECODER + r"self_attn.out_proj.\2"),
        (_DECODER + r"norms\.0" + _W, _OUR_DECODER + r"cross_attn_layer_norm.\2"),
        (_DECODER + r"norms\.1" + _W, _OUR_DECODER + r"self_attn_layer_norm.\2"),
        (_DECODER + r"norms\.2" + _W, _OUR_DECODER + r"final_layer_norm.\2"),
        (_DECODER + r"ffns\.0\.layers\.0\.0" + _W, _OUR_DECODER + r"fc1.\2"),
        (_DECODER + r"ffns\.0\.layers\.1" + _W, _OUR_DECODER + r"fc2.\2"),
        (r"transformer_decoder\.post_norm" + _W, _TM + r".decoder.layernorm.\1"),
        (r"mask_embed\.0" + _W, _TM + r".decoder.mask_predictor.mask_embedder.0.0.\1"),
        (r"mask_embed\.2" + _W, _TM + r".decoder.mask_predictor.mask_embedder.1.0.\1"),
        (r"mask_embed\.4" + _W, _TM + r".decoder.mask_predictor.mask_embedder.2.0.\1"),
        (r"cls_embed" + _W, r"class_predictor.\1"),
    )
]
# an inherited, unused classifier in files of early versions of the official code
_IGNORED = re.compile(r"decode_head\.conv_seg\.(weight|bias)")


def _split_self_attention(head: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits the fused tensors of the decoder's self-attention into q, k and v. Cross-attention stays fused."""
    result = {}
    for name, tensor in head.items():
        match = re.fullmatch(r"(.+\.self_attn)\.in_proj_(weight|bias)", name)
        if match is None:
            result[name] = tensor
            continue
        check_kind(name, tensor)
        if tensor.ndim == 0 or tensor.shape[0] % 3:
            raise ConversionError(f"{name} has the shape {tuple(tensor.shape)}, expected three equal parts")
        for part, third in zip(("q", "k", "v"), tensor.chunk(3), strict=True):
            result[f"{match[1]}.{part}_proj.{match[2]}"] = third
    return result


def make_plan(source: Source, arguments: argparse.Namespace) -> Plan:
    parts, unknown = translate_segmentation(source, arguments.ema, _PATTERNS)
    ignored = tuple(name for name in unknown if _IGNORED.fullmatch(name))
    if unknown := [name for name in unknown if name not in ignored]:
        raise ConversionError(f"{source.file} has entries that no Mask2Former has: {', '.join(unknown[:5])}")
    head = _split_self_attention(parts["head"])
    backbone = {f"model.pixel_level_module.encoder.{name}": tensor for name, tensor in parts["backbone"].items()}

    def shape(name: str, dimensions: int) -> torch.Size:
        return shape_of(source.file, head, name, dimensions)

    def number_of(prefix: str) -> int:
        return len({name.removeprefix(prefix).split(".")[0] for name in head if name.startswith(prefix)})

    hidden_dim = shape(f"{_TM}.queries_features.weight", 2)[1]
    num_labels = shape("class_predictor.weight", 2)[0] - 1  # the last row is "no object"
    heads = shape(f"{_PD}.encoder.layers.0.self_attn.attention_weights.weight", 2)[0] // 12  # 3 levels x 4 points
    labels = id2label(source.released.labels if source.released is not None else None, num_labels)
    features = backbone_config(source, any("layer_scale" in name for name in backbone))
    if heads == 0 or hidden_dim % heads or num_labels == 0:
        raise ConversionError(
            f"{source.file} has {num_labels} classes and {heads} attention heads of together {hidden_dim} channels"
        )
    config = Mask2FormerConfig(
        backbone_config=features,
        feature_size=shape(f"{_PD}.mask_projection.weight", 4)[1],
        mask_feature_size=shape(f"{_PD}.mask_projection.weight", 4)[0],
        hidden_dim=hidden_dim,
        num_attention_heads=heads,
        encoder_feedforward_dim=shape(f"{_PD}.encoder.layers.0.fc1.weight", 2)[0],
        dim_feedforward=shape(f"{_TM}.decoder.layers.0.fc1.weight", 2)[0],
        num_queries=shape(f"{_TM}.queries_features.weight", 2)[0],
        encoder_layers=number_of(f"{_PD}.encoder.layers."),
        decoder_layers=number_of(f"{_TM}.decoder.layers.") + 1,  # transformers builds one layer less than configured
        pre_norm=False,
        enforce_input_projection=False,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    state_dict = backbone | head
    with torch.device("meta"):
        buffers = dict(Mask2FormerForUniversalSegmentation(config).named_buffers())
    if "criterion.empty_weight" in buffers:  # class weights of the loss; the file has no counterpart
        state_dict["criterion.empty_weight"] = torch.ones(num_labels + 1)
        state_dict["criterion.empty_weight"][-1] = config.no_object_weight
    processor = Mask2FormerImageProcessorPil(ignore_index=255, **processor_options(source))
    return Plan("mask2former", source, config, Mask2FormerForUniversalSegmentation, state_dict, processor, 96, ignored)


def main(argv: list[str] | None = None) -> int:
    arguments = cli.parser("Converts a Mask2Former checkpoint with an InternImage backbone.").parse_args(argv)
    return cli.main(lambda: cli.run(make_plan, arguments, "mask2former"))


if __name__ == "__main__":
    sys.exit(main())
