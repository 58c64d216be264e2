# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Training as the authors did it: learning rates by layer, slower offsets, averaged weights.

After `set_weight_decay_and_lr` (classification/optimizer.py) and `lr_decay_keywords` (classification/models/intern_image.py)
of OpenGVLab/InternImage. Works for the classifier and for every model that holds an InternImage backbone.
"""

import itertools
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, seed_worker
from transformers.utils import logging

from .configuration_internimage import InternImageConfig
from .modeling_internimage import InternImageBackbone, InternImageModel, InternImageTokenBatchNorm


logger = logging.get_logger(__name__)

_OFFSETS = re.compile(r"layers\.\d+\.dcn\.(offset|mask|center_feature_scale_proj)\.")
EMA_FILE = "ema.safetensors"

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
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # ZeRO-3 leaves flat shards of parameters
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


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint of a `Trainer` in its output folder; None if there is none, or no folder.

    `Trainer` writes `trainer_state.json` last: a checkpoint in whose writing the process was killed has none that can be
    read, and is passed over. `transformers.trainer_utils.get_last_checkpoint` returns it.
    """
    found = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (step := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal():
            found[int(step)] = folder
    for _, folder in sorted(found.items(), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning(f"{folder} is not complete, it is passed over")
        else:
            return str(folder)
    return None


class EndlessStream(torch.utils.data.IterableDataset):
    """A streamed dataset as training data: epoch after epoch without an end, each in an order of its own.

    Over several processes, and workers of a data loader, each example comes exactly once per epoch; a process starts its
    next epoch when its part is through, so parts of different sizes do not keep the others waiting. The order depends on
    the seed and the epoch alone, and a resumed run skips what it has seen (which reads it again). A `Trainer` needs
    `max_steps`, and the mix-in below if there are several processes.

    Args:
        dataset: a `datasets.IterableDataset`. Shards (files) are shuffled as a whole and go to the processes whole if their
            number is a multiple of that of the processes; otherwise each process reads all and keeps its part.
        transform: from a batch, a dictionary of lists, to another, as for `Dataset.with_transform`. It gets batches of one.
        seed: of the order; the same on all processes.
        buffer_size: examples are drawn at random from this many that were read ahead.
    """

    def __init__(
        self, dataset, transform: Callable[[dict], dict] | None = None, seed: int = 0, buffer_size: int = 1000
    ):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.buffer_size = buffer_size

    def part(self, process: int, processes: int) -> "EndlessStream":
        """What one of several processes reads."""
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(self.dataset, rank=process, world_size=processes)
        return EndlessStream(dataset, self.transform, self.seed, self.buffer_size)

    def __iter__(self) -> Iterator[dict]:
        for epoch in itertools.count():
            is_empty = True
            # A dataset of its own for each epoch: `set_epoch` is shared by the workers, which need not be in the same one.
            for example in self.dataset.shuffle(seed=self.seed + epoch, buffer_size=self.buffer_size):
                is_empty = False
                if self.transform is not None:
                    batch = self.transform({name: [value] for name, value in example.items()})
                    example = {name: values[0] for name, values in batch.items()}
                yield example
            if is_empty:  # a worker more than there are shards
                return


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
    sync_batch_norm: bool = field(
        default=False,
        metadata={"help": "BatchNorm over the batches of all GPUs; without it each process uses its own batch"},
    )


class InternImageTrainerMixin:
    """Makes a `Trainer` do what the flags ask for, and what it lacks for sharded models and streamed datasets.

    `class MyTrainer(InternImageTrainerMixin, Trainer): pass`; the arguments may be any `TrainingArguments`, with or without
    `InternImageTrainingFlags`.

    - Parameter groups, and with `ema_decay` averaged weights: evaluation sees them, and after training the model has them.
    - Under FSDP2 `save_model` and every checkpoint write the whole model, which `from_pretrained` loads, also where the
      state to resume from is sharded. Evaluation uses the BatchNorm statistics of process 0, as DDP does: those are saved.
    - An `EndlessStream` as training set is read by each process in part.
    - `train(resume_from_checkpoint=True)` passes over a checkpoint that was not written to its end.
    - Weights are saved under the model's own parameter names. By default transformers saves DETR-like heads under older
      ones, which `from_pretrained` translates back; a resumed `Trainer`, or one that loads its best model at the end,
      does not, and goes on without the backbone's weights.
    - In several processes, DETR, MaskFormer and their like divide the sum of their losses by the mean number of targets
      of a process, as their papers say. transformers divides that mean by the number of processes once more, which makes
      these losses as many times too large.

    Raises:
        ValueError: for `sync_batch_norm` without GPUs, or for a model whose BatchNorm layers it cannot replace.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ema = None
        if (decay := getattr(self.args, "ema_decay", None)) is not None:
            self.ema = EMACallback(decay)
            self.add_callback(self.ema)
        if getattr(self.args, "sync_batch_norm", False):
            if self.args.device.type == "cpu":
                raise ValueError("`sync_batch_norm` needs GPUs, PyTorch has no synchronised BatchNorm for CPUs")
            if any(isinstance(module, InternImageTokenBatchNorm) for module in self.model.modules()):
                raise ValueError("`sync_batch_norm` is not possible with `use_clip_projector` and `norm_layer='BN'`")
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # in place: the model itself is no BatchNorm
        if self.is_fsdp_enabled and isinstance(self.model, PreTrainedModel):
            try:
                self.model.get_input_embeddings()
            except NotImplementedError:  # in many heads; accelerate takes None for an answer
                self.model.get_input_embeddings = lambda: None

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

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        if not isinstance(self.train_dataset, EndlessStream):
            return super().get_train_dataloader()
        from accelerate.data_loader import prepare_data_loader

        args = self.args
        loader = torch.utils.data.DataLoader(
            self.train_dataset.part(args.process_index, args.world_size),
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        # "one process": the stream is this process's part already
        return prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:  # no checkpoint at all: `Trainer` says so
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True
        if self.ema is not None and isinstance(resume_from_checkpoint, (str, os.PathLike)):
            self.ema.resume_from = Path(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def compute_loss_context_manager(self):
        several = self.args.world_size > 1
        with super().compute_loss_context_manager(), _mean_number_of_targets() if several else nullcontext():
            yield

    def evaluation_loop(self, *args, **kwargs):
        with self.ema.applied(self.model) if self.ema is not None else nullcontext():
            if self.is_fsdp_enabled:
                for buffer in self.model.buffers():
                    torch.distributed.broadcast(buffer, src=0)
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            state_dict = self.accelerator.get_state_dict(self.model)  # from all processes
            if self.args.should_save:
                self._save(output_dir, state_dict=state_dict)
        if self.ema is not None and self.is_in_train:
            # before `trainer_state.json`, which says that the checkpoint is complete
            self.ema.save(Path(output_dir), self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with _saved_under_own_names(model) if isinstance(model, PreTrainedModel) else nullcontext():
            super()._save(output_dir, state_dict)


class InternImageTrainer(InternImageTrainerMixin, Trainer):
    """`Trainer` with `InternImageTrainerMixin`."""


class EMACallback(TrainerCallback):
    """An exponential moving average of the weights and buffers, by `torch.optim.swa_utils`.

    Checkpoints hold it as `ema.safetensors`, a state dict of the model, and resuming goes on with it. After training, the
    model gets the average: that of the best checkpoint if `load_best_model_at_end`. For a single process, DDP, and FSDP2,
    where every process averages its own shards.

    Args:
        decay: of the average; 0.9998 upstream.

    Raises:
        ValueError: if `decay` is not between 0 and 1, or training starts under FSDP1 or DeepSpeed ZeRO-3, whose parameters
            are not there as a whole or as shards of their own.
    """

    def __init__(self, decay: float = 0.9998):
        if not 0 <= decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {decay!r}")
        self.decay = decay
        self.averaged: dict[str, torch.Tensor] | None = None
        self.resume_from: Path | None = None
        self._saved_in: Path | None = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights within the block, if there are any yet."""
        if self.averaged is None:
            yield
            return
        own = _copy(model)
        model.load_state_dict(self.averaged)
        try:
            yield
        finally:
            model.load_state_dict(own)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's weights into the average; the first time they are the average."""
        if self.averaged is None:
            self.averaged = _copy(model)
            return
        groups = defaultdict(list)
        for name, tensor in model.state_dict().items():
            groups[type(tensor), tensor.dtype, tensor.device].append((self.averaged[name], tensor))
        average = get_ema_multi_avg_fn(self.decay)
        for (_, dtype, _), pairs in groups.items():
            means, values = (list(tensors) for tensors in zip(*pairs, strict=True))
            if dtype.is_floating_point:
                average(means, values, None)
            else:  # counters
                torch._foreach_copy_(means, values)

    def save(self, folder: Path, should_write: bool = True) -> None:
        """Writes the average, at once; a sharded one needs all processes, of which those with `should_write` write."""
        if self.averaged is None:
            return
        tensors = {}
        for name, tensor in self.averaged.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if should_write:
                tensors[name] = whole.cpu().contiguous()
        if should_write:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / f"{EMA_FILE}.tmp")
            os.replace(folder / f"{EMA_FILE}.tmp", folder / EMA_FILE)
        self._saved_in = folder

    def load(self, file: Path, model: nn.Module) -> None:
        """Reads an average of `model`; a sharded model's is sharded likewise.

        Raises:
            ValueError: if the file is not of this model.
        """
        state, whole = model.state_dict(), load_file(file)
        if {name: tensor.shape for name, tensor in whole.items()} != {name: t.shape for name, t in state.items()}:
            raise ValueError(f"{file} holds the averaged weights of another model than this {type(model).__name__}")
        self.averaged = {
            # each process has read it all: nothing to send
            name: distribute_tensor(whole[name].to(t.device), t.device_mesh, t.placements, src_data_rank=None)
            if isinstance(t, DTensor)
            else whole[name].to(t.device)
            for name, t in state.items()
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError("`ema_decay` is not possible with DeepSpeed ZeRO-3; FSDP2 is")
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError("`ema_decay` needs version 2 of FSDP (`fsdp_version: 2`), this is version 1")
        self.averaged = self._saved_in = None
        if state.global_step == 0:
            return
        folders = [Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"]
        if self.resume_from is not None:
            folders.insert(0, self.resume_from)
        elif isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for folder in folders:
            if (folder / EMA_FILE).is_file():
                self.load(folder / EMA_FILE, model)
                return
        logger.warning(f"no {EMA_FILE} in {folders[0]}: the average starts anew from the resumed weights")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.update(model)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder != self._saved_in:  # by the mix-in, earlier
            self.save(folder, args.should_save)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.averaged is None:  # no step was left to do
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            file = Path(state.best_model_checkpoint) / EMA_FILE
            if file.is_file():
                self.load(file, model)
            else:  # written by a run without averaging
                logger.warning(f"no {EMA_FILE} in {file.parent}: the model gets the last average, not the best one's")
        model.load_state_dict(self.averaged)
        self.averaged = None  # the model has it


# The modules of transformers that take `accelerate.utils.reduce`, which is a mean, for a sum over the processes.
_SET_LOSSES = (
    "transformers.loss.loss_for_object_detection",
    "transformers.models.mask2former.modeling_mask2former",
    "transformers.models.maskformer.modeling_maskformer",
    "transformers.models.oneformer.modeling_oneformer",
)


@contextmanager
def _mean_number_of_targets() -> Iterator[None]:
    """Within the block, the losses of set prediction are normalised by the mean number of targets of a process."""
    from accelerate.utils import reduce

    modules = [
        module
        for name in _SET_LOSSES
        if (module := sys.modules.get(name)) and getattr(module, "reduce", None) is reduce
    ]
    for module in modules:
        module.reduce = partial(reduce, reduction="sum")
    try:
        yield
    finally:
        for module in modules:
            module.reduce = reduce


@contextmanager
def _saved_under_own_names(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, `Trainer` saves the model's parameters under the names that they have in it."""
    replaced = vars(model).get("save_pretrained")
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained
        if replaced is not None:
            model.save_pretrained = replaced


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


__all__ = [
    "LORA_MODULES_TO_SAVE",
    "LORA_TARGET_MODULES",
    "EMACallback",
    "EndlessStream",
    "InternImageTrainer",
    "InternImageTrainerMixin",
    "InternImageTrainingFlags",
    "last_checkpoint",
    "layer_distances",
    "parameter_groups",
]
