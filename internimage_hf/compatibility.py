# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""Workarounds for faults of other libraries: what each one is for, where it shows, and when it can be deleted.

In go models, modules and parameters; out comes what the rest of the package would have got from a library without the fault.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps

import torch
from torch import nn
from transformers import PreTrainedModel

from .checkpoint import OfficialNames


class LoadsOfficialNames:
    """A mix-in for `PreTrainedModel`: official parameter names are translated when a model is loaded, never when it is saved.

    Fault: a renaming that is registered by `register_checkpoint_conversion_mapping` is undone on saving, so that a fine-tuned
    model would go back to names that the official code alone can read.
    Versions: transformers 5.17 to 5.22 (`transformers/conversion_mapping.py`, `core_model_loading.py`).
    Test: `tests/test_checkpoint.py::test_published_checkpoint_is_saved_under_new_names`.
    Delete when: a mapping can be registered for loading alone.
    """

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        load_config = replace(load_config, weight_mapping=[OfficialNames(), *(load_config.weight_mapping or [])])
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )


def none_is_unset(forward: Callable) -> Callable:
    """Lets `output_hidden_states=None` and `return_dict=None` mean the configuration's value, as if not given.

    Fault: `capture_outputs` takes a given `output_hidden_states=None` for False, whatever the configuration says; heads pass
    on None where their caller gave nothing.
    Versions: transformers 5.17 to 5.22 (`transformers/utils/output_capturing.py`); its own models have it as well.
    Test: `tests/test_modeling.py::test_return_dict_and_output_hidden_states_follow_config`.
    Delete when: `ConvNextV2Model` with `config.output_hidden_states` returns hidden states for `output_hidden_states=None`.
    """

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        for name in ("output_hidden_states", "return_dict"):
            if name in kwargs and kwargs[name] is None:
                del kwargs[name]
        return forward(self, *args, **kwargs)

    return wrapper


def is_sharded_away(module: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has left empty tensors in the place of a module's own parameters.

    Fault: transformers initialises a head's modules under ZeRO-3 after the backbone's parameters were sharded, and hands
    `_init_weights` modules of empty tensors, which it cannot fill. The backbone was initialised when it was made.
    Versions: transformers 5.17 to 5.22 with DeepSpeed 0.17 and 0.18 (`PreTrainedModel.initialize_weights`).
    Test: `tests/test_distributed.py::test_heads_load_backbone_under_deepspeed`.
    Delete when: `initialize_weights` gathers what it initialises.
    """
    return any(hasattr(p, "ds_id") and p.numel() == 0 for p in module.parameters(recurse=False))


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter, also where ZeRO-3 has left an empty tensor in its place.

    Fault: a parameter that ZeRO-3 has sharded has the shape (0,), from which its kind (matrix or bias) cannot be told.
    Versions: DeepSpeed 0.17 and 0.18 (`deepspeed/runtime/zero/partition_parameters.py`).
    Test: `tests/test_training.py::test_sharded_parameters_keep_their_weight_decay`.
    Delete when: DeepSpeed's parameters keep their shapes, as FSDP2's do.
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def answer_for_input_embeddings(model: PreTrainedModel) -> None:
    """Lets `model.get_input_embeddings()` return None where it raises NotImplementedError.

    Fault: under FSDP2, accelerate asks every model for its input embeddings; many heads of transformers have none and raise.
    Versions: accelerate 1.10 to 1.15 (`accelerate/utils/fsdp_utils.py`), transformers 5.17 to 5.22.
    Test: `tests/test_distributed.py::test_segmentation_example_runs_in_two_processes`.
    Delete when: accelerate takes the exception for an answer.
    """
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        model.get_input_embeddings = lambda: None


@contextmanager
def saved_under_own_names(model: nn.Module) -> Iterator[None]:
    """Within the block, `Trainer` saves a model's parameters under the names that they have in it.

    Fault: `save_pretrained` gives parameters of DETR-like heads older names, which `from_pretrained` translates back, but
    `Trainer` does not when it resumes or loads its best model: it goes on without the backbone's weights.
    Versions: transformers 5.17 to 5.22 (`Trainer._load_from_checkpoint`, `_load_best_model`).
    Test: `tests/test_training.py::test_resumed_detector_keeps_backbone`.
    Delete when: `Trainer` loads weights the way that `from_pretrained` does.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    replaced = vars(model).get("save_pretrained")
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained
        if replaced is not None:
            model.save_pretrained = replaced


# The modules of transformers that take `accelerate.utils.reduce`, which is a mean, for a sum over the processes.
_SET_LOSSES = (
    "transformers.loss.loss_for_object_detection",
    "transformers.models.mask2former.modeling_mask2former",
    "transformers.models.maskformer.modeling_maskformer",
    "transformers.models.oneformer.modeling_oneformer",
)


@contextmanager
def mean_number_of_targets(processes: int) -> Iterator[None]:
    """Within the block, losses of set prediction are normalised by the mean number of targets of a process.

    Fault: transformers divides the mean of `accelerate.utils.reduce` by the number of processes once more, which makes the
    losses of DETR, MaskFormer and their like that many times too large.
    Versions: transformers 5.17 to 5.22 (`loss_for_object_detection.py` and three modeling files).
    Test: `tests/test_distributed.py::test_detection_example_runs_in_two_processes`.
    Delete when: these modules call `reduce(..., reduction="sum")`, or no longer divide.
    """
    if processes == 1:
        yield
        return
    # Not an import: this file is a part of the remote code, whose imports transformers takes for requirements.
    reduce = sys.modules["accelerate.utils"].reduce
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


__all__ = [
    "LoadsOfficialNames",
    "answer_for_input_embeddings",
    "is_sharded_away",
    "mean_number_of_targets",
    "none_is_unset",
    "saved_under_own_names",
    "whole_shape",
]
