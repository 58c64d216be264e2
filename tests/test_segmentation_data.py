"""Tests of the segmentation example's input: classes, images and masks, and its messages about unusable ones."""

import importlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from utils import ROOT


sys.path.insert(0, str(ROOT / "examples"))

masks = importlib.import_module("masks")
segmentation = importlib.import_module("semantic_segmentation")
from data import InputError, run_program  # noqa: E402


def picture(width=12, height=8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask(*values: int, width=12, height=8, dtype=np.uint8) -> Image.Image:
    """Returns a mask with a stripe per value."""
    return Image.fromarray(np.tile(np.resize(np.array(values, dtype=dtype), width), (height, 1)))


def folder(root, train: list, validation: list | None = None, ending="png"):
    """Writes `images/SPLIT/N.png` and `annotations/SPLIT/N.png`; without a validation split, no folders of splits."""
    splits = {"": train} if validation is None else {"training": train, "validation": validation}
    for split, annotations in splits.items():
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number, annotation in enumerate(annotations):
            image = annotation if isinstance(annotation, Image.Image) else mask(*annotation)
            picture(*image.size).save(root / "images" / split / f"{number}.png")
            image.save(root / "annotations" / split / f"{number}.{ending}")
    return root


def load(root, **flags):
    data = segmentation.SegmentationDataArguments(dataset=str(root), **flags)
    return segmentation.load_data_and_account(data, seed=0)


def refused(root, **flags) -> str:
    with pytest.raises(InputError) as error:
        load(root, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------- values and classes


def test_binary_masks_have_two_classes(tmp_path):
    root = folder(tmp_path, [[0, 255], [0, 255], [0]])
    message = refused(root)
    assert "0 (in 3 masks), 255 (in 2 masks, ignored), 1 class; at least two classes were expected" in message
    assert "give --mask_values 0 255" in message
    assert "--mask_values 0 255" in refused(root, ignore_index=-1)  # 256 classes, of which 254 are empty
    train, evaluation, account = load(root, mask_values=["0", "255"])
    assert account.classes == ["value 0", "value 255"]
    found = {value for part in (train, evaluation) for row in part for value in np.unique(row["mask"])}
    assert found == {0, 1}
    (root / "id2label.json").write_text('{"0": "background", "1": "road"}')
    assert "--mask_values 0 255" in refused(root)
    assert load(root, mask_values=["0", "255"])[2].classes == ["background", "road"]


def test_mask_values_with_gaps_are_named_and_can_be_mapped(tmp_path):
    root = folder(tmp_path, [[0, 50, 100], [0, 100, 255]])
    message = refused(root)
    assert "the values 0, 50, 100, by which 98 of 101 classes would be empty" in message
    assert "--mask_values 0 50 100" in message
    train, evaluation, account = load(root, mask_values=["0", "100", "50"])
    assert account.classes == ["value 0", "value 100", "value 50"]
    stripes = {tuple(row["mask"][0, :3]) for part in (train, evaluation) for row in part}
    assert stripes == {(0, 2, 1), (0, 1, 255)}
    message = refused(root, mask_values=["0", "100"])
    assert "0.png: a mask has the value 50; 0, 100 of --mask_values, or 255 for pixels to ignore" in message
    assert load(root, mask_values=["0", "100"], ignore_other_values=True)[2].classes == ["value 0", "value 100"]


def test_few_classes_without_mask_are_warning(tmp_path):
    account = load(folder(tmp_path, [[0, 1], [3]]))[2]
    assert account.classes == [f"class {i}" for i in range(4)]
    assert "1 of 4 classes are in no mask: class 2" in account.warnings


@pytest.mark.parametrize("flags", [{}, {"reduce_labels": True}, {"ignore_index": 1}])
def test_single_class_is_refused(tmp_path, flags):
    assert "at least two classes were expected" in refused(
        folder(tmp_path, [[0, 1]] if flags else [[0], [0]]), **flags
    )


def test_split_without_any_class_is_refused(tmp_path):
    root = folder(tmp_path, [[0, 1]], [[255], [255]])
    assert "all pixels of the 2 masks of evaluation are ignored" in refused(root)


def test_class_only_in_validation_masks_is_class(tmp_path):
    root = folder(tmp_path, [[0, 1], [1, 255], [255]], [[0, 2]])
    train, evaluation, account = load(root)
    assert account.classes == ["class 0", "class 1", "class 2"]
    assert account.parts["train"].counts == {"class 0": 1, "class 1": 2, "class 2": 0}
    assert account.parts["evaluation"].counts == {"class 0": 1, "class 1": 0, "class 2": 1}
    assert "1 classes are in masks to evaluate, but in none to train: class 2" in account.warnings
    assert any("to train, but in none to evaluate" in text and text.endswith("class 1") for text in account.warnings)
    assert any("all pixels of 1 masks of train are ignored" in text and "2.png" in text for text in account.warnings)
    assert "3 images; masks per class: class 0 1, class 1 2; none of class 2" in str(account)
    assert set(np.unique(evaluation[0]["mask"])) == {0, 2} and len(train) == 3


def test_classes_of_unused_split_count(tmp_path):
    root = folder(tmp_path, [[0, 1]], [[0, 1]])
    for kind in ("images", "annotations"):
        (root / kind / "test").mkdir()
        shutil.copy(root / kind / "training" / "0.png", root / kind / "test" / "0.png")
    mask(0, 2, 1).save(root / "annotations" / "test" / "0.png")
    account = load(root)[2]
    assert len(account.classes) == 3 and "the split test (1 images) is not used" in account.data.layout


@pytest.mark.parametrize("split", ["training", "validation"])
def test_names_are_checked_against_masks_of_all_splits(tmp_path, split):
    root = folder(tmp_path, [[0, 1], [1]], [[0, 1]])
    (root / "id2label.json").write_text('{"0": "sky", "1": "sea"}')
    assert load(root)[2].classes == ["sky", "sea"]
    wrong = root / "annotations" / split / "0.png"
    mask(0, 7).save(wrong)
    message = refused(root)
    assert f"{wrong}: a mask has the class 7, but there are 2 classes; 0 to 1 for the 2 classes, or 255" in message
    assert message.endswith(f"1 masks of {root} have such values, 7")
    mask(1, 2, 0).save(wrong)
    assert load(root, reduce_labels=True)[2].classes == ["sky", "sea"]  # 1 and 2
    mask(3, 1).save(wrong)
    assert "1 to 2 for the 2 classes, or 0, or 255 for pixels to ignore, were expected" in refused(
        root, reduce_labels=True
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "holds a list"),
        ('{"a": "b"}', "the entry 'a': 'b'"),
        ('{"0": "a", "1": 2}', "the entry '1': 2"),
        ('{"0": "a", "2": "b"}', "has the numbers 0, 2"),
        ('{"0": "a"}', "has the numbers 0"),
    ],
)
def test_invalid_file_of_names_is_refused(tmp_path, content, message):
    root = folder(tmp_path, [[0, 1], [1]])
    (root / "names.json").write_text(content)
    found = refused(root, id2label=str(root / "names.json"))
    assert message in found and "names.json" in found and "numbered from 0 without gaps" in found


