"""Tests of the instance segmentation example: masks of annotations and of images, their batches, metrics, training."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file
from utils import FEW_STEPS, FIXTURES, SMALL_HEADS, CocoFolder, run_main


SIZE = CocoFolder.size  # width, height of the images below
SQUARE = [4, 5, 24, 5, 24, 15, 4, 15]  # a polygon of 20 x 10 pixels
SMALL = ["--head_config_overrides", json.dumps(SMALL_HEADS["mask2former"])]


@pytest.fixture
def program(programs):
    return programs.instance_segmentation


def text_of(mask: np.ndarray) -> dict:
    """Run lengths by pycocotools itself."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def numbers_of(mask: np.ndarray) -> dict:
    """Run lengths as numbers, as COCO has them for crowds."""
    pixels = np.concatenate([[0], mask.T.ravel(), [0]])
    ends = np.flatnonzero(np.diff(pixels))
    return {"size": list(mask.shape), "counts": np.diff([0, *ends.tolist(), mask.size]).tolist()}


def shapes(count: int, seed: int = 0, size=SIZE) -> np.ndarray:
    """Random masks of several parts, with holes."""
    rng = np.random.default_rng(seed)
    return (rng.random((count, size[1] // 4, size[0] // 4)) > 0.6).repeat(4, 1).repeat(4, 2).astype(np.uint8)


@pytest.fixture
def coco(tmp_path):
    return CocoFolder(tmp_path, segmentation=[SQUARE])


def load(program, folder: object, **flags):
    return program.load_splits(program.InstanceDataArguments(dataset=str(folder), **flags), seed=0)


def masks_of(program, part, index: int, size=SIZE) -> np.ndarray:
    return program.decode_masks(part[index]["objects"]["segmentation"], size[1], size[0])


def refused(program, folder: object, **flags) -> str:
    with pytest.raises(ValueError) as error:
        load(program, folder, **flags)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- COCO's segmentation


def test_polygons_and_run_lengths_become_the_same_masks_as_by_pycocotools(program, coco):
    masks = shapes(2)
    polygons = [SQUARE, [30.5, 2.25, 45, 3, 40, 20.75]]
    triangle = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, SIZE[1], SIZE[0])))
    one = {"image_id": 10, "category_id": 3, "bbox": [0, 0, 48, 32]}
    coco.train["annotations"] = [
        {**one, "id": 1, "segmentation": text_of(masks[0])},
        {**one, "id": 2, "segmentation": numbers_of(masks[1])},
        {**one, "id": 3, "segmentation": polygons, "area": 7.5},
        {**one, "id": 4, "segmentation": SQUARE},
        {**one, "id": 5, "segmentation": numbers_of(masks[0]), "iscrowd": 1},
    ]
    train, _, account = load(program, coco.write())
    found = masks_of(program, train, 0)
    np.testing.assert_array_equal(found[:3], [*masks, triangle])
    np.testing.assert_array_equal(found[4], masks[0])
    assert found[3].sum() == 200 and found[3, 5:15, 4:24].all()
    objects = train[0]["objects"]
    assert objects["area"] == [masks[0].sum(), masks[1].sum(), 7.5, 200, masks[0].sum()]
    assert objects["iscrowd"] == [0, 0, 0, 0, 1]
    assert account.data.left_out.counts == {"crowds, not trained on": 1}
    assert account.parts["train"].counts == {"cat": 4, "dog": 0} and account.parts["train"].empty == 1


