"""In: any number of images. Out: classes or embeddings in Parquet files, computed on Ray Data, on a laptop or a cluster.

    python examples/batch_inference.py --input photos/ --output results --model OpenGVLab/internimage_t_1k_224
    python examples/batch_inference.py --input s3://bucket/images.parquet --output s3://bucket/embeddings --task embed \
        --model OpenGVLab/internimage_t_1k_224 --address auto --num_actors 8 --gpus_per_actor 1

Without arguments the program writes scikit-learn's 1797 digits as image files and classifies them with the demo's model.

`--input` is a folder tree of images, a Parquet file, or a folder of Parquet files, local or on an object storage of pyarrow
or an installed fsspec package. The program divides the images into shards. Decoders read and decode a shard; actors with
the model compute it and write one Parquet file. A file gets its name only when it is complete: a killed worker loses no
result, and a second start computes only the images without a row, new images included. Other files are counted by reason.
At the end the program checks that every image of the input has exactly one row.

The columns are `path` (`file#row` for a row of a Parquet file), `error` (null, or the reason why the image could not be
read), and either `label`, `score`, `top_labels`, `top_scores`, or `embedding`, the classifier's input as a list of fixed
size. Scores equal those of `pipeline("image-classification")` up to rounding, for any image processor.

One run at a time may write into an output folder; a second one ends with an error. A local folder has a lock, which ends
with its process. On object storage a run renews a claim once a minute; a claim without renewal for ten minutes is stale
and may be taken over.

On a cluster, every machine needs this package and access to the input, the output and the model.
"""

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import batch
import data
import numpy as np
import pyarrow as pa
import pyarrow.compute
from batch.flags import BatchArguments
from batch.inputs import find_shards
from batch.resources import plan, start_ray, this_machine
from batch.results import account, read_results, unfinished_shards
from batch.run_lock import sole_writer
from batch.storage import absolute
from batch.workers import Decoder, Model
from data import InputError, LeftOut, one_line, run_program
from transformers import HfArgumentParser


# Ray reads these on import: no usage reports, no log of its backend
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


def ship_modules() -> None:
    """Makes Ray send this program's code to the workers: their machines may not have its files."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(data)
    cloudpickle.register_pickle_by_value(batch)


def run_on_ray(
    shards: list[dict], arguments: BatchArguments, check: Callable[[], None] = lambda: None
) -> tuple[int, int, float]:
    """Computes the shards; returns the numbers of images and of images with an error, and the seconds.

    Args:
        shards: those of `unfinished_shards`.
        arguments: the flags.
        check: called after each shard; may raise to end the run.

    Raises:
        InputError: if Ray cannot be started with these flags, or a worker raised one.
    """
    import ray.data  # configures its logging on import

    ship_modules()
    try:
        work = start_ray(arguments)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised in this process too
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
        # Ray passes a worker's error on as the text of its traceback
        if found := re.search(r"^(?:\w+\.)*InputError: (.*)$", str(error), re.MULTILINE):
            raise InputError(found[1]) from error
        raise
    finally:
        ray.shutdown()


def run_plain_loop(shards: list[dict], arguments: BatchArguments) -> tuple[int, float]:
    """Computes the shards in this process with all CPUs and writes no files; returns the number of images and the seconds."""
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
    """Writes scikit-learn's digits as PNG files, a folder per class, and one file that is no image."""
    from image_classification import load_digits

    for images in load_digits().values():
        for image, label in zip(images["image"], images["label"], strict=True):
            file = folder / str(label) / f"{hashlib.sha256(image.tobytes()).hexdigest()[:16]}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    (folder / "broken.png").write_bytes(b"not an image")


def digits_summary(table: pa.Table) -> str:
    """Compares the results for the digits with their folders, the true classes."""
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


# ------------------------------------------------------------------------------------------------------------- program


def check_model(arguments: BatchArguments) -> None:
    """Checks the model before Ray is started.

    Raises:
        InputError: if the model cannot be loaded or does not fit the flags.
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
    """Runs the program; returns its summary.

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
        arguments.model = str(Path(arguments.model).absolute())  # workers have a different working directory
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
