"""In: a checkpoint, or nothing. Out: a page in the browser that shows what the model predicts and what it looks at.

    python demo/app.py
    python demo/app.py --model OpenGVLab/internimage_t_1k_224

`--model` is a folder or a repository on the Hub: a classifier, a backbone, or a detector or segmenter on an InternImage. Without it,
a small classifier of digits on photographs is trained once (a minute) and kept in `outputs/`. Beside the model's download no
request leaves the machine.
"""

import os


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import argparse
import html
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from inspector import Analysis, InputError, Inspector, one_line, read_image
from pictures import (
    draw_colors,
    draw_query,
    draw_receptive_field,
    draw_sampling_points,
    draw_similarity,
    pixel_of,
)
from PIL import Image


ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"  # absent in a Space, which has this folder alone
HUB_MODEL = "OpenGVLab/internimage_t_1k_224"
MAX_FILE = "50mb"
NO_IMAGE = "Drop an image above, or choose an example."


# -------------------------------------------------------------------------------------------------------- model and images


def default_model() -> str:
    """The folder of the small classifier, trained if it is not there; a published checkpoint where there is no clone."""
    if not EXAMPLES.is_dir():
        return HUB_MODEL
    sys.path.insert(0, str(EXAMPLES))
    try:
        from digit_classifier import digit_classifier
    except ImportError as error:
        raise InputError(f"without --model, {error.name} is needed: pip install '.[demo]'") from error
    return str(digit_classifier(ROOT / "outputs" / "digits_on_photographs"))