def test_object_without_box_gets_that_of_its_mask(program, coco):
    mask = np.zeros((32, 48), dtype=np.uint8)
    mask[3:9, 7:30] = 1
    coco.train["annotations"][0]["bbox"] = None
    coco.train["annotations"][1] |= {"bbox": [], "segmentation": text_of(mask)}
    train, _, account = load(program, coco.write())
    assert [train[i]["objects"]["bbox"] for i in range(2)] == [[[4, 5, 20, 10]], [[7, 3, 23, 6]]]
    assert not account.data.left_out and not account.warnings


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segmentation": None}, "objects without a segmentation"),
        ({"segmentation": []}, "objects without a segmentation"),
        ({"segmentation": [[]]}, "objects with polygons of fewer than three points"),
        (
            {"segmentation": [[1, 2, 30, 31]]},
            "objects with polygons of fewer than three points",
        ),  # a box to pycocotools
        ({"segmentation": [[60, 5, 70, 5, 70, 9]]}, "objects without a pixel in their image"),
        ({"segmentation": [[4, 5, 4, 5, 4, 5]]}, "objects without a pixel in their image"),
        ({"segmentation": {"size": [32, 48], "counts": [32 * 48]}}, "objects without a pixel in their image"),
        ({"bbox": [4, 5, 0, 10]}, "objects with a box of no width or height"),
        ({"bbox": [50, 5, 9, 9]}, "objects outside their image"),
    ],
)
def test_object_without_usable_mask_is_counted(program, coco, change, reason):
    coco.train["annotations"][0] |= change
    train, _, account = load(program, coco.write())
    assert account.data.left_out.counts == {reason: 1}
    assert account.parts["train"].counts == {"cat": 0, "dog": 1} and train[0]["objects"]["segmentation"] == []
    coco.train["annotations"].pop()
    assert f"no objects to train on; 1 left out: 1 {reason}" in refused(program, coco.write())


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("rle", "polygons, or run lengths with `size` and `counts`, were expected"),
        (7, "polygons, or run lengths"),
        ([[1, 2, 3, 4, 5]], "polygons of pairs of numbers"),
        ([[1, 2, 3, 4, 5, None]], "polygons of pairs of numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "polygons of pairs of numbers"),
        ([[1, 2, 3, 4, 5, 1e9]], "polygons of pairs of numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "polygons of pairs of numbers"),
        ({"size": [32], "counts": [1536]}, r"run lengths with `size` \[height, width\]"),
        ({"size": [32, 48]}, "run lengths with `counts`"),
        ({"size": [32, 48], "counts": [1, 2.5]}, "run lengths with `counts`"),
        ({"size": [32, 48], "counts": [1000, 100]}, r"`counts` that sum up to the 1536 pixels .*, not 1100"),
        ({"size": [32, 48], "counts": [1537, -1]}, "`counts` that sum up to the 1536 pixels"),
        ({"size": [32, 48], "counts": "`o0"}, "`counts` that sum up|cut off"),
        ({"size": [32, 48], "counts": "ooooooooooooooooooo"}, "text of run lengths"),
        ({"size": [32, 48], "counts": "\n"}, "text of run lengths"),
        ({"size": [32, 48], "counts": "\u00e9"}, "text of run lengths"),
    ],
)
def test_wrong_segmentation_is_named(program, coco, segmentation, message):
    coco.train["annotations"][0]["segmentation"] = segmentation
    text = refused(program, coco.write())
    assert "instances_train2017.json: annotation 1: segmentation is " in text
    with pytest.raises(ValueError, match=message):
        load(program, coco.root)


def test_class_without_category_is_named(program, coco):
    coco.train["annotations"][0]["category_id"] = 9
    assert "annotation 1: category_id 9 is none of its 2 categories (3, 4)" in refused(program, coco.write())


def test_mask_of_another_size_than_its_image_is_refused_or_left_out(program, coco):
    coco.train["annotations"][0]["segmentation"] = text_of(shapes(1, size=(64, 32))[0])
    text = refused(program, coco.write())
    assert "train2017/0.png: the run lengths of an object are for 64 x 32, but the image is 48 x 32" in text
    train, _, account = load(program, coco.root, leave_out_mismatched=True)
    assert len(train) == 1 and account.data.left_out.counts == {"images of another size than is recorded": 1}


def test_mask_apart_from_its_box_is_a_warning(program, coco):
    coco.train["annotations"][0]["bbox"] = [30, 5, 10, 10]
    _, _, account = load(program, coco.write())
    assert (
        "1 of 2 objects of train have a mask and a box that overlap by less than half of both" in account.warnings[0]
    )


