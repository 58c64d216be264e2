"""Tests of examples/figures.py, ablations.py and digit_classifier.py on a few images and steps."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from utils import TINY, run_example, run_main

from internimage_hf import InternImageConfig, InternImageForImageClassification


def tiny_config(**fields) -> InternImageConfig:
    return InternImageConfig(**{**TINY, "channels": 16, **fields})


def move_points(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if ".dcn.offset." in name or ".dcn.mask." in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------- the data


def test_single_digits_are_the_same_for_a_seed_and_differ_in_the_splits(programs):
    load = programs.embedded_data.load_single_digits
    counted = []
    data = load(5, 3, size=40, seed=1, progress=counted.append)
    again, other = load(5, 3, size=40, seed=1), load(5, 3, size=40, seed=2)
    assert sum(counted) == 8
    for name, number in (("train", 5), ("validation", 3)):
        images, labels = data[name]
        assert images.shape == (number, 40, 40, 3) and images.dtype == np.uint8
        assert labels.shape == (number,) and set(labels) <= set(range(10))
        assert np.array_equal(images, again[name][0]) and not np.array_equal(images, other[name][0])
        assert (images.reshape(number, -1).max(1) > 150).all()  # ink
        assert np.median(images) < 60  # a darkened photograph
    with pytest.raises(ValueError, match="`size` must be 32 to 213"):
        load(1, 1, size=20)


def test_classifier_learns_and_is_trained_once(programs, tmp_path, capsys):
    module = programs.digit_classifier
    images, labels = programs.embedded_data.load_single_digits(24, 1, size=32)["train"]
    torch.manual_seed(0)
    model = InternImageForImageClassification(module.small_config(32))
    norms = module.train(model, images, labels, steps=60, batch_size=24, learning_rate=5e-3)
    assert len(norms) == 60 and all(map(math.isfinite, norms))
    assert (module.predict(model, images) == labels).mean() > 0.8

    folder = module.digit_classifier(tmp_path / "model", size=32, steps=1, images=8)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert module.digit_classifier(folder, size=32, steps=1, images=8) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, module.normalised(images))
    with torch.no_grad():
        assert np.array_equal(loaded(pixel_values).logits.argmax(-1).numpy(), module.predict(loaded, images))


# ------------------------------------------------------------------------------------------------------------- the variants


@pytest.mark.parametrize("fields", [{}, {"offset_scale": 1.5, "remove_center": True}])
def test_equal_projections_per_point_equal_shared_weights(programs, fields):
    variants = programs.ablations.VARIANTS
    shared = move_points(variants["dcnv3"].build(tiny_config(**fields)))
    own = variants["per_point"].build(tiny_config(**fields))
    points = 8 if fields else 9
    state = shared.state_dict()
    for name in [name for name in state if name.endswith("dcn.output_proj.weight")]:
        groups = shared.get_submodule(name.removesuffix(".output_proj.weight")).groups
        weight = state[name].unflatten(1, (groups, 1, -1))  # (C, G, 1, C/G): the samples of a point lie side by side
        state[name] = weight.expand(-1, -1, points, -1).flatten(1)
    own.load_state_dict(state)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(images).logits, shared(images).logits, atol=1e-5, rtol=1e-5)


def test_parameters_of_variants_follow_formulas(programs):
    variants = programs.ablations.VARIANTS
    config = InternImageConfig.from_variant("t")
    with torch.device("meta"):
        count = {name: variant.build(config).num_parameters() for name, variant in variants.items()}
        # the paper's Table 11: InternImage-B with DCNv2, which has one group and a projection per point, has 146 M
        b = variants["one_group"].build(InternImageConfig.from_variant("b"))
        programs.ablations.unshare_projections(b)
    layers = list(zip(config.depths, config.hidden_sizes, config.groups, strict=True))
    assert count["per_point"] - count["dcnv3"] == 8 * sum(depth * width**2 for depth, width, _ in layers)
    assert count["dcnv3"] - count["one_group"] == 27 * sum(d * (w + 1) * (g - 1) for d, w, g in layers)
    assert count["sigmoid"] == count["unbounded"] == count["dcnv3"]
    assert round(b.num_parameters() / 1e6) == 146


def test_masks_of_variants_are_theirs(programs):
    variants = programs.ablations.VARIANTS
    torch.manual_seed(0)
    unbounded = variants["unbounded"].build(tiny_config())
    sigmoid = variants["sigmoid"].build(tiny_config())
    sigmoid.load_state_dict(unbounded.state_dict())
    images = torch.randn(1, 3, 32, 32)
    for model, expected in ((unbounded, 0.0), (sigmoid, 0.5)):  # of a mask of zeros
        sampling = programs.ablations.deformable_convolutions(model)[0].sampling
        value = torch.ones(1, 8, 8, 16)
        output = sampling(value, torch.zeros(1, 8, 8, 36), torch.zeros(1, 8, 8, 18), groups=2)
        assert output[0, 4, 4].tolist() == [9 * expected] * 16
    with torch.no_grad():
        assert not torch.allclose(unbounded.eval()(images).logits, sigmoid.eval()(images).logits)


def test_projection_per_point_refuses_center_feature_scale(programs):
    with pytest.raises(ValueError, match="`center_feature_scale` must be False for a projection per point"):
        programs.ablations.VARIANTS["per_point"].build(tiny_config(center_feature_scale=True))


def test_bytes_on_meta_device_are_those_on_cpu(programs):
    for name, variant in programs.ablations.VARIANTS.items():
        kept = []
        for device in ("cpu", "meta"):
            with torch.device(device):
                model = variant.build(tiny_config(post_norm=True, layer_scale_init_value=0.1))
                kept.append(programs.ablations.saved_bytes(model, torch.zeros(2, 3, 64, 64)))
        assert kept[0] == kept[1] > 0, name


# -------------------------------------------------------------------------------------------------------------- the programs


FEW = [
    "--seeds", 2, "--steps", 2, "--stress_steps", 2, "--batch_size", 4, "--train_images", 40, "--test_images", 10,
    "--image_size", 32,
]  # fmt: skip


def test_ablations_write_table_and_picture(programs, tmp_path, capsys):
    flags = [*FEW, "--variants", "one_group", "dcnv3", "--processes", 1, "--output_dir", tmp_path]
    run_main(programs.ablations, *flags)
    table = (tmp_path / "ablations.md").read_text()
    assert table in capsys.readouterr().out
    result = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["dcnv3", "one_group"]  # in the table's order
    for row in result["rows"]:
        assert len(row["accuracies"]) == len(row["spikes"]) == len(row["stress_spikes"]) == 2
        assert row["parameters"] > 0 and row["flops"] > 0 and row["bytes_per_image"] > 0
    shared, one = (row["accuracies"] for row in result["rows"])
    mean, _ = result["rows"][1]["difference"]
    assert mean == pytest.approx(np.mean(one) - np.mean(shared)) and result["rows"][0]["difference"] is None
    assert "| one group |" in table and "-17%" in table
    with Image.open(tmp_path / "ablations.png") as picture:
        assert picture.width > 1000


@pytest.mark.slow
def test_ablations_in_processes_equal_those_in_one(programs, tmp_path):
    flags = [*FEW, "--variants", "per_point", "unbounded"]
    run_example("ablations.py", *flags, "--processes", 2, "--output_dir", tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = run_main(programs.ablations, *flags, "--processes", 1, "--output_dir", tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    in_processes = json.loads((tmp_path / "ablations.json").read_text())["rows"]
    for row, other in zip(rows, in_processes, strict=True):
        assert row.accuracies == other["accuracies"]
        assert row.spikes == pytest.approx(other["spikes"]) and row.difference is None


def test_quick_shrinks_what_is_not_given(programs):
    arguments = programs.ablations.AblationArguments(quick=True, steps=7)
    assert (arguments.seeds, arguments.steps, arguments.train_images) == (1, 7, 1500)
    for field, value in (("seeds", 0), ("image_size", 20), ("learning_rate", 0.0), ("processes", -1)):
        with pytest.raises(ValueError, match=f"--{field} must be .*, got {value}"):
            programs.ablations.AblationArguments(**{field: value})


@pytest.fixture(scope="module")
def digits_model(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    model = InternImageForImageClassification(programs.digit_classifier.small_config(64))
    move_points(model).save_pretrained(folder)
    processor = programs.digit_classifier.InternImageImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    processor.save_pretrained(folder)
    return folder


def test_figures_are_written_for_checkpoint_and_image(programs, digits_model, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    files = run_main(
        programs.figures, "--model", digits_model, "--image", tmp_path / "photo.png", "--query", 10, 60,
        "--figures", 5, 7, 8, "--output_dir", tmp_path / "figures",
    )  # fmt: skip
    assert [file.name for file in files] == ["figure5.png", "figure7.png", "figure8.png"]
    for file in files:
        with Image.open(file) as picture:
            assert picture.width >= 1000
    curves = json.loads((tmp_path / "figures" / "figure8.json").read_text())
    assert [curve["name"] for curve in curves] == ["shift, pixels", "rotation, degrees", "scale"]
    # what leaves the image as it is leaves the prediction as it is
    assert curves[0]["same"][0] == curves[1]["same"][0] == curves[2]["same"][3] == 100
    assert curves[0]["right"] is None


def test_figure4_has_formula_of_parameters(programs, tmp_path):
    row = programs.figures.shared_weights("t")
    assert row.parameters == (29_918_424, 29_918_424 + 8 * sum(
        depth * (64 * 2**stage) ** 2 for stage, depth in enumerate((4, 4, 18, 4))
    ))  # fmt: skip
    assert row.bytes_kept[0] < row.bytes_kept[1]
    programs.figures.draw_shared_weights([row], tmp_path / "figure4.png")
    table = programs.figures.shared_weights_table([row])
    assert "| T | 29.9 M | 48.4 M | 38.2% |" in table and "66.1 % more parameters. Here: 61.8 %" in table


def test_changes_of_figure8_move_pixels(programs):
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[2, 3] = 200
    image = Image.fromarray(pixels)
    moved = np.asarray(programs.figures.shifted(image, 2))
    assert moved[2, 5, 0] == 200 and moved.shape == pixels.shape
    assert np.array_equal(np.asarray(programs.figures.turned(image, 0)), pixels)
    assert programs.figures.scaled(image, 0.5).size == (4, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--query", "64", "0"], "--query must lie in the image, 64 x 64 pixels, got 64 0"),
        (["--query", "1"], "--query must be two numbers"),
        (["--groups", "9"], "--groups must be 1 to 8, got 9"),
        (["--image", "nothing.png"], "nothing.png cannot be read as an image"),
        (["--model", "nowhere"], "--model nowhere cannot be used"),
    ],
)
def test_figures_refuse_in_one_line(programs, digits_model, tmp_path, flags, message):
    flags = flags if "--model" in flags else ["--model", digits_model, *flags]
    with pytest.raises(ValueError, match=message) as caught:
        run_main(programs.figures, "--figures", "5", "--number", 1, "--output_dir", tmp_path, *flags)
    assert "\n" not in str(caught.value)
