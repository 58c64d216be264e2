"""Classifies or embeds any number of images with InternImage on Ray Data: on a laptop, or the same on a cluster.

    python examples/batch_inference.py --input photos/ --output results --model OpenGVLab/internimage_t_1k_224
    python examples/batch_inference.py --input s3://bucket/images.parquet --output s3://bucket/embeddings --task embed \
        --model OpenGVLab/internimage_t_1k_224 --address auto --num_actors 8 --gpus_per_actor 1

Without arguments it writes scikit-learn's 1797 digits as image files and classifies them with the demo's model.

`--input` is a folder with images (and folders), a Parquet file or a folder of them, local or on any object storage that
pyarrow or an installed fsspec package knows. The images are cut into shards. Tasks read and decode a shard, actors with
the model compute it and write one Parquet file, which appears under its name when it is complete. So killed workers cost
time alone, and a second start goes on with what has no file yet, images that are new included.

The columns are `path` (of a row of a Parquet file: `file#row`), `error` (null, or why the image could not be read), and
`label`, `score`, `top_labels`, `top_scores`, or `embedding`, a list of fixed size: what the model feeds its classifier.
On a cluster every machine needs this package, and the input, the output and the model must be reachable from all.
"""

import hashlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
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
    top_k: int = field(default=5, metadata={"help": "classes per image"})
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


def open_filesystem(url: str) -> tuple[pa.fs.FileSystem, str]:
    """The filesystem of a path or URL, and the path in it."""
    if "://" not in url:
        return pa.fs.LocalFileSystem(), str(Path(url).absolute())
    try:
        return pa.fs.FileSystem.from_uri(url)
    except pa.ArrowInvalid:  # not one of pyarrow's own
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem)), path


def find_shards(arguments: BatchArguments) -> list[dict]:
    """The input in shards: `source` (a Parquet file, or ""), the rows of it, and the images' paths.

    Raises:
        ValueError: if there is nothing to read, or a column is missing.
    """
    filesystem, root = open_filesystem(arguments.input)
    kind = filesystem.get_file_info(root).type
    if kind == pa.fs.FileType.NotFound:
        raise ValueError(f"--input {arguments.input} does not exist")
    if kind == pa.fs.FileType.File:
        files = [root]
    else:
        entries = filesystem.get_file_info(pa.fs.FileSelector(root, recursive=True))
        files = sorted(entry.path for entry in entries if entry.is_file and not entry.base_name.startswith((".", "_")))
    suffixes = tuple(Image.registered_extensions())
    images = [file for file in files if file.lower().endswith(suffixes)]
    tables = [file for file in files if file.lower().endswith((".parquet", ".pq"))]
    if bool(images) == bool(tables):
        what = "images and Parquet files; name one of them" if images else "no images and no Parquet files"
        raise ValueError(f"--input {arguments.input} holds {what}")

    if taken := {"path", "error", "label", "score", "top_labels", "top_scores", "embedding"} & {
        *arguments.keep_columns
    }:
        raise ValueError(f"--keep_columns {taken.pop()} is the name of a column of the output")
    if images and arguments.keep_columns:
        raise ValueError(f"--keep_columns is for Parquet files, and --input {arguments.input} holds images")

    size, shards = arguments.shard_size, []
    for first in range(0, len(images), size):
        shards.append({"source": "", "rows": [], "paths": images[first : first + size]})
    for file in tables:
        with pa.parquet.ParquetFile(file, filesystem=filesystem) as table:
            for column in (arguments.image_column, *arguments.keep_columns):
                if column not in table.schema_arrow.names:
                    raise ValueError(f"{file} has no column {column!r}, only {', '.join(table.schema_arrow.names)}")
            number = table.metadata.num_rows
        for first in range(0, number, size):
            rows = list(range(first, min(first + size, number)))
            shards.append({"source": file, "rows": rows, "paths": [f"{file}#{row}" for row in rows]})
    return shards


def output_name(paths: list[str]) -> str:
    """The name of a shard's file: the same in every run, so that a file that exists need not be made again."""
    return f"part-{hashlib.sha256(chr(0).join(paths).encode()).hexdigest()[:20]}.parquet"