def test_annotations_that_differ_in_their_mask_alone_are_two_objects(program, coco):
    coco.train["annotations"] += [
        {**coco.train["annotations"][0], "segmentation": [[4, 5, 24, 5, 24, 15]]},
        dict(coco.train["annotations"][0]),
    ]
    train, _, account = load(program, coco.write())
    assert len(train[0]["objects"]["bbox"]) == 2
    assert account.data.left_out.counts == {"annotations that are listed twice": 1}


def test_detector_reads_no_masks(programs, coco):
    coco.train["annotations"][0]["segmentation"] = "unusable"
    detection = programs.object_detection
    train, _, _ = detection.load_splits(detection.DetectionDataArguments(dataset=str(coco.write())), seed=0)
    assert set(train[0]["objects"]) == {"bbox", "category", "area", "iscrowd"}


def test_metadata_with_segmentation_is_read(program, tmp_path):
    objects = {"bbox": [[4, 5, 20, 10]], "category": ["cat"], "segmentation": [[SQUARE]]}
    rows = [{"file_name": f"{i}.png", "objects": objects} for i in range(4)]
    for row in rows:
        Image.new("RGB", SIZE).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, evaluation, account = load(program, tmp_path)
    assert len(train) == 3 and masks_of(program, evaluation, 0).sum() == 200 and account.classes == ["cat"]
    assert "--label_divisor is for data sets with instance masks" in refused(program, tmp_path, label_divisor=1000)
    del objects["segmentation"]  # of all rows
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "has no `segmentation`, only bbox, category; polygons or run lengths were expected" in refused(
        program, tmp_path
    )


# ----------------------------------------------------------------------------------------------------------- instance masks


def write_masks(root: Path, masks: list, size=SIZE) -> Path:
    """Writes `images/N.png` and `annotations/N.png`."""
    for kind in ("images", "annotations"):
        (root / kind).mkdir(exist_ok=True)
    for number, mask in enumerate(masks):
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        Image.new("RGB", size, (9 * number, 50, 50)).save(root / "images" / f"{number}.png")
        mask.save(root / "annotations" / f"{number}.png")
    return root


