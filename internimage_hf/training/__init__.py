# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Training as in the official code: learning rates by layer, slower offsets, averaged weights; and streamed datasets."""

from .ema import EMA_FILE, EMACallback
from .optimization import LORA_MODULES_TO_SAVE, LORA_TARGET_MODULES, layer_distances, parameter_groups
from .streaming import EndlessStream
from .trainer import InternImageTrainer, InternImageTrainerMixin, InternImageTrainingFlags, last_checkpoint


__all__ = [
    "EMA_FILE",
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
