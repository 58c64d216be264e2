# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: a model, `TrainingArguments` and datasets. Out: `Trainer` with layer-wise rates, averaged weights and streaming."""

import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, seed_worker
from transformers.utils import logging

from ..compatibility import answer_for_input_embeddings, mean_number_of_targets, saved_under_own_names
from ..modeling_internimage import InternImageTokenBatchNorm
from .ema import EMACallback
from .optimization import parameter_groups
from .streaming import EndlessStream


logger = logging.get_logger(__name__)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Returns the newest complete checkpoint in a `Trainer`'s output folder; None without one, or without the folder.

    `Trainer` writes `trainer_state.json` last. A checkpoint without a readable one is incomplete and is skipped with a
    warning; `transformers.trainer_utils.get_last_checkpoint` would return it.
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
    """A mix-in for `Trainer`: the options of `InternImageTrainingFlags`, sharded models and streamed datasets.

    `class MyTrainer(InternImageTrainerMixin, Trainer): pass`; the arguments may be any `TrainingArguments`, with or without
    `InternImageTrainingFlags`.

    - The optimiser gets parameter groups. With `ema_decay`, evaluation and the trained model use averaged weights.
    - Under FSDP2, `save_model` and every checkpoint write the whole model for `from_pretrained`, beside a sharded state.
      Evaluation uses the BatchNorm statistics of process 0, as DDP does; these are the saved ones.
    - Each process reads its part of an `EndlessStream`.
    - `train(resume_from_checkpoint=True)` skips incomplete checkpoints.
    - Weights are saved under the model's own parameter names, and losses of set prediction are normalised over all
      processes: workarounds for two faults of transformers, see `compatibility.py`.

    Raises:
        ValueError: for `sync_batch_norm` without GPUs, or with BatchNorm layers that have no synchronised version.
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
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # in place, as the model itself is no BatchNorm
        if self.is_fsdp_enabled and isinstance(self.model, PreTrainedModel):
            answer_for_input_embeddings(self.model)

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
        # num_processes=1: the stream is already split
        return prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:  # True: `Trainer` raises its own error for a missing checkpoint
            resume_from_checkpoint = last_checkpoint(self.args.output_dir) or True
        if self.ema is not None and isinstance(resume_from_checkpoint, (str, os.PathLike)):
            self.ema.resume_from = Path(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def compute_loss_context_manager(self):
        with super().compute_loss_context_manager(), mean_number_of_targets(self.args.world_size):
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
            state_dict = self.accelerator.get_state_dict(self.model)  # a collective call: all processes take part
            if self.args.should_save:
                self._save(output_dir, state_dict=state_dict)
        if self.ema is not None and self.is_in_train:
            # before `Trainer` writes `trainer_state.json`, the mark of a complete checkpoint
            self.ema.save(Path(output_dir), self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with saved_under_own_names(model):
            super()._save(output_dir, state_dict)


class InternImageTrainer(InternImageTrainerMixin, Trainer):
    """`Trainer` with `InternImageTrainerMixin`."""
