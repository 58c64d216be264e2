"""In: an InternImage checkpoint. Out: an ONNX file or an AOTInductor package, kept only if its outputs equal the model's.

    python examples/export.py --model OpenGVLab/internimage_t_1k_224 --output outputs/internimage_t
    python examples/export.py --model OpenGVLab/internimage_t_1k_224 --task backbone --out_features stage2 stage3 stage4
    python examples/export.py --model my-model --format aoti --image_size 384 --output my-model.pt2

Without `--model` the program exports the demo's classifier of digits, trains it first if necessary, and measures the file's
accuracy on the held-out images. `--dataset` measures the accuracy of any classifier; classes are matched by name:

    python examples/export.py --quantize int8

`--output` is a folder, for `model.onnx` or `model.pt2` with the configuration and the image processor, or a file.
ONNX files take any batch size, height and width (of at least 33 pixels), AOTInductor packages any batch size of one image
size; `--no_dynamic` fixes the sizes. The program prints the largest difference from the model. If it is too large, no file is
kept and the exit status is 1.
"""

import contextlib
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from common import loading
from data import InputError, counted, run_program, some
from demo_model import demo_model
from flags import parse_flags
from image_classification import DataArguments, decoded, load_splits, output_size
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from internimage_hf import InternImageBackbone, InternImageConfig, InternImageForImageClassification
from internimage_hf.dcnv3 import dcnv3_as_operator
from internimage_hf.onnx_export import MIN_OPSET, expand_dcnv3, export_onnx, export_program, output_names


# Tolerances of the outputs, relative to the largest output or to 1, whichever is larger.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2}

Run = Callable[[torch.Tensor], list[torch.Tensor]]


