"""Times whole models: InternImage beside ConvNeXt, ConvNeXt V2 and Swin of transformers, on a CPU or a GPU.

    python benchmarks/model_speed.py --threads 2                              # InternImage-T on this CPU
    python benchmarks/model_speed.py --device cuda --output DIR --seconds 240   # T and B, also with torch.compile

All models have random weights (InternImage's offsets are about a pixel), so nothing is downloaded. "InternImage-T,
materialising op" is the same model with DCNv3 computed as the official fallback does it: every sampled point is written
to memory (on a CPU). `--upstream` names a checkout of OpenGVLab/InternImage, whose classification model then joins in, with
the same weights and a check that its logits agree; its compiled operator is used where it is installed, else its fallback.
The compiled one has no bfloat16, so float16 is timed in its place, and is not for torch.compile: the model stays eager.

What is timed, in groups of size x dtype x mode (eager, torch.compile) x pass:

- inference: `torch.inference_mode`, weights and images in the dtype;
- training: forward, cross-entropy, backward and AdamW; for bfloat16 with float32 weights under autocast.

The models of a group take turns, so that a slow moment of the machine hits all alike; the figure is the median over the
turns. Memory is the peak beyond weights, optimiser and images during one call. `--seconds` bounds the run: groups come in
the order of the arguments, eager before compiled, and what did not fit is listed. `--profile` adds where the time goes,
`--parts` the alternatives in layout and in the number of GEMMs that the model's code could take.

`--compile_only` fills torch.compile's cache, for a measurement after it, and times nothing.

`--output` names a folder for `model_speed_<device>.json` and the same as Markdown, rewritten after each group. The exit
status is 1 if one of InternImage's measurements failed.
"""

import argparse
import copy
import datetime
import gc
import json
import platform
import re
import signal
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from op_cpu import materialising, peak_memory
from op_gpu import stand_in_for_pkg_resources
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

import internimage_hf
from internimage_hf import InternImageConfig, InternImageForImageClassification
from internimage_hf.checkpoint import translate_state_dict
from internimage_hf.dcnv3 import dcnv3_backend_report
from internimage_hf.dcnv3_torch import Geometry
from internimage_hf.modeling_internimage import InternImageDeformableSampling, InternImageDropPath


DROP_PATH_RATE = 0.1
CLASSES = 1000
# kept back from the budget, to time what is ready when a compilation takes too long
RESERVE_SECONDS = 15


OFFICIAL_WITH_OPERATOR = "official model, DCNv3"


class OutOfTime(BaseException):
    """The time is up. Not an Exception, so that no compiler takes it for a failure of its own."""


# ------------------------------------------------------------------------------------------------------------- models


def internimage(size: str) -> nn.Module:
    config = InternImageConfig.from_variant(size, drop_path_rate=DROP_PATH_RATE)
    model = InternImageForImageClassification(config)
    for name, module in model.named_modules():
        if name.endswith(("dcn.offset", "dcn.mask")):  # zero at first, which no trained model has
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def _materialising_sampling(input, offset, mask, groups, offset_scale=1.0, remove_center=False):
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), groups, offset_scale, remove_center)
    return materialising(input, offset, mask, geometry)


def materialising_internimage(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, InternImageDeformableSampling):
            module.forward = _materialising_sampling
    return model