def test_name_of_ignored_value_is_no_class(tmp_path):
    root = folder(tmp_path, [[0, 1, 255], [1]])
    (root / "id2label.json").write_text('{"0": "sky", "1": "sea", "255": "void"}')
    assert load(root)[2].classes == ["sky", "sea"]
    assert "names.json cannot be read" in refused(root, id2label=str(root / "names.json"))


def test_mask_modes_with_defined_values_are_read(tmp_path):
    palette = mask(0, 1, 2).convert("P")
    palette.putdata(list(mask(0, 1, 2).get_flattened_data()))
    grey_rgb, opaque = (mask(0, 1, 2).convert(mode) for mode in ("RGB", "RGBA"))
    deep = mask(0, 1, 300, dtype=np.uint16)
    bits = Image.fromarray(np.asarray(mask(0, 1)).astype(bool))
    with_alpha = mask(0, 1, 2).convert("LA")
    assert [i.mode for i in (palette, deep, bits, with_alpha)] == ["P", "I;16", "1", "LA"]
    for number, image in enumerate((palette, grey_rgb, opaque, with_alpha)):
        train, _, account = load(folder(tmp_path / str(number), [image, image]))
        assert len(account.classes) == 3
        assert np.array_equal(train[0]["mask"], np.asarray(mask(0, 1, 2))), image.mode
    assert load(folder(tmp_path / "bits", [bits, bits]))[2].classes == ["class 0", "class 1"]
    train, _, account = load(folder(tmp_path / "deep", [deep, deep]), mask_values=["0", "1", "300"])
    assert set(np.unique(train[0]["mask"])) == {0, 1, 2}
    many = [mask(*range(start, start + 96), width=96, height=1, dtype=np.uint16) for start in range(0, 288, 96)]
    root = folder(tmp_path / "many", [*many, *many], [many[0]])
    assert (
        "the value 255 of 2 masks is ignored (--ignore_index), though larger ones are classes"
        in load(root)[2].warnings
    )
    train, _, account = load(root, ignore_index=-1)
    assert len(account.classes) == 288 and train[2]["mask"].dtype == np.uint16
    assert np.array_equal(train[2]["mask"], np.asarray(many[2]))
    arguments = segmentation.SegmentationDataArguments(min_scale=0.5, max_scale=0.5)
    changed = segmentation.training_transform(arguments, 64, 64, masks.ignored_label(288))(train[2], 0)["mask"]
    assert changed.shape == (64, 64) and set(np.unique(changed)) <= {*range(192, 288), 65535}


