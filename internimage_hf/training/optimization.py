# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: a classifier, or any model with an InternImage backbone. Out: its parameters in groups for an optimiser.

The groups have learning rates by layer and a lower rate for offsets. Corresponds to `set_weight_decay_and_lr`
(classification/optimizer.py) and `lr_decay_keywords` (classification/models/intern_image.py) of OpenGVLab/InternImage. The
module also lists the modules for LoRA.
"""

import re

from torch import nn

from ..compatibility import whole_shape
from ..configuration_internimage import InternImageConfig
from ..modeling_internimage import InternImageBackbone, InternImageModel
from ..modeling_internimage_composite import InternImageCompositeBackbone


_OFFSETS = re.compile(r"layers\.\d+\.dcn\.(offset|mask|center_feature_scale_proj)\.")

# For `peft.LoraConfig(target_modules=...)`: the projections around DCNv3 and the feed-forward networks of all layers, in
# the classifier and in every model with an InternImage backbone. The projections to offsets and masks are left out: a
# low-rank update moves all sampling points of a layer together, and the official fine-tuning gives them a tenth of the rate.
LORA_TARGET_MODULES = r".*\.stages\.\d+\.layers\.\d+\.(dcn\.(input_proj|output_proj)|mlp\.(fc1|fc2))"

# For `peft.LoraConfig(modules_to_save=...)`: the classifier, and every norm that is a BatchNorm in some configuration.
# Training updates the running statistics of frozen BatchNorms too; an adapter without them gives other logits after loading.
# PEFT ignores names that a model lacks. Where such a norm is a LayerNorm, PEFT trains and saves it like the classifier.
LORA_MODULES_TO_SAVE = [
    "classifier",
    "pooler.norm",  # a BatchNorm in T to XL; in H and G the last norm of the CLIP head
    "attention.query_norm",
    "attention.key_norm",
    "attention.value_norm",
    "stem.norm1",
    "stem.norm2",
    "downsamples.0.norm",
    "downsamples.1.norm",
    "downsamples.2.norm",
    "dcn.dw_norm",
]


def layer_distances(model: nn.Module) -> dict[str, int]:
    """Counts the layers of the backbone after each of its parameters, by the parameter's name in `model`.

    The last layer of the last stage has 0, the first layer of the first stage `sum(depths) - 1`. The stem counts as the
    first layer, the norm and the downsampling at a stage's end as the first layer of the next stage, and a norm between
    layers (`post_norms`, missing in the official code) as the layer before it. The last stage's norm and the pooler have 0.
    Both encoders of a composite backbone are counted so; a connection counts as the first layer of the stage it leads to.
    Parameters of heads are not in the result; their distance is 0.

    Raises:
        ValueError: if the model contains no InternImage.
    """
    result = {}
    for prefix, module in model.named_modules():
        if isinstance(module, (InternImageModel, InternImageBackbone, InternImageCompositeBackbone)):
            for name, _ in module.named_parameters():
                distance = sum(module.config.depths) - 1 - _position(name, module.config)
                result[f"{prefix}.{name}" if prefix else name] = distance
    if not result:
        raise ValueError(f"`model` holds no InternImage, it is a {type(model).__name__}")
    return result


def _position(name: str, config: InternImageConfig) -> int:
    """Returns the index of the layer, counted over all stages, that a parameter of the backbone belongs to."""
    starts = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
    if name.startswith("stem."):
        return 0
    name = re.sub(r"^(assistant|lead)\.", "encoder.", name)
    if match := re.match(r"(?:connections|connection_scales)\.(\d+)", name):
        return starts[int(match[1])]
    if match := re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", name):
        return starts[int(match[1])] + int(match[2])
    if match := re.match(r"encoder\.stages\.(\d+)\.post_norms\.(\d+)\.", name):
        return starts[int(match[1])] + config.level2_post_norm_block_ids[int(match[2])]
    match = re.match(r"encoder\.(?:stages\.(?=\d+\.norm\.)|downsamples\.)(\d+)\.", name)
    if match and int(match[1]) + 1 < len(starts):
        return starts[int(match[1]) + 1]
    return sum(config.depths) - 1


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.05,
    *,
    layer_decay: float = 1.0,
    offset_lr_multiplier: float = 0.1,
) -> list[dict]:
    """Returns parameter groups for any optimiser of `torch.optim`.

    Args:
        model: a classifier, a backbone, or any model with an InternImage backbone. Frozen parameters are left out.
        learning_rate: of the head and the last layer.
        weight_decay: of matrices and convolutions. Norms, biases and layer scales get none.
        layer_decay: factor of the learning rate from each layer to the previous one (0.9 in the official 22k-to-1k
            fine-tuning of L to G).
        offset_lr_multiplier: factor for the projections to sampling offsets, modulation masks and centre feature scale
            (`DCN_LR_MUL`, 0.1 in the official fine-tuning).

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and `name`, one per distinct combination.

    Raises:
        ValueError: if a number is out of range, or the model holds no InternImage.
    """
    for name, value in (
        ("learning_rate", learning_rate),
        ("layer_decay", layer_decay),
        ("offset_lr_multiplier", offset_lr_multiplier),
        ("weight_decay", weight_decay),
    ):
        if not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` must be a number of at least 0, got {value!r}")
    distances = layer_distances(model)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        distance = distances.get(name, 0)
        is_offset = name in distances and _OFFSETS.search(name) is not None
        decays = len(whole_shape(parameter)) > 1
        key = (distance, is_offset, decays)
        if key not in groups:
            rate = learning_rate * layer_decay**distance * (offset_lr_multiplier if is_offset else 1.0)
            groups[key] = {
                "params": [],
                "lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{distance} layers before the last{', offsets' if is_offset else ''}"
                f"{'' if decays else ', no weight decay'}",
            }
        groups[key]["params"].append(parameter)
    return list(groups.values())
