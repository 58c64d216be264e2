"""In: an image and what a model does with it. Out: pictures of it. Pillow draws them in some hundredths of a second."""

import colorsys
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from internimage_hf.inspection import LayerSampling


SIDE = 512  # longest side of a picture in pixels
PANEL, MARGIN = 300, 0.14  # longest side of a panel; its margin, a part of that
GROUP_COLORS = ("#ff2d2d", "#ffd400", "#27d827", "#00c8ff", "#ff4fd8", "#ff8c00", "#9b6bff", "#ffffff")
BLUE = "#1f5bff"
# matplotlib's magma and viridis at equal distances
MAGMA = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))
VIRIDIS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))


def enlarged(view: Image.Image) -> Image.Image:
    """The view at the size of the pictures, on which `pixel_of` reads a click."""
    scale = SIDE / max(view.size)
    return view.resize([max(1, round(scale * side)) for side in view.size], Image.Resampling.BICUBIC)


def pixel_of(click: Sequence[float], view: Image.Image) -> tuple[float, float]:
    """The pixel (x, y) of the view under a pixel of its enlarged picture."""
    return tuple(
        min(max((value + 0.5) * own / shown - 0.5, 0.0), own - 1.0)
        for value, own, shown in zip(click, view.size, enlarged(view).size, strict=True)
    )


