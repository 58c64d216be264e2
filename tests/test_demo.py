"""Tests of the page in demo/: its functions against transformers' pipelines and definitions, and the page in a browser."""

import io
import json
import logging
import shutil
import socket
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from test_inspection import backbone_config, dino, mask2former, rcnn, upernet
from torch import nn
from transformers import RTDetrConfig, RTDetrForObjectDetection
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from utils import ROOT, SMALL_HEADS, TINY, TINY_VARIANTS

import internimage_hf
from internimage_hf import (
    InternImageBackbone,
    InternImageConfig,
    InternImageDetectionImageProcessor,
    InternImageForImageClassification,
    InternImageImageProcessor,
    effective_receptive_field,
)


pytest.importorskip("gradio", reason="needs `pip install internimage-hf[demo]`")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def demo():
    """The modules of the page."""
    sys.path.insert(0, str(ROOT / "demo"))
    try:
        import app
        import inspector
        import pictures

        yield SimpleNamespace(app=app, inspector=inspector, pictures=pictures)
    finally:
        sys.path.remove(str(ROOT / "demo"))


def trained(model: nn.Module) -> nn.Module:
    """Offsets and masks as after training: not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dcn.offset." in name or ".dcn.mask." in name:
                parameter.normal_(0, 0.3)
    return model


def rt_detr() -> RTDetrForObjectDetection:
    fields = {**SMALL_HEADS["rt_detr"], "encoder_in_channels": [16, 32, 64], "num_labels": 3}
    backbone = InternImageConfig(**TINY, out_features=["stage2", "stage3", "stage4"])
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **fields))


def certain_mask2former() -> nn.Module:
    """Every query finds an object."""
    model = mask2former()
    with torch.no_grad():
        model.class_predictor.bias[0] = 20
        for name, parameter in model.named_parameters():
            if "mask_embedder" in name or "mask_projection" in name:  # masks that are clear, and differ
                parameter.normal_(0, 1)
    return model


HEADS = {
    "rt_detr": (rt_detr, lambda: RTDetrImageProcessorPil(size={"height": 64, "width": 64})),
    "upernet": (upernet, lambda: SegformerImageProcessorPil(size={"height": 64, "width": 64})),
    "dino": (dino, lambda: InternImageDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 90})),
    "rcnn": (rcnn, lambda: InternImageDetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 90})),
    "mask2former": (certain_mask2former, lambda: Mask2FormerImageProcessorPil(size={"height": 64, "width": 64})),
}


@pytest.fixture(scope="module")
def classifier(demo):
    torch.manual_seed(0)
    config = InternImageConfig(**TINY, id2label=dict(enumerate(["ant", "bee", "crane", "crane", "elk"])))
    size = {"height": 64, "width": 64}
    processor = InternImageImageProcessor(size={"shortest_edge": 72}, crop_size=size)
    return demo.inspector.Inspector(trained(InternImageForImageClassification(config)), processor, "tiny")


@pytest.fixture
def image() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((120, 90), Image.Resampling.BICUBIC)


@pytest.fixture
def file(image, tmp_path) -> Path:
    image.save(tmp_path / "image.png")
    return tmp_path / "image.png"


def save_head(name: str, folder: Path) -> Path:
    model, processor = HEADS[name]
    trained(model()).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------------- inspector


def test_classes_are_those_of_the_pipeline(classifier, image):
    found = classifier.classes(classifier.analyse(image))
    pipeline = transformers.pipeline(
        "image-classification", model=classifier.model, image_processor=classifier.processor
    )
    expected = pipeline(image, top_k=5)
    assert len(found) == 5
    assert list(found.values()) == pytest.approx([one["score"] for one in expected])
    for label, one in zip(found, expected, strict=True):
        assert label == one["label"] or label in ("crane (class 2)", "crane (class 3)")


@pytest.mark.parametrize("name", HEADS)
def test_boxes_and_masks_are_those_of_the_pipeline(demo, name, image, tmp_path):
    inspector = demo.inspector.Inspector.load(str(save_head(name, tmp_path)))
    found = inspector.objects(inspector.analyse(image), 0.0)
    model = type(inspector.model).from_pretrained(tmp_path)
    pipeline = transformers.pipeline(inspector.task, model=model, image_processor=HEADS[name][1]())
    expected = pipeline(image, threshold=0.0)
    scores = [f" {one['score']:.0%}" if one["score"] is not None else "" for one in expected]
    wanted = {
        (one["label"] + score, np.clip(list(one["box"].values()), 0, [120, 90] * 2).astype(int).tobytes())
        if "box" in one
        else (one["label"] + score, (np.asarray(one["mask"]) > 0).tobytes())
        for one, score in zip(expected, scores, strict=True)
    }
    assert found and {(label, np.asarray(area).tobytes()) for area, label in found} <= wanted
    if name in ("rt_detr", "dino"):
        areas = [area for area, _ in found]
        best = {}
        for one in sorted(expected, key=lambda one: one["score"]):
            best[tuple(np.clip(list(one["box"].values()), 0, [120, 90] * 2))] = f"{one['label']} {one['score']:.0%}"
        assert len(set(areas)) == len(areas) and all(best[area] == label for area, label in found)
    invisible = [one for one in expected if "mask" in one and not np.asarray(one["mask"]).any()]
    assert name in ("rt_detr", "dino") or len(found) == len(expected) - len(invisible)


def test_segments_of_a_semantic_segmenter_cover_the_image(demo, image, tmp_path):
    inspector = demo.inspector.Inspector.load(str(save_head("upernet", tmp_path)))
    areas = [area for area, _ in inspector.objects(inspector.analyse(image), 0.5)]
    assert np.array_equal(np.sum(areas, 0), np.ones((90, 120)))


def test_a_large_image_gets_boxes_at_the_size_that_is_shown(demo, image, tmp_path):
    inspector = demo.inspector.Inspector.load(str(save_head("rt_detr", tmp_path)))
    analysis = inspector.analyse(image.resize((1800, 1350)))
    assert analysis.image.size == (800, 600)
    areas = np.array([area for area, _ in inspector.objects(analysis, 0.0)])
    assert areas[:, 2].max() > 120 and areas[:, 2].max() <= 800 and areas[:, 3].max() <= 600


def test_backbone_without_a_head_is_looked_into(demo, image, tmp_path):
    InternImageBackbone(backbone_config()).save_pretrained(tmp_path)
    InternImageImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
        tmp_path
    )
    inspector = demo.inspector.Inspector.load(str(tmp_path))
    analysis = inspector.analyse(image)
    assert inspector.task is None and analysis.outputs is None and set(analysis.maps) == {1, 2, 3, 4}
    *_, pictures = demo.app.Page(inspector).look(analysis, (5.0, 6.0), 2, "all")
    assert len(pictures) == 6 and all(picture is not None for picture in pictures)


def test_flash_internimage_is_looked_into(demo, image):
    model = trained(InternImageForImageClassification(InternImageConfig(**TINY, **TINY_VARIANTS["dcnv4"])))
    processor = InternImageImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    inspector = demo.inspector.Inspector(model, processor, "flash")
    assert (inspector.stages, inspector.groups) == (4, 8)
    *_, pictures = demo.app.Page(inspector).look(inspector.analyse(image), (9.0, 40.0), 4, "all")
    assert all(picture is not None for picture in pictures)


def test_view_is_what_the_processor_cuts_out(classifier, image):
    pixels = classifier.processor(image, do_normalize=False, do_rescale=False, return_tensors="pt")["pixel_values"][0]
    shown = np.asarray(classifier.analyse(image).view)
    assert shown.shape == (64, 64, 3)
    assert np.abs(shown - pixels.permute(1, 2, 0).numpy()).max() <= 1


def test_view_leaves_out_the_padding(demo, image):
    class Padding(RTDetrImageProcessorPil):
        def __call__(self, *args, **kwargs):
            batch = super().__call__(*args, **kwargs)
            mask = torch.ones(1, 64, 64, dtype=torch.long)
            mask[:, 48:], mask[:, :, 60:] = 0, 0
            batch["pixel_mask"] = mask
            return batch

    inspector = demo.inspector.Inspector(rt_detr(), Padding(size={"height": 64, "width": 64}), "padded")
    assert inspector.analyse(image).view.size == (60, 48)


def test_model_runs_once_per_image(classifier, demo, image, monkeypatch):
    inspector = demo.inspector.Inspector(classifier.model, classifier.processor, "tiny", kept=2)
    runs = []
    monkeypatch.setattr(inspector, "_run", lambda one, run=inspector._run: runs.append(1) or run(one))
    first = inspector.analyse(image)
    assert inspector.analyse(image.copy()) is first and len(runs) == 1
    for other in (image.rotate(90), image.rotate(180)):
        inspector.analyse(other)
    assert inspector.analyse(image) is not first and len(runs) == 4, "only two are kept"


def test_similarity_is_the_cosine(classifier, image):
    analysis = classifier.analyse(image)
    for stage, features in analysis.maps.items():
        found = analysis.similarity(stage, (33.0, 20.0))
        stride = 4 * 2 ** (stage - 1)
        row, column = (min(int(v / stride + 0.5), n - 1) for v, n in zip((20, 33), found.shape, strict=True))
        expected = nn.functional.cosine_similarity(features, features[:, row, column, None, None], dim=0)
        torch.testing.assert_close(found, expected)
        assert found[row, column] == pytest.approx(1, abs=1e-5)


def test_colors_are_principal_components(classifier, image):
    analysis = classifier.analyse(image)
    for stage, features in analysis.maps.items():
        colors = analysis.colors(stage)
        assert colors.shape == (*features.shape[1:], 3) and colors.min() >= 0 and colors.max() <= 1
        assert colors is analysis.colors(stage), "computed once"
    from sklearn.decomposition import PCA

    expected = PCA(3, svd_solver="full").fit_transform(analysis.maps[2].flatten(1).T.double().numpy())
    low, high = np.quantile(expected, [0.01, 0.99], axis=0)
    expected = ((expected - low) / (high - low)).clip(0, 1)
    for component in range(3):
        own, other = analysis.colors(2)[..., component].ravel(), expected[:, component]
        assert np.abs(own - other).max() < 1e-3 or np.abs(own - (1 - other)).max() < 1e-3, "the sign is free"


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2)])
def test_colors_of_tiny_or_equal_maps_are_finite(demo, size):
    maps = {1: torch.randn(8, *size), 2: torch.ones(8, 4, 4)}
    analysis = demo.inspector.Analysis(None, None, None, {}, maps, None)
    assert np.isfinite(analysis.colors(1)).all()
    assert (analysis.colors(2) == 0.5).all()


@pytest.mark.parametrize(
    "content, expected",
    [
        ({}, "cannot be loaded"),
        ({"model_type": "internimage", "architectures": ["Nonsense"]}, "Nonsense, which neither"),
        ({"model_type": "internimage", "channels": 7, "groups": [2, 2, 2, 2]}, "cannot be loaded"),
    ],
)
def test_model_that_cannot_be_loaded_is_named_in_one_line(demo, tmp_path, content, expected):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(demo.inspector.InputError, match=expected) as error:
        demo.inspector.Inspector.load(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_model_without_internimage_is_refused(demo):
    with pytest.raises(demo.inspector.InputError, match="without an InternImage"):
        demo.inspector.Inspector(nn.Linear(2, 2), None, "other")


# ------------------------------------------------------------------------------------------------------------- bad images


def enormous_png(width: int, height: int) -> bytes:
    """The start of a PNG of any size, a few bytes long."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


