# Copyright 2026 The internimage-hf authors. Licensed under the MIT License.
"""In: models, modules and parameters. Out: the result that a library without its fault would have given.

Each workaround names the fault, the versions that have it, the test that shows it, and the condition to delete it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import has_static_value
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoint import OfficialNames
from .dcnv3 import is_compiled


class LoadsOfficialNames:
    """A mix-in for `PreTrainedModel` that translates official parameter names on loading and leaves saving alone.

    Fault: transformers undoes a renaming of `register_checkpoint_conversion_mapping` on saving. A fine-tuned model would get
    the official names back, and only the official code reads those.
    Versions: transformers 5.17 to 5.22 (`transformers/conversion_mapping.py`, `core_model_loading.py`).
    Test: `tests/test_checkpoint.py::test_published_checkpoint_is_saved_under_new_names`.
    Delete when: a mapping can be registered for loading only.
    """

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        load_config = replace(load_config, weight_mapping=[OfficialNames(), *(load_config.weight_mapping or [])])
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )


def none_is_unset(forward: Callable) -> Callable:
    """Removes `output_hidden_states=None` and `return_dict=None`: the configuration's value applies.

    Fault: `capture_outputs` reads an explicit `output_hidden_states=None` as False and ignores the configuration. Heads pass
    on None when their caller gave no value.
    Versions: transformers 5.17 to 5.22 (`transformers/utils/output_capturing.py`); its own models have the fault too.
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
    """Whether DeepSpeed's ZeRO-3 has replaced a module's own parameters by empty tensors.

    Fault: under ZeRO-3 transformers calls `_init_weights` for the whole head after the backbone's parameters were sharded.
    Empty tensors cannot be initialised. The backbone's parameters were initialised on its construction.
    Versions: transformers 5.17 to 5.22 with DeepSpeed 0.17 and 0.18 (`PreTrainedModel.initialize_weights`).
    Test: `tests/test_distributed.py::test_heads_load_backbone_under_deepspeed`.
    Delete when: `initialize_weights` gathers the parameters first.
    """
    return any(hasattr(p, "ds_id") and p.numel() == 0 for p in module.parameters(recurse=False))


def hide_layout(hidden_states: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N, H, W, 1, C) in compiled code, unchanged elsewhere. `show_layout` undoes it.

    Fault: Inductor gives a tensor of four dimensions before or after a convolution the strides of a channels-last (N, C, H, W)
    map, whatever its dimensions are. In memory, the columns of a (N, H, W, C) tensor are then outermost. It is written in that
    order, and copied for each convolution and matrix product. Tensors of five dimensions keep their order.
    Versions: torch 2.11 to 2.13 (`find_nodes_prefer_channels_last` in `torch/_inductor/graph.py`).
    Test: `tests/test_modeling.py::test_compiled_maps_keep_their_order_in_memory`.
    Delete when: that test passes without it.
    """
    return hidden_states.unsqueeze(3) if is_compiled() else hidden_states


def show_layout(hidden_states: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 1, C) -> (N, H, W, C); a tensor of four dimensions is unchanged.

    Fault: that of `hide_layout`, which this undoes before a convolution and before the operator.
    Versions: torch 2.11 to 2.13.
    Test: `tests/test_modeling.py::test_compiled_maps_keep_their_order_in_memory`.
    Delete when: `hide_layout` is deleted.
    """
    return hidden_states.squeeze(3) if hidden_states.ndim == 5 else hidden_states


