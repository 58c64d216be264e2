"""Tests of the example programs on small inputs."""

import importlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from utils import FEW_STEPS, FIXTURES, SMALL_HEADS, run_example, run_main

from internimage_hf.modeling_internimage_rcnn import InternImageRcnnOutput


def test_classification_fine_tunes_on_folder_and_resumes(programs, photos, tmp_path, capsys):
    flags = [
        "--dataset", photos, "--model", FIXTURES / "hf_t_like", "--eval_fraction", 0.25, "--per_device_train_batch_size", 8,
        "--learning_rate", 1e-3, "--bf16", "--use_cpu", "--gradient_checkpointing", "--logging_strategy", "no", "--save_total_limit", 5,
    ]  # fmt: skip
    folder = tmp_path / "model"
    flags = [*flags, "--output_dir", folder, "--num_train_epochs", 3]
    run_main(programs.image_classification, *flags)
    assert "30 images to train, 10 to evaluate, 2 classes" in capsys.readouterr().out
    assert (folder / "predictions.png").stat().st_size > 1000
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bright", "1": "dark"}
    assert json.loads((folder / "all_results.json").read_text())["eval_accuracy"] == 1.0

    # repeat the last epoch from the second epoch's checkpoint
    epoch = 4  # steps
    last, keep = folder / f"checkpoint-{3 * epoch}" / "model.safetensors", folder / f"checkpoint-{2 * epoch}"
    expected = load_file(last)
    assert keep.is_dir()
    for other in folder.glob("checkpoint-*"):
        if other != keep:
            shutil.rmtree(other)
    run_main(programs.image_classification, *flags, "--resume_from_checkpoint", "last")
    actual = load_file(last)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_classification_reads_recipe_and_refuses_bad_flags(programs, photos, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_train_epochs: 1\nlearning_rate: 1e-3\nmax_steps: 1\neval_strategy: no\nsave_strategy: no\n")
    common = ["--output_dir", tmp_path / "out", "--image_size", 32]
    output = run_example(
        "image_classification.py", recipe, "--max_train_samples", 16, "--max_eval_samples", 8, *common
    )
    assert "16 images to train, 8 to evaluate, 10 classes" in output
    with pytest.raises(ValueError, match="--label_column kind is not a column"):
        run_main(programs.image_classification, "--dataset", photos, "--label_column", "kind", *common)


# --- detection and segmentation, in this process


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def check_outputs(folder: Path, metrics: dict[str, float], metric: str) -> None:
    results = json.loads((folder / "all_results.json").read_text())
    assert results[metric] == metrics[metric] and "train_loss" in results
    assert (folder / "preprocessor_config.json").is_file() and (folder / "config.json").is_file()
    with Image.open(folder / "predictions.png") as picture:
        assert picture.width > 300
    assert json.loads((folder / "trainer_state.json").read_text())["best_metric"] == pytest.approx(metrics[metric])


def check_resume(program, flags: list, folder: Path) -> None:
    """Resumes from the first checkpoint, within an epoch: the last checkpoint has the same weights."""
    expected = saved_weights(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-4")
    run_main(program, *flags, "--resume_from_checkpoint", "last")
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4
    for name, tensor in saved_weights(folder / "checkpoint-4").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def check_unchanged(folder: Path, again: Path) -> None:
    """Compares a model trained with a learning rate of 0 with the original in `folder`: weights and code are equal."""
    expected = saved_weights(folder)
    actual = saved_weights(again)
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        if "running_" not in name and "num_batches" not in name:  # BatchNorm updates its running statistics
            torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    code = json.loads((again / "config.json").read_text())["auto_map"]["AutoConfig"].partition(".")[0]
    assert (again / f"{code}.py").is_file()


@pytest.mark.parametrize(
    "head",
    [
        "rt_detr",
        "deformable_detr",
        "dino",
        "mask_rcnn",
        pytest.param("detr", marks=pytest.mark.slow),
        pytest.param("cascade", marks=pytest.mark.slow),
    ],
)
def test_detection_trains_resumes_and_reloads(programs, coco_folder, tmp_path, capsys, head):
    flags = [
        "--dataset", coco_folder, "--head", head, "--head_config_overrides", json.dumps(SMALL_HEADS[head]),
        "--image_size", 64, "--output_dir", tmp_path, *FEW_STEPS,
    ]  # fmt: skip
    metrics = run_main(programs.object_detection, *flags)
    assert {"eval_map", "eval_map_50", "eval_map_75", "eval_mar_100", "eval_loss"} <= set(metrics)
    assert ("eval_mask_map" in metrics) == (head in ("mask_rcnn", "cascade"))
    check_outputs(tmp_path, metrics, "eval_map")
    account = json.loads((tmp_path / "data.json").read_text())
    assert (
        account["parts"]["train"]["unit"] == "objects" and account["left out"]["crowds, not trained on"]["count"] > 0
    )
    output = capsys.readouterr().out
    assert "9 images, 1 of them without objects; objects per class: the 0" in output.partition("train_loss")[0]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {str(i): f"the {i}" for i in range(10)}
    check_resume(programs.object_detection, flags, tmp_path)
    again = run_main(
        programs.object_detection, *flags[:2], "--model", tmp_path, "--output_dir", tmp_path / "again", *FEW_STEPS,
        "--learning_rate", 0, "--remote_code", "--ema_decay", 0.9,
    )  # fmt: skip
    assert set(again) == set(metrics)
    check_unchanged(tmp_path, tmp_path / "again")


CLASS_WEIGHTS = {
    "rt_detr": r"model\.decoder\.class_embed\.\d\.(weight|bias)|model\.enc_score_head\.(weight|bias)|model\.denoising_class_embed\.weight",
    "deformable_detr": r"model\.decoder\.class_embed\.\d\.(weight|bias)",
    "dino": r"class_branches\.\d\.(weight|bias)|label_embedding\.weight",
    "mask_rcnn": r"box_heads\.0\.(classifier|regressor)\.(weight|bias)|mask_heads\.0\.classifier\.(weight|bias)",
    "cascade": r"box_heads\.\d\.(classifier|regressor)\.(weight|bias)|mask_heads\.\d\.classifier\.(weight|bias)",
}


@pytest.mark.parametrize("head", CLASS_WEIGHTS)
def test_new_classes_renew_only_what_depends_on_them(programs, tmp_path, capsys, head):
    """Also where the number of classes stays the same. New weights are those of a new head."""
    detection = programs.object_detection
    untrained = detection.DetectionModelArguments(head=head, head_config_overrides=json.dumps(SMALL_HEADS[head]))
    model, processor = detection.build_model(untrained, ["cat", "dog", "cow"], 96)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.375)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    flags = detection.DetectionModelArguments(model=str(tmp_path))

    def new_weights(labels: list[str]) -> set[str]:
        loaded, _ = detection.build_model(flags, labels, None)
        assert list(loaded.config.id2label.values()) == labels
        before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
        assert after.keys() == before.keys() and all(parameter.isfinite().all() for parameter in after.values())
        for name, buffer in loaded.named_buffers():
            assert torch.equal(buffer, dict(model.named_buffers())[name])
        new = {name for name, p in after.items() if p.shape != before[name].shape or not torch.equal(p, before[name])}
        fresh = dict(detection.build_model(untrained, labels, 96)[0].named_parameters())
        for name in new:
            assert after[name].shape == fresh[name].shape
            if name.endswith("bias"):
                assert torch.equal(after[name], fresh[name]), name
        return new

    assert new_weights(["cat", "dog", "cow"]) == set()
    assert "was trained" not in capsys.readouterr().out
    every = {name for name in dict(model.named_parameters()) if re.fullmatch(CLASS_WEIGHTS[head], name)}
    for labels in (["cow", "dog", "cat"], ["person"], [f"class {i}" for i in range(7)]):
        assert new_weights(labels) == every and len(every) >= 4
        output = capsys.readouterr().out
        assert f"was trained for 3 classes (cat, dog, cow), not for the {len(labels)} of the data set: " in output
        assert "are new, all other weights are kept" in output and output.count("\n") == 1


def test_detection_goes_on_from_converted_checkpoint(programs, coco_folder, tmp_path, capsys):
    """Of a DINO with a composite backbone; other classes, the image processor's fields kept."""
    source = FIXTURES / "dino_tiny_cb"
    folder, small = (
        tmp_path / "converted",
        ["--dataset", coco_folder, *FEW_STEPS, "--max_steps", 2, "--layer_decay", 0.9],
    )
    arguments = [source / "checkpoint.pth", "--config", source / "config.json", "--output", folder]
    assert importlib.import_module("convert.detection").main([*map(str, arguments)]) == 0
    run_main(
        programs.object_detection, *small, "--model", folder, "--image_size", 64, "--output_dir", tmp_path / "tuned",
        "--learning_rate", 0, "--weight_decay", 0, "--remote_code",
    )  # fmt: skip
    assert "label_embedding, class_branches are new" in capsys.readouterr().out
    before, after = saved_weights(folder), saved_weights(tmp_path / "tuned")
    assert before.keys() == after.keys() and {n for n in before if not torch.equal(before[n], after[n])} == {
        name for name in before if re.fullmatch(CLASS_WEIGHTS["dino"], name)
    }
    old, new = (json.loads((f / "preprocessor_config.json").read_text()) for f in (folder, tmp_path / "tuned"))
    assert new["size"]["shortest_edge"] == 64 and new["top_k"] == old["top_k"]
    assert {"modeling_internimage_dino.py", "modeling_internimage_composite.py"} <= {
        file.name for file in (tmp_path / "tuned").iterdir()
    }


def test_rcnn_trains_on_images_of_instance_masks(programs, tmp_path):
    for i in range(3):
        for kind in ("images", "annotations"):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
        mask = np.zeros((64, 48), dtype=np.uint8)
        mask[5:40, 6:30], mask[45:60, 6:40] = 1, 2
        Image.fromarray(mask * 100).convert("RGB").save(tmp_path / "data" / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "data" / "annotations" / f"{i}.png")
    flags = [
        "--dataset",
        tmp_path / "data",
        "--image_size",
        64,
        "--output_dir",
        tmp_path / "out",
        *FEW_STEPS,
        "--max_steps",
        2,
    ]
    small = ["--head", "mask_rcnn", "--head_config_overrides", json.dumps(SMALL_HEADS["mask_rcnn"])]
    metrics = run_main(programs.object_detection, *flags, *small)
    assert "eval_mask_map" in metrics
    with pytest.raises(ValueError, match=r"has 6 images, but no metadata\.csv"):
        run_main(programs.object_detection, *flags, "--head", "dino")


def test_masks_and_boxes_of_rcnn_come_back_in_pixels_of_the_image(programs):
    """Batches of padded images: metrics of the truth, given as outputs of the model, are perfect."""
    detection, rng = programs.object_detection, np.random.default_rng(0)
    processor = detection.HEADS["mask_rcnn"].processor(size={"shortest_edge": 64, "longest_edge": 128})
    examples = []
    for number, (height, width) in enumerate(((60, 100), (90, 50), (64, 64))):
        masks = np.zeros((2, height, width), dtype=np.uint8)
        masks[0, 8:36, 4:40], masks[1, 40:59, 10:45] = 1, 1
        run_lengths = programs.coco.encode_masks(masks)
        boxes = [programs.coco.box_of(one) for one in run_lengths]
        objects = {"bbox": boxes, "category": [1, 0], "area": [w * h for _, _, w, h in boxes], "iscrowd": [0, 0]}
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        examples.append({"image": Image.fromarray(pixels), "name": "it", "image_id": number,
                         "objects": {**objects, "segmentation": run_lengths}})  # fmt: skip
    batch = detection.Collate(processor)(examples)
    assert [tuple(label["masks"].shape) for label in batch["labels"]] == [(2, *batch["pixel_values"].shape[2:])] * 3
    boxes = torch.zeros(3, 4, 4)
    for i, label in enumerate(batch["labels"]):
        boxes[i, :2, :2] = label["boxes"][:, :2] - label["boxes"][:, 2:] / 2
        boxes[i, :2, 2:] = label["boxes"][:, :2] + label["boxes"][:, 2:] / 2
        height, width = label["size"].tolist()
        inside = label["masks"].clone()
        inside[:, :height, :width] = 0
        assert not inside.any() and all(
            mask.sum() == pytest.approx(w * h * width * height, rel=0.1)
            for mask, (_, _, w, h) in zip(label["masks"], label["boxes"].tolist(), strict=True)
        )
    labels = torch.tensor([[1, 0, -1, -1]] * 3)
    scores = torch.tensor([[0.9, 0.8, 0.0, 0.0]] * 3)
    outputs = InternImageRcnnOutput(scores=scores, labels=labels, boxes=boxes, masks=torch.ones(3, 4, 28, 28))
    sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    found = detection.detect_instances(processor, outputs, sizes)
    metrics = detection.CocoMetrics([example["objects"] for example in examples], ["a", "b"])
    result = metrics.of_instances(dict(enumerate(found)))
    assert result["map"] == pytest.approx(1) and result["mask_map"] == pytest.approx(1)


def test_batch_norm_weights_of_new_head_start_at_1(programs):
    """transformers draws RT-DETR's BatchNorm weights around 0; from there the demo hardly learns."""
    detection = programs.object_detection
    arguments = detection.DetectionModelArguments()
    model, _ = detection.build_model(arguments, ["one", "two"], None)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) > 10 and all((norm.weight == 1).all() for norm in norms)


