# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Learning rates by layer, slower offsets, and what LoRA adapts: the parameters of a model, by name, in groups.

After `set_weight_decay_and_lr` (classification/optimizer.py) and `lr_decay_keywords` (classification/models/intern_image.py)
of OpenGVLab/InternImage. For the classifier and for every model that holds an InternImage backbone.
"""

import re

from torch import nn

from ..compatibility import whole_shape
from ..configuration_internimage import InternImageConfig
from ..modeling_internimage import InternImageBackbone, InternImageModel


_OFFSETS = re.compile(r"layers\.\d+\.dcn\.(offset|mask|center_feature_scale_proj)\.")

# For `peft.LoraConfig(target_modules=...)`: the projections around DCNv3 and the feed-forward networks of all layers, in
# the classifier and in every model that holds an InternImage backbone. Not the offsets and masks, which the authors train
# with a tenth of the learning rate: a low-rank change there moves all sampling points of a layer together.
LORA_TARGET_MODULES = r".*\.stages\.\d+\.layers\.\d+\.(dcn\.(input_proj|output_proj)|mlp\.(fc1|fc2))"

# For `peft.LoraConfig(modules_to_save=...)`, beside the targets: the classifier, and every norm that is a BatchNorm in some
# configuration. Training moves a BatchNorm's statistics whether its parameters are frozen or not, so an adapter without them
# gives other logits when it is loaded. PEFT ignores names that a model lacks; where such a norm is a LayerNorm, it is
# trained and saved like the classifier.
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
    """How many layers of the backbone lie behind each of its parameters, by the parameter's name in `model`.

    The last layer of the last stage is 0, the first layer of the first stage `sum(depths) - 1`. The stem counts as the
    first layer, the norm and the downsampling at a stage's end as the first layer of the next stage, a norm between layers
    (`post_norms`) as the layer after which it stands (the official code forgets these). What is not named is 0: the last
    stage's norm, the pooler, and all heads.

    Raises:
        ValueError: if there is no InternImage in the model.
    """
    result = {}
    for prefix, module in model.named_modules():
        if isinstance(module, (InternImageModel, InternImageBackbone)):
            for name, _ in module.named_parameters():
                distance = sum(module.config.depths) - 1 - _position(name, module.config)
                result[f"{prefix}.{name}" if prefix else name] = distance
    if not result:
        raise ValueError(f"`model` holds no InternImage, it is a {type(model).__name__}")
    return result


def _position(name: str, config: InternImageConfig) -> int:
    """The number of the layer, counted from the first, that a parameter of the backbone belongs to."""
    starts = [sum(config.depths[:stage]) for stage in range(len(config.depths))]
    if name.startswith("stem."):
        return 0
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
    """Parameter groups for any optimiser of `torch.optim`.

    Args:
        model: a classifier, a backbone, or any model that holds one. Frozen parameters are left out.
        learning_rate: of the head and the last layer.
        weight_decay: of matrices and convolutions. Norms, biases and layer scales have none.
        layer_decay: factor of the learning rate from each layer to the one before it (0.9 for the official 22k-to-1k
            fine-tuning of L to G).
        offset_lr_multiplier: factor for the projections to sampling offsets, modulation masks and centre feature scale
            (`DCN_LR_MUL`, 0.1 in the official fine-tuning).

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and a `name`, one for each combination that occurs.

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
