"""In: an output folder. Out: a lock on it, or a claim where the storage has no locks: one run writes at a time."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs
from data import InputError, one_line

from .flags import BatchArguments
from .storage import CLAIM, LOCK, UNFINISHED, open_filesystem


# Seconds between writing a claim and reading those of others, between renewals, and until a claim is stale.
SETTLE, RENEWAL, EXPIRY = 3.0, 60.0, 600.0


@contextmanager
def sole_writer(arguments: BatchArguments) -> Iterator[Callable[[], None]]:
    """Creates the output folder, locks or claims it within the block, and removes unfinished files of dead runs.

    Yields:
        A function that raises an `InputError` if another run may have taken the folder over.

    Raises:
        InputError: if another run writes into the folder, or it cannot be created.
    """
    filesystem, root = open_filesystem(arguments.output)
    try:
        filesystem.create_dir(root, recursive=True)
        local = isinstance(filesystem, pa.fs.LocalFileSystem) and os.name == "posix"
        check, release = (lock if local else claim)(arguments, filesystem, root)
    except InputError:
        raise
    except Exception as error:  # every storage raises its own kinds
        raise InputError(f"--output {arguments.output} cannot be written: {one_line(error)}") from error
    try:
        for entry in filesystem.get_file_info(pa.fs.FileSelector(root)):
            if entry.base_name.startswith(UNFINISHED):
                filesystem.delete_file(entry.path)
        yield check
    finally:
        release()


def in_use(arguments: BatchArguments, by: dict) -> InputError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(by["start"]))
    return InputError(
        f"--output {arguments.output} is in use: process {by['process']} on {by['host']} has been writing there since "
        f"{since}; wait for it, or name another folder"
    )


def this_run() -> dict:
    return {"host": socket.gethostname(), "process": os.getpid(), "start": time.time()}


def lock(arguments: BatchArguments, filesystem: pa.fs.FileSystem, root: str) -> tuple[Callable, Callable]:
    """Locks a local folder until this process ends; returns the check that `sole_writer` yields, and the release."""
    import fcntl

    file = open(f"{root}/{LOCK}", "a+")  # noqa: SIM115 - closing the file releases the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        file.close()
        if holder:
            raise in_use(arguments, json.loads(holder)) from None
        raise InputError(f"--output {arguments.output} is in use: another run has just begun there") from None
    except OSError:  # a network filesystem without locks
        file.close()
        return claim(arguments, filesystem, root)
    file.truncate(0)
    file.write(json.dumps(this_run()))
    file.flush()
    return (lambda: None), file.close


def claim(arguments: BatchArguments, filesystem: pa.fs.FileSystem, root: str) -> tuple[Callable, Callable]:
    """Claims a folder on storage without locks but with consistent listings; returns check and release as `lock` does.

    A run writes its claim, waits, and reads the claims of others. It gives way to a run that is working already and to an
    older one that is waiting. Of two runs, the later writer sees the other's claim: both never work at once.
    """
    path, mine = f"{root}/{CLAIM}{uuid.uuid4().hex}.json", this_run() | {"working": False}
    stop = threading.Event()

    def write() -> None:
        renewed = time.time()
        with filesystem.open_output_stream(path) as stream:
            stream.write(json.dumps(mine | {"renewed": renewed}).encode())
        mine["renewed"] = renewed

    def exists() -> bool:
        return filesystem.get_file_info(path).is_file

    def renew() -> None:
        while not stop.wait(RENEWAL):
            with suppress(Exception):  # the next renewal tries again; `check` ends the run if the fault lasts
                if exists():
                    write()

    def check() -> None:
        if time.time() - mine["renewed"] > EXPIRY / 2:
            raise InputError(
                f"--output {arguments.output}: the claim {path} could not be renewed, and another run may have taken over"
            )

    def release() -> None:
        stop.set()
        thread.join()
        if exists():
            filesystem.delete_file(path)

    write()
    try:
        time.sleep(SETTLE)
        for entry in filesystem.get_file_info(pa.fs.FileSelector(root)):
            if not entry.base_name.startswith(CLAIM) or entry.base_name == PurePosixPath(path).name:
                continue
            try:
                with filesystem.open_input_stream(entry.path) as stream:
                    other = json.loads(stream.read())
            except FileNotFoundError:  # its run has ended meanwhile
                continue
            if other["renewed"] < time.time() - EXPIRY:
                filesystem.delete_file(entry.path)
            elif other["working"] or (other["start"], entry.base_name) < (mine["start"], PurePosixPath(path).name):
                raise in_use(arguments, other)
        mine["working"] = True
        write()
    except BaseException:
        filesystem.delete_file(path)
        raise
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    return check, release
