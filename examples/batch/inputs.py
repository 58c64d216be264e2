"""In: the flags. Out: the images of the input, in shards."""

from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
from data import METADATA, InputError, LeftOut, files_below, image_endings, one_line, unusable

from .flags import BatchArguments
from .storage import CLAIM, LOCK, RESULT, SETTINGS, TABLES, UNFINISHED, open_filesystem


def list_files(filesystem: pa.fs.FileSystem, root: str, left_out: LeftOut) -> list[PurePosixPath]:
    """Lists the files of a folder tree by their path in the folder."""
    if isinstance(filesystem, pa.fs.LocalFileSystem):
        return [PurePosixPath(name.as_posix()) for name in files_below(root, left_out)]
    entries = filesystem.get_file_info(pa.fs.FileSelector(root, recursive=True))
    return [PurePosixPath(entry.path.strip("/")).relative_to(root.strip("/")) for entry in entries if entry.is_file]


def find_files(arguments: BatchArguments, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """Lists the images and the Parquet files of the input, sorted; other files go to `left_out`.

    Raises:
        InputError: if the input does not exist or cannot be listed.
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
    except Exception as error:  # every storage raises its own kinds
        raise InputError(f"--input {arguments.input} cannot be read: {one_line(error)}") from error

    # Results of any output folder are no input: the input would change with each run.
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
    if images:  # `metadata.parquet` beside images describes the images
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
    """Whether a column of this type can hold images: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(kind):
        return any(kind[i].name == "bytes" and holds_images(kind[i].type) for i in range(kind.num_fields))
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks)


def find_shards(arguments: BatchArguments, left_out: LeftOut | None = None) -> list[dict]:
    """Divides the input into shards: dictionaries of `source` (a Parquet file, or ""), `rows` of it, and the images' `paths`.

    Args:
        arguments: the flags.
        left_out: collects the files that are no input.

    Raises:
        InputError: if there are no images, or a column is missing or holds no images.
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