@pytest.mark.parametrize("head", ["upernet", "mask2former"])
def test_segmentation_trains_resumes_and_reloads(programs, mask_folder, tmp_path, head):
    flags = [
        "--dataset", mask_folder, "--reduce_labels", "--head", head, "--image_size", 64,
        "--head_config_overrides", json.dumps(SMALL_HEADS[head]), "--output_dir", tmp_path, *FEW_STEPS,
    ]  # fmt: skip
    metrics = run_main(programs.semantic_segmentation, *flags)
    assert {"eval_mean_iou", "eval_mean_accuracy", "eval_overall_accuracy", "eval_loss"} <= set(metrics)
    check_outputs(tmp_path, metrics, "eval_mean_iou")
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["10"] == "the 9"
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["do_reduce_labels"] is True
    check_resume(programs.semantic_segmentation, flags, tmp_path)
    again = run_main(
        programs.semantic_segmentation, *flags[:3], "--model", tmp_path, "--output_dir", tmp_path / "again", *FEW_STEPS,
        "--learning_rate", 0, "--remote_code", "--ema_decay", 0.9,
    )  # fmt: skip
    assert set(again) == set(metrics)
    check_unchanged(tmp_path, tmp_path / "again")


def test_coco_metrics_of_ground_truth_are_perfect(programs, coco_folder):
    """Boxes go through the model's units, fractions of a padded batch; `detect` must convert them back."""
    detection = programs.object_detection
    data = detection.DetectionDataArguments(dataset=str(coco_folder))
    train, evaluation, account = detection.load_splits(data, seed=0)
    labels = account.classes
    assert labels == [f"the {i}" for i in range(10)] and len(train) == 9 and len(evaluation) == 4
    assert evaluation[1]["objects"]["bbox"] == [] and set(evaluation[2]["objects"]["iscrowd"]) == {1}
    processor = detection.HEADS["deformable_detr"].processor(size={"shortest_edge": 48, "longest_edge": 80})
    examples = [dict(evaluation[i]) for i in range(4)]
    for example in examples[::2]:
        # the batch is padded in both directions
        example["image"] = programs.data.read_image(example["image"]).rotate(90, expand=True)
        example["objects"] = dict(example["objects"])
        height = example["image"].height
        example["objects"]["bbox"] = [[y, height - x - w, h, w] for x, y, w, h in example["objects"]["bbox"]]
    batch = detection.Collate(processor)(examples)
    assert len(batch["labels"][1]["boxes"]) == 0 and len(batch["labels"][2]["boxes"]) == 0
    assert 0 < batch["pixel_mask"].float().mean() < 1
    logits, boxes = torch.full((4, 10, 10), -20.0), torch.full((4, 10, 4), 0.5)
    for i, label in enumerate(batch["labels"]):
        for j, (box, category) in enumerate(zip(label["boxes"], label["class_labels"], strict=True)):
            boxes[i, j], logits[i, j, category] = box, 20.0
    sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    found = detection.detect(processor, SimpleNamespace(logits=logits, pred_boxes=boxes), sizes, batch["pixel_mask"])
    rows = np.stack(
        [
            np.concatenate([one["boxes"], one["scores"][:, None], one["labels"][:, None]], axis=1)
            for one in found
        ]
    )  # fmt: skip
    truth = [example["objects"] for example in examples]
    metrics = detection.CocoMetrics(truth, labels)(SimpleNamespace(predictions=rows, label_ids=np.arange(4)))
    assert metrics["map"] == pytest.approx(1.0) and metrics["mar_100"] == pytest.approx(1.0)
    rows[..., :4] += 1000
    metrics = detection.CocoMetrics(truth, labels)(SimpleNamespace(predictions=rows, label_ids=np.arange(4)))
    assert metrics["map"] == 0.0


