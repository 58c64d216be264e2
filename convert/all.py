"""python -m convert.all --output DIR: every released checkpoint, one folder each. Run again, it does what is missing."""

import argparse
import copy
import sys
from pathlib import Path

from . import backbone, classification, cli, mask2former, upernet
from .conversion import is_finished
from .errors import ConversionError
from .released import RELEASED


PLANS = {
    "classification": classification.make_plan,
    "upernet": upernet.make_plan,
    "mask2former": mask2former.make_plan,
    "backbone": backbone.make_plan,
}


def run(arguments: argparse.Namespace) -> None:
    """Converts the chosen checkpoints one after the other; a failure does not keep the others from being done.

    Raises:
        ConversionError: at the end, naming those that failed.
    """
    unknown = set(arguments.only or ()) - RELEASED.keys()
    if unknown:
        raise ConversionError(f"not released: {', '.join(sorted(unknown))}; released are {', '.join(RELEASED)}")
    failed = []
    for name, released in RELEASED.items():
        if arguments.only and name not in arguments.only:
            continue
        one = copy.copy(arguments)
        local = arguments.source_folder / released.file if arguments.source_folder else None
        one.source = str(local) if local is not None and local.is_file() else name
        one.output = arguments.output / name
        one.push_to_hub = f"{arguments.push_to_hub}/{name}" if arguments.push_to_hub else None
        print(f"{name}: {'finished already' if is_finished(one.output) else 'converting ' + one.source}", flush=True)
        try:
            cli.run(PLANS[released.task], one)
        except ConversionError as error:
            print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
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