@dataclass
class ExportArguments:
    model: str | None = field(
        default=None, metadata={"help": "an InternImage checkpoint, folder or Hub id; the demo's model if absent"}
    )
    task: str = field(
        default="image-classification",
        metadata={"help": "what to export", "choices": ["image-classification", "backbone"]},
    )
    out_features: list[str] | None = field(
        default=None, metadata={"help": "the backbone's maps; by default stage1 to stage4", "nargs": "+"}
    )
    format: str = field(default="onnx", metadata={"help": "the kind of file", "choices": ["onnx", "aoti"]})
    output: str = field(default="outputs/export", metadata={"help": "the folder, or a file ending in .onnx or .pt2"})
    opset: int = field(default=MIN_OPSET, metadata={"help": f"version of ONNX's operators, at least {MIN_OPSET}"})
    image_size: list[int] | None = field(
        default=None,
        metadata={"help": "height and width, or one number for both; the model's own if absent", "nargs": "+"},
    )
    dynamic: bool = field(
        default=True,
        metadata={"help": "any batch size, and with ONNX any image size; otherwise one image of one size"},
    )
    dcnv3_op: str = field(
        default="native",
        metadata={
            "help": "standard operators, or one node `internimage_hf::DCNv3` a layer, for runtimes with a plug-in for it",
            "choices": ["native", "custom"],
        },
    )
    dtype: str = field(
        default="float32", metadata={"help": "dtype of weights and images", "choices": list(TOLERANCES)}
    )
    quantize: str | None = field(
        default=None, metadata={"help": "int8: the weights of linear layers as int8, by torchao", "choices": ["int8"]}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "measure accuracy on this dataset's held-out images: a folder, a Hub id, or `digits`"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset on the Hub"})
    train_split: str | None = field(default=None, metadata={"help": "as for image_classification.py"})
    eval_split: str | None = field(default=None, metadata={"help": "as for image_classification.py"})
    eval_fraction: float = field(default=0.2, metadata={"help": "as for image_classification.py"})
    image_column: str | None = field(default=None, metadata={"help": "as for image_classification.py"})
    label_column: str | None = field(default=None, metadata={"help": "as for image_classification.py"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on this many images at most"})
    tolerance: float | None = field(
        default=None, metadata={"help": f"largest difference to the model as a part of its outputs; {TOLERANCES}"}
    )


def load_model(arguments: ExportArguments, name: str | Path) -> PreTrainedModel:
    """Loads the model to export, in evaluation mode.

    Raises:
        InputError: if the model cannot be loaded, or is no InternImage.
    """
    with loading("model", name):
        if arguments.task == "backbone":
            stages = arguments.out_features or AutoConfig.from_pretrained(name).stage_names[1:]
            model = InternImageBackbone.from_pretrained(name, out_features=list(stages))
        else:
            model = AutoModelForImageClassification.from_pretrained(name)
            if not isinstance(model, InternImageForImageClassification):
                raise InputError(f"--model {name} is a {type(model).__name__}; an InternImage was expected")
    return model.to(getattr(torch, arguments.dtype)).eval()


def image_size(arguments: ExportArguments, config: InternImageConfig) -> tuple[int, int]:
    """Returns height and width of the images, from the flag or else the configuration.

    Raises:
        InputError: if the flag is neither one nor two positive numbers.
    """
    sizes = arguments.image_size
    if sizes is None:
        sizes = config.image_size
        sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    if len(sizes) > 2 or min(sizes) < 1:
        raise InputError(f"--image_size must be one or two positive numbers, got {sizes}")
    return sizes[0], sizes[-1]


def quantize_int8(model: PreTrainedModel) -> None:
    """Converts the weights of all linear layers to int8, with one scale per output channel."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def run_model(model: PreTrainedModel) -> Run:
    @torch.no_grad()
    def run(pixel_values):
        outputs = model(pixel_values=pixel_values)
        return list(outputs.feature_maps) if isinstance(model, InternImageBackbone) else [outputs.logits]

    return run


def onnx_session(file: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(pixel_values):
        return [torch.from_numpy(output) for output in session.run(None, {"pixel_values": pixel_values.numpy()})]

    return run


def write_onnx(model: PreTrainedModel, image_size: tuple[int, int], arguments: ExportArguments, file: Path) -> Run:
    """Writes the ONNX file; returns a function that runs it."""
    import onnx

    program = export_onnx(
        model,
        image_size=image_size,
        dynamic=arguments.dynamic,
        opset=arguments.opset,
        dcnv3_op=arguments.dcnv3_op,
    )
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    external = size > 1.9e9  # Protocol Buffers limits a file to 2 GiB
    program.save(file, external_data=external)
    onnx.checker.check_model(file)
    if arguments.dcnv3_op == "native":
        return onnx_session(file)
    # ONNX Runtime lacks the operator: the check runs the same graph with the operator expanded.
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        nodes = expand_dcnv3(program.model)
        if nodes != sum(model.config.depths):
            raise RuntimeError(f"the file has {nodes} DCNv3 nodes, the model {sum(model.config.depths)} layers")
        program.save(Path(folder) / file.name, external_data=external)
        return onnx_session(Path(folder) / file.name)


def write_aoti(model: PreTrainedModel, image_size: tuple[int, int], arguments: ExportArguments, file: Path) -> Run:
    """Writes the AOTInductor package; returns a function that runs it."""
    as_operator = dcnv3_as_operator() if arguments.dcnv3_op == "custom" else contextlib.nullcontext()
    with as_operator:
        program = export_program(model, image_size=image_size, dynamic=("batch",) if arguments.dynamic else ())
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    package = torch._inductor.aoti_load_package(str(file))
    return lambda pixel_values: list(package(pixel_values))


def compare(run: Run, reference: Run, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[float, float]:
    """Returns the largest difference of both on random images of the given shapes, and the largest output."""
    generator = torch.Generator().manual_seed(0)
    difference = largest = 0.0
    for shape in shapes:
        pixel_values = torch.randn(shape, generator=generator).to(dtype)
        actual, expected = run(pixel_values), reference(pixel_values)
        if [tuple(a.shape) for a in actual] != [tuple(e.shape) for e in expected]:
            raise RuntimeError(
                f"for images {shape} the file returns {[tuple(a.shape) for a in actual]}, the model "
                f"{[tuple(e.shape) for e in expected]}"
            )
        for a, e in zip(actual, expected, strict=True):
            # max() could drop a NaN
            difference = np.fmax(difference, np.nan_to_num((a.float() - e.float()).abs().max().item(), nan=np.inf))
            largest = max(largest, e.float().abs().max().item())
    return float(difference), largest


def matching_classes(model_names: list[str], data_names: list[str], data: str) -> tuple[dict[int, int], str]:
    """Maps the dataset's class numbers to the model's; returns the map and a description of the matching.

    Classes are matched by name; if no name matches, without regard to case and spaces. If the model has no names (LABEL_0, ...),
    classes are matched by number, provided that their numbers are equal.

    Raises:
        InputError: if no class matches.
    """

    def normal(name: str) -> str:
        return " ".join(name.casefold().replace("_", " ").split())

    if all(name == f"LABEL_{i}" for i, name in enumerate(model_names)) and set(model_names).isdisjoint(data_names):
        if len(model_names) == len(data_names):
            return {i: i for i in range(len(data_names))}, "the model's classes have no names: matched by number"
        raise InputError(
            f"--dataset {data} has {len(data_names)} classes, the model {len(model_names)} without names (LABEL_0, ...): they "
            "cannot be matched by name; as many were expected"
        )
    for key, how in ((str, "by name"), (normal, "by name, without regard to case, spaces and underscores")):
        number = {key(name): i for i, name in reversed(list(enumerate(model_names)))}
        matched = {i: number[key(name)] for i, name in enumerate(data_names) if key(name) in number}
        if matched:
            return matched, f"{len(matched)} of {len(data_names)} classes matched {how}"
    raise InputError(
        f"--dataset {data}: none of its {len(data_names)} classes ({some(data_names)}) is one of the model's "
        f"{len(model_names)} ({some(model_names)}); the same names were expected"
    )


def evaluation_images(arguments: ExportArguments, config: InternImageConfig) -> tuple[object, list[str]]:
    """Loads the dataset's held-out images of the model's classes, labelled with the model's numbers, and a description.

    Raises:
        InputError: if the dataset cannot be used, or no image has a class of the model.
    """
    names = ("dataset", "dataset_config", "train_split", "eval_split", "eval_fraction", "image_column", "label_column")
    flags = {name: getattr(arguments, name) for name in (*names, "max_eval_samples")}
    parts, account = load_splits(DataArguments(**flags), seed=0)
    images, classes = parts["evaluation"], list(account.classes)
    model_names = [config.id2label.get(i, f"LABEL_{i}") for i in range(config.num_labels)]
    matched, how = matching_classes(model_names, classes, arguments.dataset)
    labels = images["label"]
    used = [row for row, label in enumerate(labels) if label in matched]
    lines = [f"{account.data.name}: {account.data.layout}; {account.data.left_out}", how]
    if len(used) < len(images):
        rest = Counter(classes[label] for label in labels if label not in matched)
        lines.append(
            f"{len(images) - len(used)} of {len(images)} images are left out of the accuracy, the model does not have their "
            f"classes: {counted(rest, 'images')}"
        )
    if not used:
        raise InputError(
            f"--dataset {arguments.dataset}: none of the {len(images)} images to evaluate is of a class that the model has"
        )
    numbers = [matched[labels[row]] for row in used]
    return images.select(used).remove_columns("label").add_column("label", numbers), lines


def accuracy(run: Run, images, processor: BaseImageProcessor, dtype: torch.dtype, batch_size: int) -> float:
    """Returns the fraction of correctly classified images."""
    right = 0
    for batch in images.iter(batch_size=batch_size):
        logits = run(processor(decoded(batch), return_tensors="pt")["pixel_values"].to(dtype))[0]
        right += (logits.argmax(-1) == torch.tensor(batch["label"])).sum().item()
    return right / len(images)


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Runs the program; returns its summary."""
    (arguments,) = parse_flags(argv, ExportArguments)
    suffix = {"onnx": ".onnx", "aoti": ".pt2"}[arguments.format]
    output = Path(arguments.output)
    if output.suffix in (".onnx", ".pt2") and output.suffix != suffix:
        raise InputError(f"--output {output} must end in {suffix} with --format {arguments.format}")
    file = output if output.suffix == suffix else output / f"model{suffix}"
    if arguments.task == "backbone" and arguments.dataset is not None:
        raise InputError("--dataset measures the accuracy of a classifier; a backbone has none")
    if arguments.out_features and arguments.task != "backbone":
        raise InputError("--out_features needs --task backbone")

    name = arguments.model
    if name is None:
        name = demo_model()
        if arguments.task == "image-classification" and arguments.dataset is None:
            arguments.dataset = "digits"
    model = load_model(arguments, name)
    with loading("model", name):
        processor = AutoImageProcessor.from_pretrained(name)
    height, width = image_size(arguments, model.config)
    channels, batch_size = model.config.num_channels, 32 if arguments.dynamic else 1
    shapes = [(1, channels, height, width)]
    if arguments.dynamic and arguments.format == "onnx":
        shapes.append((3, channels, height + 45, width + 38))
    elif arguments.dynamic:
        shapes.append((3, channels, height, width))
    dtype = getattr(torch, arguments.dtype)
    summary: dict[str, object] = {"model": f"{name}, {model.num_parameters():,} parameters"}

    images = None
    if arguments.dataset is not None:
        given = output_size(processor)
        if given != (height, width) and not (arguments.dynamic and arguments.format == "onnx"):
            raise InputError(
                f"--dataset: the image processor of {name} gives images of {given[0]}x{given[1]}, the file would take "
                f"{height}x{width} alone; --image_size {given[0]} {given[1]} was expected"
            )
        images, lines = evaluation_images(arguments, model.config)
        print("\n".join(lines), flush=True)
        right = accuracy(run_model(model), images, processor, dtype, batch_size)
        summary["accuracy of the model"] = f"{right:.2%} of {len(images)} images"
    if arguments.quantize == "int8":
        exact = run_model(load_model(arguments, name))
        quantize_int8(model)
        difference, largest = compare(run_model(model), exact, shapes, dtype)
        summary["int8 weights"] = f"move outputs of up to {largest:.3g} by up to {difference:.3g}"

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        start = time.perf_counter()
        write = write_onnx if arguments.format == "onnx" else write_aoti
        run = write(model, (height, width), arguments, unfinished)
        seconds = time.perf_counter() - start
        megabytes = sum(part.stat().st_size for part in Path(folder).iterdir()) / 1e6
        summary["file"] = f"{file}, {megabytes:.1f} MB, written in {seconds:.0f} s"

        difference, largest = compare(run, run_model(model), shapes, dtype)
        tolerance = (arguments.tolerance or TOLERANCES[arguments.dtype]) * max(1.0, largest)
        sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
        checked = f"outputs of up to {largest:.3g} differ by up to {difference:.2g} on images {sizes}"
        if not difference <= tolerance:
            sys.exit(f"{file} was not written: {checked}; {tolerance:.2g} would be allowed")
        summary["checked"] = checked
        if images is not None:
            right = accuracy(run, images, processor, dtype, batch_size)
            summary["accuracy of the file"] = f"{right:.2%} of {len(images)} images"
        if file != output:
            model.config.save_pretrained(folder)
            processor.save_pretrained(folder)
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == unfinished):  # the model last
            os.replace(part, file.parent / part.name)
    summary["inputs, outputs"] = f"pixel_values -> {', '.join(output_names(model))}"
    print("\n" + "\n".join(f"{key:>21}  {value}" for key, value in summary.items()))
    return summary


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    run_program(main)
