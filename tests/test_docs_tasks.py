"""Tests of docs/tasks.md: the code of each section runs as written, with small models and data."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from utils import FIXTURES, ROOT, SMALL_HEADS, TINY, launch, run_command

import internimage_hf
from internimage_hf import InternImageConfig, InternImageForImageClassification, InternImageImageProcessor


def read_tasks() -> dict[str, str]:
    """Reads the sections of the page by their headings."""
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.+)\n\n((?:(?!^## ).*\n)*)", text, flags=re.MULTILINE))
    return {heading[0].lower() + heading[1:]: content for heading, content in sections.items()}


TASKS = read_tasks()
TESTED = set()


def task(*wanted: str):
    """Marks the sections that a test runs."""
    TESTED.update(wanted)
    return lambda test: test


def code_of(wanted: str) -> list[str]:
    """Returns the pieces of code of a section, blocks and inline code in their order."""
    return [
        block or inline for block, inline in re.findall(r"```\w+\n(.+?)\n```|`(.+?)`", TASKS[wanted], flags=re.DOTALL)
    ]


def test_every_section_has_a_test():
    assert set(TASKS) == TESTED


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small checkpoint in place of the Hub's."""
    config = InternImageConfig(**{**TINY, "depths": [1, 1, 1, 1], "num_labels": 1000, "image_size": 64})
    size = {"height": 64, "width": 64}
    folder = tmp_path / "checkpoint"
    InternImageForImageClassification(config).save_pretrained(folder)
    InternImageImageProcessor(size={"shortest_edge": 64}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def run(programs, checkpoint, photos, monkeypatch, tmp_path):
    """Runs a section's first command in an empty folder, with replaced words and additional flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    others = {"my/photos": photos}

    def run(wanted: str, *more: object, **replaced: object):
        command = next(code for code in code_of(wanted) if code.startswith(("python ", "accelerate ")))
        words = [
            str(checkpoint if word.startswith("OpenGVLab/") else {**others, **replaced}.get(word, word))
            for word in shlex.split(command)
        ]
        words += map(str, more)
        if words[:2] == ["accelerate", "launch"]:
            assert words[2] == "--config_file" and words[4] == "--num_processes" and Path(words[3]).is_file()
            return launch(Path(words[3]).stem, Path(words[6]).resolve(), *words[7:])
        assert words[0] == "python"
        if words[1] == "-m":
            return importlib.import_module(words[2]).main(words[3:])
        assert Path(words[1]).is_file()
        return importlib.import_module(Path(words[1]).stem).main(words[2:])

    return run


STEP = [
    "--max_steps", 1, "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--use_cpu",
    "--per_device_train_batch_size", 4, "--logging_strategy", "no", "--output_dir", "out",
]  # fmt: skip


def image_size(folder: str) -> int:
    return json.loads(Path(folder, "config.json").read_text())["image_size"]


@task("classify images")
def test_classify(checkpoint, photos):
    code = code_of("classify images")[0].replace("OpenGVLab/internimage_t_1k_224", str(checkpoint))
    best = eval(code, {"pipeline": transformers.pipeline})(str(photos / "dark" / "0.png"), top_k=1)
    assert len(best) == 1 and not best[0]["label"].startswith("LABEL")


@task("fine-tune on my images", "go on after a crash, also with another number of processes")
def test_fine_tune_and_go_on(run):
    steps = ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
    steps = [*STEP, *steps, "--load_best_model_at_end", "true", "--max_steps"]
    assert set(run("fine-tune on my images", *steps, 2)) >= {"eval_accuracy", "eval_loss"}
    (flag,) = (code for code in code_of("go on after a crash, also with another number of processes") if "--" in code)
    run("fine-tune on my images", *steps, 4, *flag.split())
    state = json.loads(Path("out", "trainer_state.json").read_text())
    assert state["global_step"] == 4 and min(entry["step"] for entry in state["log_history"]) == 2
    config = json.loads(Path("out", "config.json").read_text())
    assert sorted(config["label2id"]) == ["bright", "dark"] and image_size("out") == 64


@task("train as the authors did", "change a recipe")
def test_recipes(run, photos, checkpoint):
    """Runs one step of a small model on small images; it accumulates the batch of 1024."""
    small = [*STEP, "--dataset", photos, "--image_size", 32, "--model", checkpoint, "--dataloader_num_workers", 0]
    small += ["--max_train_samples", 8, "--max_steps", -1, "--num_train_epochs", 1, "--warmup_epochs", 0]
    run("train as the authors did", *small, "--total_train_batch_size", 8)
    assert torch.load("out/training_args.bin", weights_only=False).bf16
    recipes = ROOT / code_of("train as the authors did")[1]
    assert {file.name.partition("_")[0] for file in recipes.glob("*.yaml")} == {
        "imagenet1k",
        "imagenet22k",
        "coco",
        "ade20k",
    }
    run("change a recipe", *small)
    arguments = torch.load("out/training_args.bin", weights_only=False)
    assert arguments.learning_rate == 1e-3 and arguments.gradient_accumulation_steps == 1024 // 4
    assert arguments.max_grad_norm == 5.0, "what the recipe says and no flag"


@task("train a detector")
def test_detector(run, coco_folder):
    metrics = run("train a detector", *STEP, "--image_size", 160, COCO_FOLDER=coco_folder)
    assert metrics["eval_map"] >= 0 and Path("out", "predictions.png").is_file()
    assert set(code_of("train a detector")[1:]) == set(importlib.import_module("object_detection").HEADS)


@task("train a segmenter")
def test_segmenter(run, mask_folder):
    metrics = run("train a segmenter", *STEP, "--image_size", 64, "--reduce_labels", FOLDER=mask_folder)
    assert metrics["eval_mean_iou"] >= 0 and Path("out", "predictions.png").is_file()
    assert set(code_of("train a segmenter")[1:]) == set(importlib.import_module("semantic_segmentation").HEADS)


@task("train an instance segmenter")
def test_instance_segmenter(run, coco_folder):
    small = ["--image_size", 64, "--head_config_overrides", json.dumps(SMALL_HEADS["mask2former"])]
    metrics = run("train an instance segmenter", *STEP, *small, COCO_FOLDER=coco_folder)
    assert metrics["eval_mask_map"] >= 0 and Path("out", "predictions.png").is_file()
    flag, value = code_of("train an instance segmenter")[1].split()
    arguments = importlib.import_module("instance_segmentation").InstanceDataArguments
    assert hasattr(arguments, flag.removeprefix("--")) and value == "1000"


@task("use another head of transformers")
def test_use_another_head():
    """test_heads.py runs all heads and compares their number with the README's."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    code = code_of("use another head of transformers")[0].replace("...", "**fields, out_features=stages")
    head = {}
    exec(code, {"InternImageConfig": InternImageConfig, "fields": TINY, "stages": stages}, head)
    model = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(**head, auxiliary_in_channels=32, hidden_size=16, auxiliary_channels=8)
    )
    assert model.eval()(torch.randn(1, 3, 64, 64)).logits.shape[-2:] == (64, 64)


