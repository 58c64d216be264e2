"""In: exceptions. Out: messages of one line."""

import os
import re
import traceback
from collections.abc import Iterable


_TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")


class ConversionError(Exception):
    """Ends a conversion with one line and exit status 1."""


def one_line(text: str) -> str:
    """Returns the text in one line, without terminal codes, control characters and signatures in URLs."""
    text = _QUERY.sub(r"\1", _TERMINAL_CODE.sub("", text))
    text = "".join(c if c.isprintable() or c.isspace() else "?" for c in text)
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message; its class if the message is empty."""
    lines = (line for line in map(one_line, str(error).splitlines()) if line)
    return next(lines, type(error).__name__)


def describe(error: Exception) -> str:
    """Describes any exception in one line; for unexpected ones with the class and the place in the code."""
    if isinstance(error, ConversionError):
        return one_line(str(error))
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        return one_line(": ".join([" -> ".join(names), error.strerror] if names else [error.strerror]))
    if isinstance(error, OSError):
        return first_line(error)
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" in {os.path.basename(place[0].filename)}, line {place[0].lineno}" if place else ""
    return (
        f"unexpected {type(error).__name__}{where}: {first_line(error)} (this is a fault of the program: please report "
        "it with the traceback, which `python -X dev -m ...` shows)"
    )


def listed(names: Iterable[str], shown: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f", ... ({len(names) - shown} more)" if len(names) > shown else "")