def stripes(*values, dtype=np.uint8) -> np.ndarray:
    """A mask with a stripe per value, numbers or colours."""
    return np.tile(
        np.repeat(np.array(values, dtype=dtype), SIZE[0] // len(values), axis=0)[None],
        (SIZE[1], *[1] * np.ndim(values)),
    )


def objects_of(part) -> list[tuple[int, int, list[float]]]:
    rows = [part[index]["objects"] for index in range(len(part))]
    return sorted(
        zip(*([value for row in rows for value in row[key]] for key in ("category", "iscrowd", "bbox")), strict=True)
    )


@pytest.mark.parametrize("palette", [False, True])
def test_values_are_instances_of_one_class(program, tmp_path, palette):
    mask = Image.fromarray(stripes(0, 1, 7, 255))
    if palette:
        mask.putpalette([10, 200, 30] * 256)
    write_masks(tmp_path, [mask] * 3)
    _, evaluation, account = load(program, tmp_path)
    assert account.classes == ["object"] and objects_of(evaluation) == [
        (0, 0, [12, 0, 12, 32]),
        (0, 0, [24, 0, 12, 32]),
    ]
    assert account.parts["train"].counts == {"object": 4}
    assert account.warnings == [
        f"the value 255 of 3 instance masks is taken for background (--ignore_index), the first is {tmp_path}/annotations/0.png"
    ]
    assert len(objects_of(load(program, tmp_path, ignore_index=-1)[1])) == 3
    (tmp_path / "id2label.json").write_text('{"1": "person"}')
    assert load(program, tmp_path)[2].classes == ["person"]
    (tmp_path / "id2label.json").write_text('{"1": "person", "2": "car"}')
    assert "--id2label names 2 classes (person, car), but greyscale instance masks" in refused(program, tmp_path)


def test_values_of_classes_and_instances_are_divided(program, tmp_path):
    """As in Cityscapes: 26 without an instance is a group of cars, 7 the road."""
    names, root = tmp_path / "names.json", tmp_path / "data"
    root.mkdir()
    mask = stripes(7, 26, 26000, 26001, 24005, 0, dtype=np.uint16)
    names.write_text('{"7": "road", "24": "person", "26": "car"}')
    write_masks(root, [mask, mask])
    flags = {"label_divisor": 1000, "id2label": str(names)}
    train, _, account = load(program, root, **flags)
    assert account.classes == ["person", "car"]
    assert "instance masks in annotation, whose values are class * 1000 + instance" in account.data.layout
    assert objects_of(train) == [
        (0, 0, [32, 0, 8, 32]), (1, 0, [16, 0, 8, 32]), (1, 0, [24, 0, 8, 32]), (1, 1, [8, 0, 8, 32])
    ]  # fmt: skip
    assert account.data.left_out.counts == {
        "crowds, not trained on": 1, "crowds, neither right nor wrong in evaluation": 1
    }  # fmt: skip
    assert load(program, root, label_divisor=1000)[2].classes == ["class 24", "class 26"]
    names.write_text('{"26": "car"}')
    assert "0.png has an instance of the class 24, which --id2label does not name; 26 were" in refused(
        program, root, **flags
    )
    assert "--label_divisor must be 2 to 65535, got 1" in refused(program, root, label_divisor=1)


def test_colours_are_classes_and_instances(program, tmp_path):
    mask = stripes((3, 1, 0), (3, 2, 0), (5, 1, 0), (5, 0, 0), (9, 0, 0), (0, 0, 0))
    write_masks(tmp_path, [mask, mask, mask, np.zeros_like(mask)])
    (tmp_path / "id2label.json").write_text('{"2": "cat", "4": "dog", "8": "sky"}')
    train, evaluation, account = load(program, tmp_path, reduce_labels=True, eval_fraction=0.5)
    both = [(0, 0, [0, 0, 8, 32]), (0, 0, [8, 0, 8, 32]), (1, 0, [16, 0, 8, 32]), (1, 1, [24, 0, 8, 32])]
    assert account.classes == ["cat", "dog"] and sorted(objects_of(train) + objects_of(evaluation)) == sorted(both * 3)
    assert sum(part.empty for part in account.parts.values()) == 1
    Image.fromarray(stripes((3, 1, 0), (3, 2, 80))).save(tmp_path / "annotations" / "1.png")
    assert "1.png has the colour [3, 2, 80]; red for the class, green for the instance" in refused(program, tmp_path)
    Image.fromarray(stripes(0, 1)).save(tmp_path / "annotations" / "1.png")
    (tmp_path / "id2label.json").unlink()
    assert "instance masks of one kind were expected" in refused(program, tmp_path)
    assert "has colours; greyscale was expected for --label_divisor" in refused(program, tmp_path, label_divisor=10)


def test_instance_mask_of_another_size_or_without_instance_is_refused(program, tmp_path):
    write_masks(tmp_path, [stripes(0, 1), stripes(0, 1)[:20]])
    text = refused(program, tmp_path)
    assert "annotations/1.png is 48x20, but its image" in text and "is 48x32 (width x height)" in text
    write_masks(tmp_path, [stripes(0, 255)] * 2)
    assert "none of the 2 instance masks" in refused(program, tmp_path)
    assert "2 of them have 255, which is ignored (--ignore_index)" in refused(program, tmp_path)
    (tmp_path / "annotations" / "0.png").write_bytes(b"no image")
    assert "annotations/0.png cannot be read as an image" in refused(program, tmp_path)


# ------------------------------------------------------------------------------------------------------- batches of masks


def test_crops_and_flips_keep_masks_on_objects(program):
    """Bright regions stay the masks; an object without a pixel in the crop is not in it."""
    arguments = program.InstanceDataArguments(dataset="a", color_jitter=False, random_crop_scale=0.3)
    transform = program.training_transform(arguments)
    rng, lost, changed = np.random.default_rng(0), 0, 0
    for seed in range(60):
        width, height = rng.integers(20, 70, 2).tolist()
        masks = np.zeros((3, height, width), dtype=np.uint8)
        for mask in masks[:2]:
            x, y = int(rng.integers(width - 8)), int(rng.integers(height - 8))
            mask[y : y + 8, x : x + 8] = rng.random((8, 8)) > 0.4
        masks[1] &= 1 - masks[0]
        masks[2, :5, :5] = 1  # a crowd
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[masks[0] == 1], pixels[masks[1] == 1] = (255, 0, 0), (0, 255, 0)
        run_lengths = program.encode_masks(masks)
        objects = {
            "bbox": [program.box_of(one) for one in run_lengths], "category": [4, 5, 6], "area": [1.0] * 3,
            "iscrowd": [0, 0, 1], "segmentation": run_lengths,
        }  # fmt: skip
        result = transform({"image": Image.fromarray(pixels), "name": "it", "image_id": 0, "objects": objects}, seed)
        image, objects = np.asarray(result["image"]), result["objects"]
        changed += image.shape[:2] != (height, width)
        lost += 2 - len(objects["category"])
        masks = program.decode_masks(objects["segmentation"], *image.shape[:2])
        for mask, category, box, area in zip(
            masks, objects["category"], objects["bbox"], objects["area"], strict=True
        ):
            np.testing.assert_array_equal(mask, image[..., category - 4] == 255)
            ys, xs = mask.nonzero()
            assert box == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] and area == mask.sum() > 0
    assert lost > 3 and changed > 10


