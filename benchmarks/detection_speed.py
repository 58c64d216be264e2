"""Times the detectors: DINO-T and Mask R-CNN-T, beside Deformable DETR of transformers on the same backbone.

    python benchmarks/detection_speed.py --threads 2                  # 800 x 1333, batch 1, on this CPU
    python benchmarks/detection_speed.py --device cuda --output DIR

All models have random weights, so nothing is downloaded. InternImage's offsets are about one pixel, as after training, and
Mask R-CNN's scores are spread such that non-maximum suppression has thousands of boxes to look at and finds its 100
detections, as on a crowded photo. Deformable DETR is the two-stage variant with as many queries and layers as DINO.

The models take turns; the figure is the median over the turns. Memory is the peak beyond weights and images during one call.
The parts of a model (backbone, neck, encoder, ...) are timed in calls of their own, since a GPU must be waited for after each.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import harness
import torch
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from internimage_hf import (
    InternImageConfig,
    InternImageDinoConfig,
    InternImageDinoForObjectDetection,
    InternImageRcnnConfig,
    InternImageRcnnForInstanceSegmentation,
    modeling_internimage_rcnn,
)


# A part of a model: modules, or functions as the name in a module's or an object's namespace.
Part = list[nn.Module] | tuple[object, str]

CLASSES = 80
QUERIES = 900


def backbone_config(variant: str, *stages: str) -> InternImageConfig:
    return InternImageConfig.from_variant(variant, layer_scale_init_value=1.0, out_features=list(stages))


def dino(variant: str) -> tuple[nn.Module, dict[str, Part]]:
    backbone = backbone_config(variant, "stage2", "stage3", "stage4")
    model = InternImageDinoForObjectDetection(
        InternImageDinoConfig(backbone_config=backbone, num_queries=QUERIES, num_labels=CLASSES)
    )
    names = ("backbone", "neck", "encoder", "decoder")
    return model, {name: [getattr(model, name)] for name in names}


def deformable_detr(variant: str) -> tuple[nn.Module, dict[str, Part]]:
    config = DeformableDetrConfig(
        backbone_config=backbone_config(variant, "stage2", "stage3", "stage4"),
        num_queries=QUERIES,
        num_labels=CLASSES,
        two_stage=True,
        two_stage_num_proposals=QUERIES,
        with_box_refine=True,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
    )
    model = DeformableDetrForObjectDetection(config)
    inner = model.model
    return model, {"backbone": [inner.backbone], "encoder": [inner.encoder], "decoder": [inner.decoder]}


def mask_rcnn(variant: str) -> tuple[nn.Module, dict[str, Part]]:
    backbone = backbone_config(variant, "stage1", "stage2", "stage3", "stage4")
    model = InternImageRcnnForInstanceSegmentation(InternImageRcnnConfig(backbone_config=backbone, num_labels=CLASSES))
    (head,) = model.box_heads
    nn.init.normal_(head.classifier.weight, std=0.6)
    nn.init.normal_(head.regressor.weight, std=0.1)
    return model, {
        "backbone": [model.backbone],
        "neck": [model.neck],
        "proposal head": [model.proposal_head],
        "RoIAlign": (modeling_internimage_rcnn, "roi_align"),
        "non-maximum suppression": (modeling_internimage_rcnn, "nms"),
        "box head": [head],
        "mask head": list(model.mask_heads),
    }


MODELS: dict[str, Callable[[str], tuple[nn.Module, dict[str, Part]]]] = {
    "DINO": dino,
    "Deformable DETR": deformable_detr,
    "Mask R-CNN": mask_rcnn,
}


def build(name: str, variant: str, device: torch.device) -> tuple[nn.Module, dict[str, Part]]:
    torch.manual_seed(0)
    model, parts = MODELS[name](variant)
    for module_name, module in model.named_modules():
        if module_name.endswith(("dcn.offset", "dcn.mask")):  # initialised with zeros, which no trained model has
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval().to(device), parts


@contextmanager
def clocks(parts: dict[str, Part], device: torch.device) -> Iterator[dict[str, float]]:
    """Within the block, the seconds that each part takes."""
    seconds = dict.fromkeys(parts, 0.0)
    undo: list[Callable[[], None]] = []

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            harness.synchronize(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            harness.synchronize(device)
            seconds[name] += time.perf_counter() - start
            return result

        return call

    for name, part in parts.items():
        if isinstance(part, tuple):
            place, function = part
            original = getattr(place, function)
            setattr(place, function, timed(name, original))
            undo.append(partial(setattr, place, function, original))
        else:
            for module in part:
                module.forward = timed(name, module.forward)
                undo.append(partial(delattr, module, "forward"))
    try:
        yield seconds
    finally:
        for step in undo:
            step()


def inputs(height: int, width: int, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Normal noise, padded to multiples of 32, as the image processor pads."""
    padded = [-(-side // 32) * 32 for side in (height, width)]
    pixel_values = torch.zeros(batch, 3, *padded, device=device)
    pixel_mask = torch.zeros(batch, *padded, dtype=torch.long, device=device)
    pixel_values[..., :height, :width].normal_()
    pixel_mask[..., :height, :width] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def measure(arguments: argparse.Namespace) -> list[dict]:
    """A row for each model: seconds per image, peak memory, and the seconds of its parts."""
    device = arguments.device
    images = inputs(*arguments.size, arguments.batch, device)
    calls, rows = {}, {}
    with torch.inference_mode():
        for name in arguments.models:
            model, parts = build(name, arguments.variant, device)
            call = partial(model, **images)
            call()
            rows[name] = {
                "model": f"{name}-{arguments.variant.upper()}",
                "peak_bytes": harness.peak_memory(call, device),
            }
            by_part = []
            for _ in range(arguments.repeats):
                with clocks(parts, device) as seconds:
                    whole = harness.seconds_of(call, 1, device)
                by_part.append({**seconds, "the rest": whole - sum(seconds.values())})
            rows[name]["parts"] = {
                part: statistics.median(turn[part] for turn in by_part) / arguments.batch for part in by_part[0]
            }
            calls[name] = partial(harness.seconds_of, call, 1, device)
        for name, times in harness.take_turns(calls, arguments.repeats).items():
            rows[name]["seconds"] = statistics.median(times) / arguments.batch
    return list(rows.values())


def markdown(report: dict) -> str:
    lines = harness.heading("Speed of detectors", report["environment"])
    rows = report["measurements"]
    cells = [(row["model"], f"{row['seconds'] * 1e3:.0f}", f"{row['peak_bytes'] / 2**20:.0f}") for row in rows]
    lines += harness.table(("model", "ms per image", "peak MiB"), cells)
    for row in rows:
        total = sum(row["parts"].values())
        cells = [(part, f"{s * 1e3:.1f}", f"{100 * s / total:.1f} %") for part, s in row["parts"].items()]
        lines += ["", f"## {row['model']}", *harness.table(("part", "ms per image", "share"), cells)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    positive = harness.positive
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--device", type=harness.device, default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--variant", choices=("t", "s", "b"), default="t", help="of the backbone")
    parser.add_argument(
        "--size", type=positive(int), nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"), help="of the images"
    )
    parser.add_argument("--batch", type=positive(int), default=1)
    parser.add_argument("--repeats", type=positive(int), default=5, help="turns")
    arguments = parser.parse_args(argv)
    harness.set_up(arguments.threads, arguments.device)
    facts = {"image_size": "x".join(map(str, arguments.size)), "batch": arguments.batch}
    report = {"environment": harness.environment(arguments.device, **facts), "measurements": measure(arguments)}
    harness.write_results(arguments.output, "detection_speed", report, markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
