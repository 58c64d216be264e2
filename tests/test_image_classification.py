"""Tests of the classification program: the images and classes that it uses, and its messages about the others."""

import json
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image
from utils import ONE_EPOCH, ROOT, run_main, write_images


EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import image_classification as program  # noqa: E402
from data import Data, InputError, run_program, undecoded  # noqa: E402


def load(dataset, **flags):
    return program.load_splits(program.DataArguments(dataset=str(dataset), **flags), seed=0)


def counts(account):
    """Returns the number of images per class over training and evaluation."""
    return sum((Counter(part.counts) for part in account.parts.values()), Counter())


# ------------------------------------------------------------------------------------------------- folders and their names


@pytest.mark.parametrize(
    "classes",
    [
        {"bus": "{}.png", "freight_train": "{}.png", "passenger_train": "{}.png", "tram": "{}.png"},
        {"test_tube": "{}.png", "flask": "train-{}.png"},
        {"train": "{}.png", "test": "{}.png", "val": "{}.png"},
        {"cat": "_DSC{}.JPG", "__dog": "__{}.jpeg", "a [1]": "val_{}.webp"},
    ],
)
def test_every_image_of_every_class_is_used(tmp_path, classes):
    write_images(tmp_path, [f"{name}/{file.format(i)}" for name, file in classes.items() for i in range(6)])
    parts, account = load(tmp_path)
    assert account.classes == sorted(classes)
    assert counts(account) == dict.fromkeys(classes, 6)
    for part in parts.values():
        assert part.features["label"].names == sorted(classes)
        for row in part:
            assert f"/{account.classes[row['label']]}/" in row["image"]["path"]


def test_folders_with_class_folders_are_splits(tmp_path):
    names = [f"{split}/{name}/{i}.png" for split in ("Train", "val", "test") for name in "ab" for i in range(3)]
    _, account = load(write_images(tmp_path, names))
    assert account.parts["train"].counts == account.parts["evaluation"].counts == {"a": 3, "b": 3}
    assert "test (6 images) is not used" in str(account)
    _, account = load(tmp_path, train_split="test", eval_split="Train")
    assert "trained on test, evaluated on Train" in str(account)


def test_image_beside_class_folders_is_one_line(tmp_path):
    write_images(tmp_path, [*(f"{name}/{i}.png" for name in "ab" for i in range(2)), "stray.png"])
    with pytest.raises(InputError, match=r"stray\.png lies beside the class folders a, b"):
        load(tmp_path)


# --------------------------------------------------------------------------------------------------- metadata and columns


@pytest.mark.parametrize("column", ["label", "Class", "kind"])
def test_labels_in_metadata_are_numbered_over_all_splits(tmp_path, column):
    for split, labels in (("train", ["ant", "bee", "cat"] * 2), ("validation", ["cat", "bee"])):
        write_images(tmp_path, [f"{split}/{label}{i}.png" for i, label in enumerate(labels)])
        lines = [f"{label}{i}.png,{label}" for i, label in enumerate(labels)]
        (tmp_path / split / "metadata.csv").write_text("\n".join([f"file_name,{column}", *lines]) + "\n")
    if column == "kind":
        with pytest.raises(InputError, match=r"--label_column was expected to name one of .*kind"):
            load(tmp_path)
    parts, account = load(tmp_path, label_column=column if column == "kind" else None)
    assert account.classes == ["ant", "bee", "cat"]
    for part in parts.values():
        for row in part:
            assert account.classes[row["label"]] in row["image"]["path"]


def saved(folder, features=None, **splits):
    """Saves splits, given as columns, by `save_to_disk`; adds the column `image`."""
    result = {}
    for name, columns in splits.items():
        length = len(next(iter(columns.values())))
        images = [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(length)]
        kinds = dict((features or {}).get(name, {}))
        part = datasets.Dataset.from_dict({"image": images, **columns})
        part = part.cast_column("image", datasets.Image())
        for column, kind in kinds.items():
            part = part.cast_column(column, kind)
        result[name] = part
    datasets.DatasetDict(result).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 9, 10, 9, 2, 2], ["2", "9", "10"]),
        (["b", "a", "b", "a", "c", "c"], ["a", "b", "c"]),
        ([True, False, True, False, True, False], ["False", "True"]),
    ],
)
def test_labels_of_any_type_become_classes(tmp_path, values, names):
    saved(tmp_path, training={"label": values}, val={"label": values[:2]})
    parts, account = load(tmp_path)
    assert account.classes == names
    for name, expected in (("train", values), ("evaluation", values[:2])):
        assert [names[label] for label in parts[name]["label"]] == list(map(str, expected))


def test_class_labels_differing_between_splits_are_matched_by_name(tmp_path):
    kinds = {
        "train": {"label": datasets.ClassLabel(names=["a", "b", "c"])},
        "test": {"label": datasets.ClassLabel(names=["c", "a"])},
    }
    saved(tmp_path, kinds, train={"label": [0, 1, 2]}, test={"label": [0, 1]})
    parts, account = load(tmp_path)
    assert [account.classes[label] for label in parts["evaluation"]["label"]] == ["c", "a"]


