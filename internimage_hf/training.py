# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Training as the authors did it: learning rates by layer, slower offsets, averaged weights.

After `set_weight_decay_and_lr` (classification/optimizer.py) and `lr_decay_keywords` (classification/models/intern_image.py)
of OpenGVLab/InternImage. Works for the classifier and for every model that holds an InternImage backbone.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from .configuration_internimage import InternImageConfig
from .modeling_internimage import InternImageBackbone, InternImageModel


logger = logging.get_logger(__name__)

_OFFSETS = re.compile(r"layers\.\d+\.dcn\.(offset|mask|center_feature_scale_proj)\.")
EMA_FILE = "ema.safetensors"

# For `peft.LoraConfig(target_modules=...)`: the projections around DCNv3 and the feed-forward networks of all layers, in
# the classifier and in every model that holds an InternImage backbone. Not the offsets and masks, which the authors train
# with a tenth of the learning rate: a low-rank change there moves all sampling points of a layer together.
LORA_TARGET_MODULES = r".*\.stages\.\d+\.layers\.\d+\.(dcn\.(input_proj|output_proj)|mlp\.(fc1|fc2))"


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
        decays = parameter.ndim > 1
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


@dataclass
class InternImageTrainingFlags:
    """Flags to mix into a `TrainingArguments` class, read by `InternImageTrainerMixin`."""

    layer_decay: float = field(
        default=1.0, metadata={"help": "factor of the learning rate from each layer to the one before it"}
    )
    offset_lr_multiplier: float = field(
        default=1.0, metadata={"help": "factor of the learning rate of offset and mask projections; 0.1 upstream"}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "average the weights with this decay, evaluate and save the average"}
    )


class InternImageTrainerMixin:
    """Gives a `Trainer` the parameter groups and, with `ema_decay`, the averaged weights that its arguments ask for.

    `class MyTrainer(InternImageTrainerMixin, Trainer): pass`; the arguments may be any `TrainingArguments`, with or without
    `InternImageTrainingFlags`. Evaluation sees the averaged weights; after training the model has them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema = None
        if (decay := getattr(self.args, "ema_decay", None)) is not None:
            self.ema = EMACallback(decay)
            self.add_callback(self.ema)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, model
            )
            groups = parameter_groups(
                model,
                options["lr"],
                self.args.weight_decay,
                layer_decay=getattr(self.args, "layer_decay", 1.0),
                offset_lr_multiplier=getattr(self.args, "offset_lr_multiplier", 1.0),
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def evaluate(self, *args, **kwargs):
        if self.ema is None:
            return super().evaluate(*args, **kwargs)
        with self.ema.applied(self.model):
            return super().evaluate(*args, **kwargs)


class InternImageTrainer(InternImageTrainerMixin, Trainer):
    """`Trainer` with `InternImageTrainerMixin`."""


class EMACallback(TrainerCallback):
    """An exponential moving average of the weights and buffers, by `torch.optim.swa_utils`.

    Checkpoints hold it as `ema.safetensors`, and resuming goes on with it. After training, the model gets the average:
    that of the best checkpoint if `load_best_model_at_end`. For a single process and DDP.

    Args:
        decay: of the average; 0.9998 upstream.

    Raises:
        ValueError: if `decay` is not between 0 and 1.
    """

    def __init__(self, decay: float = 0.9998):
        if not 0 <= decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {decay!r}")
        self.decay = decay
        self.averaged: AveragedModel | None = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights within the block, if there are any yet."""
        if self.averaged is None:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.averaged.module.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(own)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True)
        if state.global_step == 0:
            return
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for folder in folders:
            if (folder / EMA_FILE).is_file():
                self._load(folder / EMA_FILE)
                return
        logger.warning(f"no {EMA_FILE} in {folders[0]}: the average starts anew from the resumed weights")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.averaged.update_parameters(model)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tensors = {name: t.detach().cpu().clone() for name, t in self.averaged.state_dict().items()}
            save_file(tensors, folder / EMA_FILE)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint:
            file = Path(state.best_model_checkpoint) / EMA_FILE
            if file.is_file():
                self._load(file)
            else:  # written by a run without averaging
                logger.warning(f"no {EMA_FILE} in {file.parent}: the model gets the last average, not the best one's")
        model.load_state_dict(self.averaged.module.state_dict())
        self.averaged = None  # the model has it

    def _load(self, file: Path) -> None:
        self.averaged.load_state_dict(load_file(file))


__all__ = [
    "LORA_TARGET_MODULES",
    "EMACallback",
    "InternImageTrainer",
    "InternImageTrainerMixin",
    "InternImageTrainingFlags",
    "layer_distances",
    "parameter_groups",
]
