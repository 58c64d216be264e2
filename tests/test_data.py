"""Tests of the examples' input: every file is used or counted, and messages name the fault."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def data(programs):
    return programs.data


def write(root: Path, *names: str) -> Path:
    """Writes files by name: images for endings of images, text otherwise."""
    rng = np.random.default_rng(0)
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in (".png", ".jpg"):
            Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(file)
        else:
            file.write_text("no image")
    return root


def several(folders: tuple[str, ...], count: int = 3, pattern: str = "{}.png") -> list[str]:
    return [f"{folder}/{pattern.format(i)}" for folder in folders for i in range(count)]


def read(data, root: Path, classes: bool = True, **flags):
    """Returns the class names, the counts per part and class, and the dataset."""
    arguments = data.DataArguments(dataset=str(root), **flags)
    found = data.load_data(arguments, class_folders=classes)
    names = data.encode_labels(found, "label")
    parts = data.train_and_evaluation(found, arguments, 0, "label")
    counts = {}
    for part, split in parts.items():
        data.check_labels(split, "label", part)
        counts[part] = {name: list(split["label"]).count(i) for i, name in enumerate(names)}
    return names, counts, found


# ------------------------------------------------------------------------------------------------------------ class folders


@pytest.mark.parametrize(
    "classes",
    [
        ("bus", "freight_train", "passenger_train", "tram"),
        ("beaker", "test_tube"),
        ("train", "validation"),
        ("Test", "val", "zoo"),
        ("a class", "ünïcode", "#1"),
    ],
)
def test_every_image_of_every_class_is_used(data, tmp_path, classes):
    write(tmp_path, *several(classes, 10))
    names, counts, _ = read(data, tmp_path)
    assert names == sorted(classes)
    assert counts["train"] == dict.fromkeys(names, 8)
    assert counts["evaluation"] == dict.fromkeys(names, 2)


def test_file_names_do_not_define_splits(data, tmp_path):
    write(tmp_path, *several(("a", "b"), 4, "train-{}.png"), *several(("a", "b"), 8, "_DSC{}.JPG"))
    _, counts, found = read(data, tmp_path)
    assert sum(sum(part.values()) for part in counts.values()) == 24
    assert not found.left_out


@pytest.mark.parametrize("evaluation", ["validation", "val", "valid", "dev", "test", "Eval"])
def test_folders_of_class_folders_are_splits(data, tmp_path, evaluation):
    write(
        tmp_path, *several(("training/bus", "training/tram", f"{evaluation}/bus", f"{evaluation}/car")), "more/x/1.png"
    )
    names, counts, found = read(data, tmp_path)
    assert names == ["bus", "car", "tram"]
    assert counts == {"train": {"bus": 3, "car": 0, "tram": 3}, "evaluation": {"bus": 3, "car": 3, "tram": 0}}
    assert "taken for splits" in found.layout and evaluation in found.layout
    assert "1 beside the folders of the splits (more/x/1.png)" in str(found.left_out)


def test_splits_can_be_chosen(data, tmp_path):
    write(tmp_path, *several(("train/bus", "train/tram", "val/bus", "val/tram", "seen/bus", "seen/tram"), 5))
    _, counts, found = read(data, tmp_path, train_split="seen", eval_split="train")
    assert counts == {part: {"bus": 5, "tram": 5} for part in ("train", "evaluation")}
    assert "the split val (10 images) is not used" in found.layout
    names, counts, _ = read(data, tmp_path, train_split="all")
    assert names == ["bus", "tram"]
    assert sum(sum(part.values()) for part in counts.values()) == 30
    with pytest.raises(data.InputError, match="--eval_split holdout is not a split"):
        read(data, tmp_path, eval_split="holdout")


def test_class_with_one_image_stays_in_training(data, tmp_path):
    write(tmp_path, *several(("a", "b"), 5), "c/1.png")
    _, counts, _ = read(data, tmp_path)
    assert counts == {"train": {"a": 4, "b": 4, "c": 1}, "evaluation": {"a": 1, "b": 1, "c": 0}}


@pytest.mark.parametrize(
    "files, message",
    [
        ((*several(("bus", "tram")), "stray.png"), r"stray\.png lies beside the class folders bus, tram"),
        ((*several(("train/a", "train/b")), "train/1.png"), r"train/1\.png lies beside the class folders a, b"),
        (("1.png", "2.png"), "1 other images lie in no class folder"),
        (("a/readme.txt", "b/x.heic"), r"has no images; 2 left out: 1 with the ending \.txt \(a/readme\.txt\)"),
    ],
)
def test_unusable_folder_is_one_line(data, tmp_path, files, message):
    write(tmp_path, *files)
    with pytest.raises(data.InputError, match=message) as raised:
        read(data, tmp_path)
    assert "\n" not in str(raised.value)


def test_unlabelled_test_images_are_skipped_and_counted(data, tmp_path):
    write(tmp_path, *several(("train/a", "train/b", "val/a", "val/b")), "test/1.png", "test/2.png")
    _, counts, found = read(data, tmp_path)
    assert counts["evaluation"] == {"a": 3, "b": 3}
    assert str(found.left_out) == "2 left out: 2 in no class folder (test/1.png, test/2.png)"


def test_files_that_are_no_images_are_counted_with_examples(data, tmp_path):
    write(
        tmp_path,
        *several(("a", "b")),
        *(f"a/{i}.heic" for i in range(5)),
        "b/.hidden.png",
        "__MACOSX/a/._1.png",
        "notes",
    )
    _, _, found = read(data, tmp_path)
    assert str(found.left_out) == (
        "8 left out: 5 with the ending .heic (a/0.heic, a/1.heic, a/2.heic, ...); "
        "2 hidden (__MACOSX/a/._1.png, b/.hidden.png); 1 without an ending (notes)"
    )


def test_links_to_folders_are_followed_once(data, tmp_path):
    write(tmp_path / "real", *several(("a",)))
    write(tmp_path / "photos", *several(("b",)))
    (tmp_path / "photos" / "a").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "photos" / "b" / "loop").symlink_to(tmp_path / "photos")
    names, counts, _ = read(data, tmp_path / "photos")
    assert names == ["a", "b"]
    assert sum(sum(part.values()) for part in counts.values()) == 6


# ----------------------------------------------------------------------------------------------------------------- metadata


def write_metadata(folder: Path, labels: list[object], kind: str = "csv") -> None:
    write(folder, *(f"{i}.png" for i in range(len(labels))))
    rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    if kind == "csv":
        lines = [
            "file_name,label",
            *(f"{row['file_name']},{'' if row['label'] is None else row['label']}" for row in rows),
        ]
        (folder / "metadata.csv").write_text("\n".join(lines))
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("labels", [["dog", "cat", "ant", "cat"], [10, 9, 1, 9], ["007", "7", "10", "7"]])
def test_labels_are_numbered_over_all_splits(data, tmp_path, kind, labels):
    """The validation split lacks a class: a numbering of its own would shift all its labels."""
    write_metadata(tmp_path / "train", labels, kind)
    write_metadata(tmp_path / "validation", labels[:2], kind)
    names, _, found = read(data, tmp_path, classes=False)
    assert names == sorted({str(label) for label in labels}, key=(lambda n: int(n)) if "ant" not in labels else None)
    for split in ("train", "validation"):
        rows = found.splits[split]
        for row in rows:
            index = int(Path(row["image"]["path"]).stem)
            assert names[row["label"]] == str(labels[index])


def test_metadata_in_the_root_names_images_in_splits(data, tmp_path):
    write(tmp_path, *several(("train", "test")), "train/unnamed.png")
    lines = ["file_name,label"] + [f"{s}/{i}.png,{'ab'[i % 2]}" for s in ("train", "test") for i in range(3)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    _, counts, found = read(data, tmp_path)
    assert counts == {part: {"a": 2, "b": 1} for part in ("train", "evaluation")}
    assert "1 in no metadata file (train/unnamed.png)" in str(found.left_out)


@pytest.mark.parametrize(
    "content, message",
    [
        ("file_name,label\n0.png,a\nmissing.png,b\n", r"metadata\.csv, row 2: file_name 'missing\.png' is no file"),
        ("name,label\n0.png,a\n", r"metadata\.csv, row 1 has no `file_name`, only name, label"),
        ("file_name,label\n0.png\n", "row 1 has another number of fields"),
    ],
)
def test_wrong_metadata_names_file_and_row(data, tmp_path, content, message):
    write(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(data.InputError, match=message):
        read(data, tmp_path)


def test_missing_label_names_image(data, tmp_path):
    write_metadata(tmp_path, ["a", None, "b", "a"])
    with pytest.raises(data.InputError, match=r"1 of the \d images of the split \w+ have no label .*1\.png"):
        read(data, tmp_path, eval_fraction=0.5)


def test_label_columns_of_different_types_are_matched_by_name(data):
    def split(values, kind):
        return datasets.Dataset.from_dict({"label": values}, features=datasets.Features({"label": kind}))

    found = data.Data(
        "x",
        "",
        {
            "train": split([0, 1], datasets.ClassLabel(names=["cat", "dog"])),
            "test": split([1, 0, -1], datasets.ClassLabel(names=["dog", "cat"])),
        },
    )
    assert data.encode_labels(found, "label") == ["cat", "dog"]
    assert [list(found.splits[name]["label"]) for name in ("train", "test")] == [[0, 1], [0, 1, -1]]
    found.splits = {
        "train": split([2.0, 10.0], datasets.Value("float64")),
        "test": split(["10", "3"], datasets.Value("string")),
    }
    assert data.encode_labels(found, "label") == ["2", "3", "10"]
    assert [list(found.splits[name]["label"]) for name in ("train", "test")] == [[0, 2], [2, 1]]
    found.splits = {"train": split([0.5], datasets.Value("float64"))}
    with pytest.raises(data.InputError, match=r"the label 0\.5 is no class"):
        data.encode_labels(found, "label")


@pytest.mark.parametrize("other", [["a", "b"], ["b", "a"]])
def test_label_number_without_class_names_row(data, other):
    def split(values, names):
        features = datasets.Features({"label": datasets.Value("int64")})
        plain = datasets.Dataset.from_dict({"label": values}, features=features)
        plain.info.features["label"] = datasets.ClassLabel(names=names)  # as in files of other programs
        return plain

    found = data.Data("x", "", {"train": split([0, 1], ["a", "b"]), "test": split([1, 2], other)})
    with pytest.raises(data.InputError, match=r"row 1 of the split test has the label 2 .* from 0 to 1 was expected"):
        data.encode_labels(found, "label")


# ------------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_in_transformers(data, tmp_path, orientation):
    from transformers.image_utils import load_image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    image.save(file, exif=exif)
    expected = np.asarray(load_image(str(file)))
    for source in (
        file,
        str(file),
        file.read_bytes(),
        {"path": str(file), "bytes": None},
        {"bytes": file.read_bytes()},
    ):
        assert np.array_equal(np.asarray(data.read_image(source)), expected)
        assert data.upright_size(source) == (expected.shape[1], expected.shape[0])


def test_16_bit_greyscale_is_scaled_to_8_bits(data, tmp_path):
    pixels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert np.asarray(data.read_image(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(data.InputError, match=r"x\.tiff has floating-point pixels"):
        data.read_image(tmp_path / "x.tiff")


@pytest.mark.parametrize("as_bytes", [False, True])
def test_broken_image_is_named(data, tmp_path, as_bytes):
    write(tmp_path, "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    for name, part in (("cut.jpg", content[: len(content) // 2]), ("empty.jpg", b""), ("text.jpg", b"no image")):
        file = tmp_path / name
        file.write_bytes(part)
        source = {"bytes": part, "path": name} if as_bytes else file
        with pytest.raises(data.InputError, match=f"{name} cannot be read as an image: "):
            data.read_image(source)
    with pytest.raises(data.InputError, match=r"x\.png: there is no image"):
        data.read_image({"bytes": None, "path": None}, "x.png")


# ------------------------------------------------------------------------------------------------------------------ account


def test_summary_abbreviates_many_classes_and_names_empty_ones(data):
    few = data.counted({"a": 3, "b": 0}, "images")
    assert few == "images per class: a 3; none of b"
    many = data.counted({f"c{i}": i for i in range(30)}, "objects")
    assert many == "objects per class: 29 of 30 classes, 1 (c1) to 29 (c29) each; none of c0"


def test_checkpoint_of_other_data_is_refused(data, tmp_path):
    def account(name, classes, images=4):
        return data.Account(data.Data(name, "", {}), classes, {"train": data.Part(images, dict.fromkeys(classes, 2))})

    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "dog"}}))
    account("pets", ["cat", "dog"]).write(tmp_path)
    data.check_resumed(tmp_path, checkpoint, account("pets", ["cat", "dog"]))
    data.check_resumed(tmp_path, checkpoint, account("moved/pets", ["cat", "dog"]))
    with pytest.raises(data.InputError, match="2 classes cat, dog, the data set has the 2 classes ant, dog"):
        data.check_resumed(tmp_path, checkpoint, account("pets", ["ant", "dog"]))
    with pytest.raises(data.InputError, match="trained on another data set, pets"):
        data.check_resumed(tmp_path, checkpoint, account("others", ["cat", "dog"], 9))


def test_input_error_ends_program_with_one_line(data):
    def main():
        raise data.InputError("Traceback of a worker\n  more\ndata.InputError: x.jpg cannot be read")

    with pytest.raises(SystemExit, match=r"^error: x\.jpg cannot be read$"):
        data.run_program(main)
