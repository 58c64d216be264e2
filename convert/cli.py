"""In: the command line of a converter. Out: its exit status, and one line per error."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from .conversion import Plan, convert, is_finished, read_report, settings_of, size_in_bytes
from .errors import ConversionError, describe, listed
from .hub import check_repository, push
from .output import resolve, sweep, workplace
from .source import Source, find


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
    result.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="store the weights so; absent: as in the source"
    )
    result.add_argument("--push-to-hub", metavar="REPO", help="upload the folder to this repository")
    result.add_argument("--private", action="store_true", help="create the repository as a private one")
    result.add_argument(
        "--remote-code", action=argparse.BooleanOptionalAction, default=False, help="add this package's code to it"
    )
    result.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="check what was written")
    result.add_argument(
        "--max-shard-size", default="2GB", help="largest weight file; also the memory beyond the weights"
    )


def run(
    make_plan: Callable[[Source, argparse.Namespace], Plan], arguments: argparse.Namespace, task: str, label: str = ""
) -> None:
    """Converts unless the output is finished already, prints the report, and uploads.

    Args:
        make_plan: builds the task's `Plan`.
        arguments: parsed by `parser`.
        task: the task of the `Plan`.
        label: prefix of the printed lines.

    Raises:
        ConversionError: if a step fails.
    """
    output = resolve(arguments.output)
    if arguments.push_to_hub:
        check_repository(arguments.push_to_hub)
    size_in_bytes(arguments.max_shard_size)  # checked before anything is read
    report = read_report(output)
    converted = report["source"]["sha256"] if report is not None else None
    source = find(arguments.source, arguments.config, arguments.revision, converted)
    settings = settings_of(
        task,
        source,
        dtype=arguments.dtype,
        ema=arguments.ema,
        remote_code=arguments.remote_code,
        max_shard_size=arguments.max_shard_size,
    )
    prefix = f"{label}: " if label else ""
    if is_finished(output, source, settings, arguments.verify):
        sweep(output)
        print(f"{prefix}finished already, in {output}")
    else:
        with workplace(output) as work:
            if is_finished(output, source, settings, arguments.verify):
                print(f"{prefix}finished meanwhile by another conversion, in {output}")
            else:
                print(f"{prefix}converting {source.file}", flush=True)
                plan = make_plan(source, arguments)
                report = convert(
                    plan, output, work, settings, verify=arguments.verify, repository=arguments.push_to_hub
                )
                print(json.dumps(report, indent=2))
                if source.left_out:
                    print(
                        f"left out of {source.file}: other parts ({len(source.left_out)}): {listed(source.left_out)}"
                    )
                if source.unknown_fields:
                    print(f"fields of the configuration without effect: {listed(source.unknown_fields)}")
                if plan.ignored:
                    print(f"left out of {source.file}: tensors ({len(plan.ignored)}): {listed(plan.ignored)}")
                print(f"wrote {output}")
    if arguments.push_to_hub:
        print(f"uploaded to {push(output, arguments.push_to_hub, arguments.private)}")


def main(action: Callable[[], None]) -> int:
    """Runs a command; an error becomes one line and exit status 1.

    Progress bars are shown on terminals only: in a file, an interrupted bar and the error would share a line.
    """
    terminal = sys.stderr.isatty()
    hide = not terminal and logging.is_progress_bar_enabled()
    start = "\n" if terminal else ""
    if hide:
        logging.disable_progress_bar()  # bars of transformers and huggingface_hub
    try:
        action()
    except KeyboardInterrupt:
        print(f"{start}error: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if sys.flags.dev_mode and not isinstance(error, ConversionError):
            raise
        print(f"{start}error: {describe(error)}", file=sys.stderr)
        return 1
    finally:
        if hide:
            logging.enable_progress_bar()
    return 0
