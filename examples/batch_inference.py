"""Classifies or embeds any number of images with InternImage on Ray Data: on a laptop, or the same on a cluster.

    python examples/batch_inference.py --input photos/ --output results --model OpenGVLab/internimage_t_1k_224
    python examples/batch_inference.py --input s3://bucket/images.parquet --output s3://bucket/embeddings --task embed \
        --model OpenGVLab/internimage_t_1k_224 --address auto --num_actors 8 --gpus_per_actor 1

Without arguments it writes scikit-learn's 1797 digits as image files and classifies them with the demo's model.

`--input` is a folder with images (and folders), a Parquet file or a folder of them, local or on any object storage that
pyarrow or an installed fsspec package knows. The images are cut into shards. Tasks read and decode a shard, actors with
the model compute it and write one Parquet file, which appears under its name when it is complete. So killed workers cost
time alone, and a second start goes on with what has no row yet, images that are new included. Files that are no input are
counted by reason; at the end every image of the input has one row, or the program says that this is not so.

The columns are `path` (of a row of a Parquet file: `file#row`), `error` (null, or why the image could not be read), and
`label`, `score`, `top_labels`, `top_scores`, or `embedding`, a list of fixed size: what the model feeds its classifier.
Scores are those of `pipeline("image-classification")` up to rounding, for any image processor.

One run at a time writes into an output folder; a second one ends with a message. A local folder is locked, and the lock
ends with its process, however that ends. On object storage a run renews a claim once a minute, and a claim that was not
renewed for ten minutes is taken over.

On a cluster every machine needs this package, and the input, the output and the model must be reachable from all.
"""

import hashlib
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
from data import METADATA, InputError, LeftOut, files_below, image_endings, one_line, read_image, run_program, unusable
from PIL import Image
from transformers import HfArgumentParser


# read when Ray is imported: nothing is reported to its makers
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@dataclass
class BatchArguments:
    input: str | None = field(
        default=None,
        metadata={"help": "images: a folder, a Parquet file, a folder of them, or a URL; digits if absent"},
    )
    output: str = field(default="outputs/batch_inference", metadata={"help": "folder or URL for the Parquet files"})
    model: str | None = field(
        default=None, metadata={"help": "an InternImage checkpoint, folder or Hub id; the demo's model if absent"}
    )
    task: str = field(default="classify", metadata={"help": "what to compute", "choices": ["classify", "embed"]})
    top_k: int | None = field(
        default=None, metadata={"help": "classes per image; 5, or all of a model that has fewer, if absent"}
    )
    image_column: str = field(
        default="image", metadata={"help": "Parquet input: column with the files' bytes, or with {bytes, path}"}
    )
    keep_columns: list[str] = field(
        default_factory=list, metadata={"help": "Parquet input: columns to copy to the output", "nargs": "+"}
    )
    shard_size: int = field(
        default=256, metadata={"help": "images per output file and per block in memory: 150 kB each at 224 x 224"}
    )
    batch_size: int = field(default=32, metadata={"help": "images per forward pass"})
    address: str | None = field(
        default=None, metadata={"help": "of a Ray cluster, or `auto`; starts Ray on this machine alone if absent"}
    )
    autoscaling: bool = field(
        default=False,
        metadata={"help": "the cluster adds machines when they are asked for: do not compare with what it has now"},
    )
    num_actors: int | None = field(
        default=None, metadata={"help": "copies of the model; by default one per GPU, or one per CPU"}
    )
    gpus_per_actor: float | None = field(default=None, metadata={"help": "by default 1 where there are GPUs, else 0"})
    threads_per_actor: int = field(default=1, metadata={"help": "threads of an actor on CPUs"})
    num_cpus: int | None = field(default=None, metadata={"help": "CPUs that a local Ray uses; all if absent"})
    object_store_mb: int = field(
        default=512, metadata={"help": "shared memory of a local Ray, for shards between decoding and the model"}
    )
    dtype: str = field(
        default="float32", metadata={"help": "of the model", "choices": ["float32", "float16", "bfloat16"]}
    )
    compare: bool = field(
        default=False, metadata={"help": "run the same images through a plain loop in this process, for its images/s"}
    )


# --------------------------------------------------------------------------------------------------------------- files


# Names that this program gives in an output folder.
RESULT = re.compile(r"part-[0-9a-f]{20}\.parquet")
SETTINGS, LOCK, CLAIM, UNFINISHED = "_settings.json", ".lock", ".run-", ".unfinished-"
TABLES = (".parquet", ".pq")


def open_filesystem(url: str) -> tuple[pa.fs.FileSystem, str]:
    """The filesystem of a path or URL, and the path in it.

    Raises:
        InputError: if the URL is none, or nothing that is installed knows its scheme.
    """
    if "://" not in url:
        return pa.fs.LocalFileSystem(), absolute(url)
    try:
        try:
            # A name may have blanks, letters beyond ASCII and `#` in it; `%20` and the like stay as they are.
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
        filesystem.handler.fs.invalidate_cache()  # of listings, which workers of other processes change
    return filesystem, path


