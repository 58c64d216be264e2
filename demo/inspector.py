"""In: a checkpoint, and images. Out: what the model predicts for an image and what it looks at, computed once per image."""

import hashlib
import threading
import warnings
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torch import nn
from transformers import AutoImageProcessor, PreTrainedConfig

import internimage_hf
from internimage_hf import effective_receptive_field, sampling_points
from internimage_hf.inspection import LayerSampling, ReceptiveField


MAX_PIXELS = 100_000_000  # 300 MB of memory once decoded
MAX_ASPECT = 20  # image processors that set the shortest edge would make an enormous image of a narrow one
DISPLAY = 800  # longest side in pixels of the picture with predictions
# The part of a class's name that says what a model is for, and the pipeline.
TASKS = {
    "ForImageClassification": "image-classification",
    "ForInstanceSegmentation": "image-segmentation",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
}


class InputError(ValueError):
    """A file or a model of the user cannot be used. The message is one line."""


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_image(file: str | Path) -> Image.Image:
    """Decodes an image file to RGB, 8 bits per channel, turned as its EXIF orientation says.

    Raises:
        InputError: if the file is no image, is damaged, too large or too narrow, or has floating-point pixels.
    """
    name = Path(file).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name} has more than {MAX_PIXELS // 10**6} million pixels; a smaller image is needed"
        ) from error
    except Exception as error:  # decoders raise many kinds
        raise InputError(f"{name} is no image that can be read; JPEG, PNG, WebP and the like were expected") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million; a smaller image is needed"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{name} has {width} x {height} pixels; at most {MAX_ASPECT} : 1 was expected")
    if image.mode == "F":
        raise InputError(f"{name} has floating-point pixels; 8 or 16 bits per channel were expected")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which `convert` would clip
            pixels = np.asarray(image)
            if image.mode != "I" or pixels.max(initial=0) > 255:
                image = Image.fromarray((np.clip(pixels, 0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:
        raise InputError(f"{name} is damaged: {one_line(error)}") from error


@dataclass
class Analysis:
    """What a model does with one image.

    Attributes:
        image: the whole image, made small enough to be shown.
        view: the image as the network gets it, after the image processor's resizing and crop, without padding.
        pixel_values: (1, 3, height, width).
        layers: the sampling points of the last layer of each stage, by stage.
        maps: the output of each stage, (channels, height, width), by stage.
        outputs: of the model, for the pipeline's post-processing; None for a model without a head.
    """

    image: Image.Image
    view: Image.Image
    pixel_values: torch.Tensor
    layers: dict[int, LayerSampling]
    maps: dict[int, torch.Tensor]
    outputs: dict | None
    _colors: dict[int, np.ndarray] = field(default_factory=dict)

    def similarity(self, stage: int, query: tuple[float, float]) -> torch.Tensor:
        """Cosine similarity of the features nearest to a pixel (x, y) of the view to all others: (height, width)."""
        features = nn.functional.normalize(self.maps[stage], dim=0)
        row, column = self.layers[stage].at(query).cell
        return torch.einsum("chw,c->hw", features, features[:, row, column])

    def colors(self, stage: int) -> np.ndarray:
        """The three principal components of a stage's features as red, green and blue: (height, width, 3) in [0, 1].

        Each component goes from its 1st to its 99th percentile. A map of one position, or of equal features, is grey.
        """
        if stage not in self._colors:
            features = self.maps[stage].flatten(1).T.double()  # (positions, channels)
            features = features - features.mean(0)
            _, _, directions = torch.linalg.svd(
                features.T @ features if len(features) > features.shape[1] else features, full_matrices=False
            )
            directions = directions[:3]
            directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
            components = features @ directions.T
            components = nn.functional.pad(components, (0, 3 - components.shape[1]))
            low, high = components.quantile(torch.tensor([0.01, 0.99]).double(), dim=0)
            span = high - low
            flat = span <= 1e-9 * max(1.0, features.abs().max().item())
            scaled = ((components - low) / span.masked_fill(flat, 1)).masked_fill(flat, 0.5).clamp(0, 1)
            self._colors[stage] = scaled.view(*self.maps[stage].shape[1:], 3).numpy()
        return self._colors[stage]


class Inspector:
    """A model that holds an InternImage, with its image processor.

    Args:
        model: any of transformers or of this package.
        processor: its image processor.
        name: for people.
        kept: how many images' results are kept.

    Attributes:
        task: of the pipeline; None for a model without a head that it knows.
        stages: how many the InternImage has.
        groups: how many its last layers have at most.

    Raises:
        InputError: if the model holds no InternImage.
    """

    def __init__(self, model: nn.Module, processor, name: str, kept: int = 8):
        self.model, self.processor, self.name, self.kept = model.eval(), processor, name, kept
        stages = _stages(model)
        if not stages:
            raise InputError(f"--model {name} is a {type(model).__name__} without an InternImage in it")
        self.stages, self.groups = len(stages), max(stage.layers[-1].dcn.groups for stage in stages.values())
        self.task = next((task for part, task in TASKS.items() if part in type(model).__name__), None)
        self.pipeline = self.task and transformers.pipeline(self.task, model=model, image_processor=processor)
        self._cache: OrderedDict[bytes, Analysis] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, name: str) -> "Inspector":
        """Loads a checkpoint, a folder or a repository on the Hub, on the GPU if there is one.

        Raises:
            InputError: if it cannot be loaded.
        """
        try:
            fields, _ = PreTrainedConfig.get_config_dict(name)
            architecture = (fields.get("architectures") or ["InternImageForImageClassification"])[0]
            model_class = getattr(internimage_hf, architecture, None) or getattr(transformers, architecture, None)
            if model_class is None:
                raise InputError(
                    f"--model {name} is a {architecture}, which neither this package nor transformers has"
                )
            processor = AutoImageProcessor.from_pretrained(name)
            model = model_class.from_pretrained(name)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"--model {name} cannot be loaded: {one_line(error)}") from error
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), processor, name)

    def analyse(self, image: Image.Image) -> Analysis:
        """Runs the model on an image of RGB, unless it did so before."""
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        with self._lock:
            if key not in self._cache:
                self._cache[key] = self._run(image)
            self._cache.move_to_end(key)
            while len(self._cache) > self.kept:
                self._cache.popitem(last=False)
            return self._cache[key]

    def receptive_field(self, analysis: Analysis, stage: int, query: tuple[float, float]) -> ReceptiveField:
        with self._lock:
            return effective_receptive_field(self.model, analysis.pixel_values, query, stages=stage)[0]

    def classes(self, analysis: Analysis) -> dict[str, float]:
        """The best five classes of a classifier and their probabilities."""
        best = self.pipeline.postprocess(analysis.outputs, top_k=5)
        names = [one["label"] for one in best]
        numbers = analysis.outputs["logits"][0].argsort(descending=True, stable=True).tolist()
        return {
            # ImageNet has two classes "crane"
            one["label"] if names.count(one["label"]) == 1 else f"{one['label']} (class {number})": one["score"]
            for one, number in zip(best, numbers, strict=False)
        }

    def objects(self, analysis: Analysis, threshold: float) -> list[tuple[tuple[int, ...] | np.ndarray, str]]:
        """Boxes (left, top, right, bottom) or masks (height, width) of bool on `analysis.image`, with labels, best first.

        A box that a detector gives several labels comes once, with the best.
        """
        width, height = analysis.image.size
        boxes, masks = {}, []
        for one in self.pipeline.postprocess(analysis.outputs, threshold=threshold):
            label = one["label"] if one["score"] is None else f"{one['label']} {one['score']:.0%}"
            if "box" in one:
                left, top, right, bottom = (one["box"][name] for name in ("xmin", "ymin", "xmax", "ymax"))
                box = max(0, left), max(0, top), min(width, right), min(height, bottom)
                if box[0] < box[2] and box[1] < box[3] and one["score"] > boxes.get(box, (0.0,))[0]:
                    boxes[box] = one["score"], box, label
            elif (mask := np.asarray(one["mask"]) > 0).any():
                masks.append((mask.mean() if one["score"] is None else one["score"], mask, label))
        ordered = sorted((*boxes.values(), *masks), key=lambda item: -item[0])
        return [(area, label) for _, area, label in ordered]

    def _run(self, image: Image.Image) -> Analysis:
        shown = image.copy()
        shown.thumbnail((DISPLAY, DISPLAY))
        if self.pipeline is None:
            inputs, outputs = self.processor(images=[image], return_tensors="pt"), None
        else:
            inputs = self.pipeline.preprocess(image)
        pixel_values, pixel_mask = inputs["pixel_values"].float(), inputs.get("pixel_mask")
        if self.pipeline is not None:
            if "target_size" in inputs:  # of the masks and boxes
                size = [(shown.height, shown.width)]
                inputs["target_size"] = torch.tensor(size) if torch.is_tensor(inputs["target_size"]) else size
            outputs = self.pipeline.forward(inputs)
        maps: dict[int, torch.Tensor] = {}

        def keep(stage: int, _module, _args, output: torch.Tensor) -> None:
            maps[stage] = output[0].float().cpu()

        with ExitStack() as hooks:
            for stage, module in _stages(self.model).items():
                hooks.callback(module.register_forward_hook(partial(keep, stage)).remove)
            layers = {layer.stage: layer for layer in sampling_points(self.model, pixel_values)}
        height, width = pixel_values.shape[2:]
        if pixel_mask is not None:
            height, width = int(pixel_mask[0, :, 0].sum()), int(pixel_mask[0, 0].sum())
        view = _picture(pixel_values[0, :, :height, :width], self.processor)
        return Analysis(shown, view, pixel_values, layers, maps, outputs)


def _stages(model: nn.Module) -> dict[int, nn.Module]:
    """The stages of the InternImage in a model by their numbers from 1; of a composite backbone those of the last encoder."""
    return {
        int(name.rpartition(".")[2]) + 1: module
        for name, module in model.named_modules()
        if type(module).__name__ == "InternImageStage"
    }


def _picture(pixels: torch.Tensor, processor) -> Image.Image:
    """Undoes the image processor's normalisation of (3, height, width)."""
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, name)).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = pixels * std + mean
    if getattr(processor, "do_rescale", True):
        pixels = pixels / processor.rescale_factor
    return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