def halve(conv: nn.Conv2d, hidden_states: torch.Tensor) -> torch.Tensor:
    """Applies a 3x3 convolution of stride 2: (N, C, H, W) -> (N, C', ceil(H/2), ceil(W/2)).

    Fault: Inductor compares strides of channels-last maps by their remainder. The symbolic height after such a convolution is
    (H-1)//2 + 1, sympy does not cancel products of such sums, and compilation for a second image size fails with "Invalid
    ranges [0:-1]". Here a compiled model pads odd sizes by the row and column of zeros that the convolution would read
    anyway. The height is then -(-H//2), one factor of a product, which cancels. For sizes that are constants and even, the
    padding is empty and the compiler removes it. It would remove it for symbolic sizes, too, and bring the sum back, where a
    guard says that they are even: the CLIP head adds stage 4, upsampled, to stage 3. One more row and column, added and cut
    off again, keep the padding.
    Versions: torch 2.11 to 2.13 (`torch/_inductor/sizevars.py`, `torch/_inductor/fx_passes/post_grad.py`).
    Test: `tests/test_modeling.py::test_compiled_convolutions_take_a_second_image_size`, and the test that follows it.
    Delete when: those tests pass with `conv(hidden_states)` alone.
    """
    if is_compiled():
        height, width = hidden_states.shape[2:]
        rows, columns = -2 * (-height // 2) - height, -2 * (-width // 2) - width
        if has_static_value(height) and has_static_value(width):
            hidden_states = nn.functional.pad(hidden_states, (0, columns, 0, rows))
        else:
            hidden_states = nn.functional.pad(hidden_states, (0, columns + 1, 0, rows + 1))
            hidden_states = nn.functional.pad(hidden_states, (0, -1, 0, -1))
    return conv(hidden_states)


def channels_last(pixel_values: torch.Tensor) -> torch.Tensor:
    """The images in channels-last memory format, except in compiled code, where the compiler chooses the layout.

    Fault: `vmap` has no rule for memory formats, and torch has no public function that tells whether it is active.
    Versions: torch 2.11 to 2.13 (`torch/_functorch`).
    Test: `tests/test_dcnv3.py::test_per_sample_gradients_of_the_classifier`.
    Delete when: `Tensor.contiguous(memory_format=torch.channels_last)` works within `torch.func.vmap`.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return pixel_values
    return pixel_values.contiguous(memory_format=torch.channels_last)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Returns the full shape of a parameter, whether or not ZeRO-3 has sharded it.

    Fault: ZeRO-3 gives a sharded parameter the shape (0,). Matrices and biases look the same.
    Versions: DeepSpeed 0.17 and 0.18 (`deepspeed/runtime/zero/partition_parameters.py`).
    Test: `tests/test_training.py::test_sharded_parameters_keep_their_weight_decay`.
    Delete when: DeepSpeed's parameters keep their shapes, as FSDP2's do.
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager:
    """Within the block, the parameters are whole tensors; the changes of process 0 go to all processes afterwards.

    Fault: transformers shards a head's parameters under ZeRO-3 while it constructs the model. Code that sets their values
    afterwards would write into empty tensors.
    Versions: transformers 5.17 to 5.22 with DeepSpeed 0.17 and 0.18 (`deepspeed/runtime/zero/partition_parameters.py`).
    Test: `tests/test_distributed.py::test_heads_load_backbone_under_deepspeed`.
    Delete when: a context manager of transformers or accelerate does this for any kind of sharding.
    """
    shards = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shards:
        return nullcontext()
    # no import statement, for the reason in `mean_number_of_targets`
    return sys.modules["deepspeed"].zero.GatheredParameters(shards, modifier_rank=0)


def answer_for_input_embeddings(model: PreTrainedModel) -> None:
    """Makes `model.get_input_embeddings()` return None instead of raising NotImplementedError.

    Fault: under FSDP2, accelerate calls `get_input_embeddings()` of every model. Heads of transformers without input
    embeddings raise.
    Versions: accelerate 1.10 to 1.15 (`accelerate/utils/fsdp_utils.py`), transformers 5.17 to 5.22.
    Test: `tests/test_distributed.py::test_segmentation_example_runs_in_two_processes`.
    Delete when: accelerate catches the exception.
    """
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        model.get_input_embeddings = lambda: None


@contextmanager
def saved_under_own_names(model: nn.Module) -> Iterator[None]:
    """Within the block, `Trainer` saves parameters under the model's own names.

    Fault: `save_pretrained` writes older names for parameters of DETR-like heads. `from_pretrained` translates them back;
    `Trainer` does not when it resumes or loads its best model, and silently loses the backbone's weights.
    Versions: transformers 5.17 to 5.22 (`Trainer._load_from_checkpoint`, `_load_best_model`).
    Test: `tests/test_training.py::test_resumed_detector_keeps_backbone`.
    Delete when: `Trainer` translates names as `from_pretrained` does.
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


def let_pipelines_know(names: dict[str, str], model_class: type[PreTrainedModel]) -> None:
    """Enters a registered class into a mapping of names that a pipeline takes for the models it supports.

    Fault: the pipelines for object detection and image segmentation copy these mappings, and lose what was registered with
    the Auto classes: they log as an error that the model is not supported, and go on.
    Versions: transformers 5.17 to 5.22 (`pipelines/object_detection.py`, `pipelines/image_segmentation.py`).
    Test: `tests/test_rcnn.py::test_pipelines`.
    Delete when: these pipelines look at the registered classes, as that for image classification does.
    """
    names[model_class.config_class.model_type] = model_class.__name__


def has_no_video_processor(config_class: type[PreTrainedConfig]) -> None:
    """Says that models of a configuration have no video processor.

    Fault: pipelines look for a video processor too, take the `auto_map` of a remote image processor for that of one, and ask
    the user whether to trust code that does not exist, although the installed package has the model and its processor.
    Versions: transformers 5.17 to 5.22 (`AutoVideoProcessor.from_pretrained`).
    Test: `tests/test_convert_detection.py::test_converted_detectors_detect_the_same_without_the_package`.
    Delete when: a pipeline for images asks for no video processor.
    """
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

    VIDEO_PROCESSOR_MAPPING.register(config_class, None, exist_ok=True)


# Modules of transformers that use `accelerate.utils.reduce` as a sum over the processes; its default is the mean.
_SET_LOSSES = (
    "transformers.loss.loss_for_object_detection",
    "transformers.models.mask2former.modeling_mask2former",
    "transformers.models.maskformer.modeling_maskformer",
    "transformers.models.oneformer.modeling_oneformer",
)


@contextmanager
def mean_number_of_targets(processes: int) -> Iterator[None]:
    """Within the block, losses of set prediction are normalised by the mean number of targets per process.

    Fault: transformers divides the mean of `accelerate.utils.reduce` by the number of processes again. The losses of DETR,
    MaskFormer and related heads are too large by that factor.
    Versions: transformers 5.17 to 5.22 (`loss_for_object_detection.py` and three modeling files).
    Test: `tests/test_distributed.py::test_detection_example_runs_in_two_processes`.
    Delete when: these modules call `reduce(..., reduction="sum")`, or no longer divide.
    """
    if processes == 1:
        yield
        return
    # No import statement: transformers requires every package that a file of remote code imports, and this is such a file.
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
    "channels_last",
    "gathered",
    "halve",
    "has_no_video_processor",
    "hide_layout",
    "is_sharded_away",
    "let_pipelines_know",
    "mean_number_of_targets",
    "none_is_unset",
    "saved_under_own_names",
    "show_layout",
    "whole_shape",
]