def absolute(url: str) -> str:
    """A URL as it is; a path such that it is the same in every working directory."""
    if "://" in url:
        return url
    path = Path(url).absolute()
    return str(path.resolve() if ".." in path.parts else path)


def list_files(filesystem: pa.fs.FileSystem, root: str, left_out: LeftOut) -> list[PurePosixPath]:
    """The files of a folder and the folders below it, relative to it."""
    if isinstance(filesystem, pa.fs.LocalFileSystem):
        return [PurePosixPath(name.as_posix()) for name in files_below(root, left_out)]
    entries = filesystem.get_file_info(pa.fs.FileSelector(root, recursive=True))
    return [PurePosixPath(entry.path.strip("/")).relative_to(root.strip("/")) for entry in entries if entry.is_file]


def find_files(arguments: BatchArguments, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """The images and the Parquet files of the input, sorted; the other files go to `left_out`.

    Raises:
        InputError: if the input is not there or cannot be listed.
    """
    filesystem, root = open_filesystem(arguments.input)
    try:
        kind = filesystem.get_file_info(root).type
        if kind == pa.fs.FileType.NotFound:
            raise InputError(f"--input {arguments.input} does not exist")
        if kind == pa.fs.FileType.File:
            endings = (*image_endings(), *TABLES)
            if not root.lower().endswith(endings):
                raise InputError(f"--input {arguments.input} is neither an image nor a Parquet file by its ending")
            return ([], [root]) if root.lower().endswith(TABLES) else ([root], [])
        names = list_files(filesystem, root, left_out)
    except InputError:
        raise
    except Exception as error:  # every storage has its own kinds
        raise InputError(f"--input {arguments.input} cannot be read: {one_line(error)}") from error

    # Results, also of another output folder, are never input: they would change with each run.
    results = {name.parent for name in names if name.name == SETTINGS}
    own = (SETTINGS, LOCK, CLAIM, UNFINISHED)
    endings, images, tables, metadata = image_endings() | {*TABLES}, [], [], []
    for name in sorted(names):
        if name.parent in results and (RESULT.fullmatch(name.name) or name.name.startswith(own)):
            left_out.add("results of this program", name)
        elif reason := unusable(name, endings):
            left_out.add(reason, name)
        elif name.suffix.lower() not in TABLES:
            images.append(f"{root.rstrip('/')}/{name}")
        else:
            (metadata if name.name in METADATA else tables).append(name)
    if images:  # `metadata.parquet` beside images is about them
        for name in metadata:
            left_out.add("metadata of images", name)
        metadata = []
    if images and tables:
        raise InputError(
            f"--input {arguments.input} holds {len(images)} images ({images[0]}) and {len(tables)} Parquet files "
            f"({tables[0]}); a folder with one of the two was expected"
        )
    if not images and not tables + metadata:
        raise InputError(f"--input {arguments.input} holds no images and no Parquet files; {left_out}")
    return sorted(images), sorted(f"{root.rstrip('/')}/{name}" for name in tables + metadata)


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold images: bytes, or a struct that has `bytes`."""
    if pa.types.is_struct(kind):
        return any(kind[i].name == "bytes" and holds_images(kind[i].type) for i in range(kind.num_fields))
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks)


def find_shards(arguments: BatchArguments, left_out: LeftOut | None = None) -> list[dict]:
    """The input in shards: `source` (a Parquet file, or ""), the rows of it, and the images' paths.

    Args:
        arguments: the flags.
        left_out: gets the files that are no input.

    Raises:
        InputError: if there is nothing to read, or a column is missing or holds no images.
    """
    left_out = LeftOut() if left_out is None else left_out
    filesystem, _ = open_filesystem(arguments.input)
    images, tables = find_files(arguments, left_out)
    if taken := {"path", "error", "label", "score", "top_labels", "top_scores", "embedding"} & {
        *arguments.keep_columns
    }:
        raise InputError(f"--keep_columns {taken.pop()} is the name of a column of the output")
    if images and arguments.keep_columns:
        raise InputError(f"--keep_columns is for Parquet files, and --input {arguments.input} holds images")

    size, shards = arguments.shard_size, []
    for first in range(0, len(images), size):
        shards.append({"source": "", "rows": [], "paths": images[first : first + size]})
    for file in tables:
        try:
            with pa.parquet.ParquetFile(file, filesystem=filesystem) as table:
                schema, number = table.schema_arrow, table.metadata.num_rows
        except (OSError, pa.ArrowException):
            left_out.add("damaged, or no Parquet for all their ending", file)
            continue
        for column in (arguments.image_column, *arguments.keep_columns):
            if column not in schema.names:
                raise InputError(f"{file} has no column {column!r}, only {', '.join(schema.names)}")
        if not holds_images(kind := schema.field(arguments.image_column).type):
            raise InputError(
                f"{file}: the column {arguments.image_column!r} has the type {kind}; files' bytes, or {{bytes, path}}, were "
                "expected (--image_column)"
            )
        if not number:
            left_out.add("Parquet files without rows", file)
        for first in range(0, number, size):
            rows = list(range(first, min(first + size, number)))
            shards.append({"source": file, "rows": rows, "paths": [f"{file}#{row}" for row in rows]})
    if not shards:
        raise InputError(f"--input {arguments.input} holds no images; {left_out}")
    return shards


# -------------------------------------------------------------------------------------------------------------- output


def output_name(paths: list[str]) -> str:
    """The name of a shard's file: the same in every run, so that writing it twice changes nothing."""
    return f"part-{hashlib.sha256(chr(0).join(paths).encode()).hexdigest()[:20]}.parquet"


def write_file(filesystem: pa.fs.FileSystem, root: str, name: str, write: Callable[[pa.NativeFile], object]) -> None:
    """Writes a file that appears when it is complete.

    Raises:
        InputError: if it cannot be written.
    """
    unfinished = f"{root}/{UNFINISHED}{uuid.uuid4().hex}"
    try:
        with filesystem.open_output_stream(unfinished) as stream:
            write(stream)
        filesystem.move(unfinished, f"{root}/{name}")
    except Exception as error:  # every storage has its own kinds
        with suppress(Exception):  # it may not even be there
            filesystem.delete_file(unfinished)
        raise InputError(f"{root}/{name} cannot be written: {one_line(error)}") from error


# Seconds: from writing a claim to reading those of others; between renewals; until a claim counts as that of a dead run.
SETTLE, RENEWAL, EXPIRY = 3.0, 60.0, 600.0


@contextmanager
def sole_writer(arguments: BatchArguments) -> Iterator[Callable[[], None]]:
    """Makes the output folder, keeps other runs from writing into it, and removes what dead runs left unfinished.

    Yields:
        A function that raises an `InputError` if another run took the folder over.

    Raises:
        InputError: if another run writes into the folder, or it cannot be made.
    """
    filesystem, root = open_filesystem(arguments.output)
    try:
        filesystem.create_dir(root, recursive=True)
        local = isinstance(filesystem, pa.fs.LocalFileSystem) and os.name == "posix"
        check, release = (lock if local else claim)(arguments, filesystem, root)
    except InputError:
        raise
    except Exception as error:  # every storage has its own kinds
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
    """Locks a local folder for as long as this process lives; returns what `sole_writer` yields, and what ends the lock."""
    import fcntl

    file = open(f"{root}/{LOCK}", "a+")  # noqa: SIM115 - closing it gives the lock back
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
    """Claims a folder on storage without locks, whose listings show at once what was written; returns what `lock` does.

    A run writes its claim, waits, and gives way to a claim whose run works already or, of those that wait too, is older. Of
    two runs, the one that wrote later sees the other's claim, so they never work both.
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
            with suppress(Exception):  # is tried again; `check` ends the run where that lasts
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
            except FileNotFoundError:  # its run has just ended
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


def result_rows(arguments: BatchArguments, columns: list[str]) -> Iterator[tuple[str | None, ...]]:
    """The rows of all results in the output folder; `columns` are of text, and `path` is one of them.

    Raises:
        InputError: if a file is damaged, or no result.
    """
    filesystem, root = open_filesystem(arguments.output)
    files = result_files(filesystem, root)
    if not files:
        return
    schema = pa.schema([(column, pa.string()) for column in columns])
    try:
        dataset = pa.dataset.dataset(files, schema=schema, filesystem=filesystem, format="parquet")
        for batch in dataset.to_batches(columns=columns):
            if batch["path"].null_count:
                raise InputError(
                    f"--output {arguments.output} holds a {RESULT.pattern} that this program did not write"
                )
            yield from zip(*(batch[column].to_pylist() for column in columns), strict=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"--output {arguments.output} holds a damaged file; delete it and start again: {one_line(error)}"
        ) from error


def result_files(filesystem: pa.fs.FileSystem, root: str) -> list[str]:
    entries = filesystem.get_file_info(pa.fs.FileSelector(root))
    return sorted(entry.path for entry in entries if RESULT.fullmatch(entry.base_name))


def model_version(model: str | None) -> str | None:
    """Tells apart models of one name: the commit of the Hub, or a hash of what a folder holds of the model."""
    if model is None or not Path(model).is_dir():
        from transformers import AutoConfig

        return getattr(AutoConfig.from_pretrained(model), "_commit_hash", None) if model else None
    digest = hashlib.sha256()
    for pattern in ("config.json", "preprocessor_config.json", "*.safetensors", "*.bin"):
        for file in sorted(Path(model).glob(pattern)):
            digest.update(file.name.encode())
            with open(file, "rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
    return digest.hexdigest()[:20]


def check_settings(arguments: BatchArguments, filesystem: pa.fs.FileSystem, root: str) -> None:
    """Writes what the results depend on into the output folder, or compares it with what is there.

    Raises:
        InputError: if the output folder holds results of another kind.
    """
    settings = {"model": str(arguments.model), "task": arguments.task, "dtype": arguments.dtype}
    settings |= {"top_k": (arguments.top_k or 5) if arguments.task == "classify" else None}
    settings |= {"image_column": arguments.image_column, "keep_columns": arguments.keep_columns}
    settings["model_version"] = model_version(arguments.model)
    if not filesystem.get_file_info(f"{root}/{SETTINGS}").is_file:
        write_file(filesystem, root, SETTINGS, lambda stream: stream.write(json.dumps(settings, indent=1).encode()))
        return
    try:
        with filesystem.open_input_stream(f"{root}/{SETTINGS}") as stream:
            found = dict(json.loads(stream.read()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{root}/{SETTINGS} is damaged ({one_line(error)}); name another --output") from error
    if different := [key for key in settings if found.get(key) != settings[key]]:
        old, new = (", ".join(f"{key} {some.get(key)}" for key in different) for some in (found, settings))
        raise InputError(f"--output {arguments.output} holds results of {old}, not of {new}; name another --output")


def unfinished_shards(shards: list[dict], arguments: BatchArguments) -> list[dict]:
    """The shards that have images without a row, each with its `name` and with these images alone.

    Raises:
        InputError: if the output folder cannot be written, or holds results of another kind.
    """
    filesystem, root = open_filesystem(arguments.output)
    try:
        filesystem.create_dir(root, recursive=True)
        check_settings(arguments, filesystem, root)
    except OSError as error:
        raise InputError(f"--output {arguments.output} cannot be written: {one_line(error)}") from error
    done = {path for (path,) in result_rows(arguments, ["path"])}
    result = []
    for shard in shards:
        keep = [i for i, path in enumerate(shard["paths"]) if path not in done]
        paths = [shard["paths"][i] for i in keep]
        rows = [shard["rows"][i] for i in keep] if shard["source"] else []
        if paths:
            result.append({"name": output_name(paths), "source": shard["source"], "rows": rows, "paths": paths})
    return result


def account(shards: list[dict], arguments: BatchArguments) -> dict[str, str]:
    """What the output holds, compared with the input: lines for the summary.

    Raises:
        InputError: if an image of the input has no row, or a path has several.
    """
    counts, errors, vanished = Counter(), LeftOut(), LeftOut()
    expected = {path for shard in shards for path in shard["paths"]}
    for path, error in result_rows(arguments, ["path", "error"]):
        counts[path] += 1
        if path not in expected:
            vanished.add("of earlier runs, whose files --input does not hold now", path)
        elif error is not None:
            errors.add(error.removeprefix(path).strip(": ").partition(": ")[0], path)
    missing, several = sorted(expected - counts.keys()), sorted(path for path in counts if counts[path] > 1)
    for paths, what in ((missing, "have no row"), (several, "have several rows")):
        if paths:
            raise InputError(
                f"--output {arguments.output}: {len(paths)} images {what} ({', '.join(paths[:3])}), though each should have "
                "one; did another program change the folder?"
            )
    failed = sum(errors.counts.values())
    lines = {"rows": f"{len(expected)} for {len(expected)} images, {failed} with an error"}
    if failed:
        lines["rows"] += f": {errors.reasons()}"
    if vanished:
        lines["also"] = f"rows: {vanished.reasons()}"
    return lines


# ------------------------------------------------------------------------------------------------------------- workers


def scale_mean_std(processor) -> tuple[float, np.ndarray, np.ndarray]:
    """What an image processor does to 8-bit pixels: times a scale, less a mean, over a standard deviation; (3, 1, 1) each."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (np.broadcast_to(np.asarray(v, np.float32).reshape(-1, 1, 1), (3, 1, 1)) for v in (mean, std))
    return scale, mean, std


class Decoder:
    """Reads the images of a shard and brings them to the model's size.

    Where the image processor's last steps are those of `scale_mean_std`, the images stay as they are before them, in 8 bits
    a channel, and `Model` does the rest; otherwise they are what the processor makes of them, in float32.

    Raises:
        InputError: if the model has no image processor, or that cannot process an image.
    """

    def __init__(self, arguments: BatchArguments):
        from transformers import AutoImageProcessor

        import internimage_hf  # noqa: F401

        self.arguments, self.in_bytes = arguments, False
        try:
            self.processor = AutoImageProcessor.from_pretrained(arguments.model)
            self.in_bytes = self.normalises_plainly()
        except Exception as error:  # transformers and its processors raise many kinds
            raise InputError(f"--model {arguments.model} has no usable image processor: {one_line(error)}") from error

    def normalises_plainly(self) -> bool:
        """Whether the processor normalises as `scale_mean_std` says, which is tried with an image."""
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        if not all(hasattr(self.processor, name) for name in names):
            return False
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (199, 251, 3), dtype=np.uint8))
        pixels = self.process(image, do_rescale=False, do_normalize=False)
        if pixels.shape[0] != 3 or (pixels != pixels.round()).any() or pixels.min() < 0 or pixels.max() > 255:
            return False
        scale, mean, std = scale_mean_std(self.processor)
        return np.allclose((pixels * scale - mean) / std, self.process(image), rtol=1e-5, atol=1e-5)

    def process(self, image: Image.Image, **flags: bool) -> np.ndarray:
        """(channels, height, width), float32."""
        return np.asarray(self.processor(image, return_tensors="np", **flags)["pixel_values"][0], np.float32)

    def pixels(self, content: object, path: str) -> np.ndarray:
        """(channels, height, width), uint8 or float32.

        Raises:
            InputError: if it is no image, or one that the processor cannot process.
        """
        image = read_image(content, path)
        size = getattr(self.processor, "size", None) or {}
        edge, most = size.get("shortest_edge"), Image.MAX_IMAGE_PIXELS
        if getattr(self.processor, "do_resize", False) and edge and not size.get("longest_edge") and most:
            ratio = max(image.size) / min(image.size)
            if edge**2 * ratio > 2 * most:  # Pillow's own bound for reading
                raise InputError(
                    f"{path} is too long for its width: {image.width} x {image.height} would become "
                    f"{edge} x {edge * ratio:.0f} before the crop"
                )
        try:
            if self.in_bytes:
                return self.process(image, do_rescale=False, do_normalize=False).astype(np.uint8)
            return self.process(image)
        except Exception as error:  # processors raise many kinds
            raise InputError(f"{path} cannot be brought to the model's size: {one_line(error)}") from error

    def contents(self, shard: dict) -> Iterator[object]:
        """The file of each image, or why it cannot be read."""
        filesystem, _ = open_filesystem(self.arguments.input)
        if shard["source"]:
            try:
                column = self.table(shard, [self.arguments.image_column])[0]
            except (OSError, pa.ArrowException) as error:
                yield from [error] * len(shard["paths"])
                return
            for value in column:
                value = value.as_py()
                if isinstance(value, dict):
                    path = value.get("path")
                    value = value["bytes"]
                    if value is None and path is not None:
                        value = OSError(f"the row names the file {path}, and its bytes were expected")
                yield value
            return
        for path in shard["paths"]:
            try:
                with filesystem.open_input_file(path) as file:
                    yield file.read()
            except Exception as error:  # every storage has its own kinds
                yield error

    def table(self, shard: dict, columns: list[str]) -> pa.Table:
        """Columns of a shard's rows, from the row groups that have them."""
        filesystem, _ = open_filesystem(self.arguments.input)
        with pa.parquet.ParquetFile(shard["source"], filesystem=filesystem) as file:
            first, groups, start = None, [], 0
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                if start <= shard["rows"][-1] and shard["rows"][0] < stop:
                    first = start if first is None else first
                    groups.append(group)
                start = stop
            table = file.read_row_groups(groups, columns=columns).select(columns)
            return table.take([row - first for row in shard["rows"]])

    def kept(self, shard: dict) -> bytes:
        """The columns to keep of a shard's rows, in Arrow's format; null where they cannot be read."""
        columns = list(dict.fromkeys(self.arguments.keep_columns))
        if not columns:
            return b""
        try:
            table = self.table(shard, columns)
        except (OSError, pa.ArrowException):  # the damage that the images' errors tell of
            filesystem, _ = open_filesystem(self.arguments.input)
            schema = pa.parquet.read_schema(shard["source"], filesystem=filesystem)
            nulls = {name: pa.nulls(len(shard["paths"]), schema.field(name).type) for name in columns}
            table = pa.table(nulls)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    def __call__(self, shard: dict) -> dict:
        images, errors = [], []
        for path, content in zip(shard["paths"], self.contents(shard), strict=True):
            try:
                # one by one, so that what is wrong with an image stays its own
                if isinstance(content, Exception):
                    raise InputError(f"{path} cannot be read: {one_line(content)}")
                images.append(self.pixels(content, path))
                errors.append("")
            except InputError as error:
                errors.append(str(error))
        shapes = np.array([image.shape for image in images], np.int64).reshape(-1, 3)
        kind = np.uint8 if self.in_bytes else np.float32
        pixels = np.concatenate([image.ravel() for image in images]) if images else np.zeros(0, kind)
        result = {"name": shard["name"], "paths": shard["paths"], "errors": errors, "kept": self.kept(shard)}
        return result | {"pixels": pixels, "shapes": shapes}  # of all images one after the other: sizes may differ


