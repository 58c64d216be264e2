"""`--reverse`: from a folder that transformers can load to a `.pth` file of the official code."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from . import cli
from .conversion import Plan
from .errors import ConversionError, describe, first_line, listed
from .output import publish, resolve, workplace
from .source import Source


# The tensors of a model under the official names.
OfficialStateDict = Callable[[PreTrainedModel], dict[str, torch.Tensor]]


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reverse",
        action="store_true",
        help="the other way: SOURCE is such a folder, --output the .pth file to write",
    )


def run(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    make_plan: Callable[[Source, argparse.Namespace], Plan],
    task: str,
    classes: dict[type[PreTrainedModel], OfficialStateDict],
    entry: str,
) -> int:
    """Converts as the command line says, in either direction, and returns the exit status.

    Args:
        parser: of `cli.parser`, with `add_option`.
        argv: of the command line.
        make_plan, task: as for `cli.run`.
        classes: of the models that can be turned back.
        entry: of the file, which holds the tensors.
    """
    arguments = parser.parse_args(argv)
    if not arguments.reverse:
        return cli.main(lambda: cli.run(make_plan, arguments, task))
    unused = [
        "--" + name.replace("_", "-")
        for name, value in vars(arguments).items()
        if name not in ("source", "output", "reverse") and value != parser.get_default(name)
    ]
    if unused:
        parser.error(f"--reverse has no use for {', '.join(unused)}")
    return cli.main(lambda: reverse(arguments.source, arguments.output, task, classes, entry))


def reverse(
    folder: str, output: Path, task: str, classes: dict[type[PreTrainedModel], OfficialStateDict], entry: str
) -> None:
    """Writes `{entry: state dict}` in the official names, from a folder that transformers can load.

    Raises:
        ConversionError: if the folder does not hold all of the model, `output` exists, or it cannot be written.
    """
    output = resolve(output)
    if output.exists():
        raise ConversionError(f"{output} exists already")
    try:
        config_class = type(AutoConfig.from_pretrained(folder))
        model_class = next((one for one in classes if one.config_class is config_class), None)
        if model_class is None:
            known = ", ".join(one.config_class.__name__ for one in classes)
            raise ConversionError(f"{folder} holds a {config_class.__name__}, expected {known}")
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConversionError(f"cannot load {folder}: {first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            raise ConversionError(
                f"{folder} is no whole {task} model, it has {kind.replace('_', ' ')}: {listed(names)}"
            )
    state_dict = classes[model_class](model)
    ordered = {name: state_dict[name].contiguous() for name in sorted(state_dict, key=dot_natural_key)}
    with workplace(output) as work:
        file = work / "result.pth"
        try:
            torch.save({entry: ordered}, file)
        except (OSError, RuntimeError) as error:
            reason = describe(error) if isinstance(error, OSError) else first_line(error)
            raise ConversionError(f"cannot write {output}: {reason}") from error
        publish(file, output)
    print(f"wrote {output}")
