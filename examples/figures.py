"""In: a checkpoint and an image, or nothing. Out: the paper's figures 4, 5, 7 and 8 for it, as PNG files.

    python examples/figures.py
    python examples/figures.py --figures 5 7 --model OpenGVLab/internimage_t_1k_224 --image dog.jpg --query 120 80

Figure 4: parameters, and bytes kept for the backward pass, with shared weights and with a projection per sampling point, for all
sizes; it needs no checkpoint. Figure 5: sampling points at one pixel in the last layer of each stage. Figure 7: effective
receptive fields before and after training. Figure 8: how many predictions stay the same when the image is shifted, turned or
scaled.

Without `--model` a small classifier of digits on photographs is trained once (a minute) and drawn; without `--image` the figures
show its held-out images. `--query` is in pixels of the image as the model gets it, after the image processor's crop.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from ablations import saved_bytes, unshare_projections
from common import loading
from data import InputError, read_image, run_program
from digit_classifier import digit_classifier
from drawing import figure
from embedded_data import load_single_digits
from flags import make_output_dir, parse_flags
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel

import internimage_hf
from internimage_hf import (
    InternImageConfig,
    InternImageForImageClassification,
    effective_receptive_field,
    sampling_points,
)
from internimage_hf.configuration_internimage import VARIANTS
from internimage_hf.inspection import LayerSampling, ReceptiveField
from internimage_hf.remote_code import replace_file


SAMPLE = 51  # a large digit in the middle
FIGURES = ("4", "5", "7", "8")
GROUP_COLORS = ("#ff2d2d", "#ffd400", "#27d827", "#00c8ff", "#ff4fd8", "#ff8c00", "#9b6bff", "#ffffff")


@dataclass
class FigureArguments:
    figures: list[str] = field(
        default_factory=lambda: list(FIGURES), metadata={"help": "which to draw", "choices": FIGURES}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "a trained model with an InternImage (folder or Hub id); a small one if absent"},
    )
    image: list[str] | None = field(default=None, metadata={"help": "image files; figure 5 shows the first"})
    query: list[float] | None = field(
        default=None, metadata={"help": "x and y of the pixel of figures 5 and 7, by default the middle"}
    )
    groups: int = field(default=5, metadata={"help": "coloured groups in figure 5"})
    sample: int | None = field(
        default=None, metadata={"help": "the held-out image that figure 5 shows, without --image"}
    )
    number: int = field(default=200, metadata={"help": "held-out images for figures 7 and 8, without --image"})
    output_dir: str = field(default="outputs/figures", metadata={"help": "folder of the figures"})

    def __post_init__(self):
        for name, most in (("groups", len(GROUP_COLORS)), ("number", 10000)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"--{name} must be 1 to {most}, got {getattr(self, name)}")
        if self.sample is None:
            self.sample = min(SAMPLE, self.number - 1)
        if not 0 <= self.sample < self.number:
            raise InputError(f"--sample must be 0 to {self.number - 1} (--number {self.number}), got {self.sample}")
        if self.query is not None and len(self.query) != 2:
            raise InputError(f"--query must be two numbers, x and y, got {self.query}")


# ------------------------------------------------------------------------------------------------------- model and images


def load_model(name: str) -> PreTrainedModel:
    """The model of a checkpoint, of the class that its configuration names.

    Raises:
        InputError: if it cannot be loaded.
    """
    with loading("model", name):
        fields, _ = PreTrainedConfig.get_config_dict(name)
        classes = fields.get("architectures") or ["InternImageForImageClassification"]
        found = getattr(internimage_hf, classes[0], None) or getattr(transformers, classes[0], None)
        if found is None:
            raise InputError(f"--model {name} is a {classes[0]}, which neither this package nor transformers has")
        return found.from_pretrained(name).eval()


@dataclass
class Subject:
    """What is drawn: a model and images as it gets them.

    Attributes:
        pixel_values: (number, 3, height, width).
        pictures: the same for people, in uint8.
        labels: the classes of the images, if known.
        first: index of the image that figure 5 shows.
        query: x and y of the pixel.
    """

    model: PreTrainedModel
    processor: transformers.BaseImageProcessor
    pixel_values: torch.Tensor
    pictures: np.ndarray
    labels: np.ndarray | None
    first: int
    query: tuple[float, float]


def preprocess(processor, images: list[Image.Image]) -> torch.Tensor:
    return processor(images, return_tensors="pt")["pixel_values"]


def for_people(pixel_values: torch.Tensor, processor) -> np.ndarray:
    """Undoes the normalisation: (N, 3, H, W) -> (N, H, W, 3) in uint8."""
    mean, std = (
        torch.tensor(getattr(processor, name, None) or [default] * 3).view(3, 1, 1)
        for name, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    pixels = (pixel_values * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def load_subject(arguments: FigureArguments) -> Subject:
    """
    Raises:
        InputError: if the model or an image cannot be used.
    """
    name = str(digit_classifier()) if arguments.model is None else arguments.model
    model = load_model(name)
    with loading("model", name):
        processor = AutoImageProcessor.from_pretrained(name)
    labels = None
    if arguments.image:
        images = [read_image(file) for file in arguments.image]
    else:
        size = model.config.image_size if arguments.model is None else 213
        # as many for any smaller number: so the first are the same
        count = max(200, arguments.number) if arguments.model is None else arguments.number
        pixels, labels = load_single_digits(1, count, size, seed=1)["validation"]
        images = [Image.fromarray(image) for image in pixels[: arguments.number]]
        labels = labels[: arguments.number] if arguments.model is None else None
    batch = [preprocess(processor, [image]) for image in images]
    if len({values.shape for values in batch}) > 1:
        raise InputError(f"--image has images that the processor of {name} makes of different sizes; one was expected")
    pixel_values = torch.cat(batch)
    pictures = for_people(pixel_values, processor)
    height, width = pixel_values.shape[2:]
    first = 0 if arguments.image else arguments.sample
    query = tuple(arguments.query) if arguments.query else default_query(pictures[first], arguments)
    if not (0 <= query[0] < width and 0 <= query[1] < height):
        raise InputError(f"--query must lie in the image, {width} x {height} pixels, got {query[0]:g} {query[1]:g}")
    return Subject(model, processor, pixel_values, pictures, labels, first, query)


def default_query(picture: np.ndarray, arguments: FigureArguments) -> tuple[float, float]:
    """The middle of the image, or of the digit's ink."""
    height, width = picture.shape[:2]
    if arguments.image:
        return width / 2, height / 2
    rows, columns = np.nonzero(picture.min(-1) > 130)
    if len(rows) == 0:
        return width / 2, height / 2
    nearest = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
    return float(columns[nearest]), float(rows[nearest])


