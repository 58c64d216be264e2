"""In: paths and URLs. Out: files, read and written on local disks or object storage."""

import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs
from data import InputError, one_line


# Names of the program's files in an output folder.
RESULT = re.compile(r"part-[0-9a-f]{20}\.parquet")
SETTINGS, LOCK, CLAIM, UNFINISHED = "_settings.json", ".lock", ".run-", ".unfinished-"
TABLES = (".parquet", ".pq")


def open_filesystem(url: str) -> tuple[pa.fs.FileSystem, str]:
    """Returns the filesystem of a path or URL, and the path in it.

    Raises:
        InputError: if the URL is malformed, or no installed package knows its scheme.
    """
    if "://" not in url:
        return pa.fs.LocalFileSystem(), absolute(url)
    try:
        try:
            # Names may contain blanks, non-ASCII letters and `#`; existing escapes such as `%20` are kept.
            escaped = quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", url), safe="%/:?=&@+,;~!$'()*[]")
            filesystem, path = pa.fs.FileSystem.from_uri(escaped)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            if "Unrecognized filesystem" not in str(error) and not isinstance(error, pa.ArrowNotImplementedError):
                raise
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(url)
            filesystem = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{url} cannot be opened: {one_line(error)}") from error
    if isinstance(filesystem, pa.fs.PyFileSystem):
        filesystem.handler.fs.invalidate_cache()  # workers in other processes change the listings
    return filesystem, path


def absolute(url: str) -> str:
    """Makes a path absolute; returns a URL unchanged."""
    if "://" in url:
        return url
    path = Path(url).absolute()
    return str(path.resolve() if ".." in path.parts else path)


def write_file(filesystem: pa.fs.FileSystem, root: str, name: str, write: Callable[[pa.NativeFile], object]) -> None:
    """Writes a file; it gets its name only when it is complete.

    Raises:
        InputError: if it cannot be written.
    """
    unfinished = f"{root}/{UNFINISHED}{uuid.uuid4().hex}"
    try:
        with filesystem.open_output_stream(unfinished) as stream:
            write(stream)
        filesystem.move(unfinished, f"{root}/{name}")
    except Exception as error:  # every storage raises its own kinds
        with suppress(Exception):  # the file may not exist
            filesystem.delete_file(unfinished)
        raise InputError(f"{root}/{name} cannot be written: {one_line(error)}") from error