@pytest.mark.parametrize("secret", [[-1] * 4, [None] * 4])
def test_test_split_without_labels_is_not_evaluated(tmp_path, secret):
    kind = {"label": datasets.ClassLabel(names=["a", "b"])}
    saved(tmp_path, dict.fromkeys(("train", "test"), kind), train={"label": [0, 1] * 5}, test={"label": secret})
    _, account = load(tmp_path)
    assert "the split test (4 images) has no labels and is not used" in str(account)
    assert counts(account) == {"a": 5, "b": 5} and account.parts["evaluation"].images == 2
    with pytest.raises(InputError, match="4 of the 4 images of the split test have no label"):
        load(tmp_path, eval_split="test")


def test_missing_label_is_named(tmp_path):
    saved(tmp_path, train={"label": ["a", "b", None, "a"]})
    with pytest.raises(InputError, match=r"1 of the 4 images of the split train have no label .* row 2; a class"):
        load(tmp_path)


def test_columns_are_found_by_type_then_name_and_choice_is_reported(tmp_path):
    kinds = {"train": dict.fromkeys(("coarse", "label"), datasets.ClassLabel(names=["a", "b"]))}
    saved(tmp_path, kinds, train={"coarse": [0, 0, 1, 1], "label": [0, 1, 0, 1]})
    _, account = load(tmp_path)
    assert "--label_column is label, others are coarse" in str(account)
    parts, _ = load(tmp_path, label_column="coarse")
    assert sum(sum(part["label"]) for part in parts.values()) == 2
    with pytest.raises(InputError, match="--label_column fine is not a column of the split train"):
        load(tmp_path, label_column="fine")
    with pytest.raises(InputError, match="--image_column and --label_column are both label"):
        load(tmp_path, image_column="label")


# ------------------------------------------------------------------------------------------------------ classes and counts


def test_class_without_training_images_is_reported(tmp_path):
    names = [*(f"train/{name}/{i}.png" for name in "ab" for i in range(3)), "test/a/0.png", "test/zebra/0.png"]
    _, account = load(write_images(tmp_path, names))
    assert account.classes == ["a", "b", "zebra"]
    assert "no training image is of zebra, but 1 images to evaluate are" in str(account)
    _, account = load(tmp_path, max_train_samples=1)
    assert "--max_train_samples leaves out 5 images of train" in str(account)
    assert "none of" in next(line for line in str(account).splitlines() if line.strip().startswith("train"))


def test_single_class_is_refused(tmp_path):
    write_images(tmp_path / "photos", [f"only/{i}.png" for i in range(4)])
    with pytest.raises(InputError, match="has images of one class, only; at least two"):
        run_main(program, "--dataset", tmp_path / "photos", "--output_dir", tmp_path / "out", *ONE_EPOCH)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- streaming


def streamed(monkeypatch, **splits):
    data = Data(
        "me/photos", "a data set of the Hub", {n: undecoded(s.to_iterable_dataset()) for n, s in splits.items()}
    )
    monkeypatch.setattr(program, "load_data", lambda *args, **kwargs: data)


def labelled(names, labels, images=None):
    images = images or [Image.new("RGB", (8, 8))] * len(labels)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_streamed_dataset_numbers_classes_once(monkeypatch):
    streamed(monkeypatch, training=labelled(["a", "b", "c"], [0, 1, 2]), val=labelled(["c", "a"], [0, 1, 0]))
    parts, account = load("me/photos", streaming=True, max_eval_samples=2)
    assert account.classes == ["a", "b", "c"] and account.parts["train"].images is None
    assert [row["label"] for row in parts["evaluation"]] == [2, 0]
    assert "trained on training, evaluated on val" in str(account)


def test_streamed_dataset_without_names_or_evaluation_is_refused(monkeypatch):
    part = labelled(["a", "b"], [0, 1])
    streamed(monkeypatch, train=part)
    with pytest.raises(InputError, match="no split `validation` or `test`"):
        load("me/photos", streaming=True)
    whole = part.cast_column("label", datasets.Value("int64"))
    streamed(monkeypatch, train=whole, validation=whole)
    with pytest.raises(InputError, match="does not name its classes"):
        load("me/photos", streaming=True)


def test_streamed_folder_is_counted(tmp_path):
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("train_1", "b") for i in range(3)]
    parts, account = load(write_images(tmp_path, names), streaming=True)
    assert isinstance(parts["train"], datasets.IterableDataset)
    assert counts(account) == {"b": 6, "train_1": 6}
    assert Counter(row["label"] for row in parts["train"]) == {0: 3, 1: 3}


