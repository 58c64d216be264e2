"""From a translated state dict to a finished folder: build, write, verify, rename."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

import internimage_hf
from internimage_hf.remote_code import write_remote_code

from .cards import model_card
from .errors import ConversionError
from .source import Source, sha256_of


REPORT = "conversion_report.json"


@dataclass
class Plan:
    """What a conversion is to write.

    Args:
        task: `classification`, `upernet`, `mask2former` or `backbone`.
        source: where the tensors come from.
        config: of the model.
        model_class: whose instance is saved.
        state_dict: under the model's names.
        processor: an image processor, if the model has one.
        example_size: side of the image that the outputs are checked on.
        ignored: entries of the source that no model has a use for.
    """

    task: str
    source: Source
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    state_dict: dict[str, torch.Tensor]
    processor: object | None
    example_size: int = 64
    ignored: tuple[str, ...] = ()


def is_finished(output: Path) -> bool:
    return (output / REPORT).is_file()


def convert(
    plan: Plan,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    remote_code: bool = False,
    verify: bool = True,
    max_shard_size: str = "2GB",
    repository: str | None = None,
) -> dict:
    """Writes the folder `output` and returns the report, which it holds as well.

    Everything is written and verified in a folder beside it, which then is renamed: a folder of the final name is
    complete. Tensors are taken from the mapped source shard by shard, so that memory holds the weights once and one shard.

    Raises:
        ConversionError: if names or shapes do not agree, or what was written does not pass.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists already and is not empty")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)

    with torch.device("meta"):
        model = plan.model_class(plan.config)
    _check_names_and_shapes(model, plan.state_dict)
    model.load_state_dict(plan.state_dict, strict=True, assign=True)
    if dtype is not None:
        model.to(dtype)
    num_parameters = model.num_parameters()
    try:
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        del model
        if plan.processor is not None:
            plan.processor.save_pretrained(unfinished)
        report = {
            "source": {"file": plan.source.file.name, "sha256": plan.source.sha256},
            "task": plan.task,
            "num_parameters": num_parameters,
            "dtype": sorted({str(dtype or t.dtype)[6:] for t in plan.state_dict.values() if t.is_floating_point()}),
            "ignored_entries": list(plan.ignored),
            "internimage_hf": internimage_hf.__version__,
        }
        if verify:
            report["tensors"] = verify_tensors(plan.state_dict, unfinished, dtype)
        plan.state_dict.clear()  # lets go of the mapped source before the result is loaded
        if verify:
            report["outputs"] = verify_outputs(plan, unfinished)
        if remote_code:
            write_remote_code(unfinished, plan.model_class)
        card = model_card(repository or output.name, plan.task, plan.source.released, num_parameters, remote_code)
        (unfinished / "README.md").write_text(str(card), encoding="utf-8")
        report["files"] = {
            file.name: sha256_of(file) for file in sorted(unfinished.iterdir()) if file.suffix == ".safetensors"
        }
        (unfinished / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if output.is_dir():
        output.rmdir()  # empty
    os.replace(unfinished, output)
    return report


def _check_names_and_shapes(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    def listed(names) -> str:
        names = sorted(names)
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    if left_over := state_dict.keys() - expected.keys():
        raise ConversionError(f"the checkpoint has entries that the model lacks: {listed(left_over)}")
    if missing := expected.keys() - state_dict.keys():
        raise ConversionError(f"the checkpoint lacks entries of the model: {listed(missing)}")
    for name, shape in expected.items():
        if tuple(state_dict[name].shape) != shape:
            raise ConversionError(f"{name} has the shape {tuple(state_dict[name].shape)}, the model's has {shape}")


def verify_tensors(state_dict: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype | None) -> dict:
    """Compares every tensor with the file, bit for bit; in another dtype, with the source rounded to it."""
    compared, values, largest = set(), 0, 0.0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as written:
            for name in written.keys():  # noqa: SIM118 (not a dictionary)
                expected = state_dict.get(name)
                if expected is None or name in compared:
                    raise ConversionError(f"{file.name} has an entry that was not to be written: {name}")
                actual = written.get_tensor(name)
                rounded = expected.to(actual.dtype) if dtype is not None and expected.is_floating_point() else expected
                same_bits = actual.shape == rounded.shape and actual.dtype == rounded.dtype
                if not same_bits or (not torch.equal(actual, rounded) and not _equal_with_nan(actual, rounded)):
                    raise ConversionError(f"{file.name} holds other values than the checkpoint for {name}")
                if actual.is_floating_point() and actual.dtype != expected.dtype and actual.numel():
                    largest = max(largest, (actual.float() - expected.float()).abs().max().item())
                compared.add(name)
                values += actual.numel()
    if missing := state_dict.keys() - compared:
        raise ConversionError(f"{len(missing)} entries were not written, {min(missing)} first")
    return {"entries": len(compared), "values": values, "largest_difference": largest}


def _equal_with_nan(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def example_input(size: int, num_channels: int = 3) -> torch.Tensor:
    """The fixed input of the output check, (1, num_channels, size, size)."""
    return torch.randn(1, num_channels, size, size, generator=torch.Generator().manual_seed(0))


def verify_outputs(plan: Plan, folder: Path) -> dict:
    """Loads the folder and runs it twice: outputs must be finite and the same."""
    model, info = plan.model_class.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ConversionError(f"the written folder loads with {kind.replace('_', ' ')}: {sorted(info[kind])[:5]}")
    model.eval()
    pixel_values = example_input(plan.example_size).to(model.dtype)
    with torch.no_grad():
        first, second = (_main_outputs(model(pixel_values=pixel_values)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        if not one.isfinite().all():
            raise ConversionError("the converted model's outputs are not finite")
        if not torch.equal(one, other):
            raise ConversionError("the converted model's outputs differ from one run to the next")
    return {
        "input": f"normal, seed 0, {plan.example_size} x {plan.example_size}",
        "finite": True,
        "reproducible": True,
        "mean": [round(output.float().mean().item(), 6) for output in first],
        "std": [round(output.float().std().item(), 6) for output in first],
    }


def _main_outputs(outputs) -> list[torch.Tensor]:
    for names in (("logits",), ("class_queries_logits", "masks_queries_logits")):
        if all(getattr(outputs, name, None) is not None for name in names):
            return [getattr(outputs, name) for name in names]
    return list(outputs.feature_maps)
