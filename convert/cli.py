"""The command line that all converters share."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .conversion import Plan, convert, is_finished
from .errors import ConversionError
from .hub import push
from .source import Source, find


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "source",
        help="a .pth file, a folder or Hub repository in the published layout, or a released checkpoint's name",
    )
    add_options(result)
    return result


def add_options(result: argparse.ArgumentParser) -> None:
    result.add_argument("--output", type=Path, required=True, help="folder to write")
    result.add_argument("--config", help="JSON with the official fields, for a file of no released name")
    result.add_argument("--revision", help="commit of the source's Hub repository; pins the download")
    result.add_argument("--ema", action="store_true", help="convert the averaged weights (`model_ema`)")
    result.add_argument("--dtype", choices=DTYPES, help="store the weights so; float32 as they are if absent")
    result.add_argument("--push-to-hub", metavar="REPO", help="upload the folder to this repository")
    result.add_argument("--private", action="store_true", help="create the repository as a private one")
    result.add_argument(
        "--remote-code", action=argparse.BooleanOptionalAction, default=False, help="add this package's code to it"
    )
    result.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="check what was written")
    result.add_argument(
        "--max-shard-size", default="2GB", help="largest weight file; also the memory beyond the weights"
    )


def run(make_plan: Callable[[Source, argparse.Namespace], Plan], arguments: argparse.Namespace) -> None:
    """Converts, prints the report, uploads. What is finished already is not converted again.

    Raises:
        ConversionError: if any of it fails.
    """
    if is_finished(arguments.output):
        print(f"{arguments.output} is finished already")
    else:
        source = find(arguments.source, arguments.config, arguments.revision)
        report = convert(
            make_plan(source, arguments),
            arguments.output,
            dtype=DTYPES[arguments.dtype] if arguments.dtype else None,
            remote_code=arguments.remote_code,
            verify=arguments.verify,
            max_shard_size=arguments.max_shard_size,
            repository=arguments.push_to_hub,
        )
        print(json.dumps(report, indent=2))
        print(f"wrote {arguments.output}")
    if arguments.push_to_hub:
        print(f"uploaded to {push(arguments.output, arguments.push_to_hub, arguments.private)}")


def main(action: Callable[[], None]) -> int:
    """Runs a command; what a user can act on becomes one line and the status 1."""
    try:
        action()
    except ConversionError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
