"""InternImage under every head of transformers that takes a `backbone_config`.

Each head gets a forward pass, a training step and a round trip through its files. Whatever fails for InternImage alone is our
fault. What is marked as broken or as refusing must do the same to ConvNextV2, the backbone of transformers that is most like
InternImage.
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from transformers import ConvNextV2Config, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from utils import ROOT, TINY, TINY_VARIANTS

from internimage_hf import InternImageBackbone, InternImageConfig


HEIGHT, WIDTH = 64, 96
BATCH = 2
ALL_STAGES = ("stage1", "stage2", "stage3", "stage4")
LAST_THREE = ("stage2", "stage3", "stage4")
CHANNELS = [8, 16, 32, 64]  # of the four stages


def internimage(stages: tuple[str, ...], **fields) -> PreTrainedConfig:
    return InternImageConfig(
        channels=CHANNELS[0],
        depths=[1, 1, 2, 1],
        groups=[2, 4, 4, 8],
        mlp_ratio=2.0,
        out_features=list(stages),
        **fields,
    )


def convnextv2(stages: tuple[str, ...], **fields) -> PreTrainedConfig:
    return ConvNextV2Config(hidden_sizes=CHANNELS, depths=[1, 1, 2, 1], out_features=list(stages), **fields)


# Inputs of heads: keyword arguments of a forward pass, and those that a training step adds.
def images(height: int = HEIGHT, width: int = WIDTH) -> dict:
    return {"pixel_values": torch.rand(BATCH, 3, height, width)}


def boxes(**more) -> dict:
    one = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.4]]),
        **more,
    }
    return {"labels": [dict(one) for _ in range(BATCH)]}


def masks() -> torch.Tensor:
    result = torch.zeros(2, HEIGHT, WIDTH)
    result[0, :40, :30] = 1
    result[1, 20:, 50:] = 1
    return result


def segments() -> dict:
    return {"mask_labels": [masks()] * BATCH, "class_labels": [torch.tensor([0, 2])] * BATCH}


def semantic_map(height: int = HEIGHT, width: int = WIDTH) -> dict:
    return {"labels": torch.randint(4, (BATCH, height, width))}


@dataclasses.dataclass(frozen=True)
class Head:
    """A head of transformers, tiny.

    Attributes:
        model: name of its class.
        fields: of its configuration, apart from the backbone's.
        stages: the maps it takes from the backbone.
        inputs: makes the arguments of a forward pass.
        targets: makes what a training step adds; None where transformers has no loss, and one of ours serves.
        auto: names of the Auto classes that load it.
        backbone_fields: of the backbone's configuration.
        wrap: makes the configuration from the backbone's, where `fields` do not do.
        broken: what transformers itself does wrong, by the check of `CHECKS` that shows it.
        fast: whether it is in the fast suite.
    """

    model: str
    fields: dict
    stages: tuple[str, ...] = ALL_STAGES
    inputs: Callable[[], dict] = images
    targets: Callable[[], dict] | None = None
    auto: tuple[str, ...] = ()
    backbone_fields: dict = dataclasses.field(default_factory=dict)
    wrap: Callable | None = None
    broken: dict[str, str] = dataclasses.field(default_factory=dict)
    fast: bool = False

    @property
    def config_name(self) -> str:
        return self.model.rpartition("For")[0] + "Config"

    def build_config(self, backbone_config: PreTrainedConfig) -> PreTrainedConfig:
        if self.wrap is not None:
            return self.wrap(backbone_config)
        return getattr(transformers, self.config_name)(backbone_config=backbone_config, **self.fields)

    def build(self, backbone: Callable) -> torch.nn.Module:
        backbone_config = backbone(self.stages, **self.backbone_fields)
        return getattr(transformers, self.model)(self.build_config(backbone_config))


DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 7,
    "num_labels": 3,
}
OLD_DETR = {**DETR, "use_timm_backbone": False, "backbone": None}
# the heads' attention maps beside d_model must be a multiple of eight
SEGMENTING_DETR = {**OLD_DETR, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
RT_DETR = {
    **DETR,
    "encoder_hidden_dim": 32,
    "encoder_in_channels": CHANNELS[1:],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 4,
    "hidden_expansion": 0.5,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 1100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
GROUNDING_DINO = {
    **DETR,
    "text_config": BERT,
    "num_feature_levels": 4,
    "two_stage": True,
    "max_text_len": 16,
    "fusion_droppath": 0.0,
}
MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "dropout": 0.0,
    "dim_feedforward": 32,
    "encoder_feedforward_dim": 32,
    "num_queries": 5,
    "train_num_points": 64,
    "num_labels": 4,
}
ONEFORMER = {
    **{name: value for name, value in MASK2FORMER.items() if name not in ("feature_size", "mask_feature_size")},
    # what the text encoder has per head
    "hidden_dim": 64,
    "conv_dim": 64,
    "mask_dim": 64,
    "query_dec_layers": 1,
    "task_seq_len": 7,
    "text_encoder_width": 64,
    "text_encoder_context_length": 7,
    "text_encoder_num_layers": 1,
    "text_encoder_vocab_size": 99,
    "text_encoder_n_ctx": 2,
    "is_training": True,
}
OMDET = {
    "text_config": {
        "model_type": "clip_text_model",
        "vocab_size": 99,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "max_position_embeddings": 16,
        "eos_token_id": 98,
    },
    "apply_layernorm_after_vision_backbone": False,
    "text_projection_in_dim": 16,
    "text_projection_out_dim": 16,
    "class_embed_dim": 16,
    "encoder_hidden_dim": 32,
    "decoder_hidden_dim": 32,
    "task_encoder_hidden_dim": 16,
    "vision_features_channels": [32, 32, 32],
    "encoder_in_channels": CHANNELS[1:],
    "encoder_attention_heads": 2,
    "encoder_dim_feedforward": 32,
    "decoder_num_heads": 2,
    "decoder_num_layers": 2,
    "decoder_dim_feedforward": 32,
    "num_queries": 7,
}
DPT = {
    "is_hybrid": True,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
    "backbone_out_indices": [0, 1, 2, 3],
    "backbone_featmap_shape": [1, CHANNELS[2], 4, 4],
    "reassemble_factors": [1, 1, 1, 0.5],
    "neck_hidden_sizes": [CHANNELS[0], CHANNELS[1], 16, 16],
    "fusion_hidden_size": 16,
    "num_labels": 4,
    "semantic_classifier_dropout": 0.0,
}
PP_OCR_SERVER = {
    "neck_out_channels": 16,
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{way}_{length}ratio": [3, 1, 1]
            for way in ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
            for length in ("long", "mid", "short")
        },
    },
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}
TVP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "visual_prompt_size": 8,
    "max_img_size": 64,
    "num_frames": 2,
    "max_position_embeddings": 32,
}


def grounding_inputs() -> dict:
    # class names end in a full stop (1012 in BERT's vocabulary, which these heads have in their code)
    ids = torch.tensor([[101, 7, 1012, 8, 1012, 102]] * BATCH)
    return {**images(), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def omdet_inputs() -> dict:
    names = torch.tensor([[1, 10, 11, 98]] * 4)
    tasks = torch.tensor([[1, 20, 21, 22, 98]] * BATCH)
    return {
        **images(64, 64),
        "classes_input_ids": names,
        "classes_attention_mask": torch.ones_like(names),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }


def oneformer_inputs() -> dict:
    return {
        **images(),
        "task_inputs": torch.randint(99, (BATCH, 7)).float(),
        "text_inputs": torch.randint(99, (BATCH, 3, 7)),
    }


def tvp_inputs(videos: int = 1) -> dict:
    ids = torch.tensor([[1, 10, 11, 12, 2]] * videos)
    return {
        "pixel_values": torch.rand(videos, 2, 3, 64, 64),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def tvp_labels(videos: int = 1) -> dict:
    return {"labels": tuple(torch.tensor([seconds] * videos) for seconds in (10.0, 1.0, 5.0))}


def maskformer(backbone_config: PreTrainedConfig) -> PreTrainedConfig:
    decoder = transformers.DetrConfig(backbone_config=backbone_config, **OLD_DETR)
    return transformers.MaskFormerConfig(
        backbone_config=backbone_config,
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=4,
    )


def doclayout_v2(backbone_config: PreTrainedConfig) -> PreTrainedConfig:
    order = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "coordinate_size": 6,
        "shape_size": 4,
        "num_classes": 20,
    }
    return transformers.PPDocLayoutV2Config(
        backbone_config=backbone_config,
        reading_order_config=order,
        class_thresholds=[0.0] * 3,
        class_order=[0, 1, 2],
        **RT_DETR,
    )


CHECKS = ("training", "files")
DETECTION = ("AutoModelForObjectDetection",)
ZERO_SHOT = ("AutoModelForZeroShotObjectDetection",)
SEMANTIC = ("AutoModelForSemanticSegmentation",)
UNIVERSAL = ("AutoModelForUniversalSegmentation",)
DEPTH = ("AutoModelForDepthEstimation",)

HEADS = {
    "detr": Head("DetrForObjectDetection", OLD_DETR, ("stage4",), targets=boxes, auto=DETECTION, fast=True),
    "detr_segmentation": Head(
        "DetrForSegmentation",
        SEGMENTING_DETR,
        targets=lambda: boxes(masks=masks()),
        auto=("AutoModelForImageSegmentation",),
    ),
    "conditional_detr": Head(
        "ConditionalDetrForObjectDetection", OLD_DETR, ("stage4",), targets=boxes, auto=DETECTION
    ),
    "conditional_detr_segmentation": Head(
        "ConditionalDetrForSegmentation", SEGMENTING_DETR, targets=lambda: boxes(masks=masks())
    ),
    "dab_detr": Head(
        "DabDetrForObjectDetection",
        {**{k: v for k, v in OLD_DETR.items() if k != "d_model"}, "hidden_size": 32},
        ("stage4",),
        targets=boxes,
        auto=DETECTION,
    ),
    "table_transformer": Head(
        "TableTransformerForObjectDetection", OLD_DETR, ("stage4",), targets=boxes, auto=DETECTION
    ),
    "deformable_detr": Head(
        "DeformableDetrForObjectDetection", OLD_DETR, LAST_THREE, targets=boxes, auto=DETECTION, fast=True
    ),
    "deformable_detr_two_stage": Head(
        "DeformableDetrForObjectDetection",
        {**OLD_DETR, "two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 7},
        LAST_THREE,
        targets=boxes,
        auto=DETECTION,
    ),
    "grounding_dino": Head(
        "GroundingDinoForObjectDetection",
        GROUNDING_DINO,
        LAST_THREE,
        inputs=grounding_inputs,
        targets=boxes,
        auto=ZERO_SHOT,
        fast=True,
    ),
    "mm_grounding_dino": Head(
        "MMGroundingDinoForObjectDetection",
        GROUNDING_DINO,
        LAST_THREE,
        inputs=grounding_inputs,
        targets=boxes,
        auto=ZERO_SHOT,
    ),
    "rt_detr": Head("RTDetrForObjectDetection", RT_DETR, LAST_THREE, targets=boxes, auto=DETECTION, fast=True),
    "rt_detr_v2": Head("RTDetrV2ForObjectDetection", RT_DETR, LAST_THREE, targets=boxes, auto=DETECTION),
    "d_fine": Head("DFineForObjectDetection", RT_DETR, LAST_THREE, targets=boxes, auto=DETECTION, fast=True),
    "deimv2": Head("Deimv2ForObjectDetection", RT_DETR, LAST_THREE, targets=boxes, auto=DETECTION),
    "omdet_turbo": Head("OmDetTurboForObjectDetection", OMDET, LAST_THREE, inputs=omdet_inputs, auto=ZERO_SHOT),
    "pp_doclayout_v2": Head("PPDocLayoutV2ForObjectDetection", {}, LAST_THREE, auto=DETECTION, wrap=doclayout_v2),
    "pp_doclayout_v3": Head(
        "PPDocLayoutV3ForObjectDetection",
        {**RT_DETR, "x4_feat_dim": CHANNELS[0], "mask_feature_channels": [16, 16]},
        auto=DETECTION,
    ),
    "pp_doclayout_v4": Head(
        "PPDocLayoutV4ForObjectDetection", {**RT_DETR, "hidden_size": 32}, LAST_THREE, auto=DETECTION
    ),
    "pp_ocrv5_mobile_det": Head(
        "PPOCRV5MobileDetForObjectDetection",
        {"layer_list_out_channels": [8, 8, 8, 8], "neck_out_channels": 16},
        auto=DETECTION,
        fast=True,
    ),
    "pp_ocrv6_small_det": Head(
        "PPOCRV6SmallDetForObjectDetection",
        {"layer_list_out_channels": CHANNELS, "neck_out_channels": 16},
        auto=DETECTION,
    ),
    "pp_ocrv5_server_det": Head(
        "PPOCRV5ServerDetForObjectDetection",
        PP_OCR_SERVER,
        backbone_fields={"stage_out_channels": CHANNELS},
        auto=DETECTION,
    ),
    "pp_ocrv6_medium_det": Head(
        "PPOCRV6MediumDetForObjectDetection",
        PP_OCR_SERVER,
        backbone_fields={"stage_out_channels": CHANNELS},
        auto=DETECTION,
    ),
    "slanet": Head(
        "SLANetForTableRecognition",
        {"post_conv_out_channels": 16, "hidden_size": 16, "max_text_length": 8},
        LAST_THREE,
        auto=("AutoModelForTableRecognition",),
    ),
    "maskformer": Head(
        "MaskFormerForInstanceSegmentation",
        {},
        targets=segments,
        auto=("AutoModelForInstanceSegmentation",),
        wrap=maskformer,
        fast=True,
    ),
    "mask2former": Head(
        "Mask2FormerForUniversalSegmentation", MASK2FORMER, targets=segments, auto=UNIVERSAL, fast=True
    ),
    "oneformer": Head(
        "OneFormerForUniversalSegmentation", ONEFORMER, inputs=oneformer_inputs, targets=segments, auto=UNIVERSAL
    ),
    "upernet": Head(
        "UperNetForSemanticSegmentation",
        {"hidden_size": 16, "auxiliary_in_channels": CHANNELS[2], "auxiliary_channels": 8, "num_labels": 4},
        targets=semantic_map,
        auto=SEMANTIC,
        fast=True,
    ),
    "dpt_hybrid": Head(
        "DPTForSemanticSegmentation",
        DPT,
        ALL_STAGES[:3],
        inputs=lambda: images(64, 64),
        targets=lambda: semantic_map(64, 64),
        auto=SEMANTIC,
    ),
    "dpt_hybrid_depth": Head(
        "DPTForDepthEstimation", DPT, ALL_STAGES[:3], inputs=lambda: images(64, 64), auto=DEPTH, fast=True
    ),
    "vitmatte": Head(
        "VitMatteForImageMatting",
        {
            "hidden_size": CHANNELS[2],
            "convstream_hidden_sizes": [8, 8, 8],
            "fusion_hidden_sizes": [8, 8, 8, 8],
        },
        ("stage3",),
        backbone_fields={"num_channels": 4},
        inputs=lambda: {"pixel_values": torch.rand(BATCH, 4, HEIGHT, WIDTH)},
        fast=True,
    ),
    "tvp": Head("TvpForVideoGrounding", TVP, ("stage4",), inputs=tvp_inputs, targets=tvp_labels, fast=True),
    "tvp_two_videos": Head(
        "TvpForVideoGrounding",
        TVP,
        ("stage4",),
        inputs=lambda: tvp_inputs(2),
        targets=lambda: tvp_labels(2),
        broken=dict.fromkeys(CHECKS, "views one set of column embeddings as if each video had its own"),
    ),
}


# Heads that need an attribute of the backbone which InternImage and ConvNextV2 lack: by the configuration's class, the model
# for the test, fields of the configuration, and the reason.
NECK = {"neck_hidden_sizes": CHANNELS, "fusion_hidden_size": 16}
SAM_NECK = {"backbone_channel_list": CHANNELS[::-1], "fpn_hidden_size": 16, "fpn_top_down_levels": [2, 3]}
REFUSING: dict[str, tuple[str, dict, str]] = {
    "CHMv2Config": (
        "CHMv2ForDepthEstimation",
        {"reassemble_factors": [4, 2, 1, 0.5], "post_process_channels": [8, 8, 8, 8]},
        "reads a vision transformer's `hidden_size` and class tokens",
    ),
    "DepthAnythingConfig": ("DepthAnythingForDepthEstimation", NECK, "takes tokens of a vision transformer, not maps"),
    "EdgeTamVisionConfig": ("EdgeTamVisionModel", SAM_NECK, "takes timm's RepViT: a list of channels-last maps"),
    "LwDetrConfig": ("LwDetrForObjectDetection", {}, "builds its own vision transformer from the configuration"),
    "PPOCRV5MobileRecConfig": ("PPOCRV5MobileRecForTextRecognition", {}, "reads PP-LCNet's `block_configs`"),
    "PPOCRV5ServerRecConfig": (
        "PPOCRV5ServerRecForTextRecognition",
        {},
        "reads HGNet's `stage_out_channels`, and pools maps of 3 pixels' height, which a text line at stride 32 has not",
    ),
    "PPOCRV6SmallRecConfig": ("PPOCRV6SmallRecForTextRecognition", {}, "reads PP-LCNet's `block_configs`"),
    "PPOCRV6TinyRecConfig": ("PPOCRV6TinyRecForTextRecognition", {}, "reads PP-LCNet's `block_configs`"),
    "PromptDepthAnythingConfig": (
        "PromptDepthAnythingForDepthEstimation",
        NECK,
        "takes tokens of a vision transformer, not maps",
    ),
    "RfDetrConfig": ("RfDetrForObjectDetection", {}, "builds its own vision transformer from the configuration"),
    "Sam2VisionConfig": ("Sam2VisionModel", SAM_NECK, "reads Hiera's `intermediate_hidden_states`"),
    "Sam3VisionConfig": ("Sam3VisionModel", {}, "reads a vision transformer's `hidden_size` and `patch_size`"),
    "Tipsv2DptConfig": ("Tipsv2DptForDepthEstimation", NECK, "reads a vision transformer's `num_register_tokens`"),
    "UVDocConfig": ("UVDocModel", {}, "builds its own backbone from the configuration"),
    "VitPoseConfig": ("VitPoseForPoseEstimation", {}, "reads a vision transformer's `hidden_size` and `patch_size`"),
    "ZoeDepthConfig": ("ZoeDepthForDepthEstimation", NECK, "reads a vision transformer's `hidden_size`, takes tokens"),
}
# No model builds a backbone from these: they are parts of other heads' configurations.
UNUSED = {"MaskFormerDetrConfig": "MaskFormer's decoder: DETR's configuration, of which it builds the decoder alone"}


def config_classes() -> dict[str, type[PreTrainedConfig]]:
    """The configurations in the installed transformers with a field `backbone_config`, by name."""
    found = {}
    models = transformers.models
    for package in pkgutil.iter_modules(models.__path__):
        for module in pkgutil.iter_modules([f"{models.__path__[0]}/{package.name}"]):
            if not module.name.startswith("configuration_"):
                continue
            name = f"{models.__name__}.{package.name}.{module.name}"
            for value in vars(importlib.import_module(name)).values():
                if (
                    isinstance(value, type)
                    and issubclass(value, PreTrainedConfig)
                    and value.__module__ == name
                    and "backbone_config" in value.__dataclass_fields__
                ):
                    found[value.__name__] = value
    return found


def build(head: Head, backbone: Callable = internimage) -> tuple[PreTrainedModel, BackboneMixin]:
    """Returns a head with weights unlike any initialisation, and its backbone."""
    if not hasattr(transformers, head.model):
        pytest.skip(f"transformers {transformers.__version__} has no {head.model}")
    torch.manual_seed(0)
    model = head.build(backbone)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.isfinite().all():
                tensor.add_(torch.rand_like(tensor), alpha=0.05)  # not below zero: some are variances
    backbones = [module for module in model.modules() if isinstance(module, BackboneMixin)]
    assert len(backbones) == 1
    return model, backbones[0]


def tensors(output, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor in a model's output with its path."""
    if isinstance(output, torch.Tensor):
        yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from tensors(value, f"{name}.{key}")
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from tensors(value, f"{name}[{i}]")