def example_of(program, masks: np.ndarray, categories: list[int], crowds: list[int], image_id: int = 0) -> dict:
    run_lengths = program.encode_masks(masks)
    objects = {
        "bbox": [program.box_of(one) for one in run_lengths], "category": categories, "area": masks.sum((1, 2)).tolist(),
        "iscrowd": crowds, "segmentation": run_lengths,
    }  # fmt: skip
    return {"image": Image.new("RGB", masks.shape[:0:-1]), "name": "it", "image_id": image_id, "objects": objects}


def test_batch_has_masks_in_the_resized_frame(program):
    masks = shapes(3)
    masks[2] = 0
    masks[2, 31, 47] = 1  # would vanish
    processor = program.HEADS["mask2former"].processor(size={"height": 16, "width": 16}, size_divisor=16)
    first = example_of(program, masks, [2, 1, 0], [0, 1, 0], 7)
    batch = program.Collate(processor)([first, example_of(program, masks[:0].reshape(0, 20, 30), [], [])])
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and batch["image_ids"].tolist() == [7, 0]
    assert batch["sizes"].tolist() == [[32, 48], [20, 30]]
    assert [labels.tolist() for labels in batch["class_labels"]] == [[2, 0], []]
    assert [tuple(found.shape) for found in batch["mask_labels"]] == [(2, 16, 16), (0, 16, 16)]
    expected = masks[0][1::2, 1::3]  # the nearest pixels of 2 x 3
    np.testing.assert_array_equal(batch["mask_labels"][0][0].numpy(), expected)
    assert batch["mask_labels"][0][1].nonzero().tolist() == [[15, 15]]


def tiny_model(program, labels: int = 3, **overrides):
    flags = program.ModelArguments(head_config_overrides=json.dumps({**SMALL_HEADS["mask2former"], **overrides}))
    return program.build_model(flags, [f"class {i}" for i in range(labels)], 32)