# ----------------------------------------------------------------------------------------------------------------- figure 4


@dataclass(frozen=True)
class SharedWeights:
    """One size with shared weights and with a projection per point. Bytes are those kept for one image of 224 x 224."""

    size: str
    parameters: tuple[int, int]
    bytes_kept: tuple[int, int]


def shared_weights(size: str) -> SharedWeights:
    """Counted on the meta device.

    `center_feature_scale` of H and G blends the C channels before the projection, which a projection per point excludes: their
    bytes are those without it, and of their parameters only the projections change.
    """
    counts, kept = [], []
    config = InternImageConfig.from_variant(size, center_feature_scale=False)
    with torch.device("meta"):
        released = InternImageForImageClassification(InternImageConfig.from_variant(size)).num_parameters()
        for unshared in (False, True):
            model = InternImageForImageClassification(config)
            if unshared:
                unshare_projections(model)
            counts.append(model.num_parameters())
            kept.append(saved_bytes(model, torch.zeros(1, 3, 224, 224)))
    return SharedWeights(size.upper(), (released, released + counts[1] - counts[0]), (kept[0], kept[1]))


def draw_shared_weights(rows: list[SharedWeights], file: Path) -> None:
    panels = (
        ("parameters, M", [[n / 1e6 for n in row.parameters] for row in rows], "the paper at H: −42.0 %"),
        (
            "MiB kept for the backward pass, per image",
            [[n / 2**20 for n in row.bytes_kept] for row in rows],
            "the paper at H: −84.2 % of “memory”, not reproduced",
        ),
    )
    with figure(file, 1, 2, figsize=(11, 4.2)) as (_, axes):
        for axis, (title, values, paper) in zip(axes, panels, strict=True):
            for i, (shared, own) in enumerate(values):
                axis.bar(i - 0.2, shared, 0.4, color="C0", label="shared weights" if i == 0 else None)
                axis.bar(i + 0.2, own, 0.4, color="C1", label="a projection per point" if i == 0 else None)
                axis.text(
                    i, own * 1.08, f"−{100 * (1 - shared / own):.0f} %", ha="center", fontsize=12, fontweight="bold"
                )
            axis.set_yscale("log")
            axis.set_ylim(top=3 * max(own for _, own in values))
            axis.set_yticks([30, 100, 300, 1000, 3000], ["30", "100", "300", "1000", "3000"])
            axis.tick_params(which="minor", labelleft=False)
            axis.set_ylim(bottom=0.6 * min(shared for shared, _ in values))
            axis.set_xlabel(paper, fontsize=12)
            axis.set_xticks(range(len(rows)), [row.size for row in rows], fontsize=13)
            axis.set_title(title, fontsize=13)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
        axes[0].legend(loc="upper left", fontsize=12)