def check_forward(model: PreTrainedModel, head: Head) -> dict[str, torch.Tensor]:
    """Returns the outputs for fixed inputs; checks that none is NaN and that they depend on the images."""
    torch.manual_seed(1)
    inputs = head.inputs()
    with torch.no_grad():
        outputs = dict(tensors(model.eval()(**inputs)))
        others = dict(tensors(model(**{**inputs, "pixel_values": 1 - inputs["pixel_values"]})))
    assert outputs
    assert all(not t.isnan().any() for t in outputs.values()), [k for k, t in outputs.items() if t.isnan().any()]
    assert any(not torch.equal(t, others[name]) for name, t in outputs.items()), "the images make no difference"
    return outputs


def parameters_in_front(backbone: BackboneMixin, pixel_values: torch.Tensor) -> set[str]:
    """Returns the names of the backbone's parameters that its maps depend on."""
    total = sum(feature_map.sum() for feature_map in backbone(pixel_values).feature_maps)
    names, parameters = zip(*backbone.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def check_training_step(model: PreTrainedModel, backbone: BackboneMixin, head: Head) -> None:
    torch.manual_seed(2)
    model.train()
    inputs = head.inputs()
    # Adam's first step moves by the gradient's sign; eps keeps that true for tiny gradients
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, eps=1e-30)
    if head.targets is not None:
        loss = model(**inputs, **head.targets()).loss
    else:
        # random weights: a plain sum over a softmax or a norm would be constant
        outputs = [t for _, t in tensors(model(**inputs)) if t.requires_grad]
        loss = sum((t * torch.randn_like(t)).mean() for t in outputs)
    assert loss.isfinite()
    loss.backward()

    frames = inputs["pixel_values"].flatten(0, -4)
    in_front = parameters_in_front(backbone, frames)
    if "stage4" in head.stages:
        assert in_front == {name for name, _ in backbone.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters() if name in in_front}
    assert not [name for name, gradient in gradients.items() if gradient is None], "parameters without a gradient"
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()], "infinite gradients"
    assert not [name for name, gradient in gradients.items() if not gradient.any()], "gradients that are zero"

    before = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    optimizer.step()
    assert {n for n, parameter in backbone.named_parameters() if not torch.equal(parameter, before[n])} == in_front
    check_forward(model, head)