def test_detection_reads_splits_of_imagefolder(programs, scenes, tmp_path):
    """No splits, boxes by corners, categories by name, as in many datasets on the Hub."""
    with open(tmp_path / "metadata.jsonl", "w") as file:
        for i, scene in enumerate(scenes["train"]):
            scene["image"].save(tmp_path / f"{i}.png")
            corners = [[x, y, x + w, y + h] for x, y, w, h in scene["objects"]["bbox"]]
            names = ["even" if category % 2 == 0 else "odd" for category in scene["objects"]["category"]]
            row = {"file_name": f"{i}.png", "objects": {"bbox": corners, "categories": names}}
            file.write(json.dumps(row) + "\n")
    detection = programs.object_detection
    data = detection.DetectionDataArguments(dataset=str(tmp_path), box_format="xyxy", eval_fraction=1 / 3)
    train, evaluation, account = detection.load_splits(data, seed=0)
    assert account.classes == ["even", "odd"] and len(train) == 6 and len(evaluation) == 3
    found = sorted(box for part in (train, evaluation) for row in part.objects["objects"] for box in row["bbox"])
    assert found == sorted(box for scene in scenes["train"] for box in scene["objects"]["bbox"])
    assert {c for row in train.objects["objects"] for c in row["category"]} <= {0, 1}
    assert train[0]["objects"]["area"][0] == np.prod(train[0]["objects"]["bbox"][0][2:])