def shared_weights_table(rows: list[SharedWeights]) -> str:
    """Markdown: the numbers of figure 4 beside the paper's sentences."""
    lines = [
        "| size | parameters, shared | a projection per point | saved | kept per image, shared | a projection per point | saved |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = []
        for values, unit in ((row.parameters, 1e6), (row.bytes_kept, 2**20)):
            name = "M" if unit == 1e6 else "MiB"
            cells += [f"{value / unit:,.1f} {name}" for value in values] + [f"{1 - values[0] / values[1]:.1%}"]
        lines.append(f"| {row.size} | {' | '.join(cells)} |")
    by_size = {row.size: row for row in rows}
    lines.append("")
    if "H" in by_size:
        saved = (1 - shared / own for shared, own in (by_size["H"].parameters, by_size["H"].bytes_kept))
        lines.append(
            "The paper (section 4.4): at H, shared weights save 42.0 % of the parameters and 84.2 % of the memory. Here: "
            + " and ".join(f"{100 * value:.1f} %" for value in saved)
            + ". The paper does not say which memory it measured."
        )
    if "T" in by_size:
        shared, own = by_size["T"].parameters
        lines.append(
            f"The paper: at T, weights that are not shared take 66.1 % more parameters. Here: {100 * (own / shared - 1):.1f} %."
        )
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------- figure 5


def draw_sampling_points(axis, picture: np.ndarray, layer: LayerSampling, groups: int) -> None:
    """One panel: the points of one position, of a few groups in colours and of the others in grey."""
    height, width = picture.shape[:2]
    axis.imshow(picture, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    positions, weights = layer.positions[0, 0, 0], layer.weights[0, 0, 0].abs()
    (x, y), half = layer.origins[0, 0].tolist(), layer.stride / 2
    chosen = layer.spread_groups(groups)
    points = positions.shape[1]
    for group in range(len(positions)):
        if group not in chosen:
            axis.scatter(*positions[group].T, s=7, color="0.75", edgecolor="none", alpha=0.7, zorder=2)
    axis.scatter(
        *(layer.grid + layer.origins[0, 0]).T, marker="+", s=70, color="black", linewidth=3, zorder=3, alpha=0.6
    )
    axis.scatter(*(layer.grid + layer.origins[0, 0]).T, marker="+", s=60, color="white", linewidth=1.3, zorder=3)
    for color, group in zip(GROUP_COLORS, chosen, strict=False):
        for (px, py), weight in zip(positions[group].tolist(), (points * weights[group]).tolist(), strict=True):
            inside = -layer.stride < px < width - 1 + layer.stride and -layer.stride < py < height - 1 + layer.stride
            axis.scatter(
                px,
                py,
                s=max(12, 60 * min(weight, 3)),
                facecolor=color if inside else "none",
                edgecolor="black" if inside else color,
                linewidth=1 if inside else 1.6,
                zorder=4,
            )
    corners = [x - half, x + half, x + half, x - half, x - half], [y - half, y - half, y + half, y + half, y - half]
    axis.plot(*corners, color="#1f5bff", linewidth=2, zorder=5)
    axis.scatter(x, y, marker="*", s=230, color="#1f5bff", edgecolor="white", linewidth=1.5, zorder=6)
    margin = 0.09 * max(height, width)
    axis.set_xlim(-margin, width - 1 + margin)
    axis.set_ylim(height - 1 + margin, -margin)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_facecolor("0.93")
    axis.set_title(f"stage {layer.stage}\nmean reach {layer.reach[0, 0, 0]:.0f} px", fontsize=15)
    axis.set_xlabel(f"{len(chosen)} of {len(positions)} groups in colour", fontsize=12)


def draw_figure5(subject: Subject, groups: int, file: Path) -> None:
    layers = sampling_points(subject.model, subject.pixel_values[[subject.first]], query=subject.query)
    last = {layer.stage: layer for layer in layers}
    height, width = subject.pictures.shape[1:3]
    with figure(file, 1, len(last), figsize=(3.2 * len(last), 0.9 + 3.2 * height / width)) as (_, axes):
        for axis, layer in zip(axes, last.values(), strict=True):
            draw_sampling_points(axis, subject.pictures[subject.first], layer, groups)
    if all(torch.allclose(layer.positions - layer.origins[:, :, None, None], layer.grid) for layer in layers):
        print("figure 5: all sampling offsets are zero, as before training: all groups lie on the regular grid")


# ----------------------------------------------------------------------------------------------------------------- figure 7


def draw_figure7(subject: Subject, arguments: FigureArguments, file: Path) -> None:
    """Mean effective receptive fields of the middle, or of `--query` for images of the user."""
    position = subject.query if arguments.query or arguments.image else None
    torch.manual_seed(0)
    models = {"before": type(subject.model)(subject.model.config), "after": subject.model}
    fields: dict[str, list[ReceptiveField]] = {}
    for name, model in models.items():
        # Few images at a time: the graph of a large image takes gigabytes.
        parts = subject.pixel_values.split(max(1, 64 * 96**2 // subject.pixel_values[0, 0].numel()))
        found = [effective_receptive_field(model, part, position) for part in parts]
        fields[name] = [
            ReceptiveField(
                stage[0].name, stage[0].stage, stage[0].stride, stage[0].cell, torch.cat([f.gradient for f in stage])
            )
            for stage in zip(*found, strict=True)
        ]
    height, width = subject.pictures.shape[1:3]
    stages = len(fields["after"])
    with figure(file, 2, stages, figsize=(2.9 * stages, 1.6 + 4.7 * height / width)) as (picture, axes):
        for i, (name, own) in enumerate(fields.items()):
            for axis, found in zip(axes[i], own, strict=True):
                mean = found.gradient.double().mean(0)
                shown = (mean / mean.max().clamp_min(1e-300)).clamp_min(1e-3).log10()
                image = axis.imshow(shown, vmin=-3, vmax=0, cmap="magma")
                half, most = (100 * found.share_of_pixels(part) for part in (0.5, 0.9))
                axis.set_xlabel(f"50 % in {half:.1f} % of the pixels\n90 % in {most:.1f} %", fontsize=12)
                axis.set_xticks([])
                axis.set_yticks([])
                if i == 0:
                    axis.set_title(f"stage {found.stage}", fontsize=15)
            axes[i][0].set_ylabel(f"{name} training", fontsize=15)
        bar = picture.colorbar(image, ax=axes, shrink=0.6, ticks=[-3, -2, -1, 0])
        bar.ax.set_yticklabels(["≤ 0.001", "0.01", "0.1", "1"])
        bar.set_label("gradient, relative to its maximum", fontsize=12)


# ----------------------------------------------------------------------------------------------------------------- figure 8


def shifted(image: Image.Image, pixels: int) -> Image.Image:
    """The image moved to the right; its mirror image fills the gap."""
    return Image.fromarray(np.pad(np.asarray(image), ((0, 0), (pixels, 0), (0, 0)), "symmetric")[:, : image.width])


def turned(image: Image.Image, degrees: float) -> Image.Image:
    """The image turned around its middle; its mirror image fills the corners."""
    margin = max(image.size) // 2
    padded = np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), "symmetric")
    turned = Image.fromarray(padded).rotate(degrees, Image.Resampling.BILINEAR)
    return turned.crop((margin, margin, margin + image.width, margin + image.height))


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize([max(1, round(factor * side)) for side in image.size], Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Consistency:
    """One curve: the share of predictions that equal those for the unchanged image, and the accuracy, in percent."""

    name: str
    values: list[float]
    same: list[float]
    right: list[float] | None


@torch.no_grad()
def consistency(subject: Subject) -> list[Consistency]:
    """
    Raises:
        InputError: if the model does not classify.
    """
    if not hasattr(subject.model, "classifier"):
        raise InputError(f"--figures 8 needs a classifier, --model is a {type(subject.model).__name__}")
    images = [Image.fromarray(picture) for picture in subject.pictures]
    side = min(images[0].size)
    normalise = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    tests = (
        ("shift, pixels", shifted, [round(side * 2 / 7 * i / 8) for i in range(9)]),
        ("rotation, degrees", turned, list(range(0, 50, 5))),
        ("scale", scaled, [0.25 * i for i in range(1, 13)]),
    )

    def predicted(batch: list[Image.Image]) -> np.ndarray:
        step = max(1, 32 * 96**2 // (batch[0].width * batch[0].height))
        return np.concatenate(
            [
                subject.model(**subject.processor(batch[i : i + step], **normalise)).logits.argmax(-1).numpy()
                for i in range(0, len(batch), step)
            ]
        )

    unchanged, curves = predicted(images), []
    with tqdm(total=sum(len(values) for _, _, values in tests), desc="figure 8") as bar:
        for name, change, values in tests:
            same, right = [], []
            for value in values:
                found = predicted([change(image, value) for image in images])
                same.append(100 * float((found == unchanged).mean()))
                if subject.labels is not None:
                    right.append(100 * float((found == subject.labels).mean()))
                bar.update(1)
            curves.append(Consistency(name, [float(v) for v in values], same, right or None))
    return curves


def draw_consistency(curves: list[Consistency], images: int, file: Path) -> None:
    with figure(file, 1, len(curves), figsize=(11, 3.4), sharey=True) as (_, axes):
        for axis, curve in zip(axes, curves, strict=True):
            axis.plot(curve.values, curve.same, "o-", color="C0", linewidth=2.5, label="same prediction as unchanged")
            if curve.right is not None:
                axis.plot(curve.values, curve.right, "s--", color="C1", linewidth=2, label="correct prediction")
            axis.set_xlabel(curve.name, fontsize=13)
            axis.set_ylim(0, 102)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(f"% of {images} images", fontsize=13)
        axes[0].legend(loc="lower left", fontsize=11)


# ----------------------------------------------------------------------------------------------------------------- program


def main(argv: list[str] | None = None) -> list[Path]:
    """Runs the program; returns the files of the figures."""
    (arguments,) = parse_flags(argv, FigureArguments)
    folder = make_output_dir(arguments.output_dir)
    files = {name: folder / f"figure{name}.png" for name in FIGURES if name in arguments.figures}
    if "4" in files:
        rows = [shared_weights(size) for size in tqdm(VARIANTS, desc="figure 4") if not size.startswith("flash")]
        draw_shared_weights(rows, files["4"])
        table = shared_weights_table(rows)
        replace_file(folder / "figure4.md", table.encode())
        print(table)
    if files.keys() - {"4"}:
        subject = load_subject(arguments)
        with loading("model", arguments.model or "of the figures"):
            if "5" in files:
                draw_figure5(subject, arguments.groups, files["5"])
            if "7" in files:
                draw_figure7(subject, arguments, files["7"])
            if "8" in files:
                curves = consistency(subject)
                draw_consistency(curves, len(subject.pictures), files["8"])
                content = json.dumps([vars(curve) for curve in curves], indent=2) + "\n"
                replace_file(folder / "figure8.json", content.encode())
    print(*files.values(), sep="\n")
    return list(files.values())


if __name__ == "__main__":
    run_program(main)