def test_colour_masks_need_list_of_colours(tmp_path):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255]], dtype=np.uint8)
    coded = Image.fromarray(colours[np.asarray(mask(0, 1, 2))])
    palette = coded.quantize(4)
    assert palette.mode == "P"
    root = folder(tmp_path, [coded, palette, coded])
    message = refused(root)
    assert (
        "0.png has colours (mode RGB), such as #ff0000" in message
        and "--mask_values with the classes' colours" in message
    )
    train, evaluation, account = load(root, mask_values=["#000000", "#ff0000", "#0080ff"])
    for part in (train, evaluation):
        for row in part:
            assert np.array_equal(row["mask"], np.asarray(mask(0, 1, 2)))
    assert account.classes == ["value #000000", "value #ff0000", "value #0080ff"]
    blue = Image.fromarray(np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], dtype=np.uint8)[np.asarray(mask(0, 1, 2))])
    blues = folder(
        tmp_path.with_name(f"{tmp_path.name}_blue"), [blue, blue]
    )  # the colour is 255 as a number, but is not ignored
    assert "the value #0000ff" in refused(blues, mask_values=["#000000", "#ff0000"])
    assert "the value #0080ff; #000000, #ff0000 of --mask_values were expected" in refused(
        root, mask_values=["#000000", "#ff0000"]
    )


def test_masks_without_defined_values_are_refused(tmp_path):
    transparent = mask(0, 1).convert("RGBA")
    transparent.putpixel((3, 3), (1, 1, 1, 0))
    real = Image.fromarray(np.zeros((8, 12), dtype=np.float32))
    for name, image, ending, message in (
        ("transparent", transparent, "png", "0.png has transparent pixels (mode RGBA)"),
        ("real", real, "tif", "0.tif has values that are not whole numbers from 0 to 65535 (mode F)"),
        ("ink", mask(0, 1).convert("CMYK"), "tif", "0.tif has the mode CMYK"),
    ):
        assert message in refused(folder(tmp_path / name, [image, image], ending=ending))


