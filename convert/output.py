"""In: a target folder. Out: a work folder beside it, with a lock on the target for one conversion at a time."""

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import ConversionError, describe


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Marks a work folder: folders of a similar name without it belong to the user and are kept.
_MARKER = "work-folder-of-a-conversion"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def resolve(output: Path) -> Path:
    """Returns the absolute path without symbolic links: one folder has one lock.

    Raises:
        ConversionError: if no file can have this name.
    """
    try:
        os.fsencode(output).decode()
        return Path(os.path.realpath(output))
    except (OSError, ValueError) as error:
        raise ConversionError(f"--output {str(output)!r} cannot be a file's name: {error}") from error


@contextlib.contextmanager
def workplace(output: Path) -> Iterator[Path]:
    """Within the block, locks the target and provides a new empty work folder on its file system, removed at the end.

    Leftovers of killed conversions into the same target are removed first; the kernel has released their locks.

    Args:
        output: from `resolve`; its parents are created.

    Raises:
        ConversionError: if another conversion holds the lock, or nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(output)
    except OSError as error:
        raise ConversionError(f"cannot write {output}: {describe(error)}") from error
    work = None
    try:
        try:
            if lock is not None:
                for leftover in _leftovers(output):
                    _remove(leftover)
            work = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
            (work / _MARKER).touch()
        except OSError as error:
            raise ConversionError(f"cannot write {output}: {describe(error)}") from error
        yield work
    finally:
        if work is not None:
            with contextlib.suppress(OSError):  # the next conversion tries again and reports the error
                _remove(work)
        if lock is not None:
            _unlock(output, lock)


def sweep(output: Path) -> None:
    """Removes leftovers of killed conversions beside a finished target."""
    with contextlib.suppress(ConversionError, OSError):  # busy or read-only: nothing depends on the removal
        if _leftovers(output) or _lock_file(output).is_file():
            with workplace(output):
                pass


def publish(work: Path, output: Path) -> None:
    """Renames the result at `work` to its final name, atomically.

    Raises:
        ConversionError: if anything but an empty folder has this name by now.
    """
    try:
        if output.is_dir() and (os.name == "nt" or work.is_file()):
            output.rmdir()
        if work.is_file() and output.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(output))
        os.replace(work, output)
    except OSError as error:
        raise ConversionError(f"cannot give the result its name {output}: {error.strerror}") from error


def _prefix(output: Path) -> str:
    return f".{output.name}.unfinished-"


def _leftovers(output: Path) -> list[Path]:
    """Lists the work folders of this target. An empty one without a marker counts: its conversion was killed at the start."""
    return [
        path
        for path in output.parent.iterdir()
        if path.name.startswith(_prefix(output))
        and path.is_dir()
        and not path.is_symlink()
        and ((path / _MARKER).is_file() or not any(path.iterdir()))
    ]


def _remove(work: Path) -> None:
    """Removes a work folder, its marker last: the next conversion completes a killed removal."""
    for path in work.iterdir():
        if path.name != _MARKER:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(work)


def _lock_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.conversion.lock")


def _lock(output: Path) -> int | None:
    """Returns the descriptor that holds the lock; None on a file system without locks."""
    file = _lock_file(output)
    busy = ConversionError(f"another conversion is writing {output}: run this again when that one has ended")
    if fcntl is None:  # Windows deletes the file when the process ends
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        except FileExistsError:
            raise busy from None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the last holder may have removed the file meanwhile: this lock would be on a deleted file
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise busy from None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            with contextlib.suppress(OSError):
                os.unlink(file)
            print(f"note: the file system of {output} has no locks ({error.strerror})", file=sys.stderr)
            return None
        os.close(descriptor)


def _unlock(output: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        if (
            fcntl is not None and os.fstat(descriptor).st_size == 0
        ):  # a lock file is empty: one with content belongs to the user
            os.unlink(_lock_file(output))
    os.close(descriptor)