def test_broken_or_unlabelled_image_of_stream_is_named(tmp_path, small_checkpoint, monkeypatch):
    names = [f"{split}/{name}/{i}.png" for split in ("train", "test") for name in "ab" for i in range(4)]
    write_images(tmp_path / "photos", names)
    file = tmp_path / "photos" / "train" / "b" / "1.png"
    file.write_bytes(file.read_bytes()[:20])
    flags = ["--model", small_checkpoint, "--output_dir", tmp_path / "out", *ONE_EPOCH]
    flags += ["--streaming", "--max_steps", 3]
    with pytest.raises(InputError, match=r"train/b/1\.png cannot be read as an image"):
        run_main(program, "--dataset", tmp_path / "photos", *flags, "--eval_strategy", "no")
    streamed(monkeypatch, train=labelled(["a", "b"], [0, 1, -1, 1]), test=labelled(["a", "b"], [0, 1]))
    with pytest.raises(InputError, match="has no label"):
        run_main(program, "--dataset", "me/photos", *flags, "--eval_strategy", "no")


# ----------------------------------------------------------------------------------------------------------- images, model


def test_truncated_jpeg_is_named_by_worker_too(tmp_path, small_checkpoint):
    names = [f"{name}/{i}.jpg" for name in "ab" for i in range(6)]
    write_images(tmp_path / "photos", names, size=(60, 60))
    for name in names[::2]:
        file = tmp_path / "photos" / name
        file.write_bytes(file.read_bytes()[:-60])
    flags = ["--dataset", tmp_path / "photos", "--model", small_checkpoint]
    flags += ["--output_dir", tmp_path / "out", *ONE_EPOCH]
    with pytest.raises(SystemExit, match=r"\Aerror: .*/[ab]/\d\.jpg cannot be read as an image: [^\n]*\Z"):
        run_program(lambda: run_main(program, *flags, "--dataloader_num_workers", 2))


def test_image_without_file_is_named_by_row(tmp_path):
    saved(tmp_path, train={"label": ["a", "b"] * 5})
    parts, _ = load(tmp_path)
    batch = parts["train"][:1]
    batch["image"] = [{"bytes": b"no image", "path": None}]
    with pytest.raises(InputError, match=rf"row {batch['row'][0]} of its split cannot be read as an image"):
        program.decoded(batch)


def test_exif_orientation_is_applied_before_training(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 10)).save(tmp_path / name / f"{i}.jpg", exif=exif)
    parts, _ = load(tmp_path)
    assert [image.size for image in program.decoded(parts["train"][:])] == [(10, 20)] * 2


def test_image_processor_sizes_are_read():
    class Processor:
        do_center_crop = do_resize = True
        size, crop_size = {"shortest_edge": 70}, {"height": 64, "width": 96}

    assert program.output_size(Processor()) == (64, 96)
    Processor.do_center_crop = False
    with pytest.raises(InputError, match=r"gives images of different sizes .*shortest_edge.*--image_size"):
        program.output_size(Processor())
    Processor.size = {"height": 30, "width": 40}
    assert program.output_size(Processor()) == (30, 40)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "--model nowhere cannot be used"),
        (["--drop_path_rate", "2"], "--drop_path_rate 2.0 cannot be used: .*drop_path_rate"),
        (["--mixup_prob", "2"], "`mixup_prob` must be a number from 0 to 1"),
        (["--image_size", "0"], "--image_size must be at least 1, got 0"),
        (["--eval_fraction", "1"], "--eval_fraction must be between 0 and 1"),
        (["--streaming"], "--streaming needs --max_steps"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, photos, flags, message):
    with pytest.raises(InputError, match=message) as error:
        run_main(program, "--dataset", photos, "--output_dir", tmp_path / "out", *ONE_EPOCH, *flags)
    assert "\n" not in str(error.value)


def test_detector_checkpoint_is_refused(tmp_path, photos):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "detr"}))
    with pytest.raises(InputError, match=r"--model .* cannot be used"):
        run_main(
            program, "--dataset", photos, "--model", tmp_path / "model", "--output_dir", tmp_path / "out", *ONE_EPOCH
        )


def test_program_trains_on_all_classes_and_writes_summary(tmp_path, small_checkpoint, capsys):
    """33 images in batches of 4: the last batch would have one image, whose map has one pixel."""
    names = [f"{name}/train-{i}.png" for name in ("test_tube", "bus", "freight_train") for i in range(14)]
    write_images(tmp_path / "photos", names)
    metrics = run_main(
        program, "--dataset", tmp_path / "photos", "--model", small_checkpoint, "--output_dir", tmp_path / "out", *ONE_EPOCH,
        "--eval_strategy", "no", "--random_crop_scale", 1,
    )  # fmt: skip
    output = capsys.readouterr().out
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert output.index("bus 11, freight_train 11, test_tube 11") < output.index("33 images to train, 9 to evaluate")
    assert "1 of the training images, drawn at random, comes twice in an epoch" in output
    assert "the last model is saved, not the best one: nothing is evaluated during training" in output
    account = json.loads((tmp_path / "out" / "data.json").read_text())
    assert account["parts"]["train"] == {
        "images": 33, "per class": {"bus": 11, "freight_train": 11, "test_tube": 11}, "unit": "images", "empty": 0,
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {
        "bus": 0, "freight_train": 1, "test_tube": 2,
    }  # fmt: skip
    assert np.asarray(Image.open(tmp_path / "out" / "predictions.png")).std() > 0