def test_jpeg_masks_are_refused(tmp_path):
    wide = mask(0, 1, 2, 3, width=24, height=16)
    root = folder(tmp_path, [wide, wide], ending="jpg")
    message = refused(root)
    assert (
        "2 of the 2 masks of the split train are JPEG files, which do not keep values" in message
        and "0.jpg" in message
    )
    assert "JPEG changes values, PNG does not" in refused(root, mask_values=["0", "255"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ignore_index": 300}, "--ignore_index must be 0 to 255, or 65535, or -1"),
        ({"mask_values": ["1"]}, "at least two different values"),
        ({"mask_values": ["1", "1"]}, "at least two different values"),
        ({"mask_values": ["1", "x"]}, "got 'x'"),
        ({"mask_values": ["1", "#00ff00"]}, "got '1'"),
        ({"mask_values": ["#0f0", "#00ff00"]}, "got '#0f0'"),
        ({"mask_values": ["0", "1"], "reduce_labels": True}, "--reduce_labels contradicts --mask_values"),
        ({"ignore_other_values": True}, "--ignore_other_values is for masks whose classes --mask_values lists"),
        ({"mask_column": "image"}, "--image_column and --mask_column are both image"),
    ],
)
def test_contradictory_flags_are_refused(tmp_path, flags, message):
    assert message in refused(folder(tmp_path, [[0, 1], [1]]), **flags)


# -------------------------------------------------------------------------------------------------------------- files and pairs


def test_sizes_of_all_pairs_are_compared(tmp_path):
    root = folder(tmp_path, [[0, 1], [0, 1], [1]], [[0, 1]])
    mask(0, 1, width=6).save(root / "annotations" / "training" / "1.png")
    message = refused(root)
    assert "1 of the 3 masks of the split training have another size than their images" in message
    assert "annotations/training/1.png with 6x8 for " in message and "images/training/1.png with 12x8" in message
    mask(0, 1).save(root / "annotations" / "training" / "1.png")
    mask(0, 1, width=8, height=12).save(root / "annotations" / "validation" / "0.png")
    assert "1 of the 1 masks of the split validation have another size" in refused(root)


def test_image_rotated_by_exif_needs_rotated_mask(tmp_path):
    root = folder(tmp_path, [[0, 1], [0, 1]])

    def turn(image: Image.Image, orientation: int):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(root / "images" / "0.png", exif=exif)

    turn(picture(), 6)
    message = refused(root)
    assert (
        "0.png with 12x8 for" in message
        and "with 8x12 (width x height), which is turned upright by its EXIF" in message
    )
    mask(0, 1, width=8, height=12).save(root / "annotations" / "0.png")
    train, evaluation, account = load(root)
    assert account.warnings == []
    for row in (*train, *evaluation):
        assert row["mask"].shape == row["image"].size[::-1]
    turn(picture(), 3)  # rotated by 180 degrees: the sizes stay equal
    mask(0, 1).save(root / "annotations" / "0.png")
    assert any("images with an EXIF orientation" in text and "0.png" in text for text in load(root)[2].warnings)


def test_unpaired_files_are_counted_and_named(tmp_path):
    root = folder(tmp_path, [[0, 1], [0, 1], [1]], [[0, 1]])
    (root / "images" / "training" / "x.heic").write_bytes(b"")
    (root / "images" / "training" / ".hidden.png").write_bytes(b"")
    (root / "annotations" / "training" / "polygons.xml").write_text("")
    (root / "readme.txt").write_text("")
    mask(0, 1).save(root / "annotations" / "training" / "alone.png")
    picture().save(root / "overview.png")
    picture().save(root / "images" / "overview.png")
    (root / "images" / "testing").mkdir()
    picture().save(root / "images" / "testing" / "0.png")
    (root / "id2label.json").write_text('{"0": "sky", "1": "sea"}')
    train, evaluation, account = load(root)
    assert (len(train), len(evaluation)) == (3, 1)
    counts = dict(account.data.left_out.counts)
    heic = counts.pop("with the ending .heic", None)
    assert counts == {
        "hidden": 1,
        "with the ending .xml": 1,
        "with the ending .txt": 1,
        "masks without an image": 1,
        "beside the folders of images and masks": 1,
        "beside the folders of the splits": 1,
        "in a split without masks": 1,
    }
    assert heic == 1
    assert "annotations/training/alone.png" in str(account)


