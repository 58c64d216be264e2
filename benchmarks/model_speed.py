"""Times whole models: InternImage beside ConvNeXt, ConvNeXt V2 and Swin of transformers, on a CPU or a GPU.

    python benchmarks/model_speed.py --threads 2                                  # InternImage-T on this CPU
    python benchmarks/model_speed.py --device cuda --output DIR --seconds 240     # T and B, also with torch.compile
    python benchmarks/model_speed.py --threads 2 --models flash_t                 # FlashInternImage-T beside InternImage-T

All models have random weights, so nothing is downloaded. InternImage's offsets are about one pixel, as after training.
"InternImage-T, materialising op" is the same model with an operator that writes every sampled point to memory, as the
official fallback does (on a CPU). `--upstream` names a checkout of OpenGVLab/InternImage, whose classification model is
timed too, with the same weights and after a comparison of the logits. On a GPU it uses its compiled operator where that is
built, else its fallback. The compiled operator has no bfloat16, so float16 stands in for it, and the model stays eager.
Of FlashInternImage there are neither: its official operator has no fallback.

The measurements come in groups of size x dtype x mode (eager, torch.compile) x pass:

- inference: `torch.inference_mode`, weights and images in the dtype;
- training: forward, cross-entropy, backward and AdamW; for bfloat16 with float32 weights under autocast.

The models of a group take turns. The figure is the median over the turns. Memory is the peak beyond weights, optimiser and
images during one call. `--profile` adds the time of eager inference by kind of work.

After `--seconds` no model is begun; the report names those that are missing. Groups come in the order of the arguments,
eager before compiled. The results are written after each group. The exit status is 1 if a measurement of InternImage failed.
"""

import argparse
import copy
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import harness
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from internimage_hf import InternImageConfig, InternImageForImageClassification
from internimage_hf.checkpoint import translate_state_dict
from internimage_hf.modeling_internimage import InternImageDeformableSampling


DROP_PATH_RATE = 0.1
CLASSES = 1000
OFFICIAL_WITH_OPERATOR = "official model, DCNv3"

# ------------------------------------------------------------------------------------------------------------- models


def internimage(size: str) -> nn.Module:
    config = InternImageConfig.from_variant(size, drop_path_rate=DROP_PATH_RATE)
    model = InternImageForImageClassification(config)
    for name, module in model.named_modules():
        if name.endswith(("dcn.offset", "dcn.mask")):  # initialised with zeros, which no trained model has
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def _materialising(input, offset, mask, groups, offset_scale=1.0, remove_center=False):
    return harness.materialising(input, offset, mask, groups, offset_scale)


def materialising_internimage(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, InternImageDeformableSampling):
            module.forward = _materialising
    return model


def official_internimage(folder: Path, model: nn.Module, device: torch.device) -> tuple[str, nn.Module]:
    """The official classification model with the weights of ours, and the name of its operator."""
    module = harness.import_official(folder, "models.intern_image")
    operator = "DCNv3" if device.type == "cuda" and harness.has_official_operator() else "DCNv3_pytorch"
    config = model.config
    official = module.InternImage(
        core_op=operator,
        num_classes=CLASSES,
        channels=config.channels,
        depths=config.depths,
        groups=config.groups,
        layer_scale=config.layer_scale_init_value,
        offset_scale=config.offset_scale,
        post_norm=config.post_norm,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=DROP_PATH_RATE,
    )
    # The translation of the names, by numbers in place of the weights.
    numbers = {name: torch.tensor(i) for i, name in enumerate(official.state_dict())}
    ours = {int(number): model.state_dict()[name] for name, number in translate_state_dict(numbers).items()}
    official.load_state_dict({name: ours[int(number)] for name, number in numbers.items()})
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        expected = model.eval()(images).logits
        actual = official.eval().to(device)(images.to(device)).cpu()
    if not torch.allclose(actual, expected, atol=1e-2 if device.type == "cuda" else 1e-3):
        raise SystemExit(f"the official model's logits differ by {float((actual - expected).abs().max())}")
    return f"official model, {operator}", official.cpu()