class Model:
    """Computes a decoded shard and writes its file.

    Raises:
        InputError: if the model cannot be loaded, has no weights for the task, or a file cannot be written.
    """

    def __init__(self, arguments: BatchArguments, on_gpu: bool):
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        import internimage_hf  # noqa: F401

        if not on_gpu:
            torch.set_num_threads(arguments.threads_per_actor)
        self.torch, self.arguments = torch, arguments
        self.device, self.dtype = "cuda" if on_gpu else "cpu", getattr(torch, arguments.dtype)
        try:
            model, report = AutoModelForImageClassification.from_pretrained(
                arguments.model, dtype=self.dtype, output_loading_info=True
            )
        except Exception as error:  # transformers, safetensors and torch raise many kinds
            raise InputError(f"--model {arguments.model} cannot be loaded: {one_line(error)}") from error
        needed = f"{model.base_model_prefix}." if arguments.task == "embed" else ""
        if missing := sorted(key for key in report["missing_keys"] if key.startswith(needed)):
            raise InputError(
                f"--model {arguments.model} has no weights for {missing[0]}"
                f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}, which --task {arguments.task} needs"
            )
        self.model = model.to(self.device).eval()
        problem = model.config.problem_type  # as in transformers' pipeline
        self.sigmoid = problem == "multi_label_classification" or model.config.num_labels == 1
        self.processor = AutoImageProcessor.from_pretrained(arguments.model)

    def forward(self, images: list[np.ndarray]) -> np.ndarray:
        """Probabilities or embeddings of images of one size, float32."""
        torch = self.torch
        pixels = torch.from_numpy(np.stack(images)).to(self.device)
        if pixels.dtype == torch.uint8:
            scale, mean, std = scale_mean_std(self.processor)
            mean, std = (torch.tensor(v, device=self.device) for v in (mean, std))
            pixels = (pixels * scale - mean) / std
        with torch.inference_mode():
            if self.arguments.task == "embed":
                return self.model.base_model(pixels.to(self.dtype)).pooler_output.float().cpu().numpy()
            logits = self.model(pixels.to(self.dtype)).logits.float()
            return (logits.sigmoid() if self.sigmoid else logits.softmax(-1)).cpu().numpy()

    def outputs(self, shard: dict) -> dict[int, np.ndarray]:
        """Probabilities or embeddings of the images of a decoded shard that could be read, by their number in it."""
        flat, stop, result = shard["pixels"], 0, {}
        sizes: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        numbers = [i for i, error in enumerate(shard["errors"]) if not error]
        for number, shape in zip(numbers, shard["shapes"], strict=True):
            start, stop = stop, stop + int(np.prod(shape))
            shape = tuple(map(int, shape))
            sizes.setdefault(shape, []).append((number, flat[start:stop].reshape(shape)))
        for images in sizes.values():
            for first in range(0, len(images), self.arguments.batch_size):
                batch = images[first : first + self.arguments.batch_size]
                result |= zip((i for i, _ in batch), self.forward([pixels for _, pixels in batch]), strict=True)
        return result

    def table(self, shard: dict) -> pa.Table:
        paths, errors, outputs = (
            list(shard["paths"]),
            [error or None for error in shard["errors"]],
            self.outputs(shard),
        )
        for i, output in list(outputs.items()):
            if not np.isfinite(output).all():
                del outputs[i]
                errors[i] = f"{paths[i]} has an output that is not finite: --dtype {self.arguments.dtype}"

        def column(value: Callable[[np.ndarray], object], type: pa.DataType) -> pa.Array:
            return pa.array([value(outputs[i]) if i in outputs else None for i in range(len(paths))], type)

        columns = {"path": pa.array(paths, pa.string()), "error": pa.array(errors, pa.string())}
        if self.arguments.task == "embed":
            width = self.model.base_model.pooler.hidden_size
            columns["embedding"] = column(lambda output: output, pa.list_(pa.float32(), width))
        else:
            names, top = self.model.config.id2label, self.arguments.top_k or 5
            best = {i: np.argsort(-output, kind="stable")[:top] for i, output in outputs.items()}
            outputs = {
                i: ([names[int(n)] for n in best[i]], output[best[i]].tolist()) for i, output in outputs.items()
            }
            columns["label"] = column(lambda output: output[0][0], pa.string())
            columns["score"] = column(lambda output: output[1][0], pa.float32())
            columns["top_labels"] = column(lambda output: output[0], pa.list_(pa.string()))
            columns["top_scores"] = column(lambda output: output[1], pa.list_(pa.float32()))
        if shard["kept"]:
            kept = pa.ipc.open_stream(shard["kept"]).read_all()
            columns |= {name: kept[name] for name in kept.column_names}
        return pa.table(columns)

    def __call__(self, shard: dict) -> dict:
        filesystem, root = open_filesystem(self.arguments.output)
        table = self.table(shard)
        write_file(filesystem, root, shard["name"], lambda stream: pa.parquet.write_table(table, stream))
        return {"images": len(shard["paths"]), "errors": table["error"].length() - table["error"].null_count}


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Plan:
    """How many actors and decoders there are, and what each of them takes."""

    actors: int
    gpus: float
    actor_cpus: float
    decoders: int
    decoder_cpus: float


