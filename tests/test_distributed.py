"""Tests of training in several processes (CPUs, gloo) and after a crash: results equal one uninterrupted process."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from distributed_worker import GLOBAL_BATCH, IMAGES, make_stream, train
from PIL import Image
from safetensors.torch import load_file
from utils import CONFIGURATIONS, FEW_STEPS, FIXTURES, LAUNCH_ENVIRONMENT, ROOT, SMALL_HEADS, launch, run_main

from internimage_hf import InternImageForImageClassification, InternImageImageProcessor
from internimage_hf.training import EMA_FILE, last_checkpoint


pytest.importorskip("accelerate")

TESTS = Path(__file__).parent
STEPS = 9
CHECKPOINT = 4
STREAM_STEPS = 8


def run(engine: str, *runs: dict, processes: int = 2, check: bool = True) -> str:
    runs = [{name: str(v) if isinstance(v, Path) else v for name, v in r.items()} for r in runs]
    return launch(engine, TESTS / "distributed_worker.py", json.dumps(runs), processes=processes, check=check)


def result(folder: Path, process: int = 0) -> dict:
    return json.loads((folder / f"result_{process}.json").read_text())


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def difference(one: Path, other: Path, statistics: bool = True) -> float:
    """Returns the largest difference of two models' weights."""
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    own = ("running_mean", "running_var", "num_batches_tracked")
    names = [name for name in one if statistics or not name.endswith(own)]
    return max((one[name].double() - other[name].double()).abs().max().item() for name in names)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """One thread, as in the started processes: sums have the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """Results of one process: with the head's BatchNorm frozen, with batch statistics, and with averaged weights."""
    folder = tmp_path_factory.mktemp("single")
    train(str(folder / "frozen"))
    # BatchNorm sees only its process's batch: two processes equal one process with two micro-batches.
    train(str(folder / "batch_statistics"), frozen_statistics=False, micro_batches=2)
    train(str(folder / "ema"), ema_decay=0.8, save_steps=CHECKPOINT)
    return folder


def runs(folder: Path) -> list[dict]:
    return [
        {"folder": folder / "batch_statistics", "frozen_statistics": False},
        {"folder": folder / "ema", "ema_decay": 0.8},
        {"folder": folder / "stream", "stream": True, "max_steps": STREAM_STEPS},
    ]


def check_equal(folder: Path, single: Path) -> None:
    for name in ("batch_statistics", "ema"):
        off = difference(
            folder / name / "model.safetensors", single / name / "model.safetensors", name != "batch_statistics"
        )
        expected = torch.tensor(losses(single / name))
        off_loss = (torch.tensor(losses(folder / name)) - expected).abs().max().item()
        print(f"{name}: weights differ by {off:.1e}, losses by {off_loss:.1e}")
        assert len(expected) == STEPS and off < 1e-5 and off_loss < 1e-5
        assert result(folder / name)["rates"] == result(single / name)["rates"]
        assert len(result(folder / name)["rates"]) > 10  # by layer, offsets, with and without weight decay
        # all processes evaluate the same model, even if their BatchNorm statistics differed in training
        found = [result(folder / name, process)["evaluation"]["eval_loss"] for process in range(2)]
        assert found[0] == pytest.approx(found[1], rel=1e-6)
        if name != "batch_statistics":
            assert found[0] == pytest.approx(result(single / name)["evaluation"]["eval_loss"], rel=1e-5)
    assert difference(single / "ema" / "model.safetensors", single / "frozen" / "model.safetensors") > 1e-5


