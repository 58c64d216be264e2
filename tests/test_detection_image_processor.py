"""The detectors' image processor: the pixels of the official test pipeline, training targets, post-processing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

# from where it is defined: transformers 5.17 offers a placeholder at the top where torchvision is absent
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from utils import FIXTURES

from internimage_hf import InternImageDetectionImageProcessor
from internimage_hf.image_processing_internimage_detection import resize_bilinear, resize_nearest, resized_size


FOLDER = FIXTURES / "detection_preprocessing"
PIXELS = json.loads((FOLDER / "cases.json").read_text())


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load_file(FOLDER / "expected.safetensors")


def processor_of(case: str) -> InternImageDetectionImageProcessor:
    short, long = sorted(PIXELS[case]["scale"])
    return InternImageDetectionImageProcessor(size={"shortest_edge": short, "longest_edge": long})


@pytest.mark.parametrize("case", PIXELS)
def test_resized_pixels_are_opencvs(case, expected):
    height, width = resized_size(*PIXELS[case]["image"], *sorted(PIXELS[case]["scale"]))
    assert [height, width] == PIXELS[case]["resized"]
    resized = resize_bilinear(expected[f"{case}.image"].transpose(2, 0, 1), height, width)
    assert resized.dtype == np.uint8 and np.array_equal(resized.transpose(1, 2, 0), expected[f"{case}.resized"])


@pytest.mark.parametrize("case", PIXELS)
def test_pixel_values_are_those_of_the_official_pipeline(case, expected):
    encoded = processor_of(case)(Image.fromarray(expected[f"{case}.image"]), return_tensors="pt")
    (height, width), (padded_height, padded_width) = PIXELS[case]["resized"], PIXELS[case]["padded"]
    assert encoded["pixel_values"].shape == (1, 3, padded_height, padded_width)
    mask = torch.zeros(1, padded_height, padded_width, dtype=torch.long)
    mask[:, :height, :width] = 1
    assert torch.equal(encoded["pixel_mask"], mask)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    normalised = (expected[f"{case}.resized"] - mean) / std
    found = encoded["pixel_values"][0].numpy()
    np.testing.assert_allclose(found[:, :height, :width], normalised.transpose(2, 0, 1), atol=2e-6)
    assert not found[:, height:].any() and not found[:, :, width:].any()
    if f"{case}.pixel_values" in expected:
        np.testing.assert_allclose(found, expected[f"{case}.pixel_values"], atol=2e-6)


@pytest.mark.parametrize(
    "size, wanted",
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((10, 2000), (7, 1333)), ((1, 1), (800, 800))],
)
def test_sides_are_rounded(size, wanted):
    assert resized_size(*size, 800, 1333) == wanted


def test_floats_are_interpolated_without_rounding():
    image = np.random.default_rng(0).random((3, 20, 31)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None], (33, 17), mode="bilinear")[0]
    np.testing.assert_allclose(resize_bilinear(image, 33, 17), expected.numpy(), atol=3e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1"])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (70, 20)])
def test_any_mode_and_size(mode, size):
    image = Image.effect_noise(size, 50).convert(mode)
    processor = InternImageDetectionImageProcessor(size={"shortest_edge": 40, "longest_edge": 64})
    encoded = processor(image, return_tensors="pt")
    assert encoded["pixel_values"].shape[1] == 3 and encoded["pixel_values"].isfinite().all()
    assert all(side % 32 == 0 for side in encoded["pixel_values"].shape[2:])


def test_a_batch_is_padded_to_its_largest_image():
    processor = InternImageDetectionImageProcessor(size={"shortest_edge": 40, "longest_edge": 64})
    encoded = processor([Image.new("RGB", (64, 10)), Image.new("RGB", (20, 40))], return_tensors="pt")
    assert encoded["pixel_values"].shape == (2, 3, 64, 64)
    assert encoded["pixel_mask"].sum((1, 2)).tolist() == [64 * 10, 32 * 64]


def test_saved_settings_come_back(tmp_path):
    processor = InternImageDetectionImageProcessor(size={"shortest_edge": 40, "longest_edge": 64}, top_k=7)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internimage_dino"}))
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is InternImageDetectionImageProcessor and loaded.to_dict() == processor.to_dict()
    assert loaded.top_k == 7


# ------------------------------------------------------------------------------------------------------------- targets


def annotation(*objects: dict) -> dict:
    return {"image_id": 5, "annotations": [{"category_id": 1, "area": 100.0, **one} for one in objects]}


def targets_of(annotations, images=None, **options):
    images = images or [Image.new("RGB", (80, 40))]
    processor = InternImageDetectionImageProcessor(size={"shortest_edge": 60, "longest_edge": 200})
    return processor(images=images, annotations=annotations, return_tensors="pt", **options)


def test_boxes_are_relative_to_the_image_without_padding():
    small = annotation({"bbox": [10, 5, 20, 10]}, {"bbox": [60, 20, 40, 10], "category_id": 0})
    large = {"image_id": 6, "annotations": []}
    encoded = targets_of([small, large], [Image.new("RGB", (80, 40)), Image.new("RGB", (100, 300))])
    assert encoded["pixel_values"].shape == (2, 3, 192, 128)
    label = encoded["labels"][0]
    expected = [[20 / 80, 10 / 40, 20 / 80, 10 / 40], [70 / 80, 25 / 40, 20 / 80, 10 / 40]]  # the second clipped
    torch.testing.assert_close(label["boxes"], torch.tensor(expected))
    assert label["class_labels"].tolist() == [1, 0] and label["class_labels"].dtype == torch.long
    assert label["size"].tolist() == [60, 120] and label["orig_size"].tolist() == [40, 80]
    assert label["image_id"].tolist() == [5] and label["area"].tolist() == [225.0, 225.0]
    empty = encoded["labels"][1]
    assert empty["boxes"].shape == (0, 4) and empty["class_labels"].shape == (0,)


def test_what_the_authors_leave_out():
    kept = {"bbox": [10, 5, 20, 10]}
    left_out = [
        {"bbox": [10, 5, 20, 10], "iscrowd": 1},
        {"bbox": [10, 5, 0, 10]},
        {"bbox": [10, 5, 0.5, 10]},
        {"bbox": [90, 5, 20, 10]},  # beside the image
        {"bbox": [10, 5, 20, 10], "area": 0},
    ]
    assert len(targets_of(annotation(*left_out, kept))["labels"][0]["boxes"]) == 1


def test_masks_of_polygons_and_run_lengths():
    from pycocotools import mask as coco_mask

    square = np.zeros((40, 80), np.uint8)
    square[10:20, 30:50] = 1
    polygon = [[30, 10, 50, 10, 50, 20, 30, 20]]
    flat = square.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    counts = np.diff([0, *changes, len(flat)]).tolist()
    compressed = coco_mask.encode(np.asfortranarray(square))
    objects = [
        {"bbox": [30, 10, 20, 10], "segmentation": segmentation}
        for segmentation in (
            polygon,
            {"size": [40, 80], "counts": counts},
            compressed,
            {**compressed, "counts": compressed["counts"].decode()},
        )
    ]
    label = targets_of(annotation(*objects), return_segmentation_masks=True)["labels"][0]
    assert label["masks"].shape == (4, 64, 128)
    expected = np.zeros((64, 128), np.uint8)
    expected[:60, :120] = resize_nearest(square, 60, 120)
    assert all(np.array_equal(mask, expected) for mask in label["masks"].numpy())
    assert expected.sum() == 15 * 30


def test_run_lengths_are_pycocotools():
    from pycocotools import mask as coco_mask

    from internimage_hf.image_processing_internimage_detection import _mask

    generator = np.random.default_rng(0)
    for density in (0.001, 0.3, 0.999):
        noise = (generator.random((97, 61)) < density).astype(np.uint8)
        encoded = coco_mask.encode(np.asfortranarray(noise))
        assert np.array_equal(_mask(encoded, 97, 61, "mask"), noise)


@pytest.mark.parametrize(
    "objects, message",
    [
        ({"bbox": [1, 2, 3]}, r"`bbox` of `annotations\[0\]\['annotations'\]\[0\]` must be four numbers .*, got \[1, 2, 3\]"),
        ({"bbox": [1, 2, "a", 4]}, "must be four numbers"),
        ({"bbox": [1, 2, -3, 4]}, r"must be finite, with a width and height of at least 0, got \[1, 2, -3, 4\]"),
        ({"bbox": [1, 2, float("nan"), 4]}, "must be finite"),
        ({"bbox": [1, 2, 3, 4], "category_id": "cat"}, "`category_id` of .* must be an integer of at least 0, got 'cat'"),
        ({"bbox": [1, 2, 3, 4], "category_id": -1}, "`category_id` of .* must be an integer of at least 0, got -1"),
        ({}, "must have `bbox`, it has category_id, area"),
    ],
)  # fmt: skip
def test_wrong_annotations(objects, message):
    with pytest.raises(ValueError, match=message):
        targets_of(annotation(objects))


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ({"size": [80, 40], "counts": [3200]}, r"must have the image's `size` \[40, 80\], got \[80, 40\]"),
        ({"size": [40, 80], "counts": [1, 2]}, "must be integers of at least 0 that sum up to 3200"),
        ({"size": [40, 80], "counts": "\x00\x01"}, "must be integers of at least 0 that sum up to 3200"),
        ({"size": [40, 80]}, "must be a list or a string, got NoneType"),
        ([[1, 2, 3, 4]], "must be polygons of at least three points"),
        ([], "must be polygons of at least three points"),
        ([["a", 2, 3, 4, 5, 6]], "must be polygons of at least three points"),
    ],
)
def test_wrong_masks(segmentation, message):
    one = annotation({"bbox": [10, 5, 20, 10], "segmentation": segmentation})
    with pytest.raises(ValueError, match=message):
        targets_of(one, return_segmentation_masks=True)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"`annotations` must be one per image \(1\), got 2"):
        targets_of([annotation(), annotation()])
    with pytest.raises(ValueError, match=r"`annotations\[0\]` must be a dictionary with"):
        targets_of([{"boxes": []}])
    processor = InternImageDetectionImageProcessor(size={"shortest_edge": 60})
    with pytest.raises(ValueError, match="`size` must have `shortest_edge` and `longest_edge`"):
        processor(Image.new("RGB", (8, 8)))


# ----------------------------------------------------------------------------------------------------- post-processing


def test_best_pairs_of_query_and_class_are_clipped_and_scaled():
    logits = torch.tensor([[[2.0, -3.0], [1.0, 0.5]]])
    outputs = SimpleNamespace(logits=logits, pred_boxes=torch.tensor([[[0.9, 0.5, 0.4, 0.5], [0.5, 0.5, 0.2, 0.2]]]))
    processor = InternImageDetectionImageProcessor(top_k=3)
    (found,) = processor.post_process_object_detection(outputs, 0.0, target_sizes=[(100, 200)])
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.5]).sigmoid())
    assert found["labels"].tolist() == [0, 0, 1]
    torch.testing.assert_close(
        found["boxes"], torch.tensor([[140.0, 25, 200, 75], [80, 40, 120, 60], [80, 40, 120, 60]])
    )
    (found,) = processor.post_process_object_detection(outputs, 0.7, target_sizes=torch.tensor([[100, 200]]), top_k=1)
    assert len(found["scores"]) == 1
    (relative,) = processor.post_process_object_detection(outputs, 0.7)
    torch.testing.assert_close(relative["boxes"][0], torch.tensor([0.7, 0.25, 1.0, 0.75]))
    with pytest.raises(ValueError, match=r"`target_sizes` must be .* each of the 1 images, got \(2, 2\)"):
        processor.post_process_object_detection(outputs, 0.0, target_sizes=[(1, 2), (3, 4)])
    with pytest.raises(ValueError, match="`outputs` must have `masks`, those of a SimpleNamespace have none"):
        processor.post_process_instance_segmentation(outputs, target_sizes=[(100, 200)])
