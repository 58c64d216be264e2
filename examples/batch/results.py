"""In: the input's shards and an output folder. Out: the shards still to compute, and the summary of all results."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
from data import InputError, LeftOut, one_line

from .flags import BatchArguments
from .storage import RESULT, SETTINGS, open_filesystem, write_file


def output_name(paths: list[str]) -> str:
    """Names a shard's file by its paths: the name is the same in every run, and a second write replaces the first."""
    return f"part-{hashlib.sha256(chr(0).join(paths).encode()).hexdigest()[:20]}.parquet"


def result_rows(arguments: BatchArguments, columns: list[str]) -> Iterator[tuple[str | None, ...]]:
    """Yields the rows of all results in the output folder; `columns` are text columns, `path` among them.

    Raises:
        InputError: if a file is damaged, or not of this program.
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
    """Identifies a model beyond its name: the commit of the Hub, or a hash of a folder's model files."""
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
    """Writes the settings that results depend on into the output folder, or compares them with those of an earlier run.

    Raises:
        InputError: if the output folder holds results of other settings.
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
    """Reduces the shards to images without a row; each gets the `name` of its file. Complete shards are left out.

    Raises:
        InputError: if the output folder cannot be written, or holds results of other settings.
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
    """Compares the output with the input; returns lines for the summary.

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


def read_results(arguments: BatchArguments) -> pa.Table:
    filesystem, root = open_filesystem(arguments.output)
    return pa.dataset.dataset(result_files(filesystem, root), filesystem=filesystem, format="parquet").to_table()
