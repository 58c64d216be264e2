"""Helpers of several test files: paths, tiny architectures, programs in other processes, flags and data of small runs."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from safetensors.torch import load_file


FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent

MODEL_CASES = ("t_like", "s_like", "l_like", "g_like_no_clip", "h_like")


def load_case(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A parity case: the official state dict in float32, and the official model's inputs and outputs with it."""
    folder = FIXTURES / case
    state_dict = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    state_dict = {name: t.float() if t.is_floating_point() else t for name, t in state_dict.items()}
    return state_dict, load_file(folder / "expected.safetensors")


# The architectures of the tests: every switch of the official model is on in one of them and off in another.
TINY = {"channels": 8, "depths": [1, 1, 3, 1], "groups": [2, 4, 4, 8], "mlp_ratio": 2.0, "num_labels": 5}
TINY_VARIANTS = {
    "pre_norm": {},
    "post_norm": {"post_norm": True, "layer_scale_init_value": 0.1, "offset_scale": 2.0},
    "layer_scale_pre_norm": {"layer_scale_init_value": 0.5, "hidden_act": "relu"},
    "res_post_norm": {
        "res_post_norm": True,
        "level2_post_norm_block_ids": [0, 2],
        "dw_kernel_size": 5,
        "center_feature_scale": True,
    },
    "batch_norm": {"norm_layer": "BN", "hidden_act": "silu", "remove_center": True},
    "clip": {"post_norm": True, "center_feature_scale": True, "use_clip_projector": True, "remove_center": True},
    "dcnv4": {"dcn_version": 4},
    "dcnv4_post_norm": {
        "dcn_version": 4,
        "dw_kernel_size": 3,
        "post_norm": True,
        "layer_scale_init_value": 0.1,
        "offset_scale": 0.5,
        "dcn_output_bias": True,
        "mlp_fc2_bias": True,
    },
}


# ---------------------------------------------------------------------------------------------- programs in other processes


def run_command(*command: object, expect: int = 0, cwd: Path | None = None, **environment: str) -> str:
    """Runs a command that must end with the status `expect`.

    Returns its standard output, or its standard error where `expect` is not 0.
    """
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == expect, result.stderr[-3000:]
    return result.stdout if expect == 0 else result.stderr


def run_python(
    program: str, *arguments: object, cwd: Path = ROOT, flags: tuple[str, ...] = (), **environment: str
) -> str:
    """Runs a program text in a fresh interpreter and returns its standard output."""
    return run_command(sys.executable, *flags, "-c", textwrap.dedent(program), *arguments, cwd=cwd, **environment)


def run_example(name: str, *arguments: object, expect: int = 0, cwd: Path | None = None) -> str:
    """Runs a program of `examples/` in a process of its own, without GPUs; returns as `run_command` does."""
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return run_command(sys.executable, ROOT / "examples" / name, *arguments, expect=expect, cwd=cwd, **environment)


def bare_environment(tmp_path: Path, without: tuple[str, ...] = ()) -> dict:
    """Arguments of `run_python` for an interpreter with all installed packages but this one and those in `without`."""
    site = tmp_path / "site-packages"
    site.mkdir()
    installed = next(p for p in map(Path, sys.path) if (p / "transformers").is_dir())
    for entry in installed.iterdir():
        if "internimage" not in entry.name and entry.suffix != ".pth" and entry.name not in without:
            (site / entry.name).symlink_to(entry)
    assert not (site / "internimage_hf").exists()
    # -S leaves out the environment's own site-packages, where an editable installation of this package may lie
    return {"flags": ("-S",), "PYTHONPATH": str(site), "HF_MODULES_CACHE": str(tmp_path / "modules")}


CONFIGURATIONS = ROOT / "examples" / "accelerate"
LAUNCH_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
}


def launch(engine: str, program: Path, *arguments: object, processes: int = 2, check: bool = True) -> str:
    """Runs a program by `accelerate launch` with a configuration of the examples, and ends all its processes on any failure.

    Returns the output of all processes. After a failure the output stays in a folder that the message names.
    """
    logs = Path(tempfile.mkdtemp(prefix=f"launch-{engine}-"))
    shim = [ROOT / "tests" / "fsdp_on_cpu.py"] if engine == "fsdp2" else []
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGURATIONS / f"{engine}.yaml",
        "--num_processes", processes, "--main_process_port", _free_port(), "--tee", 3, "--log_dir", logs,
        *shim, program, *arguments,
    ]  # fmt: skip
    with (logs / "output").open("w") as output:
        process = subprocess.Popen(
            [*map(str, command)], stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **LAUNCH_ENVIRONMENT}
        )
        try:
            status = process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            status = "missing after 600 s; the stacks are below"
        finally:
            if process.poll() is None:
                _end(process.pid)
                process.wait()
    if status != 0 and (check or isinstance(status, str)):
        raise AssertionError(f"the exit status is {status}; all output is in {logs}\n{_ends_of_logs(logs)}")
    written = (logs / "output").read_text(errors="replace")
    shutil.rmtree(logs)
    return written