def at_stride(values: np.ndarray, stride: int, view: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A stage's map, whose position (row, column) lies on the pixel (row * stride, column * stride) of the view, interpolated
    to a picture of the view: (h, w) or (h, w, c) -> (height, width) or (height, width, c) in float32."""
    for axis, (own, shown) in enumerate(zip(reversed(view.size), reversed(size), strict=True)):
        places = ((np.arange(shown) + 0.5) * own / shown - 0.5) / stride
        places = places.clip(0, values.shape[axis] - 1)
        first = np.floor(places).astype(int)
        second = np.minimum(first + 1, values.shape[axis] - 1)
        weight = (places - first).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        values = values.take(first, axis) * (1 - weight) + values.take(second, axis) * weight
    return values.astype(np.float32)


def _colored(values: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Values in [0, 1] -> (..., 3), 0 to 255."""
    table = np.array(colors, np.float32)
    return np.stack([np.interp(values, np.linspace(0, 1, len(table)), table[:, i]) for i in range(3)], -1)


def _with_star(picture: np.ndarray, view: Image.Image, query: tuple[float, float]) -> Image.Image:
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    scale = SIDE / max(view.size)
    _star(ImageDraw.Draw(image), *((value + 0.5) * scale for value in query), 13)
    return image


def draw_query(view: Image.Image, query: tuple[float, float]) -> Image.Image:
    return _with_star(np.asarray(enlarged(view)), view, query)


def draw_similarity(similarity: torch.Tensor, layer: LayerSampling, view: Image.Image, query) -> Image.Image:
    """Colours from the lowest to the highest similarity over the image in grey."""
    shown = enlarged(view)
    low, high = similarity.min().item(), similarity.max().item()
    values = at_stride(similarity.numpy(), layer.stride, view, shown.size)
    values = (values - low) / (high - low) if high > low else np.ones_like(values)
    grey = np.asarray(shown.convert("L"), np.float32)[..., None]
    return _with_star(0.7 * _colored(values, VIRIDIS) + 0.3 * grey, view, query)


def draw_colors(colors: np.ndarray, layer: LayerSampling, view: Image.Image, query) -> Image.Image:
    return _with_star(255 * at_stride(colors, layer.stride, view, enlarged(view).size), view, query)


def draw_receptive_field(gradient: torch.Tensor, view: Image.Image, query) -> Image.Image:
    """The square root of the gradient, (height, width) as the view, over the image in grey."""
    shown = enlarged(view)
    root = gradient.float().clamp_min(0).sqrt()
    values = (root / root.max().clamp_min(1e-30)).cpu().numpy()
    values = np.asarray(Image.fromarray(values).resize(shown.size, Image.Resampling.BILINEAR))[..., None]
    grey = 0.45 * np.asarray(shown.convert("L"), np.float32)[..., None]
    opacity = np.clip(1.6 * values, 0, 1)
    return _with_star((1 - opacity) * grey + opacity * _colored(values[..., 0] * 0.75 + 0.25, MAGMA), view, query)


def draw_sampling_points(
    layers: Sequence[LayerSampling], groups: str, view: Image.Image, query: tuple[float, float], chosen: int
) -> Image.Image:
    """One panel per stage: the sampling points of its last layer at a pixel.

    Args:
        layers: of one stage each.
        groups: "far apart", "all", or the number of a group from 1.
        view: the image as the network gets it.
        query: (x, y) in pixels of the view.
        chosen: the stage whose panel is framed.
    """
    factor = 2  # drawn at twice the size: Pillow's circles have jagged edges
    scale = factor * PANEL / max(view.size)
    margin, title, gap = round(factor * PANEL * MARGIN), 30 * factor, 12 * factor
    width, height = (round(scale * side) + 2 * margin for side in view.size)
    left_margin = max(margin, margin + (270 * factor - width) // 2)  # of a narrow image, for the sake of the title
    width += 2 * (left_margin - margin)
    photo = view.resize([max(1, round(scale * side)) for side in view.size], Image.Resampling.BICUBIC)
    photo = Image.blend(photo, Image.new("RGB", photo.size, "white"), 0.2)
    columns = 2 if width > 2 * height else len(layers)
    rows = -(-len(layers) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + title + gap) - gap), "white")
    draw = ImageDraw.Draw(canvas)
    for number, layer in enumerate(layers):
        left, top = (number % columns) * (width + gap), (number // columns) * (height + title + gap)
        panel = Image.new("RGB", (width, height), "#ededed")
        panel.paste(photo, (left_margin, margin))
        one = layer.at(query)
        shown = _chosen_groups(one, groups)
        _points(ImageDraw.Draw(panel), one, shown, scale, (left_margin, margin), factor)
        canvas.paste(panel, (left, top + title))
        frame = BLUE if layer.stage == chosen else "#c8c8c8"
        box = (left, top + title, left + width - 1, top + title + height - 1)
        draw.rectangle(box, outline=frame, width=factor * (4 if layer.stage == chosen else 1))
        total = len(one.positions[0, 0, 0])
        count = f"group {shown[0] + 1} of {total}" if groups.isdigit() and shown else f"{len(shown)} of {total} groups"
        text = f"stage {layer.stage}   reach {one.reach.item():.0f} px   {count}"
        draw.text((left + 2 * factor, top + title // 2), text, "#222222", ImageFont.load_default(15 * factor), "lm")
    return canvas.reduce(factor)


def _chosen_groups(one: LayerSampling, groups: str) -> list[int]:
    total = one.positions.shape[3]
    if groups.isdigit():
        return [int(groups) - 1] if int(groups) <= total else []
    return one.spread_groups(5) if groups == "far apart" else list(range(total))


def _points(draw, one: LayerSampling, shown: list[int], scale: float, corner: tuple[int, int], factor: int) -> None:
    positions, weights = one.positions[0, 0, 0].cpu(), one.weights[0, 0, 0].abs().cpu()
    total, points = weights.shape
    origin = one.origins[0, 0].cpu()
    height, width = (-(-side // one.stride) * one.stride for side in one.image_size)  # of the map, in pixels

    def place(xy) -> tuple[float, float]:
        return tuple(start + scale * (value + 0.5) for start, value in zip(corner, xy, strict=True))

    for group in set(range(total)) - set(shown):
        for xy in positions[group].tolist():
            _circle(draw, *place(xy), 2 * factor, fill="#bdbdbd")
    for xy in (one.grid.cpu() + origin).tolist():
        x, y = place(xy)
        for half, stroke, color in ((7, 4, "#555555"), (6, 2, "white")):
            draw.line((x - half * factor, y, x + half * factor, y), color, stroke * factor)
            draw.line((x, y - half * factor, x, y + half * factor), color, stroke * factor)
    for number, group in enumerate(shown):
        color = GROUP_COLORS[number % len(GROUP_COLORS)]
        if len(shown) > len(GROUP_COLORS):
            color = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(number / len(shown), 0.9, 1))
        for xy, weight in zip(positions[group].tolist(), (points * weights[group]).tolist(), strict=True):
            radius = max(2.5, 5.5 * math.sqrt(min(weight, 4))) * factor * (0.6 if len(shown) > 8 else 1)
            inside = -one.stride < xy[0] < width and -one.stride < xy[1] < height
            if inside:
                _circle(draw, *place(xy), radius, fill=color, outline="black", width=factor)
            else:  # it reads zero
                _circle(draw, *place(xy), radius, outline=color, width=2 * factor)
    half = scale * one.stride / 2
    x, y = place(origin.tolist())
    draw.rectangle((x - half, y - half, x + half, y + half), outline=BLUE, width=2 * factor)
    _star(draw, x, y, 11 * factor)


def _circle(draw, x: float, y: float, radius: float, **kwargs) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), **kwargs)


def _star(draw, x: float, y: float, radius: float) -> None:
    for size, color in ((1.35 * radius, "white"), (radius, BLUE)):
        corners = [(size * (1 if i % 2 == 0 else 0.42), math.pi * i / 5) for i in range(10)]
        draw.polygon([(x + r * math.sin(angle), y - r * math.cos(angle)) for r, angle in corners], fill=color)
