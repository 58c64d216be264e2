"""python -m convert.all --output DIR: converts every released checkpoint into a folder; a second run converts missing ones."""

import argparse
import copy
import os
import sys
from pathlib import Path

from . import backbone, classification, cli, detection, mask2former, upernet
from .conversion import size_in_bytes
from .errors import ConversionError, describe, listed
from .released import RELEASED


PLANS = {
    "classification": classification.make_plan,
    "upernet": upernet.make_plan,
    "mask2former": mask2former.make_plan,
    "detection": detection.make_plan,
    "backbone": backbone.make_plan,
}


def run(arguments: argparse.Namespace) -> None:
    """Converts the chosen checkpoints one after the other and continues after failures.

    Raises:
        ConversionError: at the end, with the names of the failed checkpoints.
    """
    unknown = set(arguments.only or ()) - RELEASED.keys()
    if unknown:
        raise ConversionError(f"not released: {', '.join(sorted(unknown))}; released are {', '.join(RELEASED)}")
    size_in_bytes(arguments.max_shard_size)
    folder = arguments.source_folder
    if folder is not None:
        if not folder.is_dir():
            raise ConversionError(f"--source-folder {folder} is not a folder")
        known = {file for released in RELEASED.values() for file in released.files}
        if others := sorted(file.name for file in folder.iterdir() if file.name not in known):
            print(f"{len(others)} entries of {folder} have no released file's name and are left out: {listed(others)}")
    failed = []
    for name, released in RELEASED.items():
        if arguments.only and name not in arguments.only:
            continue
        one = copy.copy(arguments)
        # takes any entry of the file's name; a folder or a broken link fails with its own message
        local = (folder / file for file in released.files) if folder is not None else ()
        one.source = next((str(file) for file in local if os.path.lexists(file)), name)
        one.output = arguments.output / name
        one.push_to_hub = f"{arguments.push_to_hub}/{name}" if arguments.push_to_hub else None
        try:
            cli.run(PLANS[released.task], one, released.task, name)
        except Exception as error:
            print(f"error: {name}: {describe(error)}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise ConversionError(f"{len(failed)} failed: {', '.join(failed)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Converts every released checkpoint that is not converted yet.")
    cli.add_options(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checkpoints alone")
    parser.add_argument("--source-folder", type=Path, help="where .pth files lie that need not be downloaded")
    arguments = parser.parse_args(argv)
    return cli.main(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