@pytest.mark.parametrize("masks", [1, 0])
def test_batch_without_objects_has_finite_loss_and_gradients(program, masks):
    model, processor = tiny_model(program)
    examples = [example_of(program, shapes(count), [1] * count, [0] * count) for count in (0, masks)]
    loss = model.train()(**program.Collate(processor)(examples)).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_more_objects_than_queries_are_a_warning(program, coco):
    coco.train["annotations"] = [{**coco.train["annotations"][0], "id": i} for i in range(7)]
    train, evaluation, _ = load(program, coco.write())
    model, _ = tiny_model(program, num_queries=5)
    assert program.check_queries(model, evaluation, "evaluation") == []
    assert (
        "1 images of train have more objects, 7 at most, than the model has queries, 5"
        in (program.check_queries(model, train, "train")[0])
    )


# ----------------------------------------------------------------------------------------------------- detections and metrics


def outputs_of(program, masks: np.ndarray, categories: list[int], queries: int, labels: int) -> SimpleNamespace:
    """Outputs of a model that finds these masks, at a quarter of their size."""
    logits, classes = torch.full((1, queries, 8, 12), -20.0), torch.zeros(1, queries, labels + 1)
    classes[..., -1] = 20.0
    for i, (mask, category) in enumerate(zip(masks, categories, strict=True)):
        logits[0, i][torch.from_numpy(program.resized(mask, 8, 12)) == 1] = 20.0
        classes[0, i, category] = 40.0
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=logits)


def test_detections_are_those_of_the_image_processor_at_full_size(program):
    """Random logits: scores, labels and masks as `post_process_instance_segmentation` gives them at its own size."""
    torch.manual_seed(0)
    outputs = SimpleNamespace(
        class_queries_logits=torch.randn(2, 6, 4), masks_queries_logits=torch.randn(2, 6, 96, 96)
    )
    sizes = torch.tensor([[384, 384], [384, 384]])
    processor = program.HEADS["mask2former"].processor(size={"height": 384, "width": 384})
    expected = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=sizes.tolist(), return_binary_maps=True
    )
    for found, one in zip(program.detect(outputs, sizes), expected, strict=True):
        # transformers takes as many pairs of a query and a class as there are queries
        theirs = sorted(
            (
                (info["score"], info["label_id"], mask)
                for info, mask in zip(one["segments_info"], one["segmentation"], strict=True)
            ),
            key=lambda item: -item[0],
        )
        every = [(round(score, 6), label) for score, label in zip(found["scores"], found["labels"], strict=True)]
        assert len(every) == 18 and every == sorted(every, key=lambda item: -item[0])
        for score, label, mask in theirs:
            index = min(range(18), key=lambda i: abs(found["scores"][i] - score) + (found["labels"][i] != label))
            assert found["scores"][index] == pytest.approx(score, abs=1e-5) and found["labels"][index] == label
            np.testing.assert_array_equal(
                program.decode_masks([found["segmentation"][index]], 384, 384)[0], mask.numpy()
            )
            ys, xs = mask.nonzero(as_tuple=True)
            assert found["boxes"][index] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_metrics_of_the_truth_are_perfect_and_crowds_do_not_count(program):
    masks = np.zeros((3, 32, 48), dtype=np.uint8)
    masks[0, 4:20, 4:16] = masks[1, 8:28, 20:32] = masks[2, :, 36:] = 1
    truth = [
        example_of(program, masks, [0, 1, 1], [0, 0, 1])["objects"],
        {key: [] for key in ("bbox", "category", "area", "iscrowd", "segmentation")},
    ]
    metrics = program.CocoMetrics(truth, ["cat", "dog"])

    def score(masks, categories) -> dict[str, float]:
        found = program.detect(outputs_of(program, masks, categories, 6, 2), torch.tensor([[32, 48]]))[0]
        return metrics.of_instances({0: found, 1: dict.fromkeys(found, ())})

    right = score(masks[:2], [0, 1])
    assert right["mask_map"] == right["map"] == pytest.approx(1.0) and right["mask_mar_100"] == pytest.approx(1.0)
    part_of_crowd = masks[2] * (np.arange(32) < 16)[:, None].astype(np.uint8)
    assert score([*masks[:2], part_of_crowd], [0, 1, 1])["mask_map"] == pytest.approx(1.0)
    thin = masks[:2].copy()
    thin[0, 8:16, 8:12] = 0  # a hole: the box stays, the mask does not
    thin = score(thin, [0, 1])
    assert thin["map"] == pytest.approx(1.0) and 0.5 < thin["mask_map"] < 0.95
    assert score(masks[:2, :, ::-1], [0, 1])["mask_map_50"] == 0.0
    assert set(
        metrics.of_instances({0: {key: [] for key in ("boxes", "scores", "labels", "segmentation")}}).values()
    ) == {0.0}


