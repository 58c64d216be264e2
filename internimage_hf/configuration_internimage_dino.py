# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Configuration of DINO (https://arxiv.org/abs/2203.03605) as the authors of InternImage configure it."""

from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from .configuration_backbone import backbone_config_from
from .configuration_base import InternImageBaseConfig, is_int, is_number
from .configuration_internimage import InternImageConfig


class InternImageDinoConfig(InternImageBaseConfig):
    r"""
    Configuration of an [`InternImageDinoForObjectDetection`]. The defaults are the released DINO with InternImage-T.

    Args:
        backbone_config (configuration or `dict`, *optional*): A backbone of any type that AutoBackbone knows, with its
            `out_features`; `None` for InternImage-T with layer scale and the stages 2, 3 and 4.
        num_queries (`int`, defaults to 900): Proposals taken from the encoder, and boxes per image.
        d_model (`int`, defaults to 256): Width of encoder and decoder; a multiple of 4, of the heads and of
            `neck_groups`.
        encoder_layers, decoder_layers (`int`, defaults to 6): Layers.
        encoder_ffn_dim, decoder_ffn_dim (`int`, defaults to 2048): Hidden width of the feed-forward networks.
        encoder_attention_heads, decoder_attention_heads (`int`, defaults to 8): Heads.
        encoder_n_points, decoder_n_points (`int`, defaults to 4): Sampled points per head and level.
        num_feature_levels (`int`, defaults to 4): Maps that the encoder sees; those beyond the backbone's are made by 3x3
            convolutions of stride 2, the first from the backbone's last map.
        neck_groups (`int`, defaults to 32): Groups of the GroupNorm behind each of the neck's convolutions.
        positional_embedding_temperature (`float`, defaults to 20): Of the sine encoding of the maps; that of the queries
            has 10000.
        activation_function (`str`, defaults to `"relu"`): Of the feed-forward networks.
        dropout, attention_dropout, activation_dropout (`float`, defaults to 0): As in transformers' Deformable DETR.
        num_denoising (`int`, defaults to 100): Denoising queries in training, about that many per image, twice with the
            negatives; 0 for training without. The released H, G and CB models were trained with 1000.
        label_noise_ratio (`float`, defaults to 0.5): Half of it is the probability that a denoising query's label is
            drawn anew.
        box_noise_scale (`float`, defaults to 1.0): How far the corners of denoising boxes move, in half sizes of the box.
        class_cost, bbox_cost, giou_cost (`float`, defaults to 2, 5, 2): Of the matching.
        class_loss_coefficient, bbox_loss_coefficient, giou_loss_coefficient (`float`, defaults to 1, 5, 2): Of the loss.
        focal_alpha (`float`, defaults to 0.25): Of the focal loss; its gamma is 2.
        auxiliary_loss (`bool`, defaults to `True`): Whether each decoder layer has a loss of its own.
        disable_custom_kernels (`bool`, defaults to `False`): As in transformers' Deformable DETR.

    Raises:
        ValueError: if a field has a value that no model can be built from; the message names field and value.
    """

    model_type = "internimage_dino"
    sub_configs = {"backbone_config": AutoConfig}
    attribute_map = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"}

    backbone_config: dict | PreTrainedConfig | None = None
    num_queries: int = 900
    d_model: int = 256
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    encoder_n_points: int = 4
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    decoder_n_points: int = 4
    num_feature_levels: int = 4
    neck_groups: int = 32
    positional_embedding_temperature: float = 20
    activation_function: str = "relu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    num_denoising: int = 100
    label_noise_ratio: float = 0.5
    box_noise_scale: float = 1.0
    class_cost: float = 2
    bbox_cost: float = 5
    giou_cost: float = 2
    class_loss_coefficient: float = 1
    bbox_loss_coefficient: float = 5
    giou_loss_coefficient: float = 2
    focal_alpha: float = 0.25
    auxiliary_loss: bool = True
    disable_custom_kernels: bool = False
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = InternImageConfig(
                layer_scale_init_value=1.0, out_features=["stage2", "stage3", "stage4"]
            )
        self.backbone_config = backbone_config_from(self.backbone_config)
        self._validate()
        super().__post_init__(**kwargs)

    def _validate(self) -> None:
        require = self._require
        for name in (
            "num_queries", "d_model", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads", "encoder_n_points",
            "decoder_layers", "decoder_ffn_dim", "decoder_attention_heads", "decoder_n_points", "num_feature_levels",
            "neck_groups",
        ):  # fmt: skip
            require(is_int(getattr(self, name), 1), name, "a positive integer")
        divisors = {name: getattr(self, name) for name in ("encoder_attention_heads", "decoder_attention_heads")}
        for name, divisor in {**divisors, "neck_groups": self.neck_groups, "4, for sines of two axes": 4}.items():
            if self.d_model % divisor:
                named = f"`{name}` ({divisor})" if name.isidentifier() else name
                raise ValueError(f"`d_model` must be a multiple of {named}, got {self.d_model}")
        require(is_int(self.num_denoising, 0), "num_denoising", "an integer of at least 0")
        require(
            is_number(self.positional_embedding_temperature) and self.positional_embedding_temperature > 0,
            "positional_embedding_temperature",
            "a positive number",
        )
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            require(is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
        require(
            is_number(self.label_noise_ratio) and 0 <= self.label_noise_ratio <= 2,
            "label_noise_ratio",
            "a number in [0, 2]",
        )
        for name in (
            "box_noise_scale", "class_cost", "bbox_cost", "giou_cost", "class_loss_coefficient", "bbox_loss_coefficient",
            "giou_loss_coefficient",
        ):  # fmt: skip
            require(is_number(getattr(self, name)) and getattr(self, name) >= 0, name, "a number of at least 0")
        if self.class_cost == self.bbox_cost == self.giou_cost == 0:
            raise ValueError("one of `class_cost`, `bbox_cost` and `giou_cost` must be above 0, got 0 for all")
        require(is_number(self.focal_alpha) and 0 <= self.focal_alpha <= 1, "focal_alpha", "a number in [0, 1]")
        require(
            isinstance(self.activation_function, str) and self.activation_function in ACT2FN,
            "activation_function",
            "the name of an activation in transformers, such as 'relu'",
        )
        maps = len(getattr(self.backbone_config, "out_features", None) or [None])
        if maps > self.num_feature_levels:
            raise ValueError(
                f"`num_feature_levels` must be at least the number of the backbone's maps ({maps}, of "
                f"`backbone_config.out_features`), got {self.num_feature_levels}"
            )


__all__ = ["InternImageDinoConfig"]