@task("fine-tune with LoRA")
def test_lora(checkpoint):
    peft = pytest.importorskip("peft", reason="needs `pip install internimage-hf[export]`")
    model = InternImageForImageClassification.from_pretrained(checkpoint)
    names = {"peft": peft, "model": model}
    (code,) = code_of("fine-tune with LoRA")
    exec(code, names)
    model = names["model"]
    trainable, of = model.get_nb_trainable_parameters()
    assert 0 < trainable - model.classifier.original_module.weight.numel() < of / 2
    assert "pooler.norm.modules_to_save.default.running_mean" in "\n".join(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "wanted, processes",
    [
        ("train on several GPUs", 2),
        ("train a model too large for one GPU", 2),
        ("try several processes without a GPU", None),
    ],
)
@task("train on several GPUs", "train a model too large for one GPU", "try several processes without a GPU")
def test_several_processes(run, wanted, processes):
    replaced = {"8": processes} if processes else {}
    flags = STEP if processes else [*STEP, "--max_train_samples", 16, "--max_eval_samples", 16]
    run(wanted, *flags, **replaced)
    model = InternImageForImageClassification.from_pretrained("out")
    assert model.config.num_labels == (2 if processes else 10)


@task("train on data that does not fit on the disk")
def test_streaming(run, photos, tmp_path, checkpoint):
    for split, numbers in (("train", range(15)), ("validation", range(15, 20))):
        for label in ("dark", "bright"):
            (tmp_path / "disk" / split / label).mkdir(parents=True)
            for i in numbers:
                (photos / label / f"{i}.png").rename(tmp_path / "disk" / split / label / f"{i}.png")
    small = [
        "--dataset",
        tmp_path / "disk",
        "--model",
        checkpoint,
        "--max_steps",
        4,
        "--per_device_train_batch_size",
        4,
    ]
    small += ["--use_cpu", "--eval_steps", 2, "--save_steps", 2, "--output_dir", "out"]
    run("train on data that does not fit on the disk", *small)
    assert Path("out", "checkpoint-4").is_dir() and Path("out", "predictions.png").is_file()


@pytest.mark.parametrize(
    "program",
    [
        "image_classification",
        pytest.param("object_detection", marks=pytest.mark.slow),
        pytest.param("semantic_segmentation", marks=pytest.mark.slow),
        pytest.param("instance_segmentation", marks=pytest.mark.slow),
    ],
)
@task("put the result on the Hub")
def test_push_to_hub(hub, tmp_path, program):
    hub.required_metadata = ()
    push, remote_code = code_of("put the result on the Hub")
    small = [*STEP, "--max_train_samples", 8, "--max_eval_samples", 4]
    if program != "image_classification":
        heads = {
            "object_detection": "rt_detr",
            "semantic_segmentation": "upernet",
            "instance_segmentation": "mask2former",
        }
        small += ["--image_size", 64, "--head_config_overrides", json.dumps(SMALL_HEADS[heads[program]])]
    words = [ROOT / "examples" / f"{program}.py", *small, *push.split(), remote_code]
    run_command(sys.executable, *words, cwd=tmp_path, **hub.environment(tmp_path), PYTHONPATH=str(ROOT))
    (name, files), *others = hub.repositories.items()
    assert f"--hub_model_id {name}" in push and not others
    written = {file.name for file in (tmp_path / "out").iterdir() if file.is_file()}
    assert files.keys() == written >= {"README.md", "config.json", "model.safetensors", "predictions.png", "dcnv3.py"}
    assert all(content == (tmp_path / "out" / file).read_bytes() for file, content in files.items())