NOISE = Image.effect_noise((300, 200), 90).convert("RGB")
BAD_IMAGES = {
    "text.png": (b"no image at all", "is no image"),
    "empty.jpg": (b"", "is no image"),
    "half.jpg": (encoded(NOISE, "JPEG")[:4000], "is damaged"),
    "bomb.png": (enormous_png(50000, 50000), "more than 100 million pixels"),
    "large.png": (enormous_png(12000, 9000), "12000 x 9000 pixels, more than 100 million"),
    "narrow.png": (encoded(Image.new("RGB", (2000, 10)), "PNG"), "at most 20 : 1"),
    "float.tiff": (encoded(Image.new("F", (50, 50)), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_gets_a_message_and_no_traceback(classifier, demo, name, tmp_path, caplog):
    content, expected = BAD_IMAGES[name]
    (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.ERROR):
        (values,) = demo.app.Page(classifier).open(str(tmp_path / name), 3, "all", 0.5)
    analysis, query, status, prediction, *pictures, words = values
    assert name in status and expected in status and "\n" not in status and not caplog.records
    assert analysis is query is prediction is None and pictures == [None] * 5 and words == ""


def test_image_that_the_model_fails_on_gets_a_message(classifier, demo, file, monkeypatch):
    monkeypatch.setattr(classifier.model, "forward", lambda **_: 1 / 0)
    inspector = demo.inspector.Inspector(classifier.model, classifier.processor, "tiny")
    (values,) = demo.app.Page(inspector).open(str(file), 3, "all", 0.5)
    assert "image.png cannot be used with this model: division by zero" in values[2]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_images_of_other_modes_are_read(demo, tmp_path, mode):
    pixels = np.full((20, 30), 200 * 257, np.uint16) if mode == "I;16" else np.full((20, 30, 3), 200, np.uint8)
    image = Image.fromarray(pixels)
    image = image if mode == "I;16" else image.convert(mode)
    file = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(file)
    read = demo.inspector.read_image(file)
    assert read.mode == "RGB" and read.size == (30, 20)
    assert abs(float(np.asarray(read).mean()) - (255 if mode == "1" else 200)) < 60


# --------------------------------------------------------------------------------------------------------- pictures, clicks


def test_click_on_a_picture_is_the_pixel_under_it(demo):
    view = Image.new("RGB", (96, 48))
    shown = demo.pictures.enlarged(view)
    assert shown.size == (512, 256)
    scale = 512 / 96
    for x, y in ((0, 0), (95, 47), (31, 7)):
        click = (scale * (x + 0.5) - 0.5, scale * (y + 0.5) - 0.5)
        assert demo.pictures.pixel_of(click, view) == pytest.approx((x, y))
    assert demo.pictures.pixel_of((511, 255), view) == (95, 47), "within the image at its edge"
    assert demo.pictures.pixel_of((0, 0), view) == (0, 0)


def test_map_is_drawn_where_its_positions_lie(demo):
    """Position (row, column) lies on the pixel (row * stride, column * stride)."""
    view = Image.new("RGB", (64, 64))
    values = np.zeros((4, 4))
    values[1, 2] = 1
    drawn = demo.pictures.at_stride(values, 16, view, (256, 256))
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (row + 0.5) / 4 - 0.5 == pytest.approx(16, abs=0.5) and (column + 0.5) / 4 - 0.5 == pytest.approx(
        32, abs=0.5
    )
    linear = np.arange(4)[:, None] + 10.0 * np.arange(4)
    drawn = demo.pictures.at_stride(linear, 16, view, (64, 64))
    assert drawn[8, 24] == pytest.approx(0.5 + 15) and drawn[63, 63] == 33


def test_sampling_points_are_drawn_at_their_positions(demo):
    """A picture of one group whose nine points lie on known pixels."""
    from internimage_hf.inspection import LayerSampling

    places = torch.tensor([[10.0 * i + 5, 80.0 - 6 * i] for i in range(9)])
    positions = places.expand(1, 25, 25, 1, 9, 2)
    weights = torch.full((1, 25, 25, 1, 9), 1 / 9)
    layer = LayerSampling("", 1, 0, 4, (100, 100), None, positions, weights, torch.zeros(9, 2))
    drawn = np.asarray(
        demo.pictures.draw_sampling_points([layer], "1", Image.new("RGB", (100, 100), "black"), (0.0, 0.0), 1)
    ).astype(int)
    margin, title, scale = round(600 * 0.14) / 2, 30, 3
    red = np.array([0xFF, 0x2D, 0x2D])
    for x, y in places.tolist():
        pixel = drawn[int(title + margin + scale * (y + 0.5)), int(margin + scale * (x + 0.5))]
        assert np.abs(pixel - red).max() < 12
    assert (np.abs(drawn - red).max(-1) < 12).sum() < 9 * 200, "and nowhere else"


@pytest.mark.parametrize("size", [(40, 200), (200, 40), (64, 64)])
def test_panels_have_room_for_their_titles(demo, size):
    from internimage_hf.inspection import LayerSampling

    height, width = -(-size[1] // 4), -(-size[0] // 4)
    positions = torch.zeros(1, height, width, 1, 9, 2)
    layers = [
        LayerSampling("", stage, 0, 4, size[::-1], None, positions, positions[..., 0] + 1 / 9, torch.zeros(9, 2))
        for stage in (1, 2, 3, 4)
    ]
    drawn = demo.pictures.draw_sampling_points(layers, "all", Image.new("RGB", size), (1.0, 1.0), 2)
    assert drawn.width >= (2 if size == (200, 40) else 4) * 270 and max(drawn.size) < 1700


@pytest.mark.parametrize("groups", ["far apart", "all", "1", "8"])
def test_every_choice_of_stage_and_groups_is_drawn(classifier, demo, image, groups):
    page, analysis = demo.app.Page(classifier), classifier.analyse(image)
    pictures = {}
    for stage in (1, 4):
        first, last = page.look(analysis, (63.0, 0.0), stage, groups)
        assert first[4] is None and last[4] is not None and first[:4] == last[:4]
        pictures[stage] = [np.asarray(picture) for picture in last[:5]]
        assert f"stage {stage}:" in last[5]
    assert np.array_equal(pictures[1][0], pictures[4][0])
    assert all(not np.array_equal(a, b) for a, b in zip(pictures[1][1:], pictures[4][1:], strict=True))


def test_receptive_field_is_that_of_the_package(classifier, image):
    analysis = classifier.analyse(image)
    found = classifier.receptive_field(analysis, 2, (30.0, 12.0)).gradient
    (expected,) = effective_receptive_field(classifier.model, analysis.pixel_values, (30.0, 12.0), stages=2)
    torch.testing.assert_close(found, expected.gradient)


def test_untrained_offsets_are_announced(demo, file):
    processor = InternImageImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    inspector = demo.inspector.Inspector(
        InternImageForImageClassification(InternImageConfig(**TINY)), processor, "untrained"
    )
    assert "offsets are zero" in next(demo.app.Page(inspector).open(str(file), 3, "all", 0.5))[2]


def test_removed_image_empties_the_page(classifier, demo):
    ((analysis, query, status, *rest, words),) = demo.app.Page(classifier).open(None, 3, "all", 0.5)
    assert analysis is query is None and set(rest) == {None} and words == "" and status == demo.app.NO_IMAGE


# ---------------------------------------------------------------------------------------------------------------- programs


def test_program_ends_with_one_line_for_a_wrong_model(demo, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        demo.app.main(["--model", str(tmp_path)])
    assert ended.value.code.startswith(f"error: --model {tmp_path} cannot be loaded: ")
    assert "\n" not in ended.value.code


def test_default_model_is_the_small_classifier_in_a_clone_and_published_elsewhere(
    demo, monkeypatch, programs, tmp_path
):
    asked = []
    monkeypatch.setattr(programs.digit_classifier, "digit_classifier", lambda folder: asked.append(folder) or tmp_path)
    assert demo.app.default_model() == str(tmp_path)
    assert asked == [ROOT / "outputs" / "digits_on_photographs"], "the same folder from wherever the page is started"
    monkeypatch.setattr(demo.app, "EXAMPLES", tmp_path / "missing")
    assert demo.app.default_model() == demo.app.HUB_MODEL


@pytest.mark.parametrize("digits", [True, False])
def test_examples_are_images(demo, programs, tmp_path, digits):
    files = demo.app.example_images(digits, tmp_path)
    assert len(files) == (8 if digits else 2)
    assert {demo.inspector.read_image(file).mode for file in files} == {"RGB"}


def test_space_has_its_fields_and_the_version_of_the_tests():
    text = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(text.split("---")[1])
    assert fields["sdk"] == "gradio" and fields["license"] == "mit" and (ROOT / "demo" / fields["app_file"]).is_file()
    assert len(fields["short_description"]) <= 60
    assert f"gradio=={fields['sdk_version']}\n" in (ROOT / "constraints.txt").read_text()
    wheel = f"./internimage_hf-{internimage_hf.__version__}-py3-none-any.whl\n"
    assert wheel in (ROOT / "demo" / "requirements.txt").read_text()
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {fields["colorFrom"], fields["colorTo"]} <= colors


# ------------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture
def started(demo, classifier, file, monkeypatch):
    """The page of a tiny classifier on a free port, and the addresses to which the process connects."""
    addresses = []
    connect = socket.socket.connect

    def recorded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            addresses.append(address[0])
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    page = demo.app.build(classifier, [str(file)])
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **demo.app.LAUNCH)
    try:
        yield url, addresses
    finally:
        page.close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_page_in_a_browser(started, tmp_path, demo):
    """An example, an upload, a click, another stage and group, and a bad file; no request leaves the machine."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    url, addresses = started
    (tmp_path / "bad.png").write_text("no image")
    Image.effect_noise((200, 150), 90).convert("RGB").save(tmp_path / "other.png")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1340, "height": 1500})
        page.set_default_timeout(60_000)
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda entry: complaints.append(entry.text) if entry.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def source(name: str) -> str | None:
            return page.get_attribute(f"#{name} img", "src")

        def changed(name: str, before: str | None) -> None:
            script = "([name, before]) => { const image = document.querySelector(`#${name} img`);"
            script += " return image && image.src !== before && image.complete && image.naturalWidth > 0 }"
            page.wait_for_function(script, arg=[name, before])

        page.goto(url)
        changed("field", None)  # the first example is opened at once
        before = source("field")
        page.click("#image button[aria-label='Remove Image']")
        page.wait_for_selector("#field img", state="detached")
        page.set_input_files("#image input[type=file]", tmp_path / "other.png")
        changed("field", before)
        assert "64 × 64 pixels" in page.inner_text("#status")
        assert page.inner_text("#prediction").count("%") == 5

        points, field = source("sampling"), source("field")
        box = page.locator("#view img").bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.25)
        changed("sampling", points)
        changed("field", field)
        words = page.inner_text("#words")
        x, y = map(int, words[words.index("(") + 1 : words.index(")")].split(","))
        assert abs(x - 47.5) <= 1 and abs(y - 15.5) <= 1, (
            "the pixel under the mouse, in a picture shown smaller or larger"
        )

        points, field = source("sampling"), source("field")
        page.click("#stage label:nth-of-type(2)")
        changed("sampling", points)
        changed("field", field)
        assert "stage 2: 8 × 8 positions" in page.inner_text("#words")
        points = source("sampling")
        page.click("#groups input")
        page.click("#groups [role=option]:has-text('all')")
        changed("sampling", points)
        page.screenshot(path=tmp_path / "page.png", full_page=True)

        page.click("#image button[aria-label='Remove Image']")
        page.wait_for_selector("#field img", state="detached")
        page.set_input_files("#image input[type=file]", tmp_path / "bad.png")
        page.wait_for_function("() => document.querySelector('#status').innerText.includes('bad.png')")
        assert "is no image that can be read" in page.inner_text("#status")
        assert page.locator("#view img, #sampling img").count() == 0
        browser.close()
    assert {request.split("/")[2] for request in requests if request.startswith("http")} == {url.split("/")[2]}
    assert complaints == []
    assert set(addresses) <= {"127.0.0.1", "::1", "localhost"}