def test_image_without_mask_names_expected_mask(tmp_path):
    root = folder(tmp_path, [[0, 1], [0, 1], [1]], [[0, 1]])
    (root / "annotations" / "training" / "1.png").rename(root / "annotations" / "training" / "1_mask.png")
    message = refused(root)
    assert "1 of the 3 images of the split training have no mask, the first is " in message
    assert (
        f"{root}/images/training/1.png: {root}/annotations/training/1.png, or that name with another ending" in message
    )
    assert "there are masks such as" in message and "1_mask.png" in message
    for file in (root / "annotations").rglob("[0-9].png"):
        file.rename(file.with_name(f"{file.stem}_labelIds.png"))
    message = refused(root)
    assert "3 of the 3 images" in message and "_labelIds.png" in message


def test_ambiguous_names_are_refused(tmp_path):
    root = folder(tmp_path / "masks", [[0, 1], [0, 1]])
    mask(0, 1).save(root / "annotations" / "0.bmp")
    message = refused(root)
    assert "annotations/0.bmp and " in message and "it is not clear which mask belongs to images/0.png" in message
    root = folder(tmp_path / "images", [[0, 1], [0, 1]])
    picture().save(root / "images" / "0.jpg")
    message = refused(root)
    assert "images/0.jpg and " in message and "which image belongs to annotations/0.png" in message
    (root / "images" / "0.jpg").unlink()
    for ending in ("png", "bmp"):
        mask(0, 1).save(root / "annotations" / f"alone.{ending}")
    assert load(root)[2].data.left_out.counts == {"masks without an image": 2}


def test_folder_layouts_are_recognised(tmp_path):
    """Upper-case endings, subfolders of splits, splits above or below, `masks` beside COCO's `annotations`."""
    cities = tmp_path / "cities"
    for split in ("train", "val"):
        for city in ("aachen", "bonn"):
            for kind, image in (("images", picture()), ("masks", mask(0, 1))):
                (cities / kind / split / city).mkdir(parents=True)
                image.save(cities / kind / split / city / "0.PNG")
    (cities / "annotations").mkdir()
    (cities / "annotations" / "instances.json").write_text("{}")
    train, evaluation, account = load(cities)
    assert (len(train), len(evaluation)) == (
        2,
        2,
    ) and "the folders train, val are taken for splits" in account.data.layout
    assert sum(map(len, load(cities, train_split="all")[:2])) == 4
    assert len(load(cities, train_split="val", eval_split="train")[0]) == 2
    above = tmp_path / "above"
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (above / split).mkdir(parents=True, exist_ok=True)
            shutil.copytree(cities / kind / split, above / split / kind)
    assert [len(part) for part in load(above)[:2]] == [2, 2]


def test_metadata_pairs_images_with_masks(tmp_path):
    root = folder(tmp_path, [[0, 1], [0, 1], [0, 2]])
    rows = [{"file_name": f"images/{i}.png", "annotation_file_name": f"annotations/{2 - i}.png"} for i in range(3)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "id2label.json").write_text('{"0": "a", "1": "b", "2": "c"}')
    train, evaluation, account = load(root)
    assert len(train) + len(evaluation) == 3 and account.classes == ["a", "b", "c"] and not account.data.left_out
    (root / "metadata.jsonl").write_text('{"file_name": "images/0.png", "caption": "x"}')
    train, evaluation, account = load(root)  # the metadata holds captions: masks are found by their images' names
    assert len(train) + len(evaluation) == 3
    assert account.data.left_out.counts == {"without the column annotation": 1}
    shutil.rmtree(root / "annotations")
    assert "--mask_column" in refused(root) or "images and of masks" in refused(root)


def test_folders_without_masks_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    picture().save(tmp_path / "photos" / "a.png")
    message = refused(tmp_path)
    assert "has 1 images, but not in folders of images and of masks: images/train/ and annotations/train/" in message
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks" / "a.npy", np.zeros((8, 12)))
    assert "2 left out: 1 with the ending .npy (masks/a.npy); 1 beside" in refused(tmp_path)