def others(size: str) -> dict[str, nn.Module]:
    """Transformers' models of the same size."""
    base = size == "b"
    common = {"num_labels": CLASSES, "drop_path_rate": DROP_PATH_RATE}
    widths = [128, 256, 512, 1024] if base else [96, 192, 384, 768]
    convnext = ConvNextConfig(hidden_sizes=widths, depths=[3, 3, 27 if base else 9, 3], **common)
    models = {f"ConvNeXt-{size.upper()}": ConvNextForImageClassification(convnext)}
    if not base:
        models["ConvNeXtV2-T"] = ConvNextV2ForImageClassification(
            ConvNextV2Config(hidden_sizes=widths, depths=[3, 3, 9, 3], **common)
        )
    heads = [4, 8, 16, 32] if base else [3, 6, 12, 24]
    swin = SwinConfig(embed_dim=widths[0], depths=[2, 2, 18 if base else 6, 2], num_heads=heads, **common)
    models[f"Swin-{size.upper()}"] = SwinForImageClassification(swin)
    return models


def build(size: str, device: torch.device, upstream: Path | None) -> dict[str, nn.Module]:
    """All models of a size by name, InternImage first; of `flash_t`, FlashInternImage first and then InternImage."""
    torch.manual_seed(0)
    is_flash, size = size.startswith("flash_"), size.removeprefix("flash_")
    name = f"InternImage-{size.upper()}"
    model = internimage(size)
    if is_flash:
        return {f"Flash{name}": internimage(f"flash_{size}"), name: model} | others(size)
    models = {name: model}
    if upstream is not None:
        official, module = official_internimage(upstream, model, device)
        models[f"{name}, {official}"] = module
    if device.type == "cpu":
        models[f"{name}, materialising op"] = materialising_internimage(model)
    return models | others(size)


# ------------------------------------------------------------------------------------------------------------- timing