@pytest.mark.slow
@task("classify or embed millions of images")
def test_batch_inference(run, photos):
    pytest.importorskip("ray", reason="needs `pip install internimage-hf[batch]`")
    wanted = "classify or embed millions of images"
    command = next(code for code in code_of(wanted) if code.startswith("python "))
    words = [{"DIR_OR_URL": str(photos)}.get(word, word) for word in command.split()]
    words[words.index("--output") + 1] = "out"
    words[-1] = "checkpoint"
    small = ["--num_cpus", "2", "--object_store_mb", "100"]
    for more in ([], [*code_of(wanted)[1].split(), "--output", "embeddings"]):
        assert "40 images" in run_command(sys.executable, *words[1:], *more, *small)
    assert list(Path("out").glob("part-*.parquet")) and list(Path("embeddings").glob("part-*.parquet"))
    assert code_of(wanted)[2] == "--address auto"
    assert "address" in vars(importlib.import_module("batch_inference").BatchArguments())


EXPORTS = [
    "run it in ONNX Runtime",
    "export a backbone",
    "keep DCNv3 as one node for a TensorRT plug-in",
    "run it without Python",
    "make the file smaller",
]


@pytest.mark.slow
@task(*EXPORTS)
@pytest.mark.parametrize("wanted", EXPORTS)
def test_export(run, wanted):
    onnx = pytest.importorskip("onnx", reason="needs `pip install internimage-hf[export]`")
    run(wanted)
    file = Path("out", "model.pt2" if "aoti" in TASKS[wanted] else "model.onnx")
    assert file.stat().st_size > 50_000
    if file.suffix == ".onnx":
        graph = onnx.load(file).graph
        nodes = [node for node in graph.node if node.op_type == "DCNv3"]
        named = re.search(r"attributes `(.+?)`", TASKS[wanted])
        if named is not None:
            assert len(nodes) == 4 and {attribute.name for attribute in nodes[0].attribute} == set(
                named[1].split(", ")
            )
        else:
            assert not nodes
        assert len(graph.output) == (3 if "backbone" in wanted else 1)


@task("share a model with people who lack this package")
def test_share(checkpoint, tmp_path):
    """test_package.py loads such a folder without the package."""
    model = InternImageForImageClassification.from_pretrained(checkpoint)
    names = {
        "save_with_remote_code": internimage_hf.save_with_remote_code,
        "model": model,
        "folder": tmp_path / "shared",
    }
    eval(code_of("share a model with people who lack this package")[0], names)
    assert "auto_map" in json.loads((tmp_path / "shared" / "config.json").read_text())


@task("convert a released `.pth` file")
def test_convert(run):
    source = FIXTURES / "t_like"
    command = {"internimage_t_1k_224": source / "checkpoint.pth", "FOLDER": "converted"}
    assert run("convert a released `.pth` file", "--config", source / "config.json", **command) == 0
    expected = load_file(source / "expected.safetensors")
    model = InternImageForImageClassification.from_pretrained("converted").eval()
    torch.testing.assert_close(model(expected["pixel_values"]).logits, expected["logits"], atol=1e-4, rtol=0)


@task("make it faster on my CPU")
def test_make_kernel():
    environment = Path(sys.prefix)
    if not (environment / ".installed").is_file():
        pytest.skip("this environment is not of `make install`")
    code = code_of("make it faster on my CPU")
    for command in code[:2]:
        dry = [] if command == "make kernel" else ["--dry-run"]  # the wheels are built in test_kernel_loader.py
        subprocess.run([*command.split(), f"VENV={environment}", *dry], cwd=ROOT, check=True, capture_output=True)
    report = eval(code[2], {"dcnv3_backend_report": internimage_hf.dcnv3.dcnv3_backend_report})
    assert "kernel" in str(report)


@task("use DCNv4 or DCNv3 in my own network")
def test_modules_and_operator():
    names = {}
    exec(code_of("use DCNv4 or DCNv3 in my own network")[0], names)
    images = torch.randn(2, 6, 5, 32)
    assert names["DCNv3"](32, group=2)(images).shape == names["DCNv4"](32, group=2)(images).shape == images.shape
    assert names["dcnv4"](images, torch.randn(2, 6, 5, 56), groups=2).shape == images.shape
