"""The command line of the example programs: flags, optionally after a YAML file with flags (see `recipes/`)."""

import difflib
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments


@dataclass
class RecipeFlags:
    """What recipes state and `TrainingArguments` has no flag for; turned into flags that it has."""

    total_train_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "images per step over all devices; --gradient_accumulation_steps follows from it, "
            "--per_device_train_batch_size and the number of devices"
        },
    )
    warmup_epochs: float | None = field(
        default=None, metadata={"help": "warm-up in epochs; --warmup_steps follows from it and --num_train_epochs"}
    )


def parse_flags(argv: list[str] | None, *classes: type) -> tuple:
    """An instance of each dataclass from the command line.

    `program.py [FILE.yaml] [--flag value ...]`: the keys of the file are flags, and flags after it override it. Where one of
    the classes is a `TrainingArguments`, the flags of `RecipeFlags` are there as well.

    Args:
        argv: the command line without the program's name; that of the process if None.
        classes: the dataclasses, as for `HfArgumentParser`.

    Raises:
        ValueError: if the file is not a mapping of flags to values, has a key that is no flag of the program, or the total
            batch cannot be made of the batch per device.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    trains = next((i for i, c in enumerate(classes) if issubclass(c, TrainingArguments)), None)
    if trains is None:
        parsed = HfArgumentParser(classes)
        return parsed.parse_args_into_dataclasses(args=_with_file(argv, classes))

    parser = HfArgumentParser((*classes, RecipeFlags))
    argv = _with_file(argv, (*classes, RecipeFlags))
    *result, recipe = parser.parse_args_into_dataclasses(args=argv)
    follows = _accumulation(recipe, result[trains], argv) + _warmup(recipe, result[trains], argv)
    if follows:
        # once more: TrainingArguments hands what it is made with to accelerate and DeepSpeed
        *result, _ = parser.parse_args_into_dataclasses(args=argv + follows)
    return tuple(result)


def _with_file(argv: list[str], classes: tuple[type, ...]) -> list[str]:
    """Writes out the YAML file that `argv` may begin with; what follows it comes later and so wins."""
    if not argv or not argv[0].endswith((".yaml", ".yml")):
        return argv
    file = Path(argv[0])
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{file} must map flags to values, it is {type(values).__name__}")
    known = [f.name for c in classes for f in fields(c) if f.init]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"{file}: {name!r} is no flag of this program" + (f"; did you mean {close[0]!r}?" if close else "")
            )
    flags = []
    for name, value in values.items():
        if value is not None:
            items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, items)]
    return flags + argv[1:]


def _given(flag: str, argv: list[str]) -> bool:
    return any(argument.partition("=")[0] == f"--{flag}" for argument in argv)


def _accumulation(recipe: RecipeFlags, training: TrainingArguments, argv: list[str]) -> list[str]:
    total = recipe.total_train_batch_size
    if total is None:
        return []
    at_once = training.train_batch_size * training.world_size
    steps, rest = divmod(total, at_once)
    if total < 1 or rest:
        raise ValueError(
            f"`total_train_batch_size` must be a multiple of the {at_once} images that "
            f"{training.world_size} processes take at once (`per_device_train_batch_size` "
            f"{training.per_device_train_batch_size}), got {total}"
        )
    if _given("gradient_accumulation_steps", argv) and training.gradient_accumulation_steps != steps:
        raise ValueError(
            f"`gradient_accumulation_steps` {training.gradient_accumulation_steps} makes a batch of "
            f"{training.gradient_accumulation_steps * at_once}, not of `total_train_batch_size` {total}; leave it out"
        )
    return ["--gradient_accumulation_steps", str(steps)]


def _warmup(recipe: RecipeFlags, training: TrainingArguments, argv: list[str]) -> list[str]:
    epochs = recipe.warmup_epochs
    if epochs is None or _given("warmup_steps", argv):
        return []
    if training.max_steps > 0:
        raise ValueError("`warmup_epochs` is a part of `num_train_epochs`; with `max_steps`, give `warmup_steps`")
    if not 0 <= epochs < training.num_train_epochs:
        raise ValueError(
            f"`warmup_epochs` must be at least 0 and below `num_train_epochs` {training.num_train_epochs}, got {epochs}"
        )
    return ["--warmup_steps", repr(epochs / training.num_train_epochs)]