def test_segmentation_finds_classes_in_masks(programs, mask_folder, tmp_path):
    folder = tmp_path / "masks"
    shutil.copytree(mask_folder, folder)
    (folder / "id2label.json").unlink()
    segmentation = programs.semantic_segmentation
    data = segmentation.SegmentationDataArguments(dataset=str(folder), reduce_labels=True)
    _, evaluation, labels = segmentation.load_splits(data, seed=0)
    masks = [np.asarray(Image.open(file)) for file in (folder / "annotations" / "training").iterdir()]
    assert labels == [f"class {i}" for i in range(max(mask.max() for mask in masks))]
    row = evaluation[0]
    assert set(row["mask"][:4].flatten()) == {255} and row["full_mask"].shape == (64, 96)
    original = np.asarray(Image.open(folder / "annotations" / "validation" / "0.png"))
    assert np.array_equal(row["mask"][4:], original[4:] - 1)


def test_mean_iou_equals_scikit_learn(programs):
    rng = np.random.default_rng(0)
    masks, predicted = rng.integers(0, 7, (5, 40, 30)), rng.integers(0, 7, (5, 40, 30))
    masks[masks == 6] = 255
    masks[masks == 4] = 3  # class 4 is predicted but never true
    areas = [
        programs.semantic_segmentation.class_areas(torch.tensor(p), torch.tensor(m), 9, 255).numpy()
        for p, m in zip(predicted, masks, strict=True)
    ]
    metrics = programs.semantic_segmentation.segmentation_metrics(SimpleNamespace(predictions=np.stack(areas)))
    counted = masks != 255
    expected = jaccard_score(masks[counted], predicted[counted], average="macro")
    assert metrics["mean_iou"] == pytest.approx(expected)
    assert metrics["overall_accuracy"] == pytest.approx((masks == predicted)[counted].mean())