def official_internimage(folder: Path, model: nn.Module) -> tuple[str, nn.Module]:
    """The official classification model with the weights of ours."""
    source = folder / "classification"
    if not (source / "models" / "intern_image.py").is_file():
        raise SystemExit(f"--upstream {folder} is not a checkout of OpenGVLab/InternImage")
    try:
        import DCNv3  # noqa: F401
    except ImportError:
        operator = "DCNv3_pytorch"
        sys.modules["DCNv3"] = types.ModuleType("DCNv3")
    else:
        operator = "DCNv3"
    # What the official code takes from two packages that current environments lack.
    stand_in_for_pkg_resources()
    layers = types.ModuleType("timm.models.layers")
    layers.DropPath, layers.trunc_normal_ = InternImageDropPath, nn.init.trunc_normal_
    for name in ("timm", "timm.models"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["timm.models.layers"] = layers
    sys.path.insert(0, str(source))
    from models.intern_image import InternImage

    config = model.config
    official = InternImage(
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
    names = {key: torch.tensor(i) for i, key in enumerate(official.state_dict())}
    ours = model.state_dict()
    translated = {int(index): key for key, index in translate_state_dict(names).items()}
    official.load_state_dict({key: ours[translated[int(index)]] for key, index in names.items()})
    images = torch.randn(1, 3, 224, 224)
    device = "cuda" if operator == "DCNv3" else "cpu"  # the compiled operator has no CPU form
    with torch.inference_mode():
        expected = model.eval()(images).logits
        actual = official.eval().to(device)(images.to(device)).cpu()
    if not torch.allclose(actual, expected, atol=1e-2 if device == "cuda" else 1e-3):
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


def build(size: str, arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """All models of a size by name, InternImage first."""
    torch.manual_seed(0)
    name = f"InternImage-{size.upper()}"
    model = internimage(size)
    models = {name: model}
    if arguments.upstream is not None:
        official, module = official_internimage(arguments.upstream, model)
        models[f"{name}, {official}"] = module
    if arguments.device == "cpu":
        models[f"{name}, materialising op"] = materialising_internimage(model)
    models |= others(size)
    if arguments.only:
        models = {key: model for key, model in models.items() if key == name or re.search(arguments.only, key)}
    return models


# ------------------------------------------------------------------------------------------------------------- timing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


@contextmanager
def alarm(deadline: float) -> Iterator[None]:
    """Raises OutOfTime in the block at `deadline`, on the clock of `time.monotonic`."""

    def stop(*_) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def call_memory(call: Callable[[], None], device: torch.device) -> int:
    """Bytes in use beyond those before the call, at their peak."""
    if device.type != "cuda":
        return peak_memory(call)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(models: dict[str, nn.Module], group: dict, arguments: argparse.Namespace, deadline: float) -> list[dict]:
    """Times the models of one group in turns. A model that fails is reported as such, one without time left likewise."""
    device = torch.device(arguments.device)
    batch = arguments.batch if group["pass"] == "inference" else arguments.train_batch
    images = torch.randn(batch, 3, arguments.image_size, arguments.image_size, device=device)
    rows, ready = [], []
    out_of_time = False
    for name, model in models.items():
        row = {**group, "model": name, "batch": batch}
        rows.append(row)
        if out_of_time or time.monotonic() > deadline - RESERVE_SECONDS:
            row["failure"] = "out of time"
            continue
        try:
            with alarm(deadline - RESERVE_SECONDS):
                start = time.perf_counter()
                model = copy.deepcopy(model).to(device)
                dtype, compiled = getattr(torch, group["dtype"]), group["mode"] == "compile"
                if name.endswith(OFFICIAL_WITH_OPERATOR):
                    dtype, compiled = torch.float16 if dtype == torch.bfloat16 else dtype, False
                    row["model"] += f", {dtype}".replace("torch.", "") + ", eager"
                call = PASSES[group["pass"]](model, images, dtype, compiled)
                call()
                synchronize(device)
                row["first_call_seconds"] = round(time.perf_counter() - start, 2)
                if arguments.compile_only:
                    row["failure"] = "not timed"
                    continue
                call()
                row["peak_bytes"] = call_memory(call, device)
                start = time.perf_counter()
                call()
                synchronize(device)
                calls = max(1, min(50, round(0.2 / (time.perf_counter() - start))))
            ready.append((row, call, calls))
        except OutOfTime:
            row["failure"], out_of_time = "out of time", True
        except Exception as error:  # reported in the table and by the exit status
            row["failure"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
                :300
            ]
            print(f"{name}: {row['failure']}", file=sys.stderr)
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    times = {id(row): [] for row, _, _ in ready}
    for turn in range(arguments.turns):
        if turn > 0 and time.monotonic() > deadline:
            break
        for row, call, calls in ready:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize(device)
            times[id(row)].append((time.perf_counter() - start) / calls)
    for row, _, _ in ready:
        row["seconds"] = statistics.median(times[id(row)])
        row["fastest_seconds"] = min(times[id(row)])
        row["turns"] = len(times[id(row)])
        row["images_per_second"] = batch / row["seconds"]
    first = rows[0].get("seconds")
    for row in rows:
        if first is not None and "seconds" in row:
            row["internimage_time_ratio"] = first / row["seconds"]
    torch.compiler.reset()
    return rows


# ------------------------------------------------------------------------------------------- where the time goes, parts

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
    """The kind of work that an event does for the outermost operator that has one; a linear layer's copy is linear."""
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
    device = torch.device(arguments.device)
    images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size, device=device)
    call = inference(copy.deepcopy(model).to(device), images, getattr(torch, group["dtype"]), False)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    repeats = 5
    for _ in range(2):
        call()
    synchronize(device)
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(repeats):
            call()
        synchronize(device)
    milliseconds = {}
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = _kind(event)
        milliseconds[kind] = milliseconds.get(kind, 0.0) + own / repeats / 1e3
    return dict(sorted(milliseconds.items(), key=lambda item: -item[1]))


def _parts(size: int, channels: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Callable]:
    """Calls that compute the same in another layout, or with another number of GEMMs."""
    device = torch.device(arguments.device)
    groups = channels // 16
    tokens = torch.randn(arguments.batch, size, size, channels, device=device).to(dtype)
    images = tokens.permute(0, 3, 1, 2)
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels).to(device, dtype)
    offset, mask, both = (nn.Linear(channels, groups * width).to(device, dtype) for width in (18, 9, 27))

    def channels_first():
        return depthwise(images.contiguous()).contiguous(memory_format=torch.channels_last)

    def split_copies():
        return [part.contiguous() for part in both(tokens).split([groups * 18, groups * 9], -1)]

    return {
        "depth-wise 3x3, channels last": lambda: depthwise(images),
        "depth-wise 3x3, channels first and back": channels_first,
        "offset and mask, two GEMMs": lambda: (offset(tokens), mask(tokens)),
        "offset and mask, one GEMM": lambda: both(tokens),
        "offset and mask, one GEMM and split copies": split_copies,
    }


def time_parts(dtype: str, arguments: argparse.Namespace, deadline: float) -> list[dict]:
    """Alternatives within a layer of InternImage-T at 224 x 224, by stage: the median time of one call."""
    device = torch.device(arguments.device)
    repeats, warm_up = (20 if device.type == "cuda" else 1), 3
    rows = []
    for stage, (size, channels) in enumerate(((56, 64), (28, 128), (14, 256), (7, 512)), start=1):
        if time.monotonic() > deadline:
            break
        calls = _parts(size, channels, getattr(torch, dtype), arguments)
        times = {name: [] for name in calls}
        with torch.inference_mode():
            for _ in range(warm_up + 10):
                for name, call in calls.items():
                    synchronize(device)
                    start = time.perf_counter()
                    for _ in range(repeats):
                        call()
                    synchronize(device)
                    times[name].append((time.perf_counter() - start) / repeats)
        rows += [
            {"dtype": dtype, "stage": stage, "part": name, "milliseconds": statistics.median(values[warm_up:]) * 1e3}
            for name, values in times.items()
        ]
    return rows


# ------------------------------------------------------------------------------------------------------------- report


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, {capability}"


def environment(arguments: argparse.Namespace) -> dict:
    device = torch.device(arguments.device)
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "internimage_hf": internimage_hf.__version__,
        "dcnv3_backend": dcnv3_backend_report().get(device.type),
        "image_size": arguments.image_size,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "command": " ".join(["python", *sys.argv]),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["cudnn_allow_tf32"] = torch.backends.cudnn.allow_tf32
    return facts


def markdown(report: dict) -> str:
    facts = report["environment"]
    lines = ["# Speed of whole models", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    header = "| model | ms | images/s | InternImage's time / its time | peak MiB | first call s |"
    groups = {}
    for row in report["measurements"]:
        groups.setdefault((row["dtype"], row["pass"], row["mode"], row["batch"], row["size"]), []).append(row)
    for (dtype, passed, mode, batch, size), rows in groups.items():
        lines += ["", f"## {size.upper()}, {dtype}, {passed}, {mode}, batch {batch}", "", header]
        lines.append("|---|---:|---:|---:|---:|---:|")
        for row in rows:
            if "failure" in row:
                lines.append(f"| {row['model']} | {row['failure'].replace('|', '/')} | | | | |")
                continue
            ratio = f"{row['internimage_time_ratio']:.2f}" if "internimage_time_ratio" in row else ""
            lines.append(
                f"| {row['model']} | {row['seconds'] * 1e3:.2f} | {row['images_per_second']:.1f} | {ratio} "
                f"| {row['peak_bytes'] / 2**20:.0f} | {row['first_call_seconds']:.1f} |"
            )
    for title, by_model in report["profiles"].items():
        lines += ["", f"## Where the time goes: {title}", "", "| kind of work | " + " | ".join(by_model) + " |"]
        lines.append("|---|" + "---:|" * len(by_model))
        kinds = dict.fromkeys(kind for kinds in by_model.values() for kind in kinds)
        lines += [
            f"| {kind} | " + " | ".join(f"{kinds.get(kind, 0.0):.2f} ms" for kinds in by_model.values()) + " |"
            for kind in kinds
        ]
    if report["parts"]:
        lines += ["", "## Alternatives within a layer of InternImage-T, milliseconds", ""]
        lines += ["| dtype | part | stage 1 | stage 2 | stage 3 | stage 4 |", "|---|---|---:|---:|---:|---:|"]
        parts = {}
        for row in report["parts"]:
            parts.setdefault((row["dtype"], row["part"]), []).append(f"{row['milliseconds']:.3f}")
        lines += [f"| {dtype} | {part} | " + " | ".join(values) + " |" for (dtype, part), values in parts.items()]
    if report["not_measured"]:
        lines += ["", "Not measured, out of time: " + "; ".join(report["not_measured"]) + "."]
    return "\n".join(lines) + "\n"


def write(report: dict, folder: Path | None) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    device = report["environment"]["hardware"].split(",")[0] if "cuda" in report["environment"] else "cpu"
    stem = "model_speed_" + re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.md").write_text(markdown(report), encoding="utf-8")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--models", choices=["t", "b"], nargs="+", help="sizes; default: t, on a GPU t and b")
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
    parser.add_argument("--batch", type=int, help="images per inference; default: 8, on a GPU 64")
    parser.add_argument("--train_batch", type=int, help="images per training step; default: 4, on a GPU 64")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--only", help="InternImage, and models whose names match this regular expression")
    parser.add_argument("--upstream", type=Path, help="checkout of OpenGVLab/InternImage to compare with")
    parser.add_argument("--threads", type=int, help="threads of a CPU; default: PyTorch's")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=600, help="time for everything")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--profile", action=flag, help="where the time of eager inference goes; default: on a GPU")
    parser.add_argument("--parts", action=flag, help="alternatives within a layer; default: on a GPU")
    parser.add_argument("--compile_only", action="store_true", help="compile, and time nothing")
    parser.add_argument("--output", type=Path, help="folder for the results as JSON and Markdown")
    arguments = parser.parse_args(argv)
    try:
        on_gpu = torch.device(arguments.device).type == "cuda"
    except RuntimeError as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    if torch.device(arguments.device).type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {arguments.device}")
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: PyTorch {torch.__version__} finds no GPU here")
    for name in ("batch", "train_batch", "image_size", "threads", "turns", "seconds"):
        if getattr(arguments, name) is not None and getattr(arguments, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
    for name in ("profile", "parts"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, on_gpu and not arguments.compile_only)
    arguments.models = arguments.models or (["t", "b"] if on_gpu else ["t"])
    arguments.dtypes = arguments.dtypes or (["bfloat16", "float32"] if on_gpu else ["float32", "bfloat16"])
    arguments.modes = arguments.modes or (["eager", "compile"] if on_gpu else ["eager"])
    arguments.batch = arguments.batch or (64 if on_gpu else 8)
    arguments.train_batch = arguments.train_batch or (64 if on_gpu else 4)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    deadline = time.monotonic() + arguments.seconds
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    report = {
        "environment": environment(arguments),
        "measurements": [],
        "profiles": {},
        "parts": [],
        "not_measured": [],
    }

    def cost(group: dict) -> int:
        return (
            arguments.modes.index(group["mode"])
            + 2 * arguments.dtypes.index(group["dtype"])
            + 2 * arguments.models.index(group["size"])
        )

    keys = ("size", "dtype", "mode", "pass")
    groups = [
        dict(zip(keys, values, strict=True))
        for values in product(arguments.models, arguments.dtypes, arguments.modes, arguments.passes)
    ]
    if arguments.parts:
        for dtype in arguments.dtypes:
            report["parts"] += time_parts(dtype, arguments, deadline)
        write(report, arguments.output)
    size, models = None, {}
    for group in sorted(groups, key=cost):
        if time.monotonic() > deadline - RESERVE_SECONDS:
            report["not_measured"].append(" ".join(group.values()))
            write(report, arguments.output)
            continue
        if group["size"] != size:
            size = group["size"]
            models = build(size, arguments)
        report["measurements"] += measure(models, group, arguments, deadline)
        in_time = time.monotonic() < deadline
        if arguments.profile and in_time and group["mode"] == "eager" and group["pass"] == "inference":
            title = f"{size.upper()}, {group['dtype']}, eager inference, batch {arguments.batch}"
            report["profiles"][title] = {
                name: profile_model(model, group, arguments)
                for name, model in models.items()
                if re.fullmatch(r"(InternImage|ConvNeXt)-.", name)
            }
        write(report, arguments.output)
        gc.collect()
    print(markdown(report))
    failed = [
        row
        for row in report["measurements"]
        if row["model"].startswith("InternImage")
        and row.get("failure", "out of time") not in ("out of time", "not timed")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
