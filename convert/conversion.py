"""In: a translated state dict. Out: a finished model folder: built, written, verified, renamed."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel

import internimage_hf
from internimage_hf.remote_code import write_remote_code

from .cards import model_card
from .errors import ConversionError, describe, first_line, listed
from .output import publish
from .source import Source, check_kind, configuration_of, sha256_of


REPORT = "conversion_report.json"

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OTHERWISE = "choose another --output, or delete the folder first"


@dataclass
class Plan:
    """The content of a conversion's output.

    Args:
        task: `classification`, `upernet`, `mask2former`, `dino`, `rcnn` or `backbone`.
        source: the checkpoint of the tensors.
        config: the model's configuration.
        model_class: the model's class.
        state_dict: tensors under the model's names.
        processor: the image processor, if the model has one.
        example_size: side in pixels of the image for the check of the outputs.
        ignored: entries of the source without a use in the model.
    """

    task: str
    source: Source
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    state_dict: dict[str, torch.Tensor]
    processor: object | None
    example_size: int = 64
    ignored: tuple[str, ...] = ()


def size_in_bytes(text: str) -> int:
    """Parses `--max-shard-size` into bytes.

    Raises:
        ConversionError: if the value is not a positive number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = (
        int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) if match else 0
    )
    if size < 1:
        raise ConversionError(f"--max-shard-size must be a positive size such as 500MB, 2GB or 1GiB, got {text!r}")
    return size


def settings_of(
    task: str, source: Source, *, dtype: str | None, ema: bool, remote_code: bool, max_shard_size: str
) -> dict[str, Any]:
    """Returns the settings that determine, with the source's bytes, a folder's content; the report records them."""
    config = json.dumps(source.config, sort_keys=True).encode()
    return {
        "task": task,
        "released": source.released.name if source.released is not None else None,
        "config": hashlib.sha256(config).hexdigest() if source.config is not None else None,
        "dtype": dtype,
        "ema": ema,
        "remote_code": remote_code,
        "max_shard_size": size_in_bytes(max_shard_size),
    }


def read_report(output: Path) -> dict[str, Any] | None:
    """Reads the report in a folder; returns None if the folder is missing, empty, or has no report.

    Raises:
        ConversionError: if the report cannot be read, or is of an earlier version that did not record all settings.
    """
    file = output / REPORT
    try:
        if not file.is_file():
            return None
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"cannot read {file}: {first_line(error)}; {_OTHERWISE}") from error
    try:
        strings = [report["source"]["file"], report["source"]["sha256"], *report["files"], *report["files"].values()]
        if not all(isinstance(string, str) for string in strings) or not isinstance(report["settings"], dict):
            raise TypeError
    except (AttributeError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{file} does not tell the source, the settings and the files' sums, as an earlier version's does not; "
            + _OTHERWISE
        ) from error
    return report


def is_finished(output: Path, source: Source, settings: dict[str, Any], verify: bool) -> bool:
    """Whether the folder holds the complete conversion of this source with these settings; False if missing or empty.

    Raises:
        ConversionError: if the folder holds anything else, or is damaged: nothing is overwritten.
    """
    if not output.exists():
        return False
    report = read_report(output)
    if report is None:
        if not output.is_dir():
            raise ConversionError(f"{output} exists already and is not a folder")
        if not any(output.iterdir()):
            return False
        raise ConversionError(f"{output} exists already and is not empty")
    recorded = report["source"]
    if recorded["sha256"] != source.sha256:
        raise ConversionError(
            f"{output} holds the conversion of {recorded['file']} (sha256 {recorded['sha256'][:12]}...), not of "
            f"{source.file.name} (sha256 {source.sha256[:12]}...); {_OTHERWISE}"
        )
    if verify and "outputs" not in report:
        raise ConversionError(f"{output} was converted with --no-verify; {_OTHERWISE}")
    for name, value in settings.items():
        if report["settings"].get(name) != value:
            raise ConversionError(
                f"{output} was converted with {name} = {report['settings'].get(name)!r}, not {value!r}; {_OTHERWISE}"
            )
    for name, digest in report["files"].items():
        file = output / name
        if not file.is_file():
            raise ConversionError(f"{output} is damaged: {name} is missing; {_OTHERWISE}")
        if sha256_of(file) != digest:
            raise ConversionError(f"{output} is damaged: {name} is not what the conversion wrote; {_OTHERWISE}")
    if strange := sorted(
        file.name for file in output.iterdir() if _is_weights(file.name) and file.name not in report["files"]
    ):
        raise ConversionError(
            f"{output} has weights that the conversion did not write: {', '.join(strange)}; {_OTHERWISE}"
        )
    return True


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"))


