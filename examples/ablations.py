"""In: nothing. Out: the paper's Table 6 in small: what shared weights, groups and softmax of DCNv3 contribute.

    python examples/ablations.py            # five variants x four seeds: about ten minutes on two idle cores
    python examples/ablations.py --quick    # one seed, few steps

The task is `embedded_data.load_single_digits`: one distorted digit on a photograph. Every variant trains the small model of
`digit_classifier.py` with the same images, seeds and steps. One more, short run per variant and seed has a learning rate five
times as high and a deeper third stage; only its gradient norms are of interest. The output folder gets `ablations.md`,
`ablations.json` and `ablations.png`.

The variants need no switch in the package. `config.groups` sets the groups, and each deformable convolution calls its
parameterless layer `sampling`, which any module of the same signature may replace.
"""

import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from data import InputError, run_program
from digit_classifier import normalised, predict, small_config, train
from drawing import figure
from embedded_data import load_single_digits
from flags import make_output_dir, parse_flags
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from internimage_hf import InternImageConfig, InternImageForImageClassification, count_flops
from internimage_hf.dcnv3 import dcnv3, dcnv3_softmax
from internimage_hf.dcnv3_chunked import dcnv3_cpu
from internimage_hf.dcnv3_reference import Geometry
from internimage_hf.modeling_internimage import InternImageDeformableSampling
from internimage_hf.remote_code import replace_file


# ------------------------------------------------------------------------------------------------------------ the variants