# ----------------------------------------------------------------------------------------------------------------- training


def test_program_trains_resumes_and_starts_from_trained_model(program, coco_folder, tmp_path, capsys):
    flags = ["--dataset", coco_folder, *SMALL, "--image_size", 64, "--output_dir", tmp_path, *FEW_STEPS]
    metrics = run_main(program, *flags)
    output = capsys.readouterr().out
    assert "9 images, 1 of them without objects; objects per class: the 0" in output.partition("train_loss")[0]
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"eval_mask_map", "eval_mask_map_50", "eval_map", "eval_loss", "train_loss"} <= set(results)
    assert json.loads((tmp_path / "data.json").read_text())["left out"]["crowds, not trained on"]["count"] > 0
    assert json.loads((tmp_path / "trainer_state.json").read_text())["best_metric"] == pytest.approx(
        metrics["eval_mask_map"]
    )
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 300

    # resumed from the second of four steps
    expected = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    run_main(program, *flags, "--resume_from_checkpoint", "last")
    for name, tensor in load_file(tmp_path / "checkpoint-4" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)

    # the trained model again, with the same classes and with others
    trained = load_file(tmp_path / "model.safetensors")
    more = [
        "--output_dir",
        tmp_path / "again",
        *FEW_STEPS,
        "--learning_rate",
        0,
        "--max_steps",
        1,
        "--model",
        tmp_path,
    ]
    more += ["--eval_strategy", "no", "--save_strategy", "no"]
    again = run_main(program, "--dataset", coco_folder, *more, "--remote_code")
    assert set(again) == set(metrics) and (tmp_path / "again" / "modeling_internimage_head.py").is_file()
    same = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.allclose(tensor, trained[name], atol=1e-6) for name, tensor in same.items())
    assert json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())["size"] == {
        "height": 64,
        "width": 64,
    }
    (tmp_path / "others").mkdir()
    run_main(program, "--dataset", write_masks(tmp_path / "others", [stripes(0, 1, 2)] * 4), *more)
    other = load_file(tmp_path / "again" / "model.safetensors")
    changed = {name for name, tensor in other.items() if not torch.equal(tensor, trained[name])}
    assert changed == {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
    torch.testing.assert_close(other["criterion.empty_weight"], torch.tensor([1.0, 0.1]))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["id2label"] == {"0": "object"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size", 0], "--image_size must be at least 1, got 0"),
        (["--mask_column", "mask"], "--mask_column is for data sets with columns or instance masks"),
        (
            ["--ignore_index", 7],
            "--ignore_index is for data sets with columns or instance masks; .* has COCO annotations",
        ),
        (["--head_config_overrides", '{"queries": 1}'], "queries is not a field of Mask2FormerConfig"),
        (["--model", FIXTURES / "hf_t_like"], "hf_t_like is a internimage, not one of mask2former"),
    ],
)
def test_bad_flags_are_one_line(program, coco_folder, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run_main(program, "--dataset", coco_folder, "--output_dir", tmp_path, *FEW_STEPS, *flags)


def test_embedded_masks_are_the_digits(program):
    train, _, account = load(program, "digits", max_train_samples=3, max_eval_samples=2)
    assert len(train) == 3 and not account.warnings and not account.data.left_out
    for index in range(3):
        objects = train[index]["objects"]
        masks = masks_of(program, train, index, (96, 96))
        assert masks.sum(0).max() == 1 and objects["area"] == masks.sum((1, 2)).tolist()
        assert objects["bbox"] == [program.box_of(one) for one in objects["segmentation"]]