def convert(
    plan: Plan,
    output: Path,
    work: Path,
    settings: dict[str, Any],
    *,
    verify: bool = True,
    repository: str | None = None,
) -> dict:
    """Writes the folder `output`, with its report, and returns the report.

    The work folder is written, verified and then renamed: a folder of the final name is always complete. Tensors are copied
    from the mapped source shard by shard: memory holds the weights once, plus one shard.

    Args:
        plan: the content to write.
        output: must be missing or an empty folder.
        work: an empty folder beside it, from `workplace`.
        settings: from `settings_of`.
        verify: whether to compare the files with the source, and to run the model.
        repository: Hub id for the model card.

    Raises:
        ConversionError: if names, shapes or dtypes differ, the verification fails, or the folder cannot be written.
    """
    folder = work / "result"
    with configuration_of(plan.source), torch.device("meta"):
        model = plan.model_class(plan.config)
    try:
        _check_tensors(model, plan.state_dict)
    except ConversionError as error:
        raise ConversionError(f"{plan.source.file}: {error}") from error
    sources = {t.dtype for t in plan.state_dict.values() if t.is_floating_point()}
    dtype = getattr(torch, settings["dtype"]) if settings["dtype"] is not None else None
    if (
        dtype is None and len(sources) > 1
    ):  # transformers loads a model in one dtype: take the smallest that holds all values
        dtype = reduce(torch.promote_types, sources)
    model.load_state_dict(plan.state_dict, strict=True, assign=True)
    if dtype is not None:
        model.to(dtype)
    num_parameters = model.num_parameters()
    try:
        model.save_pretrained(folder, max_shard_size=settings["max_shard_size"])
        del model
        if plan.processor is not None:
            plan.processor.save_pretrained(folder)
        report = {
            "source": {"file": plan.source.file.name, "sha256": plan.source.sha256},
            "settings": settings,
            "task": plan.task,
            "num_parameters": num_parameters,
            "dtype": [str(dtype or next(iter(sources)))[6:]],
            "source_dtype": sorted(str(source)[6:] for source in sources),
            "ignored_entries": list(plan.ignored),
            "left_out": plan.source.left_out,
            "unknown_config_fields": plan.source.unknown_fields,
            "internimage_hf": internimage_hf.__version__,
        }
        if verify:
            report["tensors"] = verify_tensors(plan.state_dict, folder, dtype)
        plan.state_dict.clear()  # unmaps the source before the result is loaded
        if verify:
            report["outputs"] = verify_outputs(plan, folder)
        if settings["remote_code"]:
            write_remote_code(folder, plan.model_class)
        report["files"] = {file.name: sha256_of(file) for file in sorted(folder.iterdir())}
        # users may edit the card: the report does not list it
        name, remote_code = repository or output.name, settings["remote_code"]
        version = getattr(getattr(plan.config, "backbone_config", plan.config), "dcn_version", 3)
        card = model_card(name, plan.task, plan.source.released, num_parameters, remote_code, version)
        (folder / "README.md").write_text(str(card), encoding="utf-8")
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = describe(error) if isinstance(error, OSError) else first_line(error)
        raise ConversionError(f"cannot write {output}: {reason}") from error
    publish(folder, output)
    return report