def check_files(model: PreTrainedModel, head: Head, folder) -> None:
    expected = check_forward(model, head)
    model.save_pretrained(folder)
    for loader in (type(model), *(getattr(transformers, name, None) for name in head.auto)):
        if loader is None:
            continue  # the installed transformers lacks this Auto class
        again, info = loader.from_pretrained(folder, output_loading_info=True)
        assert type(again) is type(model)
        assert not any(info.values()), info
        # the report omits names that a class declares as ignorable
        state, original = again.state_dict(), model.state_dict()
        assert state.keys() == original.keys()
        assert not [name for name, tensor in original.items() if not torch.equal(tensor, state[name])]
        outputs = check_forward(again, head)
        assert outputs.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(outputs[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def with_control(head: Head, check: str, run: Callable[[Callable], None]) -> None:
    """Runs a check with InternImage. A check marked as broken in transformers must fail alike with ConvNextV2."""
    if check not in head.broken:
        run(internimage)
        return
    errors = []
    for backbone in (internimage, convnextv2):
        with pytest.raises(RuntimeError) as caught:
            run(backbone)
        errors.append(caught)
    assert errors[0].traceback[-1].path == errors[1].traceback[-1].path
    assert errors[0].traceback[-1].lineno == errors[1].traceback[-1].lineno
    pytest.xfail(f"transformers, with ConvNextV2 too: {head.broken[check]}")


CASES = [pytest.param(name, marks=() if head.fast else pytest.mark.slow) for name, head in HEADS.items()]


@pytest.mark.parametrize("name", CASES)
def test_head_runs_forward_and_training_step(name):
    head = HEADS[name]
    with_control(head, "training", lambda backbone: check_training_step(*build(head, backbone), head))


@pytest.mark.parametrize("name", CASES)
def test_head_saves_and_loads(name, tmp_path):
    head = HEADS[name]
    with_control(
        head, "files", lambda backbone: check_files(build(head, backbone)[0], head, tmp_path / backbone.__name__)
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", TINY_VARIANTS)
@pytest.mark.parametrize("name", ["rt_detr", "deformable_detr", "mask2former"])
def test_head_works_with_every_kind_of_backbone(name, variant, tmp_path):
    """Every switch of the architecture; RT-DETR also freezes the backbone's BatchNorm layers."""
    head = HEADS[name]

    def backbone(stages, **fields):
        return InternImageConfig(**{**TINY, **TINY_VARIANTS[variant], "out_features": list(stages), **fields})

    model, module = build(head, backbone)
    assert isinstance(module, InternImageBackbone)
    check_files(model, head, tmp_path)
    check_training_step(model, module, head)


@pytest.mark.parametrize("name", REFUSING)
def test_heads_for_other_backbones_refuse_as_with_convnextv2(name):
    """Heads that need more than feature maps fail alike with InternImage and ConvNextV2."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model, fields, _ = REFUSING[name]
    errors = []
    for backbone in (internimage, convnextv2):
        with pytest.raises((AttributeError, ValueError, RuntimeError, TypeError)) as caught:
            config = getattr(transformers, name)(backbone_config=backbone(ALL_STAGES), **fields)
            getattr(transformers, model)(config)(**images())
        errors.append(caught)
    assert errors[0].type is errors[1].type
    assert errors[0].traceback[-1].lineno == errors[1].traceback[-1].lineno


def test_docs_count_the_heads_that_are_tested():
    (number,) = re.findall(
        r"`tests/test_heads.py` has a working configuration for (\d+)",
        (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8"),
    )
    assert int(number) == len({head.model for head in HEADS.values()})


def test_every_head_of_transformers_is_in_a_table():
    """Heads of a new transformers version must be added to one of the tables above."""
    known = {head.config_name for head in HEADS.values()} | REFUSING.keys() | UNUSED.keys()
    unknown = config_classes().keys() - known
    assert not unknown, f"transformers {transformers.__version__} has heads that no test here knows: {sorted(unknown)}"
