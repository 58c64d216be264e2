"""Tests of the detection example's input: every image and object is used, counted, or refused in one line."""

import json
import runpy
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from utils import ROOT, CocoFolder


SIZE = CocoFolder.size  # width, height of the images below


@pytest.fixture
def detection(programs):
    return programs.object_detection


@pytest.fixture
def coco(tmp_path):
    return CocoFolder(tmp_path, area=150)


def load(detection, folder: object, **flags):
    return detection.load_splits(detection.DetectionDataArguments(dataset=str(folder), **flags), seed=0)


def objects_of(part) -> list[dict]:
    return list(part.objects["objects"])


def write_metadata(folder: Path, rows: list[dict], size=SIZE) -> Path:
    for row in rows:
        file = folder / row["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(file)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# -------------------------------------------------------------------------------------------------------------- COCO files


def test_coco_folder_is_read_whole(detection, coco):
    train, evaluation, account = load(detection, coco.write())
    assert account.classes == ["cat", "dog"] and len(train) == len(evaluation) == 2
    assert objects_of(train)[1] == {"bbox": [[4, 5, 20, 10]], "category": [1], "area": [150], "iscrowd": [0]}
    assert account.parts["train"].counts == {"cat": 1, "dog": 1} and account.parts["train"].unit == "objects"
    assert not account.warnings and not account.data.left_out


def test_image_of_other_size_than_recorded_is_refused(detection, coco):
    """A photograph rotated by its EXIF orientation, and a resized image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(coco.root / "train2017" / "turned.jpg", exif=exif)
    coco.train["images"][1]["file_name"] = "turned.jpg"
    with pytest.raises(ValueError, match=r"turned.jpg: width and height are recorded as 48 x 32, but the image turned "
                       r"upright by its EXIF orientation is 32 x 48.*--leave_out_mismatched"):  # fmt: skip
        load(detection, coco.write())
    coco.train["images"][1] |= {"width": 32, "height": 48}
    train, _, _ = load(detection, coco.write())
    assert detection.read_image(train[1]["image"]).size == (32, 48)

    coco.train["images"][0] |= {"width": 96, "height": 64}
    with pytest.raises(ValueError, match=r"0.png: width and height are recorded as 96 x 64, but the image is 48 x 32"):
        load(detection, coco.write())
    train, _, account = load(detection, coco.write(), leave_out_mismatched=True)
    assert len(train) == 1 and account.data.left_out.counts["images of another size than is recorded"] == 1


def test_missing_recorded_sizes_are_reported(detection, coco):
    del coco.train["images"][0]["width"]
    coco.train["images"][1]["height"] = None
    _, _, account = load(detection, coco.write())
    assert account.warnings == ["2 of 2 images of train record no width and height: not compared with the images"]


def test_text_and_number_ids_are_matched_with_warning(detection, coco):
    for image in coco.train["images"]:
        image["id"] = str(image["id"])
    for annotation in coco.val["annotations"]:
        annotation["category_id"] = str(annotation["category_id"])
    train, evaluation, account = load(detection, coco.write())
    assert [row["category"] for row in objects_of(train) + objects_of(evaluation)] == [[0], [1], [0], [1]]
    assert "the image ids are text in one list and numbers in the other for 2 annotations" in account.warnings[0]
    assert "the category ids are text" in account.warnings[1]


def test_annotations_of_unknown_images_are_counted(detection, coco):
    coco.train["annotations"][0]["image_id"] = 77
    train, _, account = load(detection, coco.write())
    assert objects_of(train)[0]["bbox"] == [] and account.parts["train"].empty == 1
    assert account.data.left_out.counts == {"annotations of images that instances_train2017.json does not list": 1}
    assert "1 of its 2 annotations are of images that it does not list" in account.warnings[0]
    coco.train["annotations"][1]["image_id"] = 78
    with pytest.raises(ValueError, match=r"train2017.json: none of its 2 annotations names one of its 2 images: .*77"):
        load(detection, coco.write())


@pytest.mark.parametrize("annotations", [[], None])
def test_coco_file_without_annotations_is_refused(detection, coco, annotations):
    coco.val["annotations"] = annotations
    with pytest.raises(ValueError, match=r"val2017.json: none of its 0 annotations names one of its 2 images"):
        load(detection, coco.write())


def test_null_fields_are_accepted(detection, coco):
    coco.train["annotations"][0] |= {"iscrowd": None, "area": None, "segmentation": None}
    coco.train["annotations"] += [
        {"id": 5, "image_id": 10, "category_id": 3, "bbox": []},
        {"id": 6, "image_id": 10, "category_id": 3, "bbox": None},
        {"id": 7, "image_id": 10, "category_id": 3},
        {"id": 8, "image_id": 11, "category_id": 3, "bbox": [1, 2, 0, 5]},
        {"id": 9, "image_id": 11, "category_id": 3, "bbox": [1, 2, 3, 5], "area": 0, "iscrowd": 0},
    ]
    train, _, account = load(detection, coco.write())
    assert objects_of(train)[0] == {"bbox": [[4, 5, 20, 10]], "category": [0], "area": [200], "iscrowd": [0]}
    assert objects_of(train)[1]["area"] == [150, 0]
    left_out = account.data.left_out
    assert left_out.counts == {"objects without a box": 3, "objects with a box of no width or height": 1}
    assert "annotation 5" in left_out.examples["objects without a box"][0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bbox", [1, 2, 3], r"annotation 2: bbox is \[1, 2, 3\]; four finite numbers were expected"),
        ("bbox", [1, 2, 3, 4, 5], "four finite numbers"),
        ("bbox", [1, 2, 3, float("nan")], "four finite numbers"),
        ("bbox", [1, 2, "3", 4], "four finite numbers"),
        ("bbox", [1, 2, None, 4], "four finite numbers"),
        ("bbox", "1 2 3 4", "four finite numbers"),
        ("bbox", {"x": 1}, "four finite numbers"),
        ("bbox", [9, 9, -4, 4], r"left, top, width, height were expected, .* -4 x 4; --box_format xyxy"),
        ("iscrowd", 2, "iscrowd is 2; 0, 1 or null was expected"),
        ("area", -1, "area is -1; a number of pixels, or null, was expected"),
        ("area", "9", "area is '9'"),
        ("category_id", 9, r"annotation 2: category_id 9 is none of its 2 categories \(3, 4\)"),
        ("category_id", None, "annotation 2: category_id is None, a whole number or a text was expected"),
        ("image_id", None, "annotation 2: image_id is None"),
        ("image_id", [11], r"image_id is \[11\]"),
    ],
)
def test_bad_annotation_field_is_named(detection, coco, field, value, message):
    coco.val["annotations"][1][field] = value
    with pytest.raises(ValueError, match=rf"instances_val2017\.json: .*{message}") as error:
        load(detection, coco.write())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].update(id=10), r"images\[1\]: the id 10 is also that of .*0\.png"),
        (lambda c: c["images"][1].update(id="10"), "the id 10 is also that of"),
        (lambda c: c["images"][1].update(file_name="./0.png"), "0.png is listed twice, with the ids 10 and 11"),
        (lambda c: c["images"][1].update(file_name="no.png"), r"names 1 images which are not in .*\(of 2\): no.png"),
        (lambda c: c["images"][1].update(file_name="https://a.b/0.png"), "names 1 images which are not in"),
        (lambda c: c["images"][1].update(file_name=None), r"images\[1\]: file_name is None, a text was expected"),
        (lambda c: c["images"][1].pop("id"), r"images\[1\]: id is None"),
        (lambda c: c["images"][1].update(width="48"), "width is '48'; a whole number of pixels, or null"),
        (lambda c: c.update(images=None), "lists no images"),
        (lambda c: c["images"].append(7), r"images\[2\] is a int, an object was expected"),
        (lambda c: c.update(annotations={"a": 1}), "annotations is a dict, a list was expected"),
        (lambda c: c.pop("categories"), "is not in COCO's format: it has no categories"),
        (lambda c: c["categories"][1].update(id=3), r"categories\[1\]: the id 3 has two names, cat and dog"),
        (lambda c: c["categories"][1].pop("name"), r"categories\[1\]: name is None"),
    ],
)
def test_bad_lists_of_coco_file_are_named(detection, coco, change, message):
    change(coco.train)
    with pytest.raises(ValueError, match=rf"instances_train2017\.json.*{message}") as error:
        load(detection, coco.write())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "{\n", "\u00ff"])
def test_file_that_is_not_coco_is_named(detection, coco, text):
    coco.write()
    (coco.root / "annotations" / "instances_val2017.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"instances_val2017\.json (cannot be read as JSON|is not in COCO's format)"):
        load(detection, coco.root)


def test_repeated_annotation_ids_are_counted(detection, coco):
    coco.train["annotations"] += [dict(coco.train["annotations"][0]), {**coco.train["annotations"][0], "image_id": 11}]
    train, _, account = load(detection, coco.write())
    assert [len(row["bbox"]) for row in objects_of(train)] == [1, 2]
    assert account.data.left_out.counts == {"annotations that are listed twice": 1}
    assert "1 annotations have the id of another one, such as annotation 1; all are used" in account.warnings[0]


def test_file_names_with_folders_and_backslashes_are_found(detection, coco):
    (coco.root / "train2017" / "a").mkdir()
    (coco.root / "train2017" / "0.png").rename(coco.root / "train2017" / "a" / "0.png")
    coco.train["images"][0]["file_name"] = "a\\0.png"
    coco.train["images"][1]["file_name"] = str(coco.root / "train2017" / "1.png")
    coco.val["images"][0]["file_name"] = "val2017/0.png"  # relative to the whole data set
    train, evaluation, account = load(detection, coco.write())
    assert len(train) == len(evaluation) == 2 and not account.data.left_out


def test_images_without_entry_are_counted(detection, coco):
    Image.new("RGB", SIZE).save(coco.root / "train2017" / "more.png")
    (coco.root / "val2017" / "notes.txt").write_text("")
    _, _, account = load(detection, coco.write())
    counts = account.data.left_out.counts
    assert counts == {"images that no annotation file names": 1, "with the ending .txt": 1}


def test_splits_share_one_image_folder(detection, coco):
    """Images of the other split and of an unused split do not count as left out."""
    images = coco.root / "images"
    images.mkdir()
    for split in ("train2017", "val2017"):
        for i in range(2):
            (coco.root / split / f"{i}.png").rename(images / f"{split}_{i}.png")
            coco.content[split]["images"][i]["file_name"] = f"{split}_{i}.png"
    Image.new("RGB", SIZE).save(images / "test.png")
    coco.content["test"] = {
        "images": [{"id": 1, "file_name": "test.png"}], "annotations": [], "categories": [{"id": 1, "name": "ant"}],
    }  # fmt: skip
    _, _, account = load(detection, coco.write(), train_images="images", eval_images="images")
    assert not account.data.left_out and account.classes == ["ant", "cat", "dog"]
    assert "annotations/instances_test.json (1 images) is not used" in account.data.layout


def test_categories_numbered_differently_are_matched_by_name(detection, coco):
    """By their ids, the cats of the evaluation would be the dogs of the training."""
    coco.val["categories"] = [{"id": 3, "name": "dog"}, {"id": 4, "name": "cow"}]
    train, evaluation, account = load(detection, coco.write())
    assert sorted(account.classes) == ["cat", "cow", "dog"]
    names = [[account.classes[c] for c in row["category"]] for row in objects_of(train) + objects_of(evaluation)]
    assert names == [["cat"], ["dog"], ["dog"], ["cow"]]
    assert "the category id 3 is cat and dog in different annotation files" in account.warnings[0]
    assert account.parts["evaluation"].counts["cat"] == 0


def test_categories_of_same_name_stay_separate(detection, coco):
    for content in coco.content.values():
        content["categories"] = [{"id": 4, "name": "cat"}, {"id": 3, "name": "cat"}]
    _, _, account = load(detection, coco.write())
    assert account.classes == ["cat (3)", "cat (4)"]


def test_roboflow_folder_without_valid_is_evaluated_on_test(detection, coco):
    for old, new in (("train2017", "train"), ("val2017", "test")):
        folder = (coco.root / old).rename(coco.root / new)
        (folder / "_annotations.coco.json").write_text(json.dumps(coco.content[old]))
    train, evaluation, account = load(detection, coco.root)
    assert len(train) == len(evaluation) == 2 and not account.data.left_out
    assert "evaluated on test/_annotations.coco.json" in account.data.layout
    with pytest.raises(ValueError, match=r"--eval_split valid is not a split of .* has test, train"):
        load(detection, coco.root, eval_split="valid")
    with pytest.raises(ValueError, match="both trained and evaluated on"):
        load(detection, coco.root, eval_split="train")


def test_flags_without_effect_are_refused(detection, coco):
    with pytest.raises(
        ValueError, match="--train_annotations is for COCO annotations in a folder; --dataset digits has none"
    ):
        load(detection, "digits", train_annotations="a.json")
    with pytest.raises(ValueError, match="--train_images is for COCO annotations in a folder"):
        load(detection, coco.root, train_images="train2017")
    with pytest.raises(ValueError, match="--image_column is for data sets with columns"):
        load(detection, coco.write(), image_column="photo")


def test_folder_without_annotations_names_expected_files(detection, tmp_path):
    Image.new("RGB", SIZE).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"1 images, but no metadata.csv.*annotations/instances_\*\.json"):
        load(detection, tmp_path)


def test_program_ends_with_one_line(detection, coco, monkeypatch):
    coco.val["annotations"] = None
    monkeypatch.setattr("sys.argv", ["object_detection.py", "--dataset", str(coco.write())])
    with pytest.raises(SystemExit, match=r"^error: .*instances_val2017\.json: none of its 0 annotations.*$"):
        runpy.run_path(str(ROOT / "examples" / "object_detection.py"), run_name="__main__")


# ------------------------------------------------------------------------------------------------------- boxes and their images


def test_boxes_outside_image_are_counted(detection, coco):
    coco.train["annotations"][0]["bbox"] = [40, 5, 20, 10]
    coco.train["annotations"][1]["bbox"] = [-1, -1, 50, 34]  # within the tolerance
    coco.val["annotations"] += [{"id": 8, "image_id": 10, "category_id": 3, "bbox": [48, 0, 5, 5]}]
    train, evaluation, account = load(detection, coco.write())
    assert [len(row["bbox"]) for row in objects_of(train) + objects_of(evaluation)] == [1, 1, 1, 1]
    assert account.data.left_out.counts == {"objects outside their image": 1}
    assert len(account.warnings) == 1
    assert account.warnings[0].startswith("1 of 2 images of train have boxes that reach more than 2 pixels beyond")


def test_boxes_as_fractions_are_refused(detection, tmp_path):
    rows = [{"file_name": f"{i}.png", "objects": {"bbox": [[0.1, 0.2, 0.5, 0.5]], "category": [i]}} for i in range(4)]
    with pytest.raises(ValueError, match=r"boxes of train lie between 0 and 1.*pixels were expected"):
        load(detection, write_metadata(tmp_path, rows))


def test_nothing_to_evaluate_on_is_refused(detection, coco):
    for annotation in coco.val["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(
        ValueError, match="evaluation has 2 images, but no objects to evaluate on; 2 left out: 2 crowds"
    ):
        load(detection, coco.write())
    coco.val["annotations"][0]["iscrowd"] = 0
    for annotation in coco.train["annotations"]:
        annotation["bbox"] = None
    with pytest.raises(
        ValueError, match=r"train has 2 images, but no objects to train on; .* 2 objects without a box"
    ):
        load(detection, coco.write())


# ------------------------------------------------------------------------------------------------- metadata and columns of the Hub


def test_categories_are_those_of_all_splits(detection, tmp_path):
    """Names that occur only in the evaluation split or only in an unused split."""
    rows = [
        {"file_name": f"{split}/{i}.png", "objects": {"bbox": [[1, 2, 3, 4]], "category": [name]}}
        for split, names in (("train", "bd"), ("validation", "dcb"), ("test", "a"))
        for i, name in enumerate(names)
    ]
    train, evaluation, account = load(detection, write_metadata(tmp_path, rows))
    assert account.classes == ["a", "b", "c", "d"]
    assert [row["category"] for row in objects_of(train)] == [[1], [3]]
    assert [row["category"] for row in objects_of(evaluation)] == [[3], [2], [1]]


def saved_dataset(folder: Path, splits: dict[str, dict], features: dict[str, object]) -> Path:
    for name, objects in splits.items():
        for i in range(len(objects)):
            Image.new("RGB", SIZE).save(folder / f"{name}{i}.png")
    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"image": [str(folder / f"{name}{i}.png") for i in range(len(objects))], "objects": objects},
                features=datasets.Features({"image": datasets.Image(), "objects": features[name]}),
            )
            for name, objects in splits.items()
        }
    ).save_to_disk(folder / "saved")
    return folder / "saved"


def test_class_labels_numbered_differently_are_matched_by_name(detection, tmp_path):
    boxes = datasets.List(datasets.List(datasets.Value("float32")))
    features = {
        name: {"bbox": boxes, "category": datasets.List(datasets.ClassLabel(names=names))}
        for name, names in (("train", ["cat", "dog"]), ("test", ["dog", "cow"]))
    }
    objects = [{"bbox": [[1, 2, 3, 4]], "category": [i]} for i in range(2)]
    folder = saved_dataset(tmp_path, {"train": objects, "test": objects}, features)
    train, evaluation, account = load(detection, folder)
    assert account.classes == ["cat", "dog", "cow"]
    assert [row["category"] for row in objects_of(train) + objects_of(evaluation)] == [[0], [1], [1], [2]]


def test_objects_as_list_of_dictionaries_are_read(detection, tmp_path):
    kind = datasets.List(
        {"bbox": datasets.List(datasets.Value("int64")), "label": datasets.Value("int64"), "iscrowd": datasets.Value("bool")}
    )  # fmt: skip
    one = {"bbox": [1, 2, 3, 4], "label": 40, "iscrowd": None}
    rows = [[one, None], None, [], [{**one, "label": 7, "iscrowd": True}, {**one, "label": 7}]]
    folder = saved_dataset(tmp_path, {"train": rows, "val": [[one]]}, {"train": kind, "val": kind})
    train, _, account = load(detection, folder)
    assert account.classes == ["7", "40"]
    assert [row["category"] for row in objects_of(train)] == [[1], [], [], [0, 0]]
    assert account.parts["train"].empty == 2 and account.parts["train"].counts == {"7": 1, "40": 1}
    assert account.data.left_out.counts == {"objects without a box": 1, "crowds, not trained on": 1}


def test_objects_as_dictionary_of_lists_are_read(detection, tmp_path):
    """A list of zero areas counts as given; a null or missing list does not."""
    rows = [
        {"bbox": [[1, 2, 3, 4], None], "category": ["a", "b"], "area": [0, 0]},
        {"bbox": [[1, 2, 3, 4]], "category": ["a"], "area": None},
        None,
        {"bbox": None, "category": None},
        {"bbox": [], "category": []},
    ]
    write_metadata(tmp_path, [{"file_name": f"train/{i}.png", "objects": row} for i, row in enumerate(rows)]
                   + [{"file_name": "val/0.png", "objects": rows[1]}])  # fmt: skip
    train, _, account = load(detection, tmp_path)
    assert [row["area"] for row in objects_of(train)] == [[0], [12], [], [], []]
    assert account.classes == ["a", "b"] and account.data.left_out.counts == {"objects without a box": 1}


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [[1, 2, 3, 4]], "category": ["a", "b"]}, "the fields of objects have 1 bbox, 2 category"),
        (
            {"bbox": [[1, 2, 3]], "category": ["a"]},
            r"1\.png: object 0: bbox is \[1.*, 2.*, 3.*\]; four finite numbers",
        ),
        ({"bbox": [[5, 2, 3, 4]], "category": ["a"]}, "1.png: object 0: .*left, top, right, bottom were expected"),
        ({"bbox": [[1, 2, 3, 4]], "category": [None]}, "1.png: object 0: category is None; a category was expected"),
    ],
)
def test_bad_objects_of_row_are_named(detection, tmp_path, objects, message):
    good = {"bbox": [[1, 2, 3, 4]], "category": ["a"]}
    rows = [{"file_name": f"{i}.png", "objects": value} for i, value in enumerate((good, objects, good))]
    with pytest.raises(ValueError, match=message) as error:
        load(detection, write_metadata(tmp_path, rows), box_format="xyxy")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("text", "has no `bbox`, it is Value"),
        ({"boxes": [[1, 2, 3, 4]]}, "has no `bbox`"),
        ({"bbox": [[1, 2, 3, 4]], "kind": ["a"]}, "has no `category`, only bbox, kind"),
    ],
)
def test_columns_without_boxes_are_named(detection, tmp_path, objects, message):
    rows = [{"file_name": f"{i}.png", "objects": objects} for i in range(2)]
    with pytest.raises(ValueError, match=message):
        load(detection, write_metadata(tmp_path, rows))


def test_image_sizes_are_compared_with_metadata(detection, tmp_path):
    objects = {"bbox": [[1, 2, 3, 4]], "category": ["a"]}
    rows = [{"file_name": f"{i}.png", "objects": objects, "width": 48, "height": 32 + i} for i in range(3)]
    with pytest.raises(ValueError, match=r"recorded as 48 x 3[34], but the image is 48 x 32"):
        load(detection, write_metadata(tmp_path, rows))


# ----------------------------------------------------------------------------------------------------------- batches of images


def test_truncated_image_is_named_by_worker_too(detection, programs, coco):
    for split, content in coco.content.items():
        file = coco.root / split / "1.jpg"
        Image.effect_noise(SIZE, 80).save(file)
        file.write_bytes(file.read_bytes()[:-300])
        content["images"][1]["file_name"] = "1.jpg"
    train, evaluation, _ = load(detection, coco.write())
    processor = detection.HEADS["rt_detr"].processor(size={"height": 32, "width": 32})
    transform = detection.training_transform(detection.DetectionDataArguments(dataset="a"))
    for part in (programs.common.RandomlyTransformed(train, transform, 0), evaluation):
        loader = torch.utils.data.DataLoader(part, 2, collate_fn=detection.Collate(processor), num_workers=1)
        with pytest.raises(ValueError, match=r"1\.jpg cannot be read as an image"):
            next(iter(loader))


def test_every_image_mode_is_processed_in_batches_of_any_size(detection, coco):
    """Grey, transparent, CMYK and 16-bit images; boxes refer to the images, with and without padding."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (32, 48, 4), dtype=np.uint8)
    kinds = {
        "0.png": Image.fromarray(pixels), "1.png": Image.fromarray(pixels[..., 0]),
        "2.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "3.jpg": Image.fromarray(pixels, "CMYK"),
        "4.png": Image.fromarray(pixels[..., :3]).convert("P"), "5.png": Image.fromarray(pixels[:, :30, :3]),
    }  # fmt: skip
    for name, image in kinds.items():
        image.save(coco.root / "val2017" / name)
    coco.val["images"] = [{"id": i, "file_name": name} for i, name in enumerate(kinds)]
    coco.val["annotations"] = [{"image_id": i, "category_id": 3, "bbox": [4, 5, 20, 10]} for i in range(6)]
    _, evaluation, _ = load(detection, coco.write())
    for head in detection.HEADS.values():
        processor = head.processor(**detection._processor_fields(head, 64))
        collate = detection.Collate(processor)
        for examples in ([evaluation[0]], [evaluation[5]], [evaluation[i] for i in range(6)]):
            batch = collate(examples)
            assert batch["pixel_values"].shape[:2] == (len(examples), 3) and batch["pixel_values"].isfinite().all()
            for row, label in enumerate(batch["labels"]):
                height, width = label["orig_size"].tolist()
                assert (width, height) == detection.read_image(examples[row]["image"]).size
                mask = batch.get("pixel_mask")
                frame = torch.tensor(batch["pixel_values"].shape[:1:-1], dtype=torch.float32)
                of_padded = mask is not None and not isinstance(
                    processor, detection.InternImageDetectionImageProcessor
                )
                inside = torch.stack([mask[row, 0].sum(), mask[row, :, 0].sum()]) if of_padded else frame
                centre = label["boxes"][0, :2] * frame / inside * torch.tensor([width, height])
                torch.testing.assert_close(centre, torch.tensor([14.0, 10.0]), atol=0.1, rtol=0)


def test_random_crops_and_flips_keep_boxes_on_objects(detection):
    """A bright rectangle stays inside its box; only crops drop objects, those that they show too little of."""
    rng = np.random.default_rng(0)
    arguments = detection.DetectionDataArguments(dataset="a", color_jitter=False, random_crop_scale=0.4)
    transform = detection.training_transform(arguments)
    whole = detection.training_transform(detection.DetectionDataArguments(dataset="a", random_crop_scale=1))
    kept = changed = 0
    for seed in range(150):
        width, height = rng.integers(8, 90, 2).tolist()
        x0, x1 = sorted(rng.choice(width + 1, 2, replace=False).tolist())
        y0, y1 = sorted(rng.choice(height + 1, 2, replace=False).tolist())
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[y0:y1, x0:x1] = 255
        box = [float(x0 - 1.5 * (x0 == 0)), float(y0), x1 - x0 + 1.5 * (x0 == 0), y1 - y0 + 1.5 * (y1 == height)]
        objects = {"bbox": [box], "category": [3], "area": [1.0], "iscrowd": [0]}
        example = {"image": Image.fromarray(pixels), "name": "it", "image_id": 0, "objects": objects}
        result = transform(example, seed)
        ys, xs = np.nonzero(np.asarray(result["image"])[..., 0])
        changed += result["image"].size != (width, height)
        for x, y, w, h in result["objects"]["bbox"]:
            kept += 1
            found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose([x, y, x + w, y + h], found, atol=0.01)
        if not result["objects"]["bbox"]:
            assert len(ys) < 0.31 * (x1 - x0) * (y1 - y0) + 1
        assert len(whole(example, seed)["objects"]["bbox"]) == 1
    assert kept > 100 and changed > 30


@pytest.mark.parametrize("head", ["rt_detr", "deformable_detr", "detr", "dino", "mask_rcnn", "cascade"])
def test_small_images_train_in_batches_of_one(detection, head):
    fewest = {"deformable_detr": {"two_stage_num_proposals": 3}}.get(head, {})
    if head in ("rt_detr", "dino"):
        fewest = {"num_queries": 3}
    flags = detection.DetectionModelArguments(head=head, head_config_overrides=json.dumps(fewest))
    if head == "rt_detr":
        with pytest.raises(ValueError, match=r"--image_size 90 is not a multiple of 32, .*; 96 is"):
            detection.build_model(flags, ["a"], 90)
    model, processor = detection.build_model(flags, ["a"], 64 if head == "rt_detr" else 32)
    objects = {"bbox": [[4, 5, 20, 10]], "category": [0], "area": [200], "iscrowd": [0]}
    if detection.HEADS[head].masks:
        objects["segmentation"] = [[[4, 5, 24, 5, 24, 15, 4, 15]]]
    for image_objects in (objects, {name: [] for name in objects}):
        example = {"image": Image.new("RGB", SIZE), "name": "it", "image_id": 0, "objects": image_objects}
        loss = model.train()(**detection.Collate(processor)([example])).loss
        loss.backward()
        assert loss.isfinite()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@pytest.mark.parametrize("orientation", ["none", "before", "behind", "xmp behind", "date behind"])
def test_png_header_sizes_equal_decoded_sizes(programs, tmp_path, monkeypatch, orientation):
    """The header suffices unless EXIF data may follow the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "it.png"
    Image.new("RGB", SIZE).save(file, **({"exif": exif} if orientation == "before" else {}))
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    behind = {
        "behind": _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")), "xmp behind": _chunk(b"iTXt", xmp),
        "date behind": _chunk(b"tEXt", b"date:create\0now"),
    }  # fmt: skip
    content = file.read_bytes()
    file.write_bytes(content[:-12] + behind.get(orientation, b"") + content[-12:])
    expected = SIZE if orientation in ("none", "date behind") else SIZE[::-1]
    assert programs.data.open_image(file).size == expected
    if "eXIf" not in str(behind.get(orientation)) and orientation != "xmp behind":
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert programs.data.upright_size(file) == expected