def operator(
    input: torch.Tensor,
    offset: torch.Tensor,
    mask: torch.Tensor,
    groups: int,
    offset_scale: float,
    remove_center: bool = False,
    kernel_size: int = 3,
    softmax: bool = False,
) -> torch.Tensor:
    """DCNv3 of stride 1 that keeps the map's size; one operator on the meta device as well, where `dcnv3` is many."""
    if input.is_meta:
        pair, padding = (kernel_size, kernel_size), (kernel_size // 2, kernel_size // 2)
        geometry = Geometry(pair, (1, 1), padding, (1, 1), groups, offset_scale, remove_center)
        return dcnv3_cpu(input, offset, mask, geometry, softmax)
    return (dcnv3_softmax if softmax else dcnv3)(
        input,
        offset,
        mask,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        groups=groups,
        offset_scale=offset_scale,
        remove_center=remove_center,
    )


class SoftmaxSampling(nn.Module):
    """DCNv3's own sampling by `operator`."""

    def forward(self, input, offset, mask, groups, offset_scale=1.0, remove_center=False):
        return operator(input, offset, mask, groups, offset_scale, remove_center, softmax=True)


class ElementwiseSampling(nn.Module):
    """DCNv3's sampling with a function of each scalar of the mask instead of the softmax over a group's points."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, input, offset, mask, groups, offset_scale=1.0, remove_center=False):
        return operator(input, offset, self.function(mask), groups, offset_scale, remove_center)


class PerPointSampling(nn.Module):
    """DCNv3's modulated samples before their sum: (N, H, W, C) -> (N, H, W, groups * points * C / groups).

    In terms of the operator these are groups * points groups of a 1x1 kernel, with the 3x3 grid added to the offsets.
    """

    def forward(self, input, offset, mask, groups, offset_scale=1.0, remove_center=False):
        grid = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y or not remove_center]
        points = len(grid)
        offset = offset.unflatten(-1, (groups, points, 2)) + torch.tensor(
            grid, dtype=offset.dtype, device=offset.device
        )
        mask = mask.unflatten(-1, (groups, points)).softmax(-1)
        value = input.unflatten(-1, (groups, 1, -1)).expand(-1, -1, -1, -1, points, -1)
        return operator(
            value.flatten(-3), offset.flatten(-3), mask.flatten(-2), groups * points, offset_scale, kernel_size=1
        )


def deformable_convolutions(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".dcn")]


def unshare_projections(model: nn.Module) -> None:
    """Gives every sampling point a projection of its own, w_k of equation 1: the output projection becomes 9 C x C.

    Each is initialised like one C x C projection.

    Raises:
        ValueError: if the model has `center_feature_scale`, which blends the C channels before the projection.
    """
    for dcn in deformable_convolutions(model):
        if getattr(dcn, "center_feature_scale_proj", None) is not None:
            raise ValueError("`center_feature_scale` must be False for a projection per point, got True")
        shared = dcn.output_proj
        channels, points = shared.out_features, dcn.offset.out_features // (2 * dcn.groups)
        projection = nn.Linear(points * channels, channels, device=shared.weight.device, dtype=shared.weight.dtype)
        bound = math.sqrt(3 / channels)
        nn.init.uniform_(projection.weight, -bound, bound)
        nn.init.zeros_(projection.bias)
        dcn.output_proj, dcn.sampling = projection, PerPointSampling()


def replace_softmax(model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for dcn in deformable_convolutions(model):
        dcn.sampling = ElementwiseSampling(function)


@dataclass(frozen=True)
class Variant:
    """
    Attributes:
        title: for people.
        fields: of the configuration that differ.
        change: what is done to the model.
        paper: top-1 on ImageNet and box AP on COCO in the paper's Table 6.
    """

    title: str
    fields: dict = field(default_factory=dict)
    change: Callable[[nn.Module], None] = lambda model: None
    paper: str = "not in it"

    def build(self, config: InternImageConfig) -> InternImageForImageClassification:
        """An untrained model."""
        fields = {**config.to_diff_dict(), **self.fields}
        model = InternImageForImageClassification(InternImageConfig(**fields))
        self.change(model)
        return model


VARIANTS = {
    "dcnv3": Variant("DCNv3", paper="83.5 / 47.2"),
    "per_point": Variant("a projection per point", change=unshare_projections, paper="83.6 / 47.4"),
    "one_group": Variant("one group", fields={"groups": [1, 1, 1, 1]}, paper="82.3 / 43.8"),
    "sigmoid": Variant(
        "sigmoid (DCNv2)", change=lambda model: replace_softmax(model, torch.sigmoid), paper="65.7 / 38.7"
    ),
    "unbounded": Variant("no normalisation (DCNv4)", change=lambda model: replace_softmax(model, nn.Identity())),
}


def saved_bytes(model: nn.Module, pixel_values: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without parameters. On the meta device none are allocated."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage  # kept, so that no other storage gets its address
        return tensor

    convolutions = deformable_convolutions(model)
    own = [dcn.sampling for dcn in convolutions]
    model.train()
    try:
        for dcn, sampling in zip(convolutions, own, strict=True):
            dcn.sampling = SoftmaxSampling() if type(sampling) is InternImageDeformableSampling else sampling
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(pixel_values).logits
    finally:
        for dcn, sampling in zip(convolutions, own, strict=True):
            dcn.sampling = sampling
    del output
    return sum(storage.nbytes() for storage in storages.values())


# ---------------------------------------------------------------------------------------------------------------- the runs


@dataclass
class AblationArguments:
    output_dir: str = field(default="outputs/ablations", metadata={"help": "folder of the results"})
    quick: bool = field(default=False, metadata={"help": "one seed, a quarter of the images and of the steps"})
    variants: list[str] = field(
        default_factory=lambda: list(VARIANTS), metadata={"help": "which to train", "choices": list(VARIANTS)}
    )
    seeds: int | None = field(default=None, metadata={"help": "runs per variant; 4 by default"})
    steps: int | None = field(default=None, metadata={"help": "training steps of a run; 700 by default"})
    stress_steps: int | None = field(
        default=None, metadata={"help": "steps of the run with five times the learning rate; 200 by default"}
    )
    train_images: int | None = field(default=None, metadata={"help": "6000 by default"})
    test_images: int | None = field(default=None, metadata={"help": "1000 by default"})
    image_size: int = field(default=48, metadata={"help": "side of the images in pixels, 32 to 213"})
    smallest_digit: float = field(
        default=0.5, metadata={"help": "side of the smallest digit as a part of the image's, at most 0.875"}
    )
    batch_size: int = 32
    learning_rate: float = 2e-3
    processes: int | None = field(default=None, metadata={"help": "runs at a time; one per core by default"})

    def __post_init__(self):
        defaults = {"seeds": 4, "steps": 700, "stress_steps": 200, "train_images": 6000, "test_images": 1000}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, max(1, value // 4) if self.quick else value)
        if self.processes is None:
            self.processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        for name in (*defaults, "batch_size", "processes"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 32 <= self.image_size <= 213:
            raise InputError(f"--image_size must be 32 to 213, got {self.image_size}")
        if not 0 < self.smallest_digit <= 0.875:
            raise InputError(f"--smallest_digit must be above 0 and at most 0.875, got {self.smallest_digit}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"--learning_rate must be a positive number, got {self.learning_rate}")
        self.variants = [name for name in VARIANTS if name in self.variants]


@dataclass(frozen=True)
class Run:
    """What one variant did with one seed. `spike` is the largest gradient norm over the median one."""

    variant: str
    seed: int
    accuracy: float
    spike: float
    stress_spike: float
    cpu_seconds: float


_counter = None  # of the steps of all processes


def _start_process(counter) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)


def _count(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


def _spike(norms: list[float]) -> float:
    """The largest norm over the median; infinite where the training diverged."""
    if not all(map(math.isfinite, norms)):
        return math.inf
    return max(norms) / statistics.median(norms)


def run_variant(
    name: str, seed: int, images: Path, arguments: AblationArguments, progress: Callable[[int], object]
) -> Run:
    """Trains one variant with one seed, twice. `progress` is called with 1 after each step."""
    start = time.process_time()
    with np.load(images) as file:
        data = dict(file)
    spikes = []
    for deeper, learning_rate, steps, part in (
        (False, arguments.learning_rate, arguments.steps, "train"),
        (True, 5 * arguments.learning_rate, arguments.stress_steps, "stress"),
    ):
        torch.manual_seed(seed)
        fields = {"depths": [1, 1, 6, 1]} if deeper else {}
        model = VARIANTS[name].build(small_config(arguments.image_size, **fields))
        norms = train(
            model,
            data[f"{part}_images"],
            data[f"{part}_labels"],
            steps=steps,
            learning_rate=learning_rate,
            batch_size=arguments.batch_size,
            seed=seed,
            progress=progress,
        )
        spikes.append(_spike(norms))
        if not deeper:
            accuracy = float((predict(model, data["test_images"]) == data["test_labels"]).mean())
    return Run(name, seed, accuracy, *spikes, cpu_seconds=time.process_time() - start)


def write_images(arguments: AblationArguments, file: Path) -> None:
    """Makes the images once, for all processes."""
    stress = max(32, arguments.train_images // 3)
    with tqdm(total=arguments.train_images + arguments.test_images + stress + 1, unit="image", desc="images") as bar:
        own = load_single_digits(
            arguments.train_images,
            arguments.test_images,
            arguments.image_size,
            smallest=arguments.smallest_digit,
            progress=bar.update,
        )
        small = load_single_digits(stress, 1, 32, smallest=arguments.smallest_digit, progress=bar.update)
    parts = {"train": own["train"], "test": own["validation"], "stress": small["train"]}
    np.savez(file, **{f"{n}_{what}": a for n, part in parts.items() for what, a in zip(("images", "labels"), part, strict=True)})  # fmt: skip


def run_all(arguments: AblationArguments) -> list[Run]:
    """All variants and seeds, in processes.

    Raises:
        InputError: if a process was ended from outside.
    """
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in arguments.variants]
    steps = len(jobs) * (arguments.steps + arguments.stress_steps)
    with tempfile.TemporaryDirectory(prefix="ablations-") as folder:
        images = Path(folder) / "images.npz"
        write_images(arguments, images)
        with tqdm(total=steps, unit="step", desc="training") as bar:
            if arguments.processes == 1:
                return [run_variant(name, seed, images, arguments, bar.update) for name, seed in jobs]
            return _run_in_processes(jobs, images, arguments, bar)


def _run_in_processes(jobs: list[tuple[str, int]], images: Path, arguments: AblationArguments, bar: tqdm) -> list[Run]:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(
        min(arguments.processes, len(jobs)), context, initializer=_start_process, initargs=(counter,)
    ) as pool:
        futures = [pool.submit(run_variant, name, seed, images, arguments, _count) for name, seed in jobs]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                bar.update(counter.value - bar.n)
        except BrokenProcessPool as error:
            raise InputError(
                f"--processes {arguments.processes}: a process ended before its run did; for lack of memory fewer "
                "were expected"
            ) from error
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]


# -------------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Row:
    """A variant's line of the table. Accuracies and differences are in percent; `difference` has mean and deviation."""

    variant: str
    accuracies: list[float]
    difference: tuple[float, float] | None
    parameters: int
    flops: int
    bytes_per_image: int
    spikes: list[float]
    stress_spikes: list[float]
    cpu_seconds: float


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def make_rows(runs: list[Run], arguments: AblationArguments) -> list[Row]:
    rows, baseline = [], {run.seed: run.accuracy for run in runs if run.variant == "dcnv3"}
    for name in arguments.variants:
        own = [run for run in runs if run.variant == name]
        model = VARIANTS[name].build(small_config(arguments.image_size))
        pixel_values = normalised(np.zeros((arguments.batch_size, *[arguments.image_size] * 2, 3), np.uint8))
        differences = [100 * (run.accuracy - baseline[run.seed]) for run in own if baseline and name != "dcnv3"]
        rows.append(
            Row(
                variant=name,
                accuracies=[100 * run.accuracy for run in own],
                difference=_mean_and_deviation(differences) if differences else None,
                parameters=model.num_parameters(),
                flops=count_flops(model, arguments.image_size),
                bytes_per_image=saved_bytes(model, pixel_values) // arguments.batch_size,
                spikes=[run.spike for run in own],
                stress_spikes=[run.stress_spike for run in own],
                cpu_seconds=statistics.mean(run.cpu_seconds for run in own),
            )
        )
    return rows


def _plus_minus(mean: float, deviation: float, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + ("" if math.isnan(deviation) else f" ± {deviation:.1f}")


def markdown(rows: list[Row], arguments: AblationArguments) -> str:
    """The table, with what must be known to read it."""
    seeds = "one seed" if arguments.seeds == 1 else f"mean ± standard deviation over {arguments.seeds} seeds"
    first = rows[0]
    lines = [
        f"Accuracy in percent on {arguments.test_images} held-out images, {seeds}; {arguments.steps} steps.",
        "",
        "| variant | accuracy | difference | parameters | FLOPs | bytes kept per image | largest / median gradient norm "
        "| the same at five times the learning rate | paper: top-1 / box AP |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        relative = [
            f"{(value / base - 1):+.0%}"
            for value, base in (
                (row.parameters, first.parameters),
                (row.flops, first.flops),
                (row.bytes_per_image, first.bytes_per_image),
            )
        ]
        absolute = (f"{row.parameters:,}", f"{row.flops / 1e6:.1f} M", f"{row.bytes_per_image / 2**20:.2f} MiB")
        sizes = [f"{a} ({r})" if row is not first else a for a, r in zip(absolute, relative, strict=True)]
        cells = [
            VARIANTS[row.variant].title,
            _plus_minus(*_mean_and_deviation(row.accuracies)),
            "" if row.difference is None else _plus_minus(*row.difference, sign="+"),
            *sizes,
            " ".join(f"{spike:.1f}" for spike in row.spikes),
            " ".join(f"{spike:.1f}" for spike in row.stress_spikes),
            VARIANTS[row.variant].paper,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The difference is to DCNv3 with the same seed; percentages are relative to the first row. A multiply-add is one FLOP. Bytes kept are those of one image in a "
        f"training batch of {arguments.batch_size}, without parameters.",
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], arguments: AblationArguments, file: Path) -> None:
    """Writes a PNG: accuracy, bytes and gradient norms of the variants."""
    size = {"figsize": (11, 0.9 + 0.5 * len(rows)), "sharey": True, "width_ratios": (5, 3, 4)}
    with figure(file, 1, 3, **size) as (_, (left, middle, right)):
        for y, row in enumerate(rows):
            color = f"C{list(VARIANTS).index(row.variant)}"
            mean, deviation = _mean_and_deviation(row.accuracies)
            if not math.isnan(deviation):
                left.plot([mean - deviation, mean + deviation], [y, y], color=color, linewidth=8, alpha=0.3)
            left.plot([mean, mean], [y - 0.25, y + 0.25], color=color, linewidth=3)
            left.scatter(row.accuracies, [y] * len(row.accuracies), color=color, edgecolor="black", s=30, zorder=3)
            kept = row.bytes_per_image / 2**20
            middle.barh(y, kept, color=color)
            middle.text(kept, y, f" {kept:.2f}", va="center")
            finite = [spike for spike in row.stress_spikes if math.isfinite(spike)]
            right.scatter(finite, [y] * len(finite), color=color, edgecolor="black", s=40, zorder=3)
            if len(finite) < len(row.stress_spikes):
                right.text(0.98, y, "diverged", transform=right.get_yaxis_transform(), va="center", ha="right")
        left.axvline(statistics.mean(rows[0].accuracies), color="grey", linestyle=":", zorder=0)
        left.set_yticks(range(len(rows)), [VARIANTS[row.variant].title for row in rows], fontsize=11)
        left.set_title(f"accuracy, %: {'one seed' if arguments.seeds == 1 else f'{arguments.seeds} seeds, mean ± sd'}")
        middle.set_title("MiB kept per image")
        middle.set_xlim(right=1.25 * max(row.bytes_per_image for row in rows) / 2**20)
        right.set_xscale("log")
        right.set_xlim(left=1)
        right.xaxis.set_major_formatter("{x:g}")
        right.set_title(f"largest / median gradient norm\nat a learning rate of {5 * arguments.learning_rate:g}")
        for axis in (left, middle, right):
            axis.grid(axis="x", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        left.invert_yaxis()


def main(argv: list[str] | None = None) -> list[Row]:
    """Runs the program; returns the table's rows."""
    (arguments,) = parse_flags(argv, AblationArguments)
    folder = make_output_dir(arguments.output_dir)
    start = time.monotonic()
    runs = run_all(arguments)
    rows = make_rows(runs, arguments)
    table = markdown(rows, arguments)
    result = {
        "arguments": asdict(arguments),
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(sum(run.cpu_seconds for run in runs), 1),
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
    }
    replace_file(folder / "ablations.md", table.encode())
    replace_file(folder / "ablations.json", (json.dumps(result, indent=2) + "\n").encode())
    draw(rows, arguments, folder / "ablations.png")
    print(
        f"\n{table}\n{result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of CPU time in {arguments.processes} "
        f"processes; {folder}/ablations.md, .json, .png"
    )
    return rows


if __name__ == "__main__":
    run_program(main)
