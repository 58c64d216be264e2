# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Configuration of InternImage (DCNv3) and of FlashInternImage (DCNv4): fields, validation, released architectures.

Papers: https://arxiv.org/abs/2211.05778 (InternImage, CVPR 2023), https://arxiv.org/abs/2401.06197 (DCNv4, CVPR 2024).
Fields that only InternImage has carry the paper's names; fields that every vision model has carry transformers' names.
`checkpoint.translate_config` also accepts the names of the official code and of the repositories on the Hub.
"""

import math
from typing import Any

from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .checkpoint import is_official_config, translate_config
from .configuration_base import InternImageBaseConfig, is_int, is_number


# The released architectures: `classification/configs/*.yaml` of OpenGVLab/InternImage and, for `flash_*`, of
# OpenGVLab/DCNv4. `image_size` is that of the released ImageNet-1k checkpoint.
VARIANTS: dict[str, dict[str, Any]] = {
    "t": {"channels": 64, "depths": [4, 4, 18, 4], "groups": [4, 8, 16, 32], "image_size": 224},
    "s": {
        "channels": 80,
        "depths": [4, 4, 21, 4],
        "groups": [5, 10, 20, 40],
        "layer_scale_init_value": 1e-5,
        "post_norm": True,
        "image_size": 224,
    },
    "b": {
        "channels": 112,
        "depths": [4, 4, 21, 4],
        "groups": [7, 14, 28, 56],
        "layer_scale_init_value": 1e-5,
        "post_norm": True,
        "image_size": 224,
    },
    "l": {
        "channels": 160,
        "depths": [5, 5, 22, 5],
        "groups": [10, 20, 40, 80],
        "layer_scale_init_value": 1e-5,
        "offset_scale": 2.0,
        "post_norm": True,
        "image_size": 384,
    },
    "xl": {
        "channels": 192,
        "depths": [5, 5, 24, 5],
        "groups": [12, 24, 48, 96],
        "layer_scale_init_value": 1e-5,
        "offset_scale": 2.0,
        "post_norm": True,
        "image_size": 384,
    },
    "h": {
        "channels": 320,
        "depths": [6, 6, 32, 6],
        "groups": [10, 20, 40, 80],
        "dw_kernel_size": 5,
        "res_post_norm": True,
        "level2_post_norm_block_ids": [5, 11, 17, 23, 29],
        "center_feature_scale": True,
        "use_clip_projector": True,
        "image_size": 640,
    },
    "g": {
        "channels": 512,
        "depths": [2, 2, 48, 4],
        "groups": [16, 32, 64, 128],
        "dw_kernel_size": 5,
        "post_norm": True,
        "level2_post_norm_block_ids": [5, 11, 17, 23, 29, 35, 41, 47],
        "center_feature_scale": True,
        "use_clip_projector": True,
        "image_size": 512,
    },
}
VARIANTS |= {
    "flash_t": {**VARIANTS["t"], "dcn_version": 4},
    "flash_s": {**VARIANTS["s"], "dcn_version": 4, "dw_kernel_size": 3},
    "flash_b": {**VARIANTS["b"], "dcn_version": 4, "dw_kernel_size": 3, "offset_scale": 0.5},
    "flash_l": {
        **VARIANTS["l"],
        "dcn_version": 4,
        "dw_kernel_size": 3,
        "dcn_output_bias": True,
        "mlp_fc2_bias": True,
    },
}


class InternImageConfig(BackboneConfigMixin, InternImageBaseConfig):
    r"""
    Configuration of an [`InternImageModel`]. The defaults are InternImage-T.

    Args:
        num_channels (`int`, defaults to 3): Channels of the input image.
        image_size (`int` or pair, defaults to 224): Size the checkpoint was trained for; the model takes any size.
        channels (`int`, defaults to 64): Width of stage 1 (C1 in the paper); every stage doubles it. Even.
        depths (`list[int]`, defaults to `[4, 4, 18, 4]`): Layers per stage (L1..L4).
        groups (`list[int]`, defaults to `[4, 8, 16, 32]`): Groups of the deformable convolution per stage (G1..G4).
        mlp_ratio (`float`, defaults to 4.0): Hidden width of the feed-forward network over the stage's width.
        hidden_act (`str`, defaults to `"gelu"`): Activation; the official models use `"gelu"`, `"relu"` or `"silu"`.
        norm_layer (`"LN"` or `"BN"`): Norm of the stem, the downsample layers, DCNv3's depth-wise branch and the CLIP
            projector. Norms inside layers and at stage ends are always LayerNorm.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every LayerNorm.
        batch_norm_eps (`float`, defaults to 1e-5): Epsilon of every BatchNorm.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout after the stem and in the feed-forward networks.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth rate (of the last layer if linear).
        drop_path_type (`"linear"` or `"uniform"`): How the rate grows over the layers.
        layer_scale_init_value (`float`, *optional*): Initial layer scale; `None` for no layer scale.
        dcn_version (`3` or `4`, defaults to 3): 3 for DCNv3 (InternImage), 4 for DCNv4 (FlashInternImage).
        dcn_output_bias (`bool`, *optional*): Bias of the deformable convolution's output projection. `None` means True
            for DCNv3 and False for DCNv4.
        mlp_fc2_bias (`bool`, *optional*): Bias of the feed-forward networks' second layer. `None` means True for DCNv3
            and False for DCNv4.
        offset_scale (`float`, defaults to 1.0): Factor of the sampling grid and of the learned sampling offsets.
        dw_kernel_size (`int`, *optional*): Kernel size of the depth-wise convolution before the sampling offsets, odd.
            `None` means 3 for DCNv3 and no depth-wise convolution for DCNv4.
        post_norm (`bool`): Norm after each branch instead of before it. Wins over `res_post_norm`.
        res_post_norm (`bool`): A second norm after each branch (InternImage-H). No effect with layer scale.
        level2_post_norm_block_ids (`list[int]`, *optional*): Layers of the third stage that a further norm follows.
        center_feature_scale (`bool`): Blend each group with its projected input by a learned gate (H and G). DCNv3 only.
        remove_center (`bool`): Leave the centre point out of the sampling grid. DCNv3 only.
        use_clip_projector (`bool`): The attention-pool head of H and G instead of convolution and average pool.
        cls_scale (`float`, defaults to 1.5): Width of the ordinary head's convolution over that of stage 4.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the linear layers' initial weights.
        out_features (`list[str]`, *optional*): Stages an [`InternImageBackbone`] returns: `"stem"`, `"stage1"`, ...
        out_indices (`list[int]`, *optional*): The same by position, the stem being 0.

    A configuration with 1000 labels and no `id2label` gets the label names of ImageNet-1k.

    Raises:
        ValueError: if no model can be built from the value of a field. The message names the field and the value.
    """

    model_type = "internimage"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    channels: int = 64
    depths: list[int] | tuple[int, ...] = (4, 4, 18, 4)
    groups: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    mlp_ratio: float = 4.0
    hidden_act: str = "gelu"
    norm_layer: str = "LN"
    layer_norm_eps: float = 1e-6
    batch_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    drop_path_type: str = "linear"
    layer_scale_init_value: float | None = None
    dcn_version: int = 3
    dcn_output_bias: bool | None = None
    mlp_fc2_bias: bool | None = None
    offset_scale: float = 1.0
    dw_kernel_size: int | None = None
    post_norm: bool = False
    res_post_norm: bool = False
    level2_post_norm_block_ids: list[int] | tuple[int, ...] | None = None
    center_feature_scale: bool = False
    remove_center: bool = False
    use_clip_projector: bool = False
    cls_scale: float = 1.5
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        if is_official_config(kwargs):
            translated = translate_config(kwargs)
            kwargs = {}
            for name, value in translated.items():
                if name in type(self).__dataclass_fields__:
                    setattr(self, name, value)
                else:
                    kwargs[name] = value

        for name in ("depths", "groups", "level2_post_norm_block_ids", "image_size"):
            if isinstance(getattr(self, name), (tuple, list)):
                setattr(self, name, list(getattr(self, name)))
        for name in ("dcn_output_bias", "mlp_fc2_bias"):
            if getattr(self, name) is None:
                setattr(self, name, self.dcn_version != 4)
        self._validate()

        # config.json has the derived fields for other readers; they are recomputed here, so their values are dropped.
        for derived in ("hidden_sizes", "stage_names", "num_stages"):
            kwargs.pop(derived, None)
        self.hidden_sizes = [self.channels * 2**i for i in range(len(self.depths))]
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, len(self.depths) + 1)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )

        unnamed = self.id2label is None
        super().__post_init__(**kwargs)
        if unnamed and self.num_labels == 1000:
            from .imagenet_labels import IMAGENET_1K_LABELS

            self.id2label = dict(enumerate(IMAGENET_1K_LABELS))
            self.label2id = {name: index for index, name in self.id2label.items()}

    def _validate(self) -> None:
        require = self._require
        require(is_int(self.num_channels, 1), "num_channels", "a positive integer")
        sizes = self.image_size if isinstance(self.image_size, list) else [self.image_size] * 2
        require(len(sizes) == 2 and all(is_int(s, 1) for s in sizes), "image_size", "a positive integer or a pair")
        require(is_int(self.channels, 2) and self.channels % 2 == 0, "channels", "a positive even integer")
        for name in ("depths", "groups"):
            values = getattr(self, name)
            require(
                isinstance(values, list) and len(values) == 4 and all(is_int(v, 1) for v in values),
                name,
                "four positive integers, one per stage",
            )
        for stage, groups in enumerate(self.groups):
            width = self.channels * 2**stage
            if width % groups:
                raise ValueError(
                    f"`groups[{stage}]` must divide the {width} channels of stage {stage + 1} "
                    f"(`channels` {self.channels}), got {groups}"
                )
        for name in ("mlp_ratio", "cls_scale"):
            require(is_number(getattr(self, name)) and getattr(self, name) > 0, name, "a positive number")
        require(int(self.channels * self.mlp_ratio) >= 1, "mlp_ratio", "large enough to give one hidden channel")
        for name in ("layer_norm_eps", "batch_norm_eps"):
            require(is_number(getattr(self, name)) and getattr(self, name) > 0, name, "a positive number")
        require(is_number(self.initializer_range) and self.initializer_range >= 0, "initializer_range", "at least 0")
        for name in ("hidden_dropout_prob", "drop_path_rate"):
            require(is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
        require(self.norm_layer in ("LN", "BN"), "norm_layer", '"LN" or "BN"')
        require(self.drop_path_type in ("linear", "uniform"), "drop_path_type", '"linear" or "uniform"')
        require(
            isinstance(self.hidden_act, str) and self.hidden_act in ACT2FN,
            "hidden_act",
            "the name of an activation in transformers, such as 'gelu'",
        )
        require(
            self.layer_scale_init_value is None or is_number(self.layer_scale_init_value),
            "layer_scale_init_value",
            "a number, or None for no layer scale",
        )
        require(is_number(self.offset_scale), "offset_scale", "a finite number")
        require(
            self.dw_kernel_size is None or (is_int(self.dw_kernel_size, 1) and self.dw_kernel_size % 2 == 1),
            "dw_kernel_size",
            "an odd positive integer, or None for the default of `dcn_version`",
        )
        for name in (
            *("post_norm", "res_post_norm", "center_feature_scale", "remove_center", "use_clip_projector"),
            *("dcn_output_bias", "mlp_fc2_bias"),
        ):
            require(isinstance(getattr(self, name), (bool, int)), name, "a bool")
            setattr(self, name, bool(getattr(self, name)))
        require(is_int(self.dcn_version, 3) and self.dcn_version <= 4, "dcn_version", "3 or 4")
        if self.dcn_version == 4:
            require(
                not self.remove_center, "remove_center", "False with `dcn_version` 4, which keeps the centre point"
            )
            require(
                not self.center_feature_scale, "center_feature_scale", "False with `dcn_version` 4, which has no gate"
            )
        ids = self.level2_post_norm_block_ids
        if ids is not None:
            require(
                isinstance(ids, list)
                and all(is_int(i, 0) and i < self.depths[2] for i in ids)
                and len(set(ids)) == len(ids),
                "level2_post_norm_block_ids",
                f"a list of different layers of the third stage, 0 to {self.depths[2] - 1}, or None",
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers. The field names may be our own, those of the official code, or those on the Hub."""
        return super().from_dict(translate_config(config_dict), **kwargs)

    @classmethod
    def from_variant(cls, variant: str, **kwargs) -> "InternImageConfig":
        """A released architecture, with 1000 labels unless `num_labels` or `id2label` is given.

        Args:
            variant: InternImage: `"t"`, `"s"`, `"b"`, `"l"`, `"xl"` (Table 1 of the paper), `"h"`, `"g"`.
                FlashInternImage: `"flash_t"`, `"flash_s"`, `"flash_b"`, `"flash_l"`.
            **kwargs: fields that differ.

        Raises:
            ValueError: if there is no such variant.
        """
        if not isinstance(variant, str) or variant.lower() not in VARIANTS:
            raise ValueError(f"`variant` must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
        fields = {**VARIANTS[variant.lower()], **kwargs}
        if not {"num_labels", "num_classes", "id2label"} & kwargs.keys():
            fields["num_labels"] = 1000
        return cls(**fields)

    @classmethod
    def from_stacking_rules(
        cls, channels: int = 64, group_channels: int = 16, depth: int = 4, depth_stage3: int = 18, **kwargs
    ) -> "InternImageConfig":
        """The configuration given by the paper's four free hyper-parameters (section 3.2, stacking rules).

        The rules: C_i = 2^(i-1) C_1; G_i = C_i / C'; L_1 = L_2 = L_4; L_1 <= L_3.

        Args:
            channels: C_1, width of stage 1.
            group_channels: C', channels of one group, the same in every stage. Divides `channels`.
            depth: L_1, layers of stages 1, 2 and 4.
            depth_stage3: L_3, layers of stage 3, at least `depth`.

        Raises:
            ValueError: if the values contradict a rule.
        """
        for name, value in {
            "channels": channels,
            "group_channels": group_channels,
            "depth": depth,
            "depth_stage3": depth_stage3,
        }.items():
            if not is_int(value, 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}")
        if channels % group_channels:
            raise ValueError(f"`group_channels` must divide `channels` ({channels}), got {group_channels}")
        if depth_stage3 < depth:
            raise ValueError(f"`depth_stage3` must be at least `depth` ({depth}), got {depth_stage3}")
        return cls(
            channels=channels,
            depths=[depth, depth, depth_stage3, depth],
            groups=[channels * 2**stage // group_channels for stage in range(4)],
            **kwargs,
        )

    @classmethod
    def from_scaling_rules(
        cls,
        phi: float,
        channels: int = 64,
        group_channels: int = 16,
        depth: int = 4,
        depth_stage3: int = 18,
        alpha: float = 1.09,
        beta: float = 1.36,
        **kwargs,
    ) -> "InternImageConfig":
        """Scales an origin model to about 2**phi times its cost (section 3.2, scaling rules).

        Depth grows as alpha**phi and width as beta**phi; alpha * beta**1.99 is about 2. The origin is given by the
        stacking rules' hyper-parameters. Depths are rounded to the nearest integer and the width to the nearest
        multiple of 2 that `group_channels` divides, so the result obeys the stacking rules as well.

        Raises:
            ValueError: if `alpha` or `beta` is below 1, `phi` is not a finite number, or the origin breaks a rule.
        """
        for name, value, minimum in (("phi", phi, -math.inf), ("alpha", alpha, 1), ("beta", beta, 1)):
            if not is_number(value):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}")
            if value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value!r}")
        cls.from_stacking_rules(channels, group_channels, depth, depth_stage3)
        step = math.lcm(group_channels, 2)
        return cls.from_stacking_rules(
            channels=max(1, round(channels * beta**phi / step)) * step,
            group_channels=group_channels,
            depth=max(1, round(depth * alpha**phi)),
            depth_stage3=max(1, round(depth_stage3 * alpha**phi)),
            **kwargs,
        )


__all__ = ["InternImageConfig"]