def _ends_of_logs(logs: Path, characters: int = 5000) -> str:
    """The last characters of each process's standard error and of the launcher's output."""
    ends = []
    for file in [*sorted(logs.glob("*/attempt_*/*/stderr.log")), logs / "output"]:
        # faulthandler lists all loaded extension modules, in one line of several thousand characters
        lines = [line for line in file.read_text(errors="replace").splitlines() if "Extension modules: " not in line]
        ends.append("\n".join(["", f"=== {file.relative_to(logs)}", "\n".join(lines)[-characters:]]))
    return "\n".join(ends)


def _free_port() -> int:
    """A free port below the ephemeral range: the system could give a port of that range to a client before the launch binds it."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def _end(root: int) -> None:
    """Ends a process and all its descendants; each may write its stack first.

    The descendants are found by their parents: torchrun starts its workers in new sessions, so no process group holds them all.
    """
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process ended meanwhile
            continue
        children[parent].append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children[pid]
    for what in (signal.SIGABRT, signal.SIGKILL):  # faulthandler writes the stacks on SIGABRT
        for pid in reversed(found):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)
        time.sleep(2)


# ------------------------------------------------------------------------------------- small runs of the example programs


SMALL_DETECTOR = {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
SMALL_RCNN = {
    "fpn_hidden_size": 8, "box_hidden_size": 16, "box_conv_size": 8, "num_mask_convs": 1, "mask_hidden_size": 8,
    "rpn_post_nms_top_n": 10, "rpn_post_nms_top_n_training": 10, "num_samples": 16, "max_detections": 5,
}  # fmt: skip
SMALL_HEADS = {
    "rt_detr": {**SMALL_DETECTOR, "encoder_hidden_dim": 16, "decoder_in_channels": [16] * 3, "num_queries": 10},
    "deformable_detr": {**SMALL_DETECTOR, "d_model": 32, "two_stage_num_proposals": 10},
    "detr": SMALL_DETECTOR,
    "dino": {**SMALL_DETECTOR, "encoder_layers": 1, "num_queries": 10, "num_denoising": 4},
    "mask_rcnn": SMALL_RCNN,
    "cascade": SMALL_RCNN,
    "upernet": {"hidden_size": 16, "auxiliary_channels": 8},
    "mask2former": {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "decoder_layers": 2, "train_num_points": 64},
}  # fmt: skip
FEW_STEPS = [
    "--per_device_train_batch_size", 4, "--per_device_eval_batch_size", 2, "--max_steps", 4, "--warmup_steps", 0,
    "--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2, "--use_cpu",
    "--disable_tqdm", "true", "--picture_samples", 2, "--logging_strategy", "no",
]  # fmt: skip
ONE_EPOCH = [
    "--use_cpu", "--disable_tqdm", "true", "--logging_strategy", "no", "--num_train_epochs", "1", "--warmup_steps", "0",
    "--per_device_train_batch_size", "4", "--learning_rate", "1e-3",
]  # fmt: skip


def run_main(program: ModuleType, *arguments: object) -> dict[str, float]:
    """Runs an example program in this process, which has loaded the libraries already; returns its metrics."""
    return program.main([str(argument) for argument in arguments])


def write_images(root: Path, names: Iterable[str], size: tuple[int, int] = (16, 12)) -> Path:
    """Writes images of one colour under the given names; images of one folder share their colour."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    for name in names:
        shade = 40 + 180 * folders.index(name.rpartition("/")[0]) // len(folders)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (shade, 255 - shade, shade)).save(root / name)
    return root


class CocoFolder:
    """Content of a folder in COCO's format, for tests to alter: two images per split, with one object each.

    `fields` are fields of the objects beside the category and the box.
    """

    size = (48, 32)  # width, height

    def __init__(self, root: Path, **fields: object):
        self.root, self.content = root, {}
        for split in ("train2017", "val2017"):
            (root / split).mkdir()
            for i in range(2):
                Image.new("RGB", self.size, (40 * i, 90, 10)).save(root / split / f"{i}.png")
            width, height = self.size
            self.content[split] = {
                "images": [
                    {"id": 10 + i, "file_name": f"{i}.png", "width": width, "height": height} for i in range(2)
                ],
                "annotations": [
                    {"id": 1 + i, "image_id": 10 + i, "category_id": 3 + i, "bbox": [4, 5, 20, 10], **fields}
                    for i in range(2)
                ],
                "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
            }
        self.train, self.val = self.content["train2017"], self.content["val2017"]

    def write(self) -> Path:
        (self.root / "annotations").mkdir(exist_ok=True)
        for split, content in self.content.items():
            (self.root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return self.root