def unfinished_shards(shards: list[dict], arguments: BatchArguments) -> list[dict]:
    """The shards that have no file yet, each with its `name`, without the images that other files hold already.

    Raises:
        ValueError: if the output folder holds results of another kind.
    """
    filesystem, root = open_filesystem(arguments.output)
    filesystem.create_dir(root, recursive=True)
    settings = {"model": str(arguments.model), "task": arguments.task, "top_k": arguments.top_k}
    settings |= {"dtype": arguments.dtype, "keep_columns": arguments.keep_columns}
    settings_file = f"{root}/_settings.json"
    if filesystem.get_file_info(settings_file).is_file:
        with filesystem.open_input_stream(settings_file) as stream:
            found = json.loads(stream.read())
        if found != settings:
            raise ValueError(f"--output {arguments.output} holds results of {found}, not of {settings}; name another")
    else:
        with filesystem.open_output_stream(settings_file) as stream:
            stream.write(json.dumps(settings, indent=1).encode())

    entries = filesystem.get_file_info(pa.fs.FileSelector(root))
    finished = {entry.base_name for entry in entries if entry.base_name.endswith(".parquet")}
    for entry in entries:
        if entry.base_name.startswith(".unfinished-"):
            filesystem.delete_file(entry.path)
    names = {output_name(shard["paths"]) for shard in shards}
    elsewhere = set()  # in files that were made when there were other images in the input, or of another --shard_size
    for name in finished - names:
        table = pa.parquet.read_table(f"{root}/{name}", filesystem=filesystem, columns=["path"])
        elsewhere.update(table["path"].to_pylist())

    result = []
    for shard in shards:
        if output_name(shard["paths"]) in finished:
            continue
        keep = [i for i, path in enumerate(shard["paths"]) if path not in elsewhere]
        paths = [shard["paths"][i] for i in keep]
        rows = [shard["rows"][i] for i in keep] if shard["source"] else []
        if paths and output_name(paths) not in finished:
            result.append({"name": output_name(paths), "source": shard["source"], "rows": rows, "paths": paths})
    return result


# ------------------------------------------------------------------------------------------------------------- workers


class Decoder:
    """Reads the images of a shard and brings them to the model's size, without normalising them: 8 bits each."""

    def __init__(self, arguments: BatchArguments):
        from transformers import AutoImageProcessor

        import internimage_hf  # noqa: F401

        self.arguments = arguments
        self.processor = AutoImageProcessor.from_pretrained(arguments.model)

    def readers(self, shard: dict) -> Iterator[Callable[[], bytes]]:
        """What reads the file of each image."""
        filesystem, _ = open_filesystem(self.arguments.input)
        if not shard["source"]:
            for path in shard["paths"]:
                yield lambda path=path: filesystem.open_input_file(path).read()
            return
        for row in self.table(shard, [self.arguments.image_column]).to_pylist():
            value = row[self.arguments.image_column]
            yield lambda value=value: value["bytes"] if isinstance(value, dict) else value

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
            return file.read_row_groups(groups, columns=columns).take([row - first for row in shard["rows"]])

    def pixels(self, data: bytes) -> np.ndarray:
        """(channels, height, width), uint8."""
        with Image.open(io.BytesIO(data)) as image:
            rgb = image.convert("RGB")
        return self.processor(rgb, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]

    def __call__(self, shard: dict) -> dict:
        pixels, errors = [], []
        for read in self.readers(shard):
            try:
                # one by one, so that what is wrong with an image stays its own
                pixels.append(self.pixels(read()).round().clip(0, 255).astype(np.uint8))
                errors.append("")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        kept = b""
        if self.arguments.keep_columns:
            sink = pa.BufferOutputStream()
            table = self.table(shard, self.arguments.keep_columns)
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            kept = sink.getvalue().to_pybytes()
        pixels = np.stack(pixels) if pixels else np.zeros((0, 3, 1, 1), np.uint8)
        return {"name": shard["name"], "paths": shard["paths"], "errors": errors, "pixels": pixels, "kept": kept}


class Model:
    """Computes a decoded shard and writes its file."""

    def __init__(self, arguments: BatchArguments, on_gpu: bool):
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        import internimage_hf  # noqa: F401

        if not on_gpu:
            torch.set_num_threads(arguments.threads_per_actor)
        self.torch, self.arguments = torch, arguments
        self.device, self.dtype = "cuda" if on_gpu else "cpu", getattr(torch, arguments.dtype)
        model = AutoModelForImageClassification.from_pretrained(arguments.model, dtype=self.dtype)
        self.model = model.to(self.device).eval()
        processor = AutoImageProcessor.from_pretrained(arguments.model)
        self.scale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
        self.mean, self.std = (torch.tensor(v, device=self.device)[:, None, None] for v in (mean, std))

    def outputs(self, pixels: np.ndarray) -> np.ndarray:
        """Probabilities or embeddings of decoded images, float32."""
        torch, parts = self.torch, []
        with torch.inference_mode():
            for first in range(0, len(pixels), self.arguments.batch_size):
                batch = torch.tensor(pixels[first : first + self.arguments.batch_size]).to(self.device)
                pixel_values = ((batch * self.scale - self.mean) / self.std).to(self.dtype)
                if self.arguments.task == "embed":
                    parts.append(self.model.internimage(pixel_values).pooler_output.float().cpu())
                else:
                    parts.append(self.model(pixel_values).logits.float().softmax(-1).cpu())
        if parts:
            return torch.cat(parts).numpy()
        embed = self.arguments.task == "embed"
        return np.zeros((0, self.model.internimage.pooler.hidden_size if embed else self.model.num_labels), np.float32)

    def table(self, shard: dict) -> pa.Table:
        errors = [error or None for error in shard["errors"]]
        outputs = self.outputs(shard["pixels"])
        position = np.cumsum([error is None for error in errors]) - 1  # of an image among those that could be read

        def column(values, type: pa.DataType) -> pa.Array:
            return pa.array([None if e else values[p] for e, p in zip(errors, position, strict=True)], type)

        columns = {"path": pa.array(list(shard["paths"]), pa.string()), "error": pa.array(errors, pa.string())}
        if self.arguments.task == "embed":
            columns["embedding"] = column(list(outputs), pa.list_(pa.float32(), outputs.shape[1]))
        else:
            order = np.argsort(-outputs, axis=1, kind="stable")[:, : self.arguments.top_k]
            scores = np.take_along_axis(outputs, order, axis=1).tolist()
            labels = [[self.model.config.id2label[int(i)] for i in row] for row in order]
            columns["label"] = column([row[0] for row in labels], pa.string())
            columns["score"] = column([row[0] for row in scores], pa.float32())
            columns["top_labels"] = column(labels, pa.list_(pa.string()))
            columns["top_scores"] = column(scores, pa.list_(pa.float32()))
        if shard["kept"]:
            kept = pa.ipc.open_stream(shard["kept"]).read_all()
            columns |= {name: kept[name] for name in kept.column_names}
        return pa.table(columns)

    def __call__(self, shard: dict) -> dict:
        filesystem, root = open_filesystem(self.arguments.output)
        unfinished = f"{root}/.unfinished-{uuid.uuid4().hex}"
        pa.parquet.write_table(self.table(shard), unfinished, filesystem=filesystem)
        filesystem.move(unfinished, f"{root}/{shard['name']}")
        return {"images": len(shard["paths"]), "errors": sum(bool(error) for error in shard["errors"])}