def _logits(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def inference(model: nn.Module, images: torch.Tensor, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    model = model.to(dtype).eval()
    images = images.to(dtype)
    function = torch.compile(model) if compiled else model

    def call() -> None:
        with torch.inference_mode():
            _logits(function(images))

    return call


def training(model: nn.Module, images: torch.Tensor, dtype: torch.dtype, compiled: bool) -> Callable[[], None]:
    model = model.float().train()
    labels = torch.arange(images.shape[0], device=images.device) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=images.is_cuda)
    function = torch.compile(model) if compiled else model

    def call() -> None:
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(images.device.type, dtype)
        with autocast:
            loss = F.cross_entropy(_logits(function(images)).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


PASSES = {"inference": inference, "training": training}


def first_calls(
    model: nn.Module, row: dict, images: torch.Tensor, device: torch.device
) -> tuple[Callable[[], None], int]:
    """A call of the model's pass, and how often to make it in a turn; writes what the first calls show to `row`."""
    start = time.perf_counter()
    model = copy.deepcopy(model).to(device)
    dtype, compiled = getattr(torch, row["dtype"]), row["mode"] == "compile"
    if row["model"].endswith(OFFICIAL_WITH_OPERATOR):
        dtype, compiled = torch.float16 if dtype == torch.bfloat16 else dtype, False
        row["model"] += f", {dtype}".replace("torch.", "") + ", eager"
    call = PASSES[row["pass"]](model, images, dtype, compiled)
    call()
    harness.synchronize(device)
    row["first_call_seconds"] = round(time.perf_counter() - start, 2)
    call()
    row["peak_bytes"] = harness.peak_memory(call, device)
    return call, max(1, min(50, round(0.2 / harness.seconds_of(call, 1, device))))


def measure(
    models: dict[str, nn.Module], group: dict, arguments: argparse.Namespace, deadline: float
) -> tuple[list[dict], list[str]]:
    """Times the models of a group in turns: a row for each, with its figures or its failure, and who had no time left."""
    batch = arguments.batch if group["pass"] == "inference" else arguments.train_batch
    images = torch.randn(batch, 3, arguments.image_size, arguments.image_size, device=arguments.device)
    rows, ready, missing = {}, {}, []
    for name, model in models.items():
        if time.monotonic() > deadline:
            missing.append(" ".join([*group.values(), name]))
            continue
        row = rows[name] = {**group, "model": name, "batch": batch}
        try:
            call, calls = first_calls(model, row, images, arguments.device)
            ready[name] = partial(harness.seconds_of, call, calls, arguments.device)
        except Exception as error:  # reported in the table and by the exit status
            row["failure"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
            print(f"{name}: {row['failure']}", file=sys.stderr)
            if arguments.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    for name, times in harness.take_turns(ready, arguments.repeats, deadline - time.monotonic()).items():
        seconds = statistics.median(times)
        rows[name] |= {"seconds": seconds, "fastest_seconds": min(times), "turns": len(times)}
        rows[name]["images_per_second"] = batch / seconds
    first = next(iter(rows.values()), {}).get("seconds")
    for name in ready:
        if first is not None:
            rows[name]["internimage_time_ratio"] = first / rows[name]["seconds"]
    if group["mode"] == "compile":
        torch.compiler.reset()
    return list(rows.values()), missing


# ------------------------------------------------------------------------------------------------ where the time goes

KINDS = (
    ("DCNv3", r"dcnv3|grid_sampler|embedding_bag"),
    ("linear layers", r"aten::(linear|addmm|matmul|mm)$"),
    ("depth-wise convolutions", r"depthwise"),
    ("convolutions", r"aten::(conv2d|_?convolution)$"),
    ("norms", r"aten::(layer_norm|batch_norm|native_layer_norm)$"),
    ("activations", r"aten::gelu$"),
    ("attention", r"scaled_dot_product|softmax"),
    ("copies between layouts", r"aten::(contiguous|clone|copy_|reshape|cat|roll)$"),
    ("residuals and other arithmetic", r"aten::(add|add_|mul|mul_|div|sub|mean|addcmul)$"),
)


def _kind(event) -> str:
    """The kind of the outermost operator that has one: a copy that a linear layer makes counts as linear."""
    found = "other"
    while event is not None:
        if re.search(r"aten::(conv2d|_?convolution)$", event.name) and event.input_shapes:
            weight = event.input_shapes[1] if len(event.input_shapes) > 1 else []
            found = "depth-wise convolutions" if len(weight) == 4 and weight[1] == 1 else "convolutions"
        else:
            found = next((kind for kind, pattern in KINDS if re.search(pattern, event.name)), found)
        event = event.cpu_parent
    return found


def profile_model(model: nn.Module, group: dict, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one eager inference by kind of work."""
    device = arguments.device
    images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size, device=device)
    call = inference(copy.deepcopy(model).to(device), images, getattr(torch, group["dtype"]), False)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    repeats = 5
    for _ in range(2):
        call()
    harness.synchronize(device)
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(repeats):
            call()
        harness.synchronize(device)
    milliseconds = {}
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = _kind(event)
        milliseconds[kind] = milliseconds.get(kind, 0.0) + own / repeats / 1e3
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))


# ------------------------------------------------------------------------------------------------------------- report


def markdown(report: dict) -> str:
    lines = harness.heading("Speed of whole models", report["environment"])
    groups = {}
    for row in report["measurements"]:
        groups.setdefault((row["dtype"], row["pass"], row["mode"], row["batch"], row["size"]), []).append(row)
    for (dtype, passed, mode, batch, size), rows in groups.items():
        first = "FlashInternImage" if size.startswith("flash_") else "InternImage"
        header = ("model", "ms", "images/s", f"{first}'s time / its time", "peak MiB", "first call s")
        cells = [
            (row["model"], row["failure"], "", "", "", "")
            if "failure" in row
            else (
                row["model"],
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['images_per_second']:.1f}",
                f"{row['internimage_time_ratio']:.2f}" if "internimage_time_ratio" in row else "",
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['first_call_seconds']:.1f}",
            )
            for row in rows
        ]
        lines += ["", f"## {size.upper()}, {dtype}, {passed}, {mode}, batch {batch}", *harness.table(header, cells)]
    for title, by_model in report["profiles"].items():
        kinds = dict.fromkeys(kind for times in by_model.values() for kind in times)
        cells = [(kind, *(f"{times.get(kind, 0.0):.2f} ms" for times in by_model.values())) for kind in kinds]
        lines += ["", f"## Where the time goes: {title}", *harness.table(("kind of work", *by_model), cells)]
    if report["not_measured"]:
        lines += ["", "Not measured, out of time: " + "; ".join(report["not_measured"]) + "."]
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    positive = harness.positive
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--device", type=harness.device, default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--models", choices=["t", "b", "flash_t", "flash_b"], nargs="+", help="default: t, on a GPU t and b"
    )
    parser.add_argument(
        "--dtypes",
        choices=["float32", "bfloat16"],
        nargs="+",
        help="default: float32 bfloat16, on a GPU bfloat16 float32",
    )
    parser.add_argument(
        "--modes", choices=["eager", "compile"], nargs="+", help="default: eager, on a GPU eager and compile"
    )
    parser.add_argument("--passes", choices=list(PASSES), nargs="+", default=list(PASSES))
    parser.add_argument("--batch", type=positive(int), help="images per inference; default: 8, on a GPU 64")
    parser.add_argument("--train_batch", type=positive(int), help="images per training step; default: 4, on a GPU 64")
    parser.add_argument("--image_size", type=positive(int), default=224)
    parser.add_argument("--repeats", type=positive(int), default=7, help="turns of each group")
    parser.add_argument("--seconds", type=positive(float), default=600, help="no model is begun after this time")
    parser.add_argument("--profile", action="store_true", help="where the time of eager inference goes")
    arguments = parser.parse_args(argv)
    on_gpu = arguments.device.type == "cuda"
    arguments.models = arguments.models or (["t", "b"] if on_gpu else ["t"])
    arguments.dtypes = arguments.dtypes or (["bfloat16", "float32"] if on_gpu else ["float32", "bfloat16"])
    arguments.modes = arguments.modes or (["eager", "compile"] if on_gpu else ["eager"])
    arguments.batch = arguments.batch or (64 if on_gpu else 8)
    arguments.train_batch = arguments.train_batch or (64 if on_gpu else 4)
    return arguments


def groups_in_order(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The groups, the cheapest and first-named ones first."""

    def cost(group: dict) -> int:
        return (
            arguments.modes.index(group["mode"])
            + 2 * arguments.dtypes.index(group["dtype"])
            + 2 * arguments.models.index(group["size"])
        )

    values = product(arguments.models, arguments.dtypes, arguments.modes, arguments.passes)
    return sorted((dict(zip(("size", "dtype", "mode", "pass"), v, strict=True)) for v in values), key=cost)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    deadline = time.monotonic() + arguments.seconds
    harness.set_up(arguments.threads, arguments.device)
    facts = {
        "image_size": arguments.image_size,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    report = {
        "environment": harness.environment(arguments.device, **facts),
        "measurements": [],
        "profiles": {},
        "not_measured": [],
    }
    size, models = None, {}
    for group in groups_in_order(arguments):
        if time.monotonic() > deadline:
            report["not_measured"].append(" ".join(group.values()))
            continue
        if group["size"] != size:
            size = group["size"]
            models = build(size, arguments.device, arguments.upstream)
        rows, missing = measure(models, group, arguments, deadline)
        report["measurements"] += rows
        report["not_measured"] += missing
        in_time = time.monotonic() < deadline
        if arguments.profile and in_time and group["mode"] == "eager" and group["pass"] == "inference":
            title = f"{size.upper()}, {group['dtype']}, eager inference, batch {arguments.batch}"
            report["profiles"][title] = {
                name: profile_model(model, group, arguments)
                for name, model in models.items()
                if re.fullmatch(r"((Flash)?InternImage|ConvNeXt)-.", name)
            }
        harness.write_results(arguments.output, "model_speed", report, markdown(report))
        gc.collect()
    harness.write_results(arguments.output, "model_speed", report, markdown(report))
    print(markdown(report))
    return int(
        any(
            "failure" in row and row["model"].startswith(("InternImage", "FlashInternImage"))
            for row in report["measurements"]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
