"""Conversion: every layout in, a folder for transformers out, and onto a Hub over HTTP."""

import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, MODEL_CASES, ROOT, case_folder, load_case
from safetensors.torch import load_file
from test_package import bare_environment, run_python

from convert import all as convert_all
from convert import backbone, classification, mask2former, upernet
from convert.conversion import REPORT
from convert.labels import class_names, id2label
from convert.released import RELEASED
from internimage_hf import (
    InternImageBackbone,
    InternImageConfig,
    InternImageForImageClassification,
)
from internimage_hf.checkpoint import translate_state_dict


def convert(module, *arguments: object) -> int:
    return module.main([str(argument) for argument in arguments])


def released_keys(variant: str) -> list[tuple[str, tuple[int, ...]]]:
    with gzip.open(FIXTURES / "state_dict_keys" / f"{variant}.json.gz", "rt") as file:
        return [(key, tuple(shape)) for key, shape in json.load(file)]


# --------------------------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("case", MODEL_CASES)
def test_released_layout(case, tmp_path, capsys):
    folder = case_folder(case)
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
def test_published_layout(case, tmp_path):
    assert convert(classification, FIXTURES / case, "--output", tmp_path / "model") == 0
    expected = load_file(FIXTURES / case / "expected.safetensors")
    model = InternImageForImageClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(expected["pixel_values"]).logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in RELEASED if RELEASED[name].task == "classification"])
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
def test_back_to_the_official_layout_and_forth(case, tmp_path):
    folder = case_folder(case)
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


@pytest.mark.parametrize("variant", ["t", "s", "b", "l", "xl", "h", "g"])
def test_full_size_names_go_back(variant):
    with torch.device("meta"):
        model = InternImageForImageClassification(InternImageConfig.from_variant(variant))
    official = classification.official_state_dict(model)
    assert {name: tuple(t.shape) for name, t in official.items()} == dict(released_keys(variant))


def test_options(tmp_path):
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


def test_labels():
    assert class_names("imagenet-22k")[0] == "organism, being" and len(set(class_names("imagenet-22k"))) == 21841
    assert class_names("ade20k")[:3] == ["wall", "building", "sky"] and len(class_names("ade20k")) == 150
    assert id2label("ade20k", 3) == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_memory_of_a_conversion(tmp_path):
    """Of a model of 200 MB, against the memory that the same imports take."""
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
def test_a_bad_file_is_one_line_and_nothing_is_left(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, message = bad_files(tmp_path)[kind]
    output = tmp_path / "out" / "model"
    assert convert(classification, source, "--config", FIXTURES / "t_like" / "config.json", "--output", output) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "was-here").exists()
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_bad_arguments(tmp_path, capsys):
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


def test_killed_while_writing_and_run_again(tmp_path):
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
    assert classification.main(arguments) == 0  # finished already
    assert (output / "model.safetensors").stat().st_mtime_ns == stamp


# --------------------------------------------------------------------------------------------------- downstream models


@pytest.mark.parametrize("name", [name for name in RELEASED if RELEASED[name].task != "classification"])
def test_every_released_downstream_backbone_maps_without_remainder(name):
    """A backbone of the variant's names and shapes, with the layer scale that the authors trained T to XL with."""
    from types import SimpleNamespace

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


def test_upernet(tmp_path):
    from transformers import UperNetForSemanticSegmentation, pipeline

    folder = case_folder("upernet_tiny")
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
    if wanted.shape != logits.shape:  # the official head's own resolution, before the resize to the input's
        wanted = torch.nn.functional.interpolate(wanted, size=logits.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)

    segment = pipeline("image-segmentation", model=str(output))
    from PIL import Image

    masks = segment(Image.new("RGB", (70, 50), (120, 30, 200)))
    assert masks and all(entry["mask"].size == (70, 50) for entry in masks)


def test_backbone_of_a_segmenter_and_of_a_classifier(tmp_path):
    folder = case_folder("upernet_tiny")
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
    """A model's tensors under mmdetection's names: the conversion's patterns, walked backwards by hand for one model."""
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


def test_mask2former(tmp_path):
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


def test_everything_in_the_table_that_lies_here(tmp_path, capsys):
    """One file is there, one is broken, the others would be downloaded: offline, they fail one by one."""
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
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


SOURCE = [FIXTURES / "t_like" / "checkpoint.pth", "--config", FIXTURES / "t_like" / "config.json"]


def test_convert_push_and_load(hub, tmp_path):
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


def test_upload_killed_half_way(hub, tmp_path):
    arguments = [*SOURCE, "--output", tmp_path / "model", "--push-to-hub", "somebody/killed"]
    hub.slow_upload = 30.0
    process = run_converter(hub, tmp_path, *arguments, wait=False)
    deadline = time.monotonic() + 100
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


@pytest.mark.parametrize(
    ("token", "forbid", "message"),
    [(None, False, "HF_TOKEN"), ("hf_bad", False, "HF_TOKEN"), ("hf_good", True, "may not write")],
)
def test_missing_token_or_permission(hub, tmp_path, token, forbid, message):
    hub.forbid = forbid
    shutil.copytree(FIXTURES / "t_like", tmp_path / "source")
    status, _, err = run_converter(
        hub, tmp_path, *SOURCE, "--output", tmp_path / "model", "--push-to-hub", "somebody/refused", token=token
    )
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(lines) == 1 and message in lines[0] and "Traceback" not in err


def test_model_cards_of_the_released():
    from huggingface_hub import ModelCard

    from convert.cards import model_card

    for name, released in RELEASED.items():
        card = ModelCard(str(model_card(name, released.task, released, 123, True)))
        assert card.data.license == "mit" and card.data.library_name == "transformers"
        assert bool(card.data.eval_results) == (released.metric is not None)
        if released.metric is not None:
            assert card.data.eval_results[0].metric_value == released.metric