def example_images(digits: bool, folder: Path) -> list[str]:
    """Writes images that come with scikit-learn, if it is installed: digits on photographs, or photographs."""
    try:
        if digits:
            from embedded_data import load_single_digits

            images = load_single_digits(1, 8, size=213, seed=3)["validation"][0]
        else:
            from sklearn.datasets import load_sample_images

            images = load_sample_images().images
    except ImportError:
        return []
    files = [folder / f"example_{number}.png" for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    return [str(file) for file in files]


# ------------------------------------------------------------------------------------------------------- what the page does


def message(text: str) -> str:
    return f"⚠️ {html.escape(text)}"


class Page:
    """The handlers of the page. They return values for the components, and a message instead of an exception.

    Args:
        inspector: the model.
    """

    def __init__(self, inspector: Inspector):
        self.inspector = inspector
        self.classifies = inspector.task == "image-classification"

    def open(self, file: str | None, stage: int, groups: str, threshold: float) -> Iterator[tuple]:
        """A new image, looked at in its middle.

        Yields:
            The analysis, the query, the status, the prediction, and the pictures as `look` does.
        """
        if file is None:
            yield None, None, NO_IMAGE, None, *[None] * 5, ""
            return
        try:
            analysis = self.inspector.analyse(read_image(file))
            query = tuple((side - 1) / 2 for side in analysis.view.size)
            width, height = analysis.view.size
            status = f"The network sees {width} × {height} pixels. **Click one of them** in the picture on the right."
            if all(_is_regular(layer) for layer in analysis.layers.values()):
                status += " All sampling offsets are zero, as before training: every group lies on the regular grid."
            start = analysis, query, status, self.predict(analysis, threshold)
            for pictures in self.look(analysis, query, stage, groups):
                yield *start, *pictures
        except InputError as error:
            yield None, None, message(str(error)), None, *[None] * 5, ""
        except Exception as error:  # whatever a model raises for this image
            logging.getLogger(__name__).exception("an image could not be analysed")
            text = f"{Path(file).name} cannot be used with this model: {one_line(error)}"
            yield None, None, message(text), None, *[None] * 5, ""

    def click(self, analysis: Analysis | None, stage: int, groups: str, event: gr.SelectData) -> Iterator[tuple]:
        """Another pixel. Yields the query, and the pictures as `look` does."""
        query = analysis and pixel_of(event.index, analysis.view)
        for pictures in self.look(analysis, query, stage, groups):
            yield query, *pictures

    def look(self, analysis: Analysis | None, query: tuple | None, stage: int, groups: str) -> Iterator[tuple]:
        """
        Yields:
            The view with the query, sampling points, similarity, components, receptive field, and numbers in words; first
            without the receptive field, which takes a backward pass.
        """
        if analysis is None:
            yield *[None] * 5, ""
            return
        view, layer = analysis.view, analysis.layers[stage]
        similarity = analysis.similarity(stage, query)
        quick = (
            draw_query(view, query),
            draw_sampling_points(list(analysis.layers.values()), groups, view, query, stage),
            draw_similarity(similarity, layer, view, query),
            draw_colors(analysis.colors(stage), layer, view, query),
        )
        height, width = similarity.shape
        words = (
            f"Pixel ({query[0]:.0f}, {query[1]:.0f}) · stage {stage}: {height} × {width} positions, one per {layer.stride} "
            f"pixels, {len(analysis.maps[stage])} channels, {layer.positions.shape[3]} groups of "
            f"{layer.positions.shape[4]} points · similarity {similarity.min():.2f} to {similarity.max():.2f}"
        )
        yield *quick, None, words
        field = self.inspector.receptive_field(analysis, stage, query)
        height, width = view.height, view.width
        half = field.share_of_pixels(0.5)
        words += f" · half of the gradient lies in {half:.1%} of the pixels" if half == half else " · no gradient"
        yield *quick, draw_receptive_field(field.gradient[0, :height, :width], view, query), words

    def predict(self, analysis: Analysis | None, threshold: float):
        """The value of the component of the prediction; None for a model without a head."""
        if analysis is None or self.inspector.task is None:
            return None
        if self.classifies:
            return self.inspector.classes(analysis)
        objects = self.inspector.objects(analysis, threshold)
        return analysis.image, [
            (0.6 * area if isinstance(area, np.ndarray) else area, label) for area, label in objects[:30]
        ]


def _is_regular(layer) -> bool:
    offsets = layer.positions - layer.origins[:, :, None, None]
    return torch.allclose(offsets, layer.grid.expand_as(offsets), atol=1e-3)


def shown_errors(handler: Callable) -> Callable:
    """A handler whose exceptions become one line on the page, and a traceback in the log."""

    @wraps(handler)
    def guarded(*args):
        try:
            yield from handler(*args)
        except Exception as error:
            logging.getLogger(__name__).exception("the page could not answer")
            raise gr.Error(html.escape(one_line(error)), print_exception=False) from error

    return guarded


CSS = """
.gradio-container {max-width: 1340px !important}
#view img {cursor: crosshair}
"""


def build(inspector: Inspector, examples: list[str]) -> gr.Blocks:
    """The page."""
    page = Page(inspector)
    name = Path(inspector.name).name if Path(inspector.name).is_dir() else inspector.name
    plain = {"interactive": False, "show_label": False, "buttons": ["download", "fullscreen"], "format": "jpeg"}
    with gr.Blocks(title="What InternImage looks at", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(
            "# What InternImage looks at\n"
            f"`{name}` · {inspector.model.num_parameters() / 1e6:.1f} M parameters. "
            "Each deformable convolution chooses where it samples, separately for each group of channels and each "
            "position. This page shows where."
        )
        analysis, query = gr.State(time_to_live=3600), gr.State()
        with gr.Row():
            with gr.Column():
                gr.Markdown("### Image")
                picture = gr.Image(
                    elem_id="image", sources=["upload", "clipboard"], show_label=False, height=320, buttons=[]
                )
                # gr.Image opens the file itself and fails on a bad one without a readable message; `open` gets its path
                picture.preprocess = lambda payload: payload and payload.path
                status = gr.Markdown(NO_IMAGE, elem_id="status")
                if examples:
                    gr.Examples([[file] for file in examples], picture, label="Examples", elem_id="examples")
            with gr.Column():
                gr.Markdown("### What the network sees: click a pixel")
                view = gr.Image(elem_id="view", height=320, **{**plain, "buttons": []})
                stage = gr.Radio(
                    list(range(1, inspector.stages + 1)),
                    value=min(3, inspector.stages),
                    label="stage",
                    elem_id="stage",
                )
                choices = ["far apart", "all", *map(str, range(1, inspector.groups + 1))]
                chosen = gr.Dropdown(
                    choices, value="far apart", label="groups: five that lie far apart, all, or one", elem_id="groups"
                )
            with gr.Column(visible=inspector.task is not None):
                gr.Markdown("### Prediction")
                if page.classifies or inspector.task is None:
                    prediction = gr.Label(num_top_classes=5, show_label=False, elem_id="prediction")
                    threshold = gr.Number(0.5, visible=False)
                else:
                    prediction = gr.AnnotatedImage(show_label=False, height=320, elem_id="prediction", format="jpeg")
                    scored = (
                        "ForSemanticSegmentation" not in type(inspector.model).__name__
                    )  # such masks have no score
                    threshold = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="least score", visible=scored)
        words = gr.Markdown(elem_id="words")
        gr.Markdown(
            "### Sampling points\nOf the last layer of each stage, for the output at the star. A colour is a group, the area of a "
            "point its weight. Crosses: where an ordinary 3 × 3 convolution samples. Hollow: outside the image, read as zero. "
            "Small grey dots: the other groups."
        )
        sampling = gr.Image(elem_id="sampling", **plain)
        with gr.Row():
            titles = (
                ("field", "Receptive field", "Gradient of the star's feature on the image."),
                (
                    "similarity",
                    "Similar features",
                    "Cosine similarity to the star's: yellow is highest.",
                ),
                ("components", "Features as colours", "Three principal components as red, green, blue."),
            )
            others = []
            for name, title, text in titles:
                with gr.Column():
                    gr.Markdown(f"### {title}\n{text}")
                    others.append(gr.Image(elem_id=name, height=320, **plain))
        field, similarity, components = others

        pictures = [view, sampling, similarity, components, field, words]
        quiet = {"show_progress": "minimal", "api_visibility": "private"}
        picture.change(
            shown_errors(page.open),
            [picture, stage, chosen, threshold],
            [analysis, query, status, prediction, *pictures],
            **quiet,
        )
        click = shown_errors(page.click)

        def clicked(analysis, stage, chosen, event: gr.SelectData):
            yield from click(analysis, stage, chosen, event)

        for clickable in (view, field, similarity, components):
            clickable.select(
                clicked, [analysis, stage, chosen], [query, *pictures], trigger_mode="always_last", **quiet
            )
        for control in (stage, chosen):
            control.change(shown_errors(page.look), [analysis, query, stage, chosen], pictures, **quiet)
        if not page.classifies and inspector.task is not None:
            threshold.release(page.predict, [analysis, threshold], prediction, **quiet)
        if examples:
            blocks.load(lambda: examples[0], None, picture, **quiet)
    blocks.queue(default_concurrency_limit=1)
    return blocks


LAUNCH = {
    "css": CSS,
    "max_file_size": MAX_FILE,
    "footer_links": [],
    "share": False,
    "ssr_mode": False,
    "enable_monitoring": False,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default=os.environ.get("INTERNIMAGE_MODEL"),
        help="folder or Hub id; by default the environment variable INTERNIMAGE_MODEL, else a small classifier of digits",
    )
    parser.add_argument("--host", help="address to listen on; 127.0.0.1, or GRADIO_SERVER_NAME")
    parser.add_argument("--port", type=int, help="port; the first free one from 7860 on, or GRADIO_SERVER_PORT")
    arguments = parser.parse_args(argv)
    try:
        name = arguments.model or default_model()
        inspector = Inspector.load(name)
        with tempfile.TemporaryDirectory(prefix="internimage-demo-") as folder:
            examples = example_images(arguments.model is None and name != HUB_MODEL, Path(folder))
            build(inspector, examples).launch(server_name=arguments.host, server_port=arguments.port, **LAUNCH)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # no free port
        sys.exit(f"error: --port: {one_line(error)}")


if __name__ == "__main__":
    main()
