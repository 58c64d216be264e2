"""Tests of the conversion: every official layout into a folder for transformers, and its upload to a Hub over HTTP."""

import argparse
import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import httpx
from PIL import Image
from safetensors.torch import load_file, save_file
from utils import FIXTURES, MODEL_CASES, ROOT, bare_environment, load_case, run_python

from convert import all as convert_all
from convert import backbone, classification, cli, conversion, mask2former, upernet
from convert import output as output_module
from convert import source as source_module
from convert.conversion import REPORT
from convert.errors import ConversionError
from convert.hub import push
from convert.labels import class_names, id2label
from convert.released import RELEASED
from convert.source import sha256_of
from internimage_hf import (
    InternImageBackbone,
    InternImageConfig,
    InternImageForImageClassification,
)
from internimage_hf.checkpoint import translate_state_dict


def convert(module, *arguments: object) -> int:
    return module.main([str(argument) for argument in arguments])


def released_keys(variant: str) -> list[tuple[str, tuple[int, ...]]]:
    folder = "dcnv4_keys" if variant.startswith("flash_") else "state_dict_keys"
    with gzip.open(FIXTURES / folder / f"{variant.removeprefix('flash_')}.json.gz", "rt") as file:
        return [(key, tuple(shape)) for key, shape in json.load(file)]