def test_broken_files_are_named(tmp_path):
    root = folder(tmp_path, [[0, 1], [0, 1]], [[0, 1]])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    for file in (root / "images" / "training").iterdir():
        file.unlink()
    for number in range(2):
        (root / "images" / "training" / f"{number}.jpg").write_bytes(buffer.getvalue()[: -len(buffer.getvalue()) // 2])
        mask(0, 1, width=200, height=200).save(root / "annotations" / "training" / f"{number}.png")
    train, *_ = load(root)
    loader = torch.utils.data.DataLoader(train, batch_size=1, num_workers=1, collate_fn=lambda rows: rows)
    with pytest.raises(InputError) as error:
        next(iter(loader))
    assert "images/training/0.jpg cannot be read as an image" in str(error.value).splitlines()[-1]
    broken = root / "annotations" / "validation" / "0.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    assert f"{broken} cannot be read as an image" in refused(root)


def test_dataset_rows_without_mask_are_refused(tmp_path):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "annotation": datasets.Image(), "text": datasets.Value("string")}
    )
    rows = {"image": [picture()] * 3, "annotation": [mask(0, 1), mask(1, 2), None], "text": ["", "", ""]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": whole.select([0, 1]), "test": whole.select([0]), "hidden": whole}).save_to_disk(
        tmp_path
    )
    train, evaluation, account = load(tmp_path)
    assert (len(train), len(evaluation)) == (2, 1) and len(account.classes) == 3
    message = refused(tmp_path, train_split="hidden")
    assert "1 of the 3 masks of the split hidden are missing (null), the first is that of row 2" in message
    assert "has the type Value('string')" in refused(tmp_path, mask_column="text")


# ------------------------------------------------------------------------------------------------------- training, evaluation


def small_model(head: str, labels: int = 2):
    arguments = segmentation.SegmentationModelArguments(head=head)
    data = segmentation.SegmentationDataArguments(image_size=32)
    return segmentation.build_model(arguments, data, [f"class {i}" for i in range(labels)])


def trainer_of(head: str, tmp_path, rows: list[dict], **flags):
    programs_common = importlib.import_module("common")
    model, processor = small_model(head)
    transform = segmentation.training_transform(segmentation.SegmentationDataArguments(), 32, 32)
    arguments = segmentation.SegmentationTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, learning_rate=1e-3, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False, logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, **flags,
    )  # fmt: skip
    return segmentation.SegmentationTrainer(
        model=model,
        args=arguments,
        train_dataset=programs_common.RandomlyTransformed(rows, transform, 0),
        eval_dataset=[{**row, "full_mask": torch.from_numpy(row["mask"].astype(np.int64))} for row in rows],
        data_collator=segmentation.Collate(processor),
        compute_metrics=segmentation.segmentation_metrics,
        processing_class=processor,
    )


@pytest.mark.parametrize("head", ["upernet", "mask2former"])
def test_batch_of_one_and_ignored_masks_train(tmp_path, head):
    """UperNet's BatchNorm gets one value per channel, and the loss is a mean over no pixels."""
    classes = np.asarray(mask(0, 1, width=40, height=40))
    rows = [{"image": picture(40, 40), "mask": classes if i != 1 else np.full_like(classes, 255)} for i in range(3)]
    trainer = trainer_of(
        head, tmp_path, rows, per_device_train_batch_size=1, per_device_eval_batch_size=1, max_steps=3
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())
    metrics = trainer.evaluate()
    assert np.isfinite([metrics["eval_loss"], metrics["eval_mean_iou"]]).all()


def test_last_image_joins_a_batch(tmp_path):
    rows = [{"image": picture(40, 40), "mask": np.asarray(mask(0, 1, width=40, height=40))} for _ in range(3)]
    trainer = trainer_of("upernet", tmp_path, rows, per_device_train_batch_size=2, num_train_epochs=1)
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [2, 2]
    assert np.isfinite(trainer.train().training_loss)


def test_more_classes_than_queries_is_warning(tmp_path):
    train, _, account = load(folder(tmp_path, [[0, 1], [0, 1, 2, 255]], [[0]]))
    model, _ = small_model("mask2former", 3)
    rules = masks.MaskRules()
    assert segmentation.check_queries(model, train, rules) == []
    model.config.num_queries = 2
    assert (
        "1 masks to train have more classes, 3 at most, than the head has queries, 2"
        in segmentation.check_queries(model, train, rules)[0]
    )
    assert segmentation.check_queries(small_model("upernet", 3)[0], train, rules) == []
    assert account.classes == ["class 0", "class 1", "class 2"]


