# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: the model's weights after each step. Out: their exponential moving average, in checkpoints and in the final model."""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """An exponential moving average of the weights and buffers, by `torch.optim.swa_utils`.

    Each checkpoint holds the average as `ema.safetensors`, a state dict of the model; a resumed run continues it. After
    training, the model gets the average, with `load_best_model_at_end` that of the best checkpoint. Works in a single
    process, under DDP, and under FSDP2, where every process averages its own shards.

    Args:
        decay: of the average; 0.9998 in the official code.

    Raises:
        ValueError: if `decay` is not in [0, 1), or training starts under FSDP1 or DeepSpeed ZeRO-3: their parameters are
            neither whole tensors nor DTensor shards.
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
        """Within the block, the model has the averaged weights, once there are any."""
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
        """Updates the average with the model's weights; the first call starts it with them."""
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
        """Writes the average atomically. All processes must call it for a sharded model; those with `should_write` write."""
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
        """Reads the average of `model` from a file and shards it as the model is sharded.

        Raises:
            ValueError: if the names or shapes in the file are not those of the model.
        """
        state, whole = model.state_dict(), load_file(file)
        if {name: tensor.shape for name, tensor in whole.items()} != {name: t.shape for name, t in state.items()}:
            raise ValueError(f"{file} holds the averaged weights of another model than this {type(model).__name__}")
        self.averaged = {
            # src_data_rank=None: each process has read the whole file, no process has to send it
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
        if folder != self._saved_in:  # else `InternImageTrainerMixin.save_model` has written it
            self.save(folder, args.should_save)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.averaged is None:  # no step was trained
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            file = Path(state.best_model_checkpoint) / EMA_FILE
            if file.is_file():
                self.load(file, model)
            else:  # a run without averaging wrote this checkpoint
                logger.warning(f"no {EMA_FILE} in {file.parent}: the model gets the last average, not the best one's")
        model.load_state_dict(self.averaged)
        self.averaged = None  # the model holds the average now; frees the copy


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