# --------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("case", MODEL_CASES)
def test_released_layout_converts_with_official_outputs(case, tmp_path, capsys):
    folder = FIXTURES / case
    output = tmp_path / "model"
    assert (
        convert(classification, folder / "checkpoint.pth", "--config", folder / "config.json", "--output", output) == 0
    )
    assert "largest_difference" in capsys.readouterr().out
    state_dict, expected = load_case(case)
    model = InternImageForImageClassification.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(expected["pixel_values"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    report = json.loads((output / REPORT).read_text())
    assert report["tensors"]["entries"] == len(state_dict) and report["tensors"]["largest_difference"] == 0
    assert report["outputs"] | {"mean": 0, "std": 0} == report["outputs"] | {
        "mean": 0,
        "std": 0,
        "finite": True,
        "reproducible": True,
    }
    assert {path.name for path in output.iterdir()} == {
        "README.md", "config.json", "conversion_report.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("case", ["hf_t_like", "hf_s_like"])
def test_published_layout_converts_with_official_outputs(case, tmp_path):
    assert convert(classification, FIXTURES / case, "--output", tmp_path / "model") == 0
    expected = load_file(FIXTURES / case / "expected.safetensors")
    model = InternImageForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(expected["pixel_values"]).logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in RELEASED if RELEASED[name].published_repository])
def test_every_released_classification_checkpoint_maps_without_remainder(name):
    released = RELEASED[name]
    num_labels = len(class_names(released.labels))
    published = json.loads((FIXTURES / "released_models.json").read_text())[name]
    official = {
        key: torch.empty((num_labels, *shape[1:]) if key.startswith("head.") else shape, device="meta")
        for key, shape in released_keys(released.variant)
    }
    config = InternImageConfig.from_variant(released.variant, id2label=id2label(released.labels, num_labels))
    with torch.device("meta"):
        model = InternImageForImageClassification(config)
    model.load_state_dict(translate_state_dict(official), strict=True, assign=True)
    assert model.num_parameters() == published["num_parameters"]
    assert (released.metric, released.flops) == (
        published["top1_imagenet1k_percent"],
        published["flops_published_giga"],
    )
    assert released.size == published["image_size"] and published["config"]["num_classes"] == num_labels


@pytest.mark.parametrize("case", MODEL_CASES)
def test_reverse_conversion_round_trip_is_exact(case, tmp_path):
    folder = FIXTURES / case
    there, back, again = tmp_path / "there", tmp_path / "back.pth", tmp_path / "again"
    assert (
        convert(classification, folder / "checkpoint.pth", "--config", folder / "config.json", "--output", there) == 0
    )
    assert convert(classification, there, "--output", back, "--reverse") == 0
    original = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    reversed_state_dict = torch.load(back, weights_only=True)["model"]
    assert reversed_state_dict.keys() == original.keys()
    assert all(torch.equal(reversed_state_dict[name], tensor) for name, tensor in original.items())
    assert convert(classification, back, "--config", folder / "config.json", "--output", again) == 0
    one, other = (load_file(path / "model.safetensors") for path in (there, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "variant", [*("t", "s", "b", "l", "xl", "h", "g"), *("flash_t", "flash_s", "flash_b", "flash_l")]
)
def test_full_size_names_reverse(variant):
    with torch.device("meta"):
        model = InternImageForImageClassification(InternImageConfig.from_variant(variant))
    official = classification.official_state_dict(model)
    assert {name: tuple(t.shape) for name, t in official.items()} == dict(released_keys(variant))


def test_ema_dtype_and_shard_size_options_take_effect(tmp_path):
    state_dict, _ = load_case("t_like")
    averaged = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()}
    source = tmp_path / "both.pth"
    torch.save({"model": state_dict, "model_ema": averaged, "epoch": 3}, source)
    common = [source, "--config", FIXTURES / "t_like" / "config.json", "--output"]
    assert convert(classification, *common, tmp_path / "ema", "--ema") == 0
    ema = load_file(tmp_path / "ema" / "model.safetensors")
    assert torch.equal(ema["classifier.bias"], averaged["head.bias"])

    assert convert(classification, *common, tmp_path / "half", "--dtype", "bfloat16", "--max-shard-size", "100KB") == 0
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    half = InternImageForImageClassification.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    report = json.loads((tmp_path / "half" / REPORT).read_text())
    assert report["dtype"] == ["bfloat16"] and 0 < report["tensors"]["largest_difference"] < 0.1

    assert convert(classification, *common, tmp_path / "bare", "--no-verify") == 0
    assert "tensors" not in json.loads((tmp_path / "bare" / REPORT).read_text())


def test_label_files_are_complete():
    assert class_names("imagenet-22k")[0] == "organism, being" and len(set(class_names("imagenet-22k"))) == 21841
    assert class_names("ade20k")[:3] == ["wall", "building", "sky"] and len(class_names("ade20k")) == 150
    assert id2label("ade20k", 3) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_conversion_memory_is_bounded(tmp_path):
    """The peak for a model of 200 MB, above the memory of the same imports."""
    source = tmp_path / "internimage_s_1k_224.pth"
    state_dict = {key: torch.zeros(shape) for key, shape in released_keys("s")}
    for key in state_dict:
        if key.endswith("num_batches_tracked"):
            state_dict[key] = torch.tensor(1)
    torch.save({"model": state_dict}, source)
    size = source.stat().st_size
    del state_dict
    program = """
        import sys

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

        from convert import classification
        small, config, big, output = sys.argv[1:]
        assert classification.main([small, "--config", config, "--output", output + "-small"]) == 0
        before = peak()
        assert classification.main([big, "--output", output, "--max-shard-size", "20MB"]) == 0
        print("peak", peak() - before)
    """
    output = run_python(
        program,
        FIXTURES / "t_like" / "checkpoint.pth",
        FIXTURES / "t_like" / "config.json",
        source,
        tmp_path / "model",
    )
    assert int(output.split("peak ")[1]) < 1.3 * size


# ----------------------------------------------------------------------------------------------------------- failures


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was-here",)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    good = FIXTURES / "t_like" / "checkpoint.pth"
    truncated, text, hostile, other, scrap, short, shaped = (
        folder / f"{name}.pth" for name in ("truncated", "text", "hostile", "other", "scrap", "short", "shaped")
    )
    truncated.write_bytes(good.read_bytes()[:100_000])
    text.write_text("not a checkpoint")
    with open(hostile, "wb") as file:
        pickle.dump({"model": Hostile()}, file)
    torch.save([1, 2, 3], other)
    state_dict, _ = load_case("t_like")
    torch.save({"model": {**state_dict, "levels.0.extra.weight": torch.zeros(1)}}, scrap)
    torch.save(
        {"model": {name: tensor for name, tensor in state_dict.items() if name != "levels.1.norm.0.bias"}}, short
    )
    torch.save({"model": {**state_dict, "levels.1.norm.0.bias": torch.zeros(3)}}, shaped)
    return {
        "truncated": (truncated, "truncated.pth cannot be read"),
        "text": (text, "text.pth"),
        "hostile": (hostile, "hostile.pth"),
        "other": (other, "no state dict"),
        "scrap": (scrap, "levels.0.extra.weight"),
        "short": (short, "encoder.stages.1.norm.bias"),
        "shaped": (shaped, "encoder.stages.1.norm.bias has the shape (3,)"),
        "absent": (folder / "absent.pth", "absent.pth"),
    }


@pytest.mark.parametrize("kind", ["truncated", "text", "hostile", "other", "scrap", "short", "shaped", "absent"])
def test_bad_file_is_one_line_and_leaves_nothing(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, message = bad_files(tmp_path)[kind]
    output = tmp_path / "out" / "model"
    assert convert(classification, source, "--config", FIXTURES / "t_like" / "config.json", "--output", output) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "was-here").exists()
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_bad_arguments_are_one_line(tmp_path, capsys):
    checkpoint, config = FIXTURES / "t_like" / "checkpoint.pth", FIXTURES / "t_like" / "config.json"
    for arguments, message in (
        ([checkpoint], "--config"),
        ([checkpoint, "--config", tmp_path / "no.json"], "no.json"),
        ([checkpoint, "--config", FIXTURES / "s_like" / "config.json"], "encoder.stages"),
        (["internimage_m_1k_224"], "internimage_t_1k_224"),
        ([checkpoint, "--config", config, "--ema"], "model_ema"),
    ):
        assert convert(classification, *arguments, "--output", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert convert(classification, checkpoint, "--config", config, "--output", tmp_path / "full") == 1
    assert "not empty" in capsys.readouterr().err


def test_killed_conversion_leaves_no_folder_and_runs_again(tmp_path):
    checkpoint, config = FIXTURES / "t_like" / "checkpoint.pth", FIXTURES / "t_like" / "config.json"
    output = tmp_path / "model"
    arguments = [str(a) for a in (checkpoint, "--config", config, "--output", output)]
    program = f"""
import os, signal
from convert import classification, conversion
conversion.verify_tensors = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
classification.main({arguments!r})
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not output.exists() and next(tmp_path.glob(".model.unfinished-*/result/model.safetensors"))
    assert classification.main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    stamp = (output / "model.safetensors").stat().st_mtime_ns
    assert classification.main(arguments) == 0  # the folder is finished already
    assert (output / "model.safetensors").stat().st_mtime_ns == stamp


T_LIKE = ["--config", FIXTURES / "t_like" / "config.json"]
WEIGHT = "levels.0.blocks.0.mlp.fc1.weight"


def official(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**torch.load(FIXTURES / "t_like" / "checkpoint.pth", weights_only=True)["model"], **changed}


def saved(file: Path, content: object) -> Path:
    torch.save(content, file)
    return file


def only_error(capsys) -> str:
    """Returns the last command's stderr, which must be one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert "Traceback" not in lines[0] and "unexpected" not in lines[0] and lines[0].isprintable()
    return lines[0]


ODD = {
    "complex": (lambda t: t.to(torch.complex64), "is of complex64, expected float32"),
    "integer": (lambda t: t.to(torch.int32), "is of int32, expected float32"),
    "bool": (lambda t: t > 0, "is of bool, expected float32"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "is of float8_e4m3fn, expected float32"),
    "sparse": (lambda t: t.to_sparse(), "is sparse"),
    "quantized": (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "is quantized"),
    "meta": (lambda t: t.to("meta"), "without data"),
    "scalar": (lambda t: t.flatten()[0], "has the shape ()"),
    "empty": (lambda t: t[:0], "has the shape (0, 8)"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of the formats under test
@pytest.mark.parametrize("kind", ODD)
def test_invalid_tensor_is_named_in_one_line(kind, tmp_path, capsys):
    spoil, message = ODD[kind]
    source = saved(tmp_path / "odd.pth", {"model": official(**{WEIGHT: spoil(official()[WEIGHT])})})
    output = tmp_path / "out" / "model"
    assert convert(classification, source, *T_LIKE, "--output", output) == 1
    error = only_error(capsys)
    assert message in error and "odd.pth: internimage.encoder.stages.0.layers.0.mlp.fc1.weight" in error
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize("shape", [(), (0, 64), (5, 64, 1)])
def test_classifier_of_wrong_shape_is_named_in_one_line(shape, tmp_path, capsys):
    source = saved(tmp_path / "odd.pth", {"model": official(**{"head.weight": torch.zeros(shape)})})
    assert convert(classification, source, *T_LIKE, "--output", tmp_path / "out") == 1
    assert f"odd.pth: classifier.weight has the shape {shape}" in only_error(capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_tensors_that_are_not_finite_are_named(value, tmp_path, capsys):
    """Not a number, infinite, or too large for half precision."""
    source = saved(tmp_path / "odd.pth", {"model": official(**{"head.bias": torch.tensor([value] + [0.0] * 9)})})
    options = ["--dtype", "float16"] if value == 1e6 else []
    output = tmp_path / "out" / "model"
    assert convert(classification, source, *T_LIKE, "--output", output, *options) == 1
    error = only_error(capsys)
    assert ("too large for float16" if options else "1 of the 10 values of classifier.bias are not finite") in error
    assert not list(output.parent.iterdir())


def test_averaged_counters_become_integers(tmp_path):
    name = "conv_head.1.0.num_batches_tracked"
    source = saved(tmp_path / "ema.pth", {"model": official(**{name: torch.tensor(7.0)})})
    assert convert(classification, source, *T_LIKE, "--output", tmp_path / "model") == 0
    assert (
        load_file(tmp_path / "model" / "model.safetensors")["internimage.pooler.norm.num_batches_tracked"].item() == 7
    )
    source = saved(tmp_path / "half.pth", {"model": official(**{name: torch.tensor(7.5)})})
    assert convert(classification, source, *T_LIKE, "--output", tmp_path / "other") == 1


def test_mixed_dtypes_become_smallest_common_dtype(tmp_path):
    """transformers loads a model in the dtype of its first tensor and would round the others."""
    state_dict = {
        k: (t.half() if "mlp" in k else t.bfloat16()) if t.is_floating_point() else t for k, t in official().items()
    }
    source = saved(tmp_path / "mixed.pth", {"model": state_dict})
    assert convert(classification, source, *T_LIKE, "--output", tmp_path / "model") == 0
    report = json.loads((tmp_path / "model" / REPORT).read_text())
    assert report["dtype"] == ["float32"] and report["source_dtype"] == ["bfloat16", "float16"]
    model = InternImageForImageClassification.from_pretrained(tmp_path / "model")
    weight = model.internimage.encoder.stages[0].layers[0].mlp.fc1.weight
    assert torch.equal(weight, state_dict[WEIGHT].float())


def test_tensors_that_share_memory_are_written_separately(tmp_path):
    other = WEIGHT.replace("levels.0", "levels.2").replace("weight", "bias")
    state_dict = official()
    state_dict[other] = state_dict[other.replace("blocks.0", "blocks.1")]
    source = saved(tmp_path / "shared.pth", {"model": state_dict})
    assert convert(classification, source, *T_LIKE, "--output", tmp_path / "model") == 0


@pytest.mark.parametrize("size", ["abc", "0", "-1", "5XB", "", "nan"])
def test_invalid_shard_size_is_one_line(size, tmp_path, capsys):
    source = FIXTURES / "t_like" / "checkpoint.pth"
    for module, arguments in ((classification, [source, *T_LIKE]), (convert_all, [])):
        assert convert(module, *arguments, "--output", tmp_path / "model", f"--max-shard-size={size}") == 1
        assert f"--max-shard-size must be a positive size such as 500MB, 2GB or 1GiB, got {size!r}" in only_error(
            capsys
        )


# ------------------------------------------------------------------------------------------------- files of other kinds


class _Own:
    """A class of an unknown training program."""


def plain_data() -> dict[str, object]:
    """Objects that training programs save beside the weights, with the classes' original names."""
    config = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    node = config(MODEL=config(NAME="internimage"))
    node.__dict__ |= {"__immutable__": True, "__deprecated_keys__": {"OLD"}}
    return {
        "config": node,
        "args": argparse.Namespace(lr=1e-3, betas=[0.9, 0.999]),
        "max_accuracy": np.float64(83.5),
        "history": np.zeros(3),
        "meta": defaultdict(list, {"epoch": [1]}),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 299,
    }


@pytest.fixture
def foreign_classes(monkeypatch):
    """Lets torch.save pickle classes under the names of `plain_data`; reading must work without their modules."""
    content = plain_data()
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    module.CfgNode = type(content["config"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", package)
        patch.setitem(sys.modules, "yacs.config", module)
        yield content


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoint_is_read_without_its_classes(zipped, tmp_path, foreign_classes, monkeypatch, capsys):
    source = tmp_path / "ckpt_epoch_ema_best.pth"
    torch.save({"model": official(), **foreign_classes}, source, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.setattr(argparse.Namespace, "__init__", None)  # reading must not run code of the classes
    left_out = source_module.read_tensors(source)[1]
    monkeypatch.undo()
    assert left_out.keys() == foreign_classes.keys()
    assert convert(classification, source, *T_LIKE, "--output", tmp_path / "model") == 0
    out = capsys.readouterr().out
    assert f"left out of {source}: other parts (7): config, args, max_accuracy, history, meta, optimizer, epoch" in out
    report = json.loads((tmp_path / "model" / REPORT).read_text())
    assert (
        report["left_out"] == left_out
        and left_out["optimizer"] == "a dict of 2 entries"
        and left_out["epoch"] == "299"
    )


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_unknown_class_or_call_in_pickle_is_one_line(tmp_path, foreign_classes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = type(foreign_classes["config"])
    for content, name in (
        (_Own(), f"{__name__}._Own"),
        (Calls(os.system, "touch was-here"), f"{os.name if os.name != 'nt' else 'nt'}.system"),
        (config(inner=Calls(eval, "open('was-here', 'w')")), "eval"),
        (Calls(getattr, argparse.Namespace(), "x"), "getattr"),
    ):
        source = saved(tmp_path / "own.pth", {"model": official(), "config": content})
        assert convert(classification, source, *T_LIKE, "--output", tmp_path / "model") == 1
        error = only_error(capsys)
        assert "own.pth holds" in error and f" {name}, and is not read" in error and "torch.save(" in error
        assert not (tmp_path / "was-here").exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b"x"), "gzip"),
        (b"PK\x03\x04 no archive", "cannot be read"),
        (b"x" * 257 + b"ustar", "tar archive"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"some text", "neither a file of torch.save nor a safetensors file"),
        (pickle.dumps({"model": 1}, protocol=4), "neither a tensor nor plain data"),
        (None, "has neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_file_of_other_kind_is_named_by_kind(content, message, tmp_path, capsys):
    source = tmp_path / "file.pth"
    source.mkdir() if content is None else source.write_bytes(content)
    assert convert(classification, source, *T_LIKE, "--output", tmp_path / "out" / "model") == 1
    assert message in (error := only_error(capsys)) and "file.pth" in error


def test_misspelt_configuration_field_is_reported(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(T_LIKE[1].read_text()), "offset_scal": 2.0}))
    source = FIXTURES / "t_like" / "checkpoint.pth"
    for module in (classification, backbone):
        output = tmp_path / module.__name__
        assert convert(module, source, "--config", config, "--output", output) == 0
        assert "fields of the configuration without effect: offset_scal\n" in capsys.readouterr().out
        assert json.loads((output / REPORT).read_text())["unknown_config_fields"] == ["offset_scal"]


def test_wrong_configuration_is_one_line(tmp_path, capsys):
    config = tmp_path / "config.json"
    good = json.loads(T_LIKE[1].read_text())
    for text in (
        json.dumps({**good, "depths": "many"}), json.dumps({**good, "backbone": 3}), json.dumps({**good, "act_layer": []}),
        "[1]", "{", "[" * 100_000, json.dumps({**good, "channels": 7}),
    ):  # fmt: skip
        config.write_text(text)
        assert (
            convert(backbone, FIXTURES / "t_like" / "checkpoint.pth", "--config", config, "--output", tmp_path / "o")
            == 1
        )
        only_error(capsys)


def test_prefixes_nesting_and_cache_links_are_read(tmp_path):
    """The prefix `module.` of data-parallel training, a nested state dict, and a cache file: a link to a name without suffix."""
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "0123abc"
    shutil.copyfile(FIXTURES / "hf_t_like" / "model.safetensors", blob)
    sources = [
        saved(tmp_path / "a.pth", {f"module.{name}": tensor for name, tensor in official().items()}),
        saved(tmp_path / "b.pth", {"state_dict": {"model": official(), "epoch": 3}, "optimizer": {}}),
        blob,
    ]
    (tmp_path / "link.safetensors").symlink_to(blob)
    for source in (*sources, tmp_path / "link.safetensors"):
        assert all(isinstance(tensor, torch.Tensor) for tensor in source_module.read_tensors(source)[0].values())
    tensors, left_out = source_module.read_tensors(sources[0])
    assert tensors.keys() == official().keys() and not left_out
    tensors, left_out = source_module.read_tensors(sources[1])
    assert tensors.keys() == official().keys() and left_out == {
        "optimizer": "a dict of 0 entries",
        "state_dict.epoch": "3",
    }


# ----------------------------------------------------------------------------------------- two conversions, one folder


def finished(folder: Path) -> bool:
    """Whether every file has the checksum of the report."""
    report = json.loads((folder / REPORT).read_text())
    return bool(report["files"]) and all(
        sha256_of(folder / name) == digest for name, digest in report["files"].items()
    )


def other_source(folder: Path) -> Path:
    return saved(folder / "other.pth", {"model": official(**{"head.bias": official()["head.bias"] + 1})})


def test_concurrent_conversion_into_same_folder_is_refused(tmp_path, capsys, monkeypatch):
    output, a, b = tmp_path / "out" / "model", FIXTURES / "t_like" / "checkpoint.pth", other_source(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "out")
    results = []

    def verify_and_start_another(*arguments):
        if not results:
            results.append(None)
            capsys.readouterr()
            for source, place in ((a, output), (b, output), (b, link / "model")):
                results.append((convert(classification, source, *T_LIKE, "--output", place), only_error(capsys)))
        return verify(*arguments)

    verify = conversion.verify_tensors
    monkeypatch.setattr(conversion, "verify_tensors", verify_and_start_another)
    assert convert(classification, a, *T_LIKE, "--output", output) == 0
    assert len(results) == 4
    assert all(status == 1 and f"another conversion is writing {output}" in error for status, error in results[1:])
    assert finished(output) and [path.name for path in output.parent.iterdir()] == ["model"]


def test_concurrent_processes_write_one_whole_folder(tmp_path):
    """Processes forked after the imports start at once: each folder comes from one source, from the process that reports it."""
    sources = [FIXTURES / "t_like" / "checkpoint.pth", other_source(tmp_path)]
    program = """
        import contextlib, io, os, sys
        from convert import classification
        config, output, *sources = sys.argv[1:]
        read, write = os.pipe()
        children = []
        for index in range(4):
            if not (child := os.fork()):
                os.close(write)
                os.read(read, 1)
                said = io.StringIO()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
                    status = classification.main(
                        [sources[index % 2], "--config", config, "--output", output, "--max-shard-size", "20KB"])
                os._exit(10 + index % 2 if "wrote" in said.getvalue() else status)
            children.append(child)
        os.close(write)
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    """
    output = tmp_path / "out" / "model"
    codes = json.loads(run_python(program, T_LIKE[1], output, *sources, OMP_NUM_THREADS="1"))
    assert set(codes) <= {0, 1, 10, 11} and len([code for code in codes if code >= 10]) == 1, codes
    assert finished(output) and len(list(output.glob("*.safetensors"))) > 1
    source = sources[max(codes) - 10]
    assert json.loads((output / REPORT).read_text())["source"]["sha256"] == sha256_of(source)
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_folder_created_during_conversion_is_kept(tmp_path, monkeypatch, capsys):
    """Another program creates the folder without the lock."""
    output = tmp_path / "model"
    verify = conversion.verify_tensors

    def appears(*arguments):
        output.mkdir()
        (output / "file").write_text("mine")
        return verify(*arguments)

    monkeypatch.setattr(conversion, "verify_tensors", appears)
    source = FIXTURES / "t_like" / "checkpoint.pth"
    assert convert(classification, source, *T_LIKE, "--output", output) == 1
    assert f"cannot give the result its name {output}" in only_error(capsys)
    assert [path.name for path in output.iterdir()] == ["file"] and os.listdir(tmp_path) == ["model"]


def test_unrelated_folders_are_kept(tmp_path):
    output = tmp_path / "model"
    for name in (".model.unfinished", ".model.unfinished-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    (tmp_path / ".model.conversion.lock").write_text("mine")
    assert convert(classification, FIXTURES / "t_like" / "checkpoint.pth", *T_LIKE, "--output", output) == 0
    assert sorted(os.listdir(tmp_path)) == [
        ".model.conversion.lock", ".model.unfinished", ".model.unfinished-mine", "model",
    ]  # fmt: skip
    assert all((path / "thesis.txt").read_text() == "mine" for path in tmp_path.glob(".model.unfinished*"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "model"
    assert convert(classification, FIXTURES / "t_like" / "checkpoint.pth", *T_LIKE, "--output", output) == 0
    return output


def edit_report(folder: Path, edit) -> None:
    report = json.loads((folder / REPORT).read_text())
    edit(report)
    (folder / REPORT).write_text(json.dumps(report))


DAMAGES = {
    "missing": (lambda folder: (folder / "config.json").unlink(), "is damaged: config.json is missing"),
    "changed": (lambda folder: _flip(folder / "model.safetensors"), "is damaged: model.safetensors is not what"),
    "foreign": (
        lambda folder: (folder / "model.safetensors.index.json").touch(),
        "did not write: model.safetensors.index",
    ),
    "old": (
        lambda folder: edit_report(folder, lambda report: report.pop("settings")),
        "as an earlier version's does not",
    ),
    "broken": (lambda folder: (folder / REPORT).write_text("{"), f"{REPORT}: "),
    "list": (lambda folder: (folder / REPORT).write_text("[1]"), "does not tell the source"),
    "unverified": (lambda folder: edit_report(folder, lambda report: report.pop("outputs")), "with --no-verify"),
}


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_output_is_refused_and_kept(kind, converted, tmp_path, capsys):
    damage, message = DAMAGES[kind]
    output = shutil.copytree(converted, tmp_path / "model")
    damage(output)
    before = sorted(os.listdir(output))
    assert convert(classification, FIXTURES / "t_like" / "checkpoint.pth", *T_LIKE, "--output", output) == 1
    error = only_error(capsys)
    assert message in error and "choose another --output, or delete the folder first" in error
    assert sorted(os.listdir(output)) == before


def test_output_of_other_source_or_settings_is_refused(converted, tmp_path, monkeypatch, capsys):
    """Such a folder is not uploaded either."""
    monkeypatch.setattr(cli, "push", lambda *arguments: pytest.fail("uploaded"))
    converted = shutil.copytree(converted, tmp_path / "model")
    checkpoint = FIXTURES / "t_like" / "checkpoint.pth"
    other_config = tmp_path / "config.json"
    other_config.write_text(json.dumps({**json.loads(T_LIKE[1].read_text()), "drop_path_rate": 0.3}))
    stamp = (converted / "model.safetensors").stat().st_mtime_ns
    for arguments, message in (
        ([other_source(tmp_path), *T_LIKE], "holds the conversion of checkpoint.pth (sha256 "),
        ([checkpoint, *T_LIKE, "--dtype", "float16"], "with dtype = None, not 'float16'"),
        ([checkpoint, *T_LIKE, "--ema"], "with ema = False, not True"),
        ([checkpoint, *T_LIKE, "--remote-code"], "with remote_code = False, not True"),
        ([checkpoint, *T_LIKE, "--max-shard-size", "1MB"], "with max_shard_size = 2000000000, not 1000000"),
        ([checkpoint, "--config", other_config], "with config = "),
    ):
        assert convert(classification, *arguments, "--output", converted, "--push-to-hub", "me/model") == 1
        assert message in only_error(capsys)
    assert convert(backbone, checkpoint, *T_LIKE, "--output", converted) == 1
    assert "with task = 'classification', not 'backbone'" in only_error(capsys)
    assert (converted / "model.safetensors").stat().st_mtime_ns == stamp

    (converted / "README.md").write_text("my own card")
    assert convert(classification, checkpoint, *T_LIKE, "--output", converted) == 0  # users may edit the card
    assert "finished already" in capsys.readouterr().out


def test_leftovers_of_killed_conversion_are_removed(converted, tmp_path):
    output = shutil.copytree(converted, tmp_path / "model")
    work = tmp_path / ".model.unfinished-abcd1234"
    work.mkdir()
    (work / output_module._MARKER).touch()
    (tmp_path / ".model.unfinished-empty").mkdir()  # killed before the marker was written
    (tmp_path / ".model.conversion.lock").touch()
    assert convert(classification, FIXTURES / "t_like" / "checkpoint.pth", *T_LIKE, "--output", output) == 0
    assert os.listdir(tmp_path) == ["model"]


# --------------------------------------------------------------------------------------------- paths, disks, all of them


def test_unusable_paths_are_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for output in (
        file,
        file / "below",
        tmp_path / ("x" * 300),
        "/proc/nowhere/model",
        tmp_path / "nul\0byte",
        tmp_path / "\udcff",
    ):
        assert convert(classification, FIXTURES / "t_like" / "checkpoint.pth", *T_LIKE, "--output", output) == 1
        only_error(capsys)
    for source in ("nul\0byte", "x" * 5000, file / "below.pth"):
        assert convert(classification, source, *T_LIKE, "--output", tmp_path / "model") == 1
        only_error(capsys)
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def full_disk():
    """Limits files to 50 KB: writes fail as on a full disk, with another errno."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_line_and_leaves_nothing(converted, tmp_path, capfd, full_disk):
    checkpoint = FIXTURES / "t_like" / "checkpoint.pth"
    assert convert(classification, checkpoint, *T_LIKE, "--output", tmp_path / "model") == 1
    assert f"error: cannot write {tmp_path / 'model'}: " in capfd.readouterr().err
    assert convert(classification, converted, "--output", tmp_path / "back.pth", "--reverse") == 1
    assert f"error: cannot write {tmp_path / 'back.pth'}: " in capfd.readouterr().err
    assert not os.listdir(tmp_path)


def test_convert_all_continues_after_failure(tmp_path, monkeypatch, capsys):
    """Failures: an OSError, an unexpected exception, a MemoryError, and a folder and a broken link in place of a file."""
    names = [name for name in RELEASED if RELEASED[name].task == "classification"][:6]
    folder = tmp_path / "pth"
    folder.mkdir()
    (folder / RELEASED[names[0]].file).mkdir()
    (folder / RELEASED[names[1]].file).symlink_to("nowhere")
    (folder / "internimage_t_1k_224 (1).pth").touch()
    for name in names[2:]:
        (folder / RELEASED[name].file).write_bytes(b"x")
    errors = dict(
        zip(names[2:], (OSError(28, "No space left on device", "/x"), KeyError("k"), MemoryError(), None), strict=True)
    )

    def make_plan(source, arguments):
        if error := errors[source.released.name]:
            raise error
        raise ConversionError("last")

    monkeypatch.setitem(convert_all.PLANS, "classification", make_plan)
    assert convert(convert_all, "--output", tmp_path / "out", "--source-folder", folder, "--only", *names) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 7 and all(line.startswith("error: ") for line in lines), lines
    assert lines[-1] == f"error: 6 failed: {', '.join(names)}"
    for line, name, message in zip(
        lines, names, ("has neither model", "", "/x: No space left", "unexpected KeyError in test_convert.py", "memory", "last"), strict=False,
    ):  # fmt: skip
        assert line.startswith(f"error: {name}: ") and message in line
    assert "1 entries" in captured.out and "internimage_t_1k_224 (1).pth" in captured.out
    assert convert(convert_all, "--output", tmp_path / "out", "--source-folder", folder / "none") == 1
    assert "--source-folder" in only_error(capsys)


def test_reverse_needs_whole_classifier_and_refuses_forward_options(converted, tmp_path, capsys):
    folder = shutil.copytree(converted, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert convert(classification, folder, "--output", tmp_path / "back.pth", "--reverse") == 1
    assert "missing keys: classifier.bias" in capsys.readouterr().err and not (tmp_path / "back.pth").exists()
    with pytest.raises(SystemExit):
        convert(classification, folder, "--output", tmp_path / "back.pth", "--reverse", "--push-to-hub", "me/model")
    assert "--push-to-hub" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- downstream models


@pytest.mark.parametrize("name", [name for name in RELEASED if RELEASED[name].task != "classification"])
def test_every_released_downstream_backbone_maps_without_remainder(name):
    """A backbone with the variant's names and shapes, and the official layer scale of T to XL."""
    from convert.backbone import backbone_config, backbone_tensors
    from internimage_hf import InternImageBackbone

    released = RELEASED[name]
    config = InternImageConfig.from_variant(
        released.variant,
        use_clip_projector=False,
        layer_scale_init_value=None if released.variant in "hg" else 1.0,
    )
    with torch.device("meta"):
        classifier = InternImageForImageClassification(config)
    official = {
        f"backbone.{key}": tensor
        for key, tensor in classification.official_state_dict(classifier).items()
        if not key.startswith(("conv_head.", "head."))
    } | {"decode_head.conv.weight": torch.zeros(1)}
    source = SimpleNamespace(read=lambda ema: official, released=released, config=None, file=name)
    state_dict, ignored = backbone_tensors(source, ema=False)
    with torch.device("meta"):
        backbone = InternImageBackbone(backbone_config(source, any("layer_scale" in key for key in state_dict)))
    expected = {key: tensor.shape for key, tensor in backbone.state_dict().items()}
    assert {key: tensor.shape for key, tensor in state_dict.items()} == expected
    assert ignored == ("decode_head.conv.weight",)
    assert RELEASED[name].task in convert_all.PLANS


def test_upernet_converts_with_official_outputs(tmp_path):
    from transformers import UperNetForSemanticSegmentation, pipeline

    folder = FIXTURES / "upernet_tiny"
    output = tmp_path / "upernet"
    assert (
        convert(
            upernet, folder / "checkpoint.pth", "--config", folder / "config.json", "--output", output, "--remote-code"
        )
        == 0
    )
    assert "AutoModelForSemanticSegmentation" in json.loads((output / "config.json").read_text())["auto_map"]
    expected = load_file(folder / "expected.safetensors")
    model = UperNetForSemanticSegmentation.from_pretrained(output).eval()
    with torch.no_grad():
        logits = model(expected["pixel_values"]).logits
    wanted = expected["logits"]
    if wanted.shape != logits.shape:  # the official logits are not yet resized to the input
        wanted = torch.nn.functional.interpolate(wanted, size=logits.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)

    segment = pipeline("image-segmentation", model=str(output))
    from PIL import Image

    masks = segment(Image.new("RGB", (70, 50), (120, 30, 200)))
    assert masks and all(entry["mask"].size == (70, 50) for entry in masks)


def test_backbone_of_segmenter_and_classifier_converts(tmp_path):
    folder = FIXTURES / "upernet_tiny"
    assert (
        convert(backbone, folder / "checkpoint.pth", "--config", folder / "config.json", "--output", tmp_path / "a")
        == 0
    )
    model = InternImageBackbone.from_pretrained(tmp_path / "a").eval()
    state_dict = torch.load(folder / "checkpoint.pth", weights_only=True)["state_dict"]
    assert torch.equal(model.stem.conv1.weight, state_dict["backbone.patch_embed.conv1.weight"])
    assert len(model(torch.randn(1, 3, 64, 64)).feature_maps) == 4

    source = [FIXTURES / "s_like" / "checkpoint.pth", "--config", FIXTURES / "s_like" / "config.json"]
    assert convert(backbone, *source, "--output", tmp_path / "b", "--remote-code") == 0
    _, expected = load_case("s_like")
    maps = InternImageBackbone.from_pretrained(tmp_path / "b").eval()(expected["pixel_values"]).feature_maps
    torch.testing.assert_close(maps[3], expected["stage4"], atol=1e-4, rtol=0)


def official_mask2former(model) -> dict[str, torch.Tensor]:
    """A model's tensors under mmdetection's names, by hand-written inverses of the conversion's patterns."""
    heads = {}
    pd, tm = "model.pixel_level_module.decoder.", "model.transformer_module."
    simple = {
        f"{pd}level_embed": "pixel_decoder.level_encoding.weight",
        f"{pd}adapter_1.0.weight": "pixel_decoder.lateral_convs.0.conv.weight",
        f"{pd}layer_1.0.weight": "pixel_decoder.output_convs.0.conv.weight",
        f"{tm}queries_features.weight": "query_feat.weight",
        f"{tm}queries_embedder.weight": "query_embed.weight",
        f"{tm}level_embed.weight": "level_embed.weight",
    }
    parts = [
        (f"{pd}input_projections.%d.0", "pixel_decoder.input_convs.%d.conv"),
        (f"{pd}input_projections.%d.1", "pixel_decoder.input_convs.%d.gn"),
        (f"{pd}adapter_1.1", "pixel_decoder.lateral_convs.0.gn"),
        (f"{pd}layer_1.1", "pixel_decoder.output_convs.0.gn"),
        (f"{pd}mask_projection", "pixel_decoder.mask_feature"),
        (f"{pd}encoder.layers.%d.self_attn.sampling_offsets", "pixel_decoder.encoder.layers.%d.attentions.0.sampling_offsets"),
        (f"{pd}encoder.layers.%d.self_attn.attention_weights", "pixel_decoder.encoder.layers.%d.attentions.0.attention_weights"),
        (f"{pd}encoder.layers.%d.self_attn.value_proj", "pixel_decoder.encoder.layers.%d.attentions.0.value_proj"),
        (f"{pd}encoder.layers.%d.self_attn.output_proj", "pixel_decoder.encoder.layers.%d.attentions.0.output_proj"),
        (f"{pd}encoder.layers.%d.self_attn_layer_norm", "pixel_decoder.encoder.layers.%d.norms.0"),
        (f"{pd}encoder.layers.%d.final_layer_norm", "pixel_decoder.encoder.layers.%d.norms.1"),
        (f"{pd}encoder.layers.%d.fc1", "pixel_decoder.encoder.layers.%d.ffns.0.layers.0.0"),
        (f"{pd}encoder.layers.%d.fc2", "pixel_decoder.encoder.layers.%d.ffns.0.layers.1"),
        (f"{tm}decoder.layers.%d.cross_attn.out_proj", "transformer_decoder.layers.%d.attentions.0.attn.out_proj"),
        (f"{tm}decoder.layers.%d.self_attn.out_proj", "transformer_decoder.layers.%d.attentions.1.attn.out_proj"),
        (f"{tm}decoder.layers.%d.cross_attn_layer_norm", "transformer_decoder.layers.%d.norms.0"),
        (f"{tm}decoder.layers.%d.self_attn_layer_norm", "transformer_decoder.layers.%d.norms.1"),
        (f"{tm}decoder.layers.%d.final_layer_norm", "transformer_decoder.layers.%d.norms.2"),
        (f"{tm}decoder.layers.%d.fc1", "transformer_decoder.layers.%d.ffns.0.layers.0.0"),
        (f"{tm}decoder.layers.%d.fc2", "transformer_decoder.layers.%d.ffns.0.layers.1"),
        (f"{tm}decoder.layernorm", "transformer_decoder.post_norm"),
        (f"{tm}decoder.mask_predictor.mask_embedder.0.0", "mask_embed.0"),
        (f"{tm}decoder.mask_predictor.mask_embedder.1.0", "mask_embed.2"),
        (f"{tm}decoder.mask_predictor.mask_embedder.2.0", "mask_embed.4"),
        ("class_predictor", "cls_embed"),
    ]  # fmt: skip
    for ours, official in parts:
        for layer in range(9) if "%d" in ours else (None,):
            for kind in ("weight", "bias"):
                name = (ours if layer is None else ours % layer) + f".{kind}"
                simple[name] = (official if layer is None else official % layer) + f".{kind}"
    state_dict = {k: v for k, v in model.state_dict().items() if not k.startswith("model.pixel_level_module.encoder.")}
    for name, official in simple.items():
        if name in state_dict:
            heads[official] = state_dict.pop(name)
    for layer in range(9):
        ours, official = f"{tm}decoder.layers.{layer}.", f"transformer_decoder.layers.{layer}.attentions."
        for kind in ("weight", "bias"):
            if f"{ours}cross_attn.in_proj_{kind}" not in state_dict:
                continue
            heads[f"{official}0.attn.in_proj_{kind}"] = state_dict.pop(f"{ours}cross_attn.in_proj_{kind}")
            heads[f"{official}1.attn.in_proj_{kind}"] = torch.cat(
                [state_dict.pop(f"{ours}self_attn.{part}_proj.{kind}") for part in "qkv"]
            )
    assert set(state_dict) <= {"criterion.empty_weight"}, set(state_dict)
    return {f"decode_head.{name}": tensor for name, tensor in heads.items()}


def test_mask2former_converts(tmp_path):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = json.loads((FIXTURES / "s_like" / "config.json").read_text())
    backbone_config = InternImageConfig.from_dict(config)
    backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone_config, feature_size=32, mask_feature_size=32, hidden_dim=32, num_attention_heads=4,
            encoder_feedforward_dim=64, dim_feedforward=64, num_queries=10, encoder_layers=2, decoder_layers=4,
            num_labels=7,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    backbone_model = InternImageForImageClassification(InternImageConfig.from_dict(config))
    encoder = model.model.pixel_level_module.encoder
    backbone_model.internimage.load_state_dict({**backbone_model.internimage.state_dict(), **encoder.state_dict()})
    official = {
        f"backbone.{name}": tensor
        for name, tensor in classification.official_state_dict(backbone_model).items()
        if name.split(".")[0] in ("patch_embed", "levels")
    }
    official |= official_mask2former(model)
    official |= {"decode_head.conv_seg.weight": torch.zeros(1), "decode_head.conv_seg.bias": torch.zeros(1)}
    torch.save({"meta": {}, "state_dict": official}, tmp_path / "m2f.pth")
    (tmp_path / "config.json").write_text(json.dumps({"backbone": {**config, "type": "InternImage"}}))
    output = tmp_path / "model"
    assert convert(mask2former, tmp_path / "m2f.pth", "--config", tmp_path / "config.json", "--output", output) == 0
    converted = Mask2FormerForUniversalSegmentation.from_pretrained(output).eval()
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, actual = model(pixel_values), converted(pixel_values)
    torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.masks_queries_logits, expected.masks_queries_logits, atol=1e-4, rtol=1e-5)
    assert json.loads((output / REPORT).read_text())["ignored_entries"] == [
        "decode_head.conv_seg.weight", "decode_head.conv_seg.bias",
    ]  # fmt: skip


def test_convert_all_converts_local_files_and_reports_failures(tmp_path, capsys):
    """One local file is valid, one is broken; the others would be downloaded and fail offline, one by one."""
    folder = tmp_path / "pth"
    folder.mkdir()
    state_dict = {key: torch.zeros(shape) for key, shape in released_keys("t")}
    torch.save({"model": state_dict}, folder / "internimage_t_1k_224.pth")
    (folder / "internimage_s_1k_224.pth").write_text("broken")
    names = ["internimage_t_1k_224", "internimage_s_1k_224"]
    arguments = ["--output", tmp_path / "out", "--source-folder", folder, "--only", *names]
    assert convert(convert_all, *arguments) == 1
    captured = capsys.readouterr()
    assert "1 failed: internimage_s_1k_224" in captured.err
    config = json.loads((tmp_path / "out" / "internimage_t_1k_224" / "config.json").read_text())
    assert "tabby cat" in config["id2label"]["281"] and config["label2id"]["crane (bird)"] == 134
    assert convert(convert_all, *arguments) == 1
    assert "internimage_t_1k_224: finished already" in capsys.readouterr().out
    assert convert(convert_all, "--output", tmp_path / "out", "--only", "internimage_m") == 1


# ------------------------------------------------------------------------------------------------------- onto a Hub


def run_converter(hub, tmp_path, *arguments, token="hf_good", wait=True):
    environment = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"}
    process = subprocess.Popen(
        [sys.executable, "-m", "convert.classification", *map(str, arguments)],
        cwd=ROOT, env={**environment, **hub.environment(tmp_path, token)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if not wait:
        return process
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


SOURCE = [FIXTURES / "t_like" / "checkpoint.pth", "--config", FIXTURES / "t_like" / "config.json"]


def test_converted_model_is_pushed_and_loads(hub, tmp_path):
    hub.fail_next = 1  # the first request meets a server error
    status, out, err = run_converter(
        hub,
        tmp_path,
        *SOURCE,
        "--output",
        tmp_path / "model",
        "--remote-code",
        "--push-to-hub",
        "somebody/internimage",
    )
    assert status == 0, err
    assert f"{hub.url}/somebody/internimage" in out
    files = hub.repositories["somebody/internimage"]
    assert {path.name for path in (tmp_path / "model").iterdir()} <= files.keys()
    assert files["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()

    program = """
        import sys, torch
        from safetensors.torch import load_file
        if sys.argv[2] == "with":
            import internimage_hf
        else:
            import importlib.util
            assert importlib.util.find_spec("internimage_hf") is None
        from transformers import AutoModelForImageClassification
        model = AutoModelForImageClassification.from_pretrained("somebody/internimage", trust_remote_code=sys.argv[2] != "with")
        expected = load_file(sys.argv[1])
        torch.testing.assert_close(model.eval()(expected["pixel_values"]).logits, expected["logits"], atol=1e-4, rtol=0)
        print(type(model).__module__.split(".")[0])
    """
    expected = FIXTURES / "t_like" / "expected.safetensors"
    environment = hub.environment(tmp_path)
    assert run_python(program, expected, "with", **environment) == "internimage_hf\n"
    bare = bare_environment(tmp_path)
    assert run_python(program, expected, "without", cwd=tmp_path, **environment, **bare) == "transformers_modules\n"

    card = run_python(
        """
        import sys
        from huggingface_hub import ModelCard
        card = ModelCard.load(sys.argv[1] + "/README.md")
        card.validate()
        print(card.data.license, card.data.pipeline_tag)
        """,
        tmp_path / "model",
        **environment,
    )
    assert card == "mit image-classification\n"


def test_killed_upload_is_completed(hub, tmp_path):
    arguments = [*SOURCE, "--output", tmp_path / "model", "--push-to-hub", "somebody/killed"]
    hub.slow_upload = 30.0
    process = run_converter(hub, tmp_path, *arguments, wait=False)
    deadline = time.monotonic() + 500  # only a hanging program exceeds this
    while not any(request.startswith("PUT /lfs/") for request in hub.requests):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not hub.repositories["somebody/killed"].keys() - {".gitattributes"}
    hub.slow_upload = 0.0
    status, out, err = run_converter(hub, tmp_path, *arguments)
    assert status == 0, err
    assert "finished already" in out
    assert (
        hub.repositories["somebody/killed"]["model.safetensors"]
        == (tmp_path / "model" / "model.safetensors").read_bytes()
    )


@pytest.fixture
def hub_here(hub, monkeypatch, tmp_path):
    """The Hub of this process; retries do not wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True),
        ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_TOKEN_PATH", str(tmp_path / "token")),
    ):  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    _http.close_session()
    yield hub
    _http.close_session()


@pytest.mark.parametrize(
    ("token", "forbid", "message"),
    [(None, False, "HF_TOKEN"), ("hf_bad", False, "HF_TOKEN"), ("hf_good", True, "may not write")],
)
def test_missing_token_or_permission_is_one_line(hub_here, converted, monkeypatch, capsys, token, forbid, message):
    hub_here.forbid = forbid
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    push_it = ["--output", converted, "--push-to-hub", "somebody/refused"]
    assert convert(classification, *SOURCE, *push_it) == 1
    assert message in only_error(capsys)


CREATE, PREUPLOAD, BATCH, PUT, COMMIT = r"/repos/create", r"/preupload/", r"/objects/batch", r"^PUT /lfs/", r"/commit/"
# huggingface_hub itself asks six times, where it asks more than once: the converter's own attempts are those beyond
PASSING = [
    *((endpoint, answer, 1) for endpoint in (CREATE, PREUPLOAD, BATCH, PUT, COMMIT) for answer in (500, "reset")),
    *((PUT, answer, 8) for answer in (500, 503, "reset")),
    *((PUT, answer, 2) for answer in (403, 408, 429)),
]


@pytest.mark.parametrize(("endpoint", "answer", "times"), PASSING)
def test_upload_survives_transient_fault(endpoint, answer, times, hub_here, converted):
    hub_here.fail(endpoint, answer, times)
    assert push(converted, "somebody/model", pause=0).endswith("somebody/model")
    files = hub_here.repositories["somebody/model"]
    assert files == {path.name: path.read_bytes() for path in converted.iterdir()}
    assert len(hub_here.commits["somebody/model"]) == 2  # the first commit is the repository's creation


LASTING = [
    *((endpoint, 500, "after 5 attempts") for endpoint in (CREATE, PREUPLOAD, BATCH, PUT, COMMIT)),
    *((endpoint, "reset", "after 5 attempts") for endpoint in (CREATE, BATCH, PUT, COMMIT)),
    *((endpoint, 403, "may not write") for endpoint in (CREATE, PREUPLOAD, BATCH, COMMIT)),
    *((endpoint, 401, "HF_TOKEN") for endpoint in (CREATE, PREUPLOAD, COMMIT)),
    *((endpoint, 400, "400") for endpoint in (CREATE, PREUPLOAD, BATCH, PUT, COMMIT)),
    *((endpoint, "html", "nothing was committed") for endpoint in (CREATE, PREUPLOAD, BATCH)),
    (PUT, 403, "after 5 attempts"),
    (PUT, 413, "--max-shard-size"),
    (COMMIT, 413, "--max-shard-size"),
    (CREATE, 402, "402"),
]


@pytest.mark.parametrize(("endpoint", "answer", "message"), LASTING)
def test_lasting_hub_fault_is_one_line(endpoint, answer, message, hub_here, converted, capsys):
    hub_here.fail(endpoint, answer)
    assert cli.main(lambda: push(converted, "somebody/model", pause=0)) == 1
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "somebody/model" in errors[0], lines
    assert not any("Traceback" in line for line in lines)
    attempts = [line for line in lines if line.startswith("upload to somebody/model: ")]
    assert len(attempts) == (4 if "attempts" in message else 0)
    if endpoint == PUT:
        assert "model.safetensors" in errors[0]
    assert not hub_here.repositories.get("somebody/model")


def raising(error: Exception, monkeypatch) -> None:
    def request(*arguments, **keywords):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", request)


@pytest.mark.parametrize(
    ("make", "attempts", "message"),
    [
        (lambda x: x.ConnectError("[Errno -2] Name or service not known"), 5, "Name or service not known"),
        (lambda x: x.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] expired"), 1, "SSL_CERT_FILE"),
        (lambda x: x.ReadTimeout("timed out"), 5, "ReadTimeout: timed out"),
        (lambda x: x.WriteError(""), 5, "WriteError"),
        (lambda x: x.UnsupportedProtocol("no scheme"), 1, "HF_ENDPOINT"),
        (lambda x: x.LocalProtocolError("Illegal header value"), 1, "HF_TOKEN"),
        (lambda x: RuntimeError("Data processing error: CAS service error"), 5, "CAS service error"),
        (lambda x: OSError(28, "No space left on device", "/tmp/x"), 1, "/tmp/x: No space left on device"),
        (lambda x: PermissionError("Xet says no"), 1, "role `write`"),
        (lambda x: ValueError("Invalid metadata"), 1, "Invalid metadata"),
        (lambda x: KeyError("url"), 1, "KeyError"),
    ],
)
def test_any_upload_exception_is_one_line(make, attempts, message, hub_here, converted, monkeypatch, capsys):
    raising(make(httpx), monkeypatch)
    assert cli.main(lambda: push(converted, "somebody/model", pause=0)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == attempts and all(line.startswith("upload to ") for line in lines[:-1])
    assert lines[-1].startswith("error: cannot upload to somebody/model") and message in lines[-1]


def test_invalid_endpoint_or_repository_id_is_one_line(hub_here, converted, monkeypatch, capsys):
    for name in ("a/b/c", "me/mo del", "", "me/" + "x" * 100):
        assert cli.main(lambda name=name: push(converted, name, pause=0)) == 1
        assert "cannot upload to" in only_error(capsys)
    source = FIXTURES / "t_like" / "checkpoint.pth"
    output = converted.parent / "unused"
    assert convert(classification, source, *T_LIKE, "--output", output, "--push-to-hub", "a/b/c") == 1
    assert "cannot upload to" in only_error(capsys) and not output.exists()  # the error comes before the conversion
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(lambda: push(converted, "somebody/model", pause=0)) == 1
    assert "after 5 attempts" in capsys.readouterr().err.splitlines()[-1]


def test_new_upload_removes_earlier_weights(hub_here, converted, capsys):
    """transformers prefers model.safetensors to shards, even where the shards are newer."""
    push(converted, "somebody/model", pause=0)
    files = hub_here.repositories["somebody/model"]
    files |= {"model-00001-of-00002.safetensors": b"old", "pytorch_model.bin": b"old", "notes.txt": b"mine"}
    (converted / ".cache").mkdir()
    (converted / ".cache" / "x").touch()
    push(converted, "somebody/model", pause=0)
    shutil.rmtree(converted / ".cache")
    assert files.keys() == {path.name for path in converted.iterdir()} | {"notes.txt"}
    out = capsys.readouterr().out
    assert "2 weight files of another upload: model-00001-of-00002.safetensors, pytorch_model.bin" in out
    assert "not uploaded: 1 hidden files: .cache/x" in out


def test_private_upload_to_public_repository_is_refused(hub_here, converted, capsys):
    for _ in range(2):
        assert cli.main(lambda: push(converted, "somebody/secret", private=True, pause=0)) == 0
    assert hub_here.private == {"somebody/secret"}
    hub_here.repositories["somebody/open"], hub_here.commits["somebody/open"] = {}, ["0" * 40]
    assert cli.main(lambda: push(converted, "somebody/open", private=True, pause=0)) == 1
    assert "is public" in only_error(capsys) and not hub_here.repositories["somebody/open"]


def test_finished_checkpoint_is_not_downloaded_again(hub_here, tmp_path, capsys):
    """A checkpoint named by its Hub file, with an empty cache: the Hub returns the file's checksum."""
    hub_here.repositories["me/published"] = {
        path.name: path.read_bytes() for path in (FIXTURES / "hf_t_like").iterdir() if path.suffix != ".md"
    }
    hub_here.commits["me/published"] = ["1" * 40]
    assert convert(classification, "me/published", "--output", tmp_path / "model") == 0, capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    hub_here.requests.clear()
    assert convert(classification, "me/published", "--output", tmp_path / "model") == 0
    assert "finished already" in capsys.readouterr().out
    assert "GET /me/published/resolve/main/model.safetensors" not in hub_here.requests
    hub_here.repositories["me/published"]["model.safetensors"] = b"other"
    assert convert(classification, "me/published", "--output", tmp_path / "model") == 1
    assert "holds the conversion of model.safetensors" in capsys.readouterr().err
    hub_here.fail("/me/published/", "reset")
    assert convert(classification, "me/published", "--output", tmp_path / "new") == 1
    assert "cannot download model.safetensors of me/published: " in (error := only_error(capsys)) and "reset" in error


def test_model_cards_of_released_checkpoints_are_complete():
    from huggingface_hub import ModelCard

    from convert.cards import model_card

    for name, released in RELEASED.items():
        task = released.task
        if task == "detection":
            task = "dino" if name.startswith("dino_") else "rcnn"
        card = ModelCard(str(model_card(name, task, released, 123, True)))
        assert card.data.license == "mit" and card.data.library_name == "transformers"
        values = [value for _, _, value in released.precisions] or [released.metric] * (released.metric is not None)
        assert [result.metric_value for result in card.data.eval_results or ()] == values


@pytest.mark.parametrize("image_size, crop", [(64, (64, 64)), ([64, 96], (64, 96)), ((96, 64), (96, 64))])
def test_processor_crops_to_model_image_size(image_size, crop):
    pixels = classification.image_processor(image_size)(Image.new("RGB", (200, 150)), return_tensors="pt")
    assert tuple(pixels["pixel_values"].shape[-2:]) == crop