def check_stream(folder: Path) -> None:
    """Each of two processes sees its part of the stream: an epoch of 48 images and 16 images of the next."""
    seen = [result(folder, process)["seen"][:STREAM_STEPS] for process in range(2)]  # one more batch is prefetched
    each = [[i for batch in batches for i in batch] for batches in seen]
    assert [len(indices) for indices in each] == [STREAM_STEPS * GLOBAL_BATCH // 2] * 2
    assert each == [drawn(process, 2, STREAM_STEPS * GLOBAL_BATCH // 2) for process in range(2)]


def drawn(process: int, processes: int, count: int) -> list[int]:
    iterator = iter(make_stream().part(process, processes))
    return [next(iterator)["index"] for _ in range(count)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    run("ddp", *runs(folder))
    return folder


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    run("fsdp2", *runs(folder))
    return folder


LAST_COLLECTIVE = """
import atexit, os, sys, time


@atexit.register  # the first registered function runs last
def last():
    print("the last function", flush=True)
    # The other process does its part now. To let go of the tensor, the thread that did ours waits for Python, which is busy
    # until its interpreter is taken down.
    sys.setswitchinterval(1000)
    os.write(writer, b"x")
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass


class WhenTheInterpreterIsTakenDown:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)  # and lets the thread go on


import torch, torch.distributed as dist
from data import run_program

reader, writer = os.pipe()
is_first = os.fork() != 0
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(not is_first), world_size=2)
tensor = torch.ones(1)
if not is_first:
    os.read(reader, 1)
    dist.all_reduce(tensor)
    os._exit(0)
_in_the_end = WhenTheInterpreterIsTakenDown()
in_use = dist.group.WORLD  # as by a model in DDP
dist.all_reduce(tensor, async_op=True)
run_program(lambda: None)
"""


def test_program_exits_cleanly_with_process_group(tmp_path):
    """Without `leave_process_group` the program ends by SIGABRT, even if it destroys the group."""
    ended = subprocess.run(
        [sys.executable, "-c", LAST_COLLECTIVE, tmp_path / "rendezvous"],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, **LAUNCH_ENVIRONMENT, "PYTHONPATH": str(ROOT / "examples")},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "the last function\n"), ended.stderr


FAILING = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("rank 1 was here", file=sys.stderr)
    os.abort()
time.sleep(60)
"""


def test_failed_launch_shows_output_of_each_process(tmp_path):
    (tmp_path / "program.py").write_text(FAILING)
    with pytest.raises(AssertionError, match="SIGABRT") as failure:
        launch("ddp", tmp_path / "program.py")
    message = str(failure.value)
    folder = Path(re.search("all output is in (.*)", message)[1])
    assert "=== output" in message and len(list(folder.glob("*/attempt_0/*/stderr.log"))) == 2
    one = message[message.index("1/stderr.log") :]
    assert "rank 1 was here" in one and "Fatal Python error: Aborted" in one and "Extension modules" not in one
    shutil.rmtree(folder)


def test_ddp_equals_single_process(single, ddp):
    assert result(ddp / "ema")["engine"].endswith("MULTI_CPU")
    check_equal(ddp, single)
    check_stream(ddp / "stream")


def test_fsdp2_equals_single_process(single, fsdp2):
    assert result(fsdp2 / "ema")["engine"].endswith("FSDP")
    assert "FSDPInternImageLayer" in result(fsdp2 / "ema")["sharded"]  # by `_no_split_modules`
    check_equal(fsdp2, single)
    check_stream(fsdp2 / "stream")


def test_fsdp2_checkpoint_loads_in_single_process(single, fsdp2):
    """The model and every checkpoint are whole, beside a sharded state to resume from."""
    assert list((fsdp2 / "ema" / "checkpoint-4").glob("optimizer_0/*.distcp"))
    pixel_values = torch.randn(2, 3, 32, 32)
    for name in ("ema", "ema/checkpoint-4"):
        logits = []
        for folder in (single, fsdp2):
            model, info = InternImageForImageClassification.from_pretrained(folder / name, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            with torch.no_grad():
                logits.append(model.eval()(pixel_values).logits)
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    off = difference(single / "ema" / "checkpoint-4" / EMA_FILE, fsdp2 / "ema" / "checkpoint-4" / EMA_FILE)
    assert off < 1e-5


@pytest.mark.slow
def test_fsdp2_resumes_with_other_number_of_processes(single, fsdp2, tmp_path):
    """From 2 to 1 and 1 to 2 processes: weights, optimiser, schedule, average and position in the data."""
    one = [
        {"folder": tmp_path / "2to1", "ema_decay": 0.8, "resume": fsdp2 / "ema" / "checkpoint-4"},
        {"folder": tmp_path / "1", "ema_decay": 0.8},
    ]
    run("fsdp2", *one, processes=1)
    run("fsdp2", {"folder": tmp_path / "1to2", "ema_decay": 0.8, "resume": tmp_path / "1" / "checkpoint-4"})
    for name in ("2to1", "1", "1to2"):
        off = difference(tmp_path / name / "model.safetensors", single / "ema" / "model.safetensors")
        print(f"{name}: {off:.1e}")
        assert off < 1e-5
    both = zip(*(result(tmp_path / "1to2", process)["seen"] for process in range(2)), strict=True)
    images = [sorted(itertools.chain(*batches)) for batches in both]
    left = STEPS - CHECKPOINT
    assert images[:left] == [sorted(batch) for batch in result(tmp_path / "1")["seen"][CHECKPOINT:STEPS]]


@pytest.mark.slow
def test_ddp_resumes_with_other_number_of_processes(single, ddp, tmp_path):
    train(str(tmp_path / "2to1"), ema_decay=0.8, resume=str(ddp / "ema" / "checkpoint-4"))
    run("ddp", {"folder": tmp_path / "1to2", "ema_decay": 0.8, "resume": single / "ema" / "checkpoint-4"})
    for name in ("2to1", "1to2"):
        assert difference(tmp_path / name / "model.safetensors", single / "ema" / "model.safetensors") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_run_with_killed_process_resumes(engine, tmp_path):
    options = {"ema_decay": 0.8, "drop_path_rate": 0.3}
    run(engine, {"folder": tmp_path / "parts", "kill_at": 7, **options}, check=False)
    assert last_checkpoint(tmp_path / "parts") == str(tmp_path / "parts" / "checkpoint-4")
    run(
        engine,
        {"folder": tmp_path / "parts", "resume": tmp_path / "parts" / "checkpoint-4", **options},
        {"folder": tmp_path / "whole", **options},
    )
    assert difference(tmp_path / "parts" / "model.safetensors", tmp_path / "whole" / "model.safetensors") < 1e-6


@pytest.mark.slow
def test_deepspeed_equals_single_process(single, tmp_path):
    """ZeRO-3 in two processes, and a resumed checkpoint."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run("deepspeed_zero3", {"folder": tmp_path / "whole"})
    run("deepspeed_zero3", {"folder": tmp_path / "parts", "resume": tmp_path / "whole" / "checkpoint-4"})
    assert result(tmp_path / "whole")["engine"].endswith("DEEPSPEED")
    for name in ("whole", "parts"):
        off = difference(tmp_path / name / "model.safetensors", single / "frozen" / "model.safetensors")
        print(f"largest difference {off:.1e}")
        assert off < 1e-5
    expected = torch.tensor(losses(single / "frozen"))
    assert (torch.tensor(losses(tmp_path / "whole")) - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "head, flags",
    [
        ("detr", ["--image_size", 64]),
        ("rt_detr", ["--image_size", 160]),
        ("upernet", ["--image_size", 64, "--reduce_labels"]),
    ],
)
def test_heads_load_backbone_under_deepspeed(head, flags, coco_folder, mask_folder, tmp_path):
    """With a learning rate of 0, heads keep the checkpoint's backbone, which ZeRO-3 shards before it builds the head."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    detects = head.endswith("detr")
    launch(
        "deepspeed_zero3", ROOT / "examples" / ("object_detection.py" if detects else "semantic_segmentation.py"),
        "--dataset", coco_folder if detects else mask_folder, "--backbone", FIXTURES / "hf_t_like", "--head", head, *flags,
        "--head_config_overrides", json.dumps(SMALL_HEADS[head]), "--output_dir", tmp_path, *FEW_STEPS,
        "--per_device_train_batch_size", 2, "--learning_rate", 0, "--weight_decay", 0,
    )  # fmt: skip
    checkpoint = InternImageForImageClassification.from_pretrained(FIXTURES / "hf_t_like").internimage.state_dict()
    saved = load_file(tmp_path / "model.safetensors")
    found = 0
    for name, tensor in saved.items():
        _, is_backbone, rest = name.partition("encoder.stages.")
        if is_backbone and "backbone" in name:
            torch.testing.assert_close(tensor, checkpoint["encoder.stages." + rest], atol=0, rtol=0)
            found += 1
    assert found > 100


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_training_resumes_exactly(stream, tmp_path):
    """Killed within the second epoch; the unfinished checkpoint is skipped."""
    options = {"ema_decay": 0.8, "drop_path_rate": 0.3, "stream": stream, "max_steps": 12}
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    command = [
        sys.executable,
        TESTS / "distributed_worker.py",
        json.dumps([{"folder": str(parts), "kill_at": 11, **options}]),
    ]
    killed = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={**os.environ, **LAUNCH_ENVIRONMENT}, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert sorted(f.name for f in parts.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    unfinished = parts / "checkpoint-10"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"")
    assert last_checkpoint(parts) == str(parts / "checkpoint-8")
    resumed = train(str(parts), resume=True, **options)
    train(str(whole), **options)
    off = difference(parts / "model.safetensors", whole / "model.safetensors")
    print(f"largest difference {off:.1e}")
    assert off < 1e-6
    assert result(parts)["seen"][-4:] == result(whole)["seen"][-4:]
    assert resumed.state.global_step == 12


def test_resumed_stream_continues_at_same_example(tmp_path):
    """Resumed in the third epoch of the stream; `Trainer` counts none."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"stream": True, "max_steps": 15, "save_steps": 13, "drop_path_rate": 0.3}
    train(str(whole), **options)
    train(str(parts), resume=str(whole / "checkpoint-13"), **options)
    assert result(parts)["seen"] == result(whole)["seen"]  # skipped examples are read again
    assert difference(parts / "model.safetensors", whole / "model.safetensors") < 1e-6


def test_last_checkpoint_of_empty_folder_is_none(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": ')
    assert last_checkpoint(tmp_path) is None


# ------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_stream_yields_each_example_once_per_epoch(processes):
    """With as many shards as processes, fewer, and more."""
    by_process = [epochs(make_stream().part(process, processes), 3) for process in range(processes)]
    by_epoch = [list(itertools.chain(*parts)) for parts in zip(*by_process, strict=True)]
    assert all(sorted(indices) == list(range(IMAGES)) for indices in by_epoch)
    assert by_epoch[0] != by_epoch[1] != by_epoch[2] != by_epoch[0]
    for process, parts in enumerate(by_process):
        indices = list(itertools.chain(*parts))
        assert drawn(process, processes, len(indices)) == indices


def epochs(stream, count: int) -> list[list[int]]:
    """Returns the expected indices of a stream's first epochs."""
    orders = (stream.dataset.shuffle(seed=stream.seed + e, buffer_size=stream.buffer_size) for e in range(count))
    return [[example["index"] for example in order] for order in orders]


def test_stream_in_workers_yields_every_example():
    loader = torch.utils.data.DataLoader(make_stream(), batch_size=None, num_workers=2)
    iterator = iter(loader)
    indices = [next(iterator)["index"] for _ in range(2 * IMAGES)]
    assert set(Counter(indices).values()) <= {1, 2, 3} and set(indices) == set(range(IMAGES))


# --------------------------------------------------------------------------------------- the classification example


@pytest.fixture
def classification(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import image_classification

    return image_classification


STEPWISE = [
    "--eval_strategy", "steps", "--save_strategy", "steps", "--logging_strategy", "no", "--dataloader_pin_memory", "false", "--use_cpu",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("engine, flags", [("ddp", ["--streaming"]), ("fsdp2", [])])
def test_classification_example_runs_in_two_processes(engine, flags, tmp_path, classification):
    folder = tmp_path / "model"
    flags = ["--output_dir", folder, *STEPWISE, "--ema_decay", 0.9, "--layer_decay", 0.95, *flags]
    output = launch(
        engine, ROOT / "examples" / "image_classification.py", *flags, "--max_steps", 60, "--eval_steps", 30, "--save_steps", 30
    )  # fmt: skip
    assert ("streamed" if "--streaming" in flags else "1437 images to train, 360 to evaluate") in output
    accuracy = json.loads((folder / "all_results.json").read_text())["eval_accuracy"]
    evaluation = classification.load_digits()["test"]
    processor = InternImageImageProcessor.from_pretrained(folder)
    batch = classification.evaluation_transform(processor)(evaluation[:])
    with torch.no_grad():
        logits = InternImageForImageClassification.from_pretrained(folder).eval()(batch["pixel_values"]).logits
    assert accuracy == pytest.approx(
        (logits.argmax(-1) == torch.tensor(batch["labels"])).float().mean().item(), abs=1e-6
    )
    assert accuracy > 0.8
    # the same command again resumes from the last checkpoint
    output = launch(
        engine, ROOT / "examples" / "image_classification.py", *flags, "--max_steps", 64, "--eval_steps", 4, "--save_steps", 4,
        "--resume_from_checkpoint", "last",
    )  # fmt: skip
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 64


@pytest.mark.slow
@pytest.mark.parametrize("head, fields", [("deformable_detr", {}), ("dino", {"num_denoising": 0})])
def test_detection_example_runs_in_two_processes(head, fields, coco_folder, tmp_path):
    """Losses are normalised by the boxes of all processes: weights and COCO's metrics equal one process.

    Denoising queries are random numbers of each process, as many as the process's images have boxes.
    """
    flags = [
        "--dataset", coco_folder, "--head", head, "--image_size", 64,
        "--head_config_overrides", json.dumps({**SMALL_HEADS[head], **fields}), *FEW_STEPS, "--max_train_samples", 8, "--max_steps", 6,
        # an optimiser that shows a wrong factor of the gradients and does not amplify rounding
        "--optim", "sgd", "--learning_rate", 1e-4, "--max_grad_norm", 1e6, "--logging_strategy", "steps", "--logging_steps", 1,
        "--random_crop_scale", 1,  # images of one shape: padding would depend on a process's batch
    ]  # fmt: skip
    for processes in (1, 2):
        launch(
            "ddp", ROOT / "examples" / "object_detection.py", *flags, "--output_dir", tmp_path / str(processes),
            "--per_device_train_batch_size", 4 // processes, "--per_device_eval_batch_size", 2 // processes,
            processes=processes,
        )  # fmt: skip
    off = difference(*(tmp_path / str(processes) / "checkpoint-6" / "model.safetensors" for processes in (1, 2)))
    print(f"largest difference {off:.1e}")
    assert off < 1e-5
    assert (
        losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4) and len(losses(tmp_path / "1")) == 6
    )
    one, two = (json.loads((tmp_path / str(n) / "all_results.json").read_text()) for n in (1, 2))
    coco = [name for name in one if name.startswith(("eval_map", "eval_mar"))]
    assert len(coco) == 12 and all(one[name] == pytest.approx(two[name], abs=1e-4) for name in coco)
    assert (tmp_path / "2" / "predictions.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("engine, head", [("ddp", "upernet"), ("fsdp2", "mask2former")])
def test_segmentation_example_runs_in_two_processes(engine, head, programs, mask_folder, tmp_path):
    """Both processes evaluate the saved model."""
    flags = [
        "--dataset", mask_folder, "--reduce_labels", "--head", head, "--image_size", 64, "--output_dir", tmp_path / "model",
        "--head_config_overrides", json.dumps(SMALL_HEADS[head]), *FEW_STEPS, "--learning_rate", 1e-2,
    ]  # fmt: skip
    launch(engine, ROOT / "examples" / "semantic_segmentation.py", *flags)
    metrics = json.loads((tmp_path / "model" / "all_results.json").read_text())

    program = programs.semantic_segmentation
    data, model, arguments = program.parse_flags(
        [*map(str, flags[:3]), "--model", str(tmp_path / "model"), *map(str, FEW_STEPS), "--output_dir", str(tmp_path)],
        program.SegmentationDataArguments, program.SegmentationModelArguments, program.SegmentationTrainingArguments,
    )  # fmt: skip
    _, evaluation, labels = program.load_splits(data, arguments.seed)
    model, processor = program.build_model(model, data, labels)
    trainer = program.SegmentationTrainer(
        model=model,
        args=arguments,
        train_dataset=programs.common.RandomlyTransformed([], None, 0),
        eval_dataset=evaluation,
        data_collator=program.Collate(processor),
        compute_metrics=program.segmentation_metrics,
        processing_class=processor,
    )
    alone = trainer.evaluate()
    for name in ("eval_mean_iou", "eval_mean_accuracy", "eval_overall_accuracy"):
        assert metrics[name] == pytest.approx(alone[name], abs=1e-4)


def check_metrics_of_one_process(program: ModuleType, folder: Path, data: list, count: int) -> None:
    """One process finds COCO's metrics of the saved model, `folder / "model"`, again."""
    metrics = json.loads((folder / "model" / "all_results.json").read_text())
    alone = run_main(
        program, *data, *FEW_STEPS, "--model", folder / "model", "--learning_rate", 0, "--max_steps", 1,
        "--eval_strategy", "no", "--save_strategy", "no", "--output_dir", folder / "alone",
    )  # fmt: skip
    coco = [name for name in metrics if "map" in name or "mar" in name]
    assert len(coco) == count and all(metrics[name] == pytest.approx(alone[name], abs=1e-4) for name in coco)


@pytest.mark.slow
def test_dino_trains_and_resumes_under_fsdp2(programs, coco_folder, tmp_path):
    """With denoising. One process finds the metrics of the saved model again."""
    data = ["--dataset", coco_folder, "--image_size", 64]
    head = ["--head", "dino", "--head_config_overrides", json.dumps(SMALL_HEADS["dino"])]
    flags = [*data, *head, *FEW_STEPS, "--learning_rate", 1e-2, "--output_dir", tmp_path / "model"]
    launch("fsdp2", ROOT / "examples" / "object_detection.py", *flags)
    expected = load_file(tmp_path / "model" / "checkpoint-4" / "model.safetensors")
    assert list((tmp_path / "model" / "checkpoint-4").glob("optimizer_0/*.distcp"))
    check_metrics_of_one_process(programs.object_detection, tmp_path, data, count=12)

    shutil.rmtree(tmp_path / "model" / "checkpoint-4")
    launch("fsdp2", ROOT / "examples" / "object_detection.py", *flags, "--resume_from_checkpoint", "last")
    again = load_file(tmp_path / "model" / "checkpoint-4" / "model.safetensors")
    assert max((again[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


@pytest.mark.slow
def test_instance_segmentation_example_runs_in_two_processes(programs, coco_folder, tmp_path):
    """Both processes evaluate the saved model, whose metrics one process finds again."""
    data = ["--dataset", coco_folder, "--image_size", 64]
    head = ["--head_config_overrides", json.dumps(SMALL_HEADS["mask2former"])]
    launch(
        "ddp", ROOT / "examples" / "instance_segmentation.py", *data, *head, *FEW_STEPS, "--learning_rate", 1e-2,
        "--output_dir", tmp_path / "model",
    )  # fmt: skip
    check_metrics_of_one_process(programs.instance_segmentation, tmp_path, data, count=24)


def test_classification_example_streams_folder(tmp_path, classification):
    photos = tmp_path / "photos"
    for split, count in (("train", 10), ("test", 4)):
        for label, colour in (("dark", 40), ("bright", 200)):
            (photos / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (colour + 5 * i,) * 3).save(photos / split / label / f"{i}.png")
    flags = ["--streaming", "--dataset", str(photos), "--output_dir", str(tmp_path / "model"), *STEPWISE]
    with pytest.raises(ValueError, match="max_steps"):
        classification.main(flags)
    steps = ["--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--per_device_train_batch_size", "8"]
    metrics = classification.main([*flags, *steps])
    assert set(metrics) >= {"eval_accuracy", "eval_loss"}
    assert (tmp_path / "model" / "checkpoint-2").is_dir()
    (photos / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="validation"):
        classification.main([*flags, *steps])


# ------------------------------------------------------------------------------------------------ configurations


def launched_with(engine: str) -> dict[str, str]:
    """Returns the environment that `accelerate launch` derives from a configuration for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = ["--config_file", str(CONFIGURATIONS / f"{engine}.yaml"), "program.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if not arguments.use_deepspeed:
        assert arguments.multi_gpu or arguments.use_fsdp
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)[1]


@pytest.mark.parametrize("engine", sorted(file.stem for file in CONFIGURATIONS.glob("*.yaml")))
def test_accelerate_configurations_set_expected_values(engine, monkeypatch):
    environment = launched_with(engine)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # left to `--bf16` of the examples
    expected = {
        "ddp": {},
        "fsdp2": {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        },
        "deepspeed_zero3": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
            "ACCELERATE_GRADIENT_CLIPPING": "auto",
        },
    }[engine]
    assert {name: environment.get(name) for name in expected} == expected
    if engine == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: its own reading is not checked")
        from accelerate.utils import DeepSpeedPlugin

        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert DeepSpeedPlugin().deepspeed_config["zero_optimization"]["stage"] == 3