# ---------------------------------------------------------------------------------------------------------------- runs


def run_on_ray(shards: list[dict], arguments: BatchArguments) -> tuple[int, int, float]:
    """Computes the shards; returns the number of images, of those with an error, and the seconds."""
    import ray.data  # which sets up its logging

    local = {"num_cpus": arguments.num_cpus, "object_store_memory": arguments.object_store_mb * 2**20}
    local |= {"include_dashboard": False}
    ray.init(
        address=arguments.address, log_to_driver=False, logging_level="error", **({} if arguments.address else local)
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    gpus = arguments.gpus_per_actor
    if gpus is None:
        gpus = 1.0 if resources.get("GPU") else 0.0
    cpus, threads = int(resources["CPU"]), arguments.threads_per_actor
    actors = arguments.num_actors or max(1, int(resources["GPU"] / gpus) if gpus else cpus // threads)
    if gpus:
        actor_cpus, decoder_cpus, decoders = 0.0, 1.0, cpus
    else:  # the model takes most of the time: decoders have a quarter of the CPUs, and may use what is idle
        actor_cpus, decoder_cpus, decoders = 0.75 * min(threads, cpus / actors), 0.25, actors
        if actor_cpus > 1:  # Ray's resources above 1 are whole numbers
            actor_cpus = int(actor_cpus)

    start, images, errors = time.perf_counter(), 0, 0
    dataset = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
        Decoder,
        fn_constructor_args=[arguments],
        num_cpus=decoder_cpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=decoders),
    )
    results = dataset.map(
        Model,
        fn_constructor_args=[arguments, gpus > 0],
        num_cpus=actor_cpus,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(shards))),
    )
    total = sum(len(shard["paths"]) for shard in shards)
    for result in results.iter_rows():
        images, errors = images + result["images"], errors + result["errors"]
        print(f"{images} of {total} images, {images / (time.perf_counter() - start):.1f} images/s", flush=True)
    seconds = time.perf_counter() - start
    ray.shutdown()
    return images, errors, seconds


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
    return pa.dataset.dataset(root, filesystem=filesystem, format="parquet").to_table()


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program; returns what it prints at the end."""
    (arguments,) = HfArgumentParser(BatchArguments).parse_args_into_dataclasses(args=argv)
    for name in ("shard_size", "batch_size", "top_k", "threads_per_actor"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
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
    arguments.input, arguments.output = (
        url if "://" in url else str(Path(url).absolute()) for url in (arguments.input, arguments.output)
    )

    shards = find_shards(arguments)
    todo = unfinished_shards(shards, arguments)
    total, left = (sum(len(shard["paths"]) for shard in some) for some in (shards, todo))
    summary: dict[str, object] = {"input": f"{arguments.input}: {total} images, {total - left} of them done before"}
    if todo:
        images, errors, seconds = run_on_ray(todo, arguments)
        summary["Ray Data"] = f"{images} images in {seconds:.1f} s, {images / seconds:.1f} images/s, {errors} errors"
        if arguments.compare:
            images, seconds = run_plain_loop(todo, arguments)
            summary["plain loop"] = f"{images} images in {seconds:.1f} s, {images / seconds:.1f} images/s"
    summary["output"] = f"{arguments.output}: {len(shards)} shards"
    if demo:
        summary["demo"] = digits_summary(read_results(arguments))
    print("\n" + "\n".join(f"{key:>10}  {value}" for key, value in summary.items()))
    return summary


if __name__ == "__main__":
    main()