def plan(arguments: BatchArguments, machines: list[dict[str, float]]) -> Plan:
    """Divides machines with so many `CPU` and `GPU` each.

    Raises:
        InputError: if the flags ask for more than there is, which Ray would wait for without a word.
    """
    cpus = int(sum(machine.get("CPU", 0) for machine in machines))
    gpus, threads = arguments.gpus_per_actor, arguments.threads_per_actor
    if gpus is None:
        gpus = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise InputError(f"--gpus_per_actor must be 0, a part of one GPU or a whole number of GPUs, got {gpus:g}")
    if not cpus:
        raise InputError("there are no CPUs to decode images on")
    if gpus:  # an actor has its GPUs on one machine, and parts of one GPU
        found = int(sum(machine.get("GPU", 0) for machine in machines))
        each = (lambda n: n * math.floor(1 / gpus + 1e-9)) if gpus <= 1 else (lambda n: n // gpus)
        room = int(sum(each(int(machine.get("GPU", 0))) for machine in machines))
        what = f"of --gpus_per_actor {gpus:g}; there are {found} GPUs on {len(machines)} machines"
    else:
        room = sum(int(machine.get("CPU", 0)) // threads for machine in machines)
        what = f"of --threads_per_actor {threads}; there are {cpus} CPUs on {len(machines)} machines"
    actors = arguments.num_actors or max(room, 1)
    if actors > room and not arguments.autoscaling:
        raise InputError(f"there is no room for {actors} actors {what}, with room for {room}")
    if gpus:
        return Plan(actors, gpus, 0.0, cpus, 1.0)
    # the model takes most of the time: decoders have a quarter of the CPUs, and may use what is idle
    actor_cpus = 0.75 * (threads if arguments.autoscaling else min(threads, cpus / actors))
    # Ray's resources above 1 are whole numbers
    return Plan(actors, 0.0, int(actor_cpus) if actor_cpus > 1 else actor_cpus, actors, 0.25)


def this_machine(arguments: BatchArguments) -> dict[str, float]:
    """What a local Ray may use.

    Raises:
        InputError: if the flags ask for more than there is, or for less shared memory than Ray needs.
    """
    import torch

    cpus, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    if (arguments.num_cpus or 1) > cpus:
        raise InputError(f"--num_cpus {arguments.num_cpus} is more than the {cpus} CPUs of this machine")
    if not 75 <= arguments.object_store_mb <= memory:
        raise InputError(
            f"--object_store_mb must be between 75, which Ray needs, and the {memory} of this machine, got "
            f"{arguments.object_store_mb}"
        )
    return {"CPU": arguments.num_cpus or cpus, "GPU": torch.cuda.device_count()}


def check_address(address: str) -> None:
    """Ray waits for minutes where nobody answers, and ends the process.

    Raises:
        InputError: if nobody answers at the address of a cluster.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"--address {address} does not answer ({one_line(error)}); host:port of a Ray cluster, or auto, was expected"
        ) from error


def start_ray(arguments: BatchArguments) -> Plan:
    """Starts Ray or joins a cluster.

    Raises:
        InputError: if that fails, or there is less than the flags ask for.
    """
    import ray

    local = {}
    if arguments.address is None:
        machine = this_machine(arguments)
        plan(arguments, [machine])
        local = {"num_cpus": arguments.num_cpus, "num_gpus": machine["GPU"], "include_dashboard": False}
        local["object_store_memory"] = arguments.object_store_mb * 2**20
    else:
        check_address(arguments.address)
    try:
        ray.init(address=arguments.address or "local", log_to_driver=False, logging_level="critical", **local)
    except Exception as error:  # Ray raises many kinds
        where = f"--address {arguments.address}" if arguments.address else "Ray on this machine"
        raise InputError(f"{where} cannot be used: {one_line(error)}") from error
    return plan(arguments, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def ship_modules() -> None:
    """Has Ray send the code of this program to workers, which may be on machines that do not have its files."""
    import data
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(data)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def run_on_ray(
    shards: list[dict], arguments: BatchArguments, check: Callable[[], None] = lambda: None
) -> tuple[int, int, float]:
    """Computes the shards; returns the number of images, of those with an error, and the seconds.

    Args:
        shards: those of `unfinished_shards`.
        arguments: the flags.
        check: is called after each shard, and may end the run by an error.

    Raises:
        InputError: if Ray cannot be started as the flags say, or a worker raised one.
    """
    import ray.data  # which sets up its logging

    ship_modules()
    try:
        work = start_ray(arguments)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised here as well
        ray.data.DataContext.get_current().enable_progress_bars = False
        start, images, errors = time.perf_counter(), 0, 0
        dataset = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
            Decoder,
            fn_constructor_args=[arguments],
            num_cpus=work.decoder_cpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=work.decoders),
        )
        results = dataset.map(
            Model,
            fn_constructor_args=[arguments, work.gpus > 0],
            num_cpus=work.actor_cpus,
            num_gpus=work.gpus,
            compute=ray.data.ActorPoolStrategy(size=min(work.actors, len(shards))),
        )
        total = sum(len(shard["paths"]) for shard in shards)
        for result in results.iter_rows():
            check()
            images, errors = images + result["images"], errors + result["errors"]
            print(f"{images} of {total} images, {images / (time.perf_counter() - start):.1f} images/s", flush=True)
        return images, errors, time.perf_counter() - start
    except ray.exceptions.RayError as error:
        # a worker's error comes as its traceback
        if found := re.search(r"^(?:\w+\.)*InputError: (.*)$", str(error), re.MULTILINE):
            raise InputError(found[1]) from error
        raise
    finally:
        ray.shutdown()


def run_plain_loop(shards: list[dict], arguments: BatchArguments) -> tuple[int, float]:
    """The same work in this process with all CPUs, without files: the number of images and the seconds."""
    import torch

    on_gpu = torch.cuda.is_available() and arguments.gpus_per_actor != 0
    arguments = replace(arguments, threads_per_actor=arguments.num_cpus or os.cpu_count())
    start, images = time.perf_counter(), 0
    decoder, model = Decoder(arguments), Model(arguments, on_gpu)
    for shard in shards:
        images += model.table(decoder(shard)).num_rows
    return images, time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------- demo


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as PNG files in a folder for each class, and one file that is no image."""
    from image_classification import load_digits

    for images in load_digits().values():
        for image, label in zip(images["image"], images["label"], strict=True):
            file = folder / str(label) / f"{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    (folder / "broken.png").write_bytes(b"not an image")


def digits_summary(table: pa.Table) -> str:
    """How right the results for the digits are, whose folders are the truth."""
    table = table.filter(pa.compute.is_null(table["error"]))
    truth = np.array([Path(path).parent.name for path in table["path"].to_pylist()])
    if "label" in table.column_names:
        right = np.char.add("digit ", truth) == np.array(table["label"].to_pylist())
        return f"{right.mean():.1%} of the digits classified right"
    embeddings = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    squares = (embeddings**2).sum(1)
    distances = squares[:, None] + squares[None] - 2 * embeddings @ embeddings.T
    np.fill_diagonal(distances, np.inf)
    return f"{(truth[distances.argmin(1)] == truth).mean():.1%} of the digits have a nearest neighbour of their class"


def read_results(arguments: BatchArguments) -> pa.Table:
    filesystem, root = open_filesystem(arguments.output)
    return pa.dataset.dataset(result_files(filesystem, root), filesystem=filesystem, format="parquet").to_table()


def check_model(arguments: BatchArguments) -> None:
    """Looks at the model before anything is started.

    Raises:
        InputError: if there is no such model, or it does not suit the flags.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    import internimage_hf  # noqa: F401

    try:
        config = AutoConfig.from_pretrained(arguments.model)
    except Exception as error:  # transformers and the Hub raise many kinds
        raise InputError(f"--model {arguments.model} cannot be loaded: {one_line(error)}") from error
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise InputError(f"--model {arguments.model} is a {config.model_type}; an image classifier was expected")
    if arguments.task == "embed" and config.model_type != "internimage":
        raise InputError(f"--model {arguments.model} is a {config.model_type}; --task embed expects an InternImage")
    if arguments.task == "classify" and not config.num_labels:
        raise InputError(f"--model {arguments.model} has no classes; --task embed needs none")
    if arguments.task == "classify" and (arguments.top_k or 1) > config.num_labels:
        raise InputError(
            f"--top_k {arguments.top_k} is more than the {config.num_labels} classes of --model {arguments.model}"
        )
    Decoder(arguments)


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program; returns what it prints at the end.

    Raises:
        InputError: if the flags, the input, the output or the model cannot be used.
    """
    (arguments,) = HfArgumentParser(BatchArguments).parse_args_into_dataclasses(args=argv)
    for name in ("shard_size", "batch_size", "top_k", "threads_per_actor", "num_actors", "num_cpus"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if arguments.address is None:
        plan(arguments, [this_machine(arguments)])
    if arguments.model is None:
        from demo_model import demo_model

        arguments.model = str(demo_model().absolute())
    elif Path(arguments.model).is_dir():
        arguments.model = str(Path(arguments.model).absolute())  # workers have another working directory
    demo = arguments.input is None
    if demo:
        arguments.input = "outputs/digits"
        if not Path(arguments.input).is_dir():
            write_digits(Path(arguments.input))
    arguments.input, arguments.output = absolute(arguments.input), absolute(arguments.output)

    left_out = LeftOut()
    check_model(arguments)
    shards = find_shards(arguments, left_out)
    total = sum(len(shard["paths"]) for shard in shards)
    print(f"{arguments.input}: {total} images; {left_out}", flush=True)
    with sole_writer(arguments) as check:
        todo = unfinished_shards(shards, arguments)
        left = sum(len(shard["paths"]) for shard in todo)
        summary: dict[str, object] = {
            "input": f"{arguments.input}: {total} images, {total - left} of them done before"
        }
        summary["left out"] = str(left_out)
        if todo:
            images, errors, seconds = run_on_ray(todo, arguments, check)
            speed = f"{images / seconds:.1f} images/s"
            summary["Ray Data"] = f"{images} images in {seconds:.1f} s, {speed}, {errors} errors"
            if arguments.compare:
                images, seconds = run_plain_loop(todo, arguments)
                summary["plain loop"] = f"{images} images in {seconds:.1f} s, {images / seconds:.1f} images/s"
        summary |= account(shards, arguments)
        summary["output"] = f"{arguments.output}: {len(shards)} shards"
        if demo:
            summary["demo"] = digits_summary(read_results(arguments))
    print("\n" + "\n".join(f"{key:>10}  {value}" for key, value in summary.items()))
    return summary


if __name__ == "__main__":
    run_program(main)
