"""In: a command line, optionally with a YAML file of flags (see `recipes/`) first. Out: checked dataclasses."""

import argparse
import difflib
import json
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from data import InputError, one_line
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool


@dataclass
class RecipeFlags:
    """Flags of recipes that `TrainingArguments` lacks; they are converted to flags of it."""

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


class _Parser(HfArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(message)

    def flags(self) -> dict[str, argparse.Action]:
        """Maps field names to their argparse actions."""
        return {action.dest: action for action in reversed(self._actions) if action.dest != "help"}

    def given(self, argv: list[str]) -> dict[str, object]:
        """Returns the fields that a command line sets, in any spelling of their flags, and their values."""
        absent = object()
        namespace = argparse.Namespace(**dict.fromkeys(self.flags(), absent))
        self.parse_known_args(argv, namespace)
        return {name: value for name, value in vars(namespace).items() if value is not absent}

    def parse(self, argv: list[str]) -> list:
        """Creates an instance of each dataclass."""
        try:
            *result, rest = self.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
        except InputError:
            raise
        except (ValueError, TypeError) as error:  # raised by the classes' own checks
            raise InputError(one_line(error)) from error
        if rest:
            name = rest[0].lstrip("-").partition("=")[0]
            raise InputError(f"{rest[0]} is no flag of this program, nor the value of one{self.suggestion(name)}")
        return result

    def suggestion(self, name: str) -> str:
        close = difflib.get_close_matches(name, self.flags(), n=1)
        return f"; did you mean {close[0]!r}?" if close else ""


def parse_flags(argv: list[str] | None, *classes: type) -> tuple:
    """Creates an instance of each dataclass from the command line.

    `program.py [FILE.yaml] [--flag value ...]`: the keys of the file are flags; later flags override them. With a
    `TrainingArguments` among the classes, the flags of `RecipeFlags` are accepted too.

    Values in the file mean the same as on the command line: `no` is the text "no", and 1e-4 is a number. `null` is None.

    Args:
        argv: the command line without the program's name; by default that of the process.
        classes: the dataclasses, as for `HfArgumentParser`.

    Raises:
        InputError: if a flag or a value cannot be used, the file is not a mapping of flags to values, has a key that is no flag
            of the program, or one twice, or the total batch cannot be made of the batch per device.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    trains = next((i for i, c in enumerate(classes) if issubclass(c, TrainingArguments)), None)
    if trains is not None:
        classes = (*classes, RecipeFlags)
    parser = _Parser(classes)
    argv = _with_file(argv, parser, classes)
    result = parser.parse(argv)
    if trains is None:
        return tuple(result)

    given, training, recipe = parser.given(argv), result[trains], result[-1]
    if "load_best_model_at_end" in given and (why := getattr(training, "why_not_the_best", None)) is not None:
        raise InputError(f"--load_best_model_at_end is not possible: {why}")
    follows = _accumulation(recipe, training, given) + _warmup(recipe, training, given)
    if follows:
        # constructed again: TrainingArguments passes its values to accelerate and DeepSpeed on construction
        result = parser.parse(argv + follows)
    return tuple(result[:-1])


def make_output_dir(path: str) -> Path:
    """The folder of `--output_dir`, made if it does not exist.

    Raises:
        InputError: if it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be made: {error.strerror}") from error
    return folder


def _with_file(argv: list[str], parser: _Parser, classes: tuple[type, ...]) -> list[str]:
    """Replaces a YAML file at the start of `argv` by its flags; the flags after it override them."""
    if not argv or not argv[0].endswith((".yaml", ".yml")):
        return argv
    file = Path(argv[0])
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(root, yaml.MappingNode):
        kind = {"sequence": "list", "scalar": "text"}.get(getattr(root, "id", None), "empty")
        raise InputError(f"{file} must map flags to values, it is {kind}")
    hints = {name: hint for c in classes for name, hint in typing.get_type_hints(c).items()}
    known, lines, flags = parser.flags(), {}, []
    for key, value in root.value:
        name, line = key.value, key.start_mark.line + 1
        if not isinstance(name, str) or name not in known:
            raise InputError(f"{file}, line {line}: {name!r} is no flag of this program{parser.suggestion(str(name))}")
        if name in lines:
            raise InputError(f"{file}: {name} is there twice, in lines {lines[name]} and {line}; one was expected")
        lines[name] = line
        where = f"{file}, line {line}: {name}"
        if value.tag == "tag:yaml.org,2002:null":
            if type(None) not in typing.get_args(hints[name]):
                raise InputError(f"{where} is null; a value was expected, or no such line")
            parser.set_defaults(**{name: None})
            continue
        words = _words(value, known[name], where)
        try:
            parser.parse_known_args(words)
        except InputError as error:
            raise InputError(f"{where}: {str(error).partition(': ')[2] or error}") from error
        flags += words
    return flags + argv[1:]


def _words(value: yaml.Node, action: argparse.Action, where: str) -> list[str]:
    """Returns a file's flag and value as words of a command line."""
    flag = action.option_strings[0]
    if isinstance(value, yaml.SequenceNode):
        if action.nargs != "+":
            raise InputError(f"{where} is a list; one value was expected")
        if not all(isinstance(item, yaml.ScalarNode) for item in value.value):
            raise InputError(f"{where} is a list of lists or mappings; a list of values was expected")
        return [flag, *(item.value for item in value.value)]
    if isinstance(value, yaml.MappingNode):
        return [f"{flag}={json.dumps(_parsed(value, where))}"]
    text = value.value
    if action.type is string_to_bool:
        text = {"on": "true", "off": "false"}.get(text.lower(), text)
    return [f"{flag}={text}"]


def _parsed(node: yaml.Node, where: str) -> object:
    """Converts a value within a mapping to JSON; 1e-4, text for YAML, becomes a number."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise InputError(f"{where}: {twice} is there twice; one was expected")
        return {key.value: _parsed(value, where) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_parsed(item, where) for item in node.value]
    if node.style is not None:  # in quotes
        return node.value
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", node.value):
        return float(node.value)
    value = yaml.safe_load(node.value)
    return value if value is None or isinstance(value, (bool, int, float)) else node.value


def _accumulation(recipe: RecipeFlags, training: TrainingArguments, given: dict[str, object]) -> list[str]:
    total = recipe.total_train_batch_size
    if total is None:
        return []
    at_once = training.train_batch_size * training.world_size
    steps, rest = divmod(total, at_once)
    if total < 1 or rest:
        raise InputError(
            f"`total_train_batch_size` must be a multiple of the {at_once} images that "
            f"{training.world_size} processes take at once (`per_device_train_batch_size` "
            f"{training.per_device_train_batch_size}), got {total}"
        )
    if given.get("gradient_accumulation_steps", steps) != steps:
        raise InputError(
            f"`gradient_accumulation_steps` {training.gradient_accumulation_steps} makes a batch of "
            f"{training.gradient_accumulation_steps * at_once}, not of `total_train_batch_size` {total}; leave it out"
        )
    return ["--gradient_accumulation_steps", str(steps)]


def _warmup(recipe: RecipeFlags, training: TrainingArguments, given: dict[str, object]) -> list[str]:
    epochs = recipe.warmup_epochs
    if epochs is None or "warmup_steps" in given:
        return []
    if training.max_steps > 0:
        raise InputError("`warmup_epochs` is a part of `num_train_epochs`; with `max_steps`, give `warmup_steps`")
    if not 0 <= epochs < training.num_train_epochs:
        raise InputError(
            f"`warmup_epochs` must be at least 0 and below `num_train_epochs` {training.num_train_epochs}, got {epochs}"
        )
    return ["--warmup_steps", repr(epochs / training.num_train_epochs)]