def test_random_transformations_depend_on_seed_epoch_and_index_only(programs, scenes):
    data = programs.semantic_segmentation.SegmentationDataArguments(
        random_flip=True, color_jitter=True, min_scale=0.7, max_scale=1.5
    )
    transform = programs.semantic_segmentation.training_transform(data, 48, 64)
    rows = [{"image": s["image"], "mask": np.asarray(s["annotation"])} for s in scenes["train"]]
    first, second = (programs.common.RandomlyTransformed(rows, transform, seed=3) for _ in range(2))
    one, other = first[2], second[2]
    assert one["image"].size == (64, 48) and one["mask"].shape == (48, 64)
    assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))
    assert np.array_equal(one["mask"], other["mask"])
    second.epoch.fill_(1)
    assert not np.array_equal(np.asarray(one["image"]), np.asarray(second[2]["image"]))
    for s in scenes["train"]:
        assert set(np.unique(s["annotation"])) <= {0, *(1 + c for c in s["objects"]["category"])}


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("object_detection", ["--head_config_overrides", '{"queries": 1}'], "queries is not a field of RTDetrConfig"),
        ("object_detection", ["--head_config_overrides", "{"], "--head_config_overrides is not JSON"),
        ("object_detection", ["--model", "m", "--backbone", "t"], "--backbone is for an untrained head"),
        (
            "object_detection",
            ["--backbone", "t", "--image_size", 64],
            "64 is too small: RTDetrForObjectDetection has 84 places",
        ),
        (
            "object_detection",
            ["--head", "deformable_detr", "--image_size", 32],
            "22 places .* fewer than its 30 queries",
        ),
        ("object_detection", ["--head", "dino", "--image_size", 32], "22 places .* fewer than its 30 queries"),
        (
            "object_detection",
            ["--head", "cascade", "--head_config_overrides", '{"x": 1}'],
            "field of InternImageRcnnConfig",
        ),
        (
            "object_detection",
            ["--head", "dino", "--label_divisor", 1000],
            "--label_divisor is for heads with masks; --head dino reads boxes alone",
        ),
        (
            "object_detection",
            ["--model", FIXTURES / "hf_t_like"],
            "is a internimage, not one of rt_detr, deformable_detr, detr, internimage_dino, internimage_rcnn$",
        ),
        ("object_detection", ["--head", "mask_rcnn", "--image_size", 0], "--image_size must be at least 1, got 0"),
        ("object_detection", ["--random_crop_scale", 0], "--random_crop_scale must be above 0"),
        ("object_detection", ["--train_annotations", "no.json"], "--train_annotations no.json is not a file"),
        ("object_detection", ["--train_images", "nowhere"], "name their folder by --train_images"),
        ("semantic_segmentation", ["--image_size", 0, "--reduce_labels"], "--image_size must be at least 1, got 0"),
        ("semantic_segmentation", ["--ignore_index", 300], "--ignore_index must be 0 to 255"),
        ("semantic_segmentation", [], "a mask has the class 11, but there are 11 classes"),
        ("semantic_segmentation", ["--mask_column", "mask"], "--mask_column mask is not a column"),
    ],
)
def test_bad_flags_are_one_line(programs, coco_folder, mask_folder, tmp_path, program, flags, message):
    folder = coco_folder if program == "object_detection" else mask_folder
    with pytest.raises(ValueError, match=message):
        run_main(getattr(programs, program), "--dataset", folder, "--output_dir", tmp_path, *FEW_STEPS, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "flags", "metric", "least"),
    [
        ("object_detection", [], "eval_map_50", 0.5),
        ("object_detection", ["--head", "dino"], "eval_map_50", 0.5),
        ("object_detection", ["--head", "mask_rcnn"], "eval_mask_map_50", 0.5),
        ("semantic_segmentation", [], "eval_mean_iou", 0.6),
        ("instance_segmentation", [], "eval_mask_map_50", 0.5),
    ],
)
def test_programs_learn_embedded_data(tmp_path, program, flags, metric, least):
    output = run_example(f"{program}.py", "--output_dir", tmp_path, *flags)
    assert "predictions.png" in output
    assert json.loads((tmp_path / "all_results.json").read_text())[metric] >= least