def test_classes_of_same_name_are_counted_separately(tmp_path):
    root = folder(tmp_path, [[0, 1], [1, 2]], [[0]])
    (root / "id2label.json").write_text('{"0": "door", "1": "sky", "2": "door"}')
    assert load(root)[2].parts["train"].counts == {"door (0)": 1, "sky": 2, "door (2)": 1}


def test_mask_of_one_value_is_normalised_as_in_evaluation():
    norm = segmentation.OneValueBatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    one, many = torch.randn(1, 3, 1, 1), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(norm(one), norm.eval()(one))
    assert norm.num_batches_tracked == 0
    norm.train()
    torch.testing.assert_close(norm(many), torch.nn.BatchNorm2d(3)(many))


def test_evaluation_counts_at_mask_sizes(tmp_path):
    """Masks of different sizes in a batch; classes without pixels are left out of the mean."""
    rows = []
    for width, height in ((40, 24), (20, 64)):
        rows.append({"image": picture(width, height), "mask": np.asarray(mask(0, 1, 255, width=width, height=height))})
    trainer = trainer_of("upernet", tmp_path, rows, per_device_eval_batch_size=2)
    prediction = trainer.predict(trainer.eval_dataset)
    areas = prediction.predictions.sum(0)
    assert areas[1].sum() == sum((row["mask"] != 255).sum() for row in rows) == areas[2].sum()
    # the expected values, one image at a time
    right = 0
    for row in rows:
        batch = trainer.data_collator([row])
        with torch.no_grad():
            logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
        full = torch.nn.functional.interpolate(logits, row["mask"].shape, mode="bilinear")[0].argmax(0).numpy()
        right += (full == row["mask"])[row["mask"] != 255].sum()
    assert areas[0].sum() == right


def test_resized_masks_equal_pillow(tmp_path):
    rng = np.random.default_rng(0)
    for height, width, size in ((37, 50, (64, 32)), (64, 64, (32, 32)), (5, 9, (20, 13))):
        values = rng.integers(0, 200, (height, width), dtype=np.uint8)
        expected = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
        assert np.array_equal(segmentation.resized(values, size[1], size[0]), expected)
    _, processor = small_model("mask2former")
    row = {"image": picture(), "mask": np.asarray(mask(0, 1, 255))}
    batch = segmentation.Collate(processor)([row, {**row, "mask": np.full_like(row["mask"], 255)}])
    assert batch["class_labels"][0].tolist() == [0, 1] and batch["class_labels"][1].tolist() == []
    assert batch["mask_labels"][0].shape == (2, 32, 32) and batch["mask_labels"][1].shape == (0, 32, 32)


def test_program_prints_summary_and_one_line_error(tmp_path, capsys):
    root = folder(tmp_path / "data", [[0, 1], [0, 255], [1]], [[0, 1]])
    flags = ["--dataset", root, "--image_size", 32, "--max_steps", 1, "--use_cpu", "--disable_tqdm", "true"]
    flags += ["--output_dir", tmp_path / "out", "--per_device_train_batch_size", 1, "--eval_strategy", "steps"]
    flags = [str(flag) for flag in [*flags, "--save_strategy", "steps", "--picture_samples", 1]]
    segmentation.main(flags)
    printed = capsys.readouterr().out
    assert "classes  2: class 0, class 1" in printed
    assert "train  3 images; masks per class: class 0 2, class 1 2" in printed
    assert "left out  nothing is left out" in printed
    assert printed.index("left out") < printed.index("mean IoU")
    account = json.loads((tmp_path / "out" / "data.json").read_text())
    assert account["parts"]["evaluation"]["per class"] == {"class 0": 1, "class 1": 1}
    (root / "annotations" / "validation" / "0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: segmentation.main(flags))
    assert str(ended.value).startswith(f"error: {root}/annotations/validation/0.png cannot be read as an image")
    assert "\n" not in str(ended.value)