def _check_tensors(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> None:
    expected = model.state_dict()

    if left_over := state_dict.keys() - expected.keys():
        raise ConversionError(f"the checkpoint has entries that the model lacks: {listed(sorted(left_over))}")
    if missing := expected.keys() - state_dict.keys():
        raise ConversionError(f"the checkpoint lacks entries of the model: {listed(sorted(missing))}")
    for name, wanted in expected.items():
        tensor = state_dict[name]
        check_kind(name, tensor)
        if tensor.shape != wanted.shape:
            raise ConversionError(f"{name} has the shape {tuple(tensor.shape)}, the model's has {tuple(wanted.shape)}")
        if not wanted.is_floating_point() and tensor.dtype in _FLOATS and torch.equal(tensor, tensor.round()):
            tensor = state_dict[name] = tensor.to(wanted.dtype)  # a counter averaged together with the weights
        allowed = _FLOATS if wanted.is_floating_point() else (wanted.dtype,)
        if tensor.dtype not in allowed:
            raise ConversionError(
                f"{name} is of {str(tensor.dtype)[6:]}, expected {' or '.join(str(dtype)[6:] for dtype in allowed)}"
            )
    end = 0  # memory of the tensors so far
    for name in sorted(state_dict, key=lambda name: state_dict[name].data_ptr()):
        tensor = state_dict[name]
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.data_ptr() < end:  # a safetensors file cannot hold memory under two names
            state_dict[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + (last + 1) * tensor.element_size())


def verify_tensors(state_dict: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype | None) -> dict:
    """Compares every tensor with the file bit by bit; in another dtype, with the rounded source.

    Raises:
        ConversionError: if a value differs, is not finite in the source, or is too large for `dtype`.
    """
    compared, values, largest = set(), 0, 0.0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as written:
            for name in written.keys():  # noqa: SIM118 (not a dictionary)
                expected = state_dict.get(name)
                if expected is None or name in compared:
                    raise ConversionError(f"{file.name} has an entry that was not to be written: {name}")
                actual = written.get_tensor(name)
                if strange := _not_finite(expected):
                    raise ConversionError(
                        f"the checkpoint is damaged: {strange} of the {expected.numel()} values of {name} are not finite"
                    )
                rounded = expected.to(dtype) if dtype is not None and expected.is_floating_point() else expected
                if _not_finite(rounded):
                    raise ConversionError(f"{name} has values too large for {str(dtype)[6:]}: choose another --dtype")
                if actual.dtype != rounded.dtype or not torch.equal(actual, rounded):
                    raise ConversionError(f"{file.name} holds other values than the checkpoint for {name}")
                if actual.dtype != expected.dtype and actual.numel():
                    largest = max(largest, (actual.double() - expected.double()).abs().max().item())
                compared.add(name)
                values += actual.numel()
    if missing := state_dict.keys() - compared:
        raise ConversionError(f"{len(missing)} entries were not written, {min(missing)} first")
    return {"entries": len(compared), "values": values, "largest_difference": largest}


def _not_finite(tensor: torch.Tensor) -> int:
    """Counts values that are not finite. Minimum and maximum, NaN included, need no memory; a mask is built only if needed."""
    if tensor.numel() == 0 or all(extreme.isfinite() for extreme in tensor.aminmax()):
        return 0
    return tensor.numel() - int(tensor.isfinite().sum())


def example_input(size: int, num_channels: int = 3) -> torch.Tensor:
    """Returns the fixed input of the output check, (1, num_channels, size, size)."""
    return torch.randn(1, num_channels, size, size, generator=torch.Generator().manual_seed(0))


def verify_outputs(plan: Plan, folder: Path) -> dict:
    """Loads the folder and runs the model twice: outputs must be finite and equal."""
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
    for names in (
        ("logits", "pred_boxes"),
        ("scores", "boxes"),
        ("logits",),
        ("class_queries_logits", "masks_queries_logits"),
    ):
        if all(getattr(outputs, name, None) is not None for name in names):
            return [getattr(outputs, name) for name in names]
    return list(outputs.feature_maps)
