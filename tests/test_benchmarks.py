"""Tests of the benchmarks: their common parts, and each program on tiny inputs on the CPU."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from utils import ROOT

from internimage_hf import InternImageConfig, InternImageForImageClassification, InternImageRcnnConfig, region_ops
from internimage_hf.dcnv3 import dcnv3_softmax


sys.path.insert(0, str(ROOT / "benchmarks"))
import backward_bounds
import detection_speed
import harness
import model_speed
import op_cpu
import op_gpu
import sass_count


TINY_CALL = harness.OperatorCall(size=6, channels=32, groups=2, count=3)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(folder, program: str) -> tuple[dict, str]:
    """Returns a program's report and its Markdown."""
    (file,) = folder.glob(f"{program}_*.json")
    assert sorted(folder.iterdir()) == [file, file.with_suffix(".md")]
    return json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- harness


def test_operator_calls_equal_those_of_models():
    assert harness.operator_calls("t", 224) == [(56, 64, 4, 4), (28, 128, 8, 4), (14, 256, 16, 18), (7, 512, 32, 4)]
    assert harness.operator_calls("h", 512)[2] == (32, 1280, 40, 32)
    model = InternImageForImageClassification(InternImageConfig.from_variant("t")).eval()
    seen = []
    for module in model.modules():
        if type(module).__name__ == "InternImageDCNv3":
            module.register_forward_hook(lambda m, inputs, output: seen.append((*inputs[0].shape[1:], m.groups)))
    with torch.inference_mode():
        model(torch.zeros(1, 3, 70, 70))  # no multiple of 32
    expected = [
        (call.size, call.size, call.channels, call.groups)
        for call in harness.operator_calls("t", 70)
        for _ in range(call.count)
    ]
    assert seen == expected


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_other_formulations_agree_with_the_operator(scale):
    tensors = [t.double() for t in harness.make_inputs(2, TINY_CALL, torch.float32)]
    expected = dcnv3_softmax(*tensors, groups=2, offset_scale=scale, backend="torch").float()
    tensors = [t.float() for t in tensors]
    torch.testing.assert_close(harness.materialising(*tensors, 2, scale), expected, atol=1e-5, rtol=1e-4)
    if scale == 1.0:
        torch.testing.assert_close(op_cpu.loop_of_grid_samples(*tensors, 2), expected, atol=1e-5, rtol=1e-4)


def test_timed_functions_alternate():
    order = []
    functions = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert harness.take_turns(functions, 2) == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}
    assert order == list("abcabc")
    assert {len(values) for values in harness.take_turns(functions, 9, seconds=-1, at_least=2).values()} == {2}


def test_peak_memory_counts_temporaries_and_the_result():
    def call():
        temporary = torch.ones(1000, dtype=torch.float64)
        result = torch.ones(500, dtype=torch.float64)
        del temporary
        return result

    assert harness.peak_memory(call) == 12000


def test_results_replace_those_of_same_day(tmp_path):
    report = {"environment": {"hardware": "A (R) chip/9, 2 threads", "date": "2026-11-28 10:00 UTC"}}
    for text in ("first", "second"):
        harness.write_results(tmp_path / "new", "op", report, text)
    assert results(tmp_path / "new", "op") == (report, "second")
    assert {file.stem for file in (tmp_path / "new").iterdir()} == {"op_a_r_chip_9_2026-11-28"}


def test_table_is_markdown():
    assert harness.table(("name", "ms"), [("a|b", "1.25"), ("c", "")]) == [
        "",
        "| name |   ms |",
        "|------|-----:|",
        "| a/b  | 1.25 |",
        "| c    |      |",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cuda:99"), "finds no GPU cuda:99"),
        (("--device", "meta"), "must be cpu or cuda, got meta"),
        (("--device", "no-device"), "argument --device: "),
        (("--batch", "0"), "argument --batch: must be positive, got 0"),
        (("--seconds", "many"), "invalid float value: 'many'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        model_speed.main(list(arguments))
    assert message in capsys.readouterr().err


def test_kernel_built_from_other_sources_is_stale(tmp_path):
    with harness._in_place_of({}, [harness.KERNEL_PROJECT]):
        folder = importlib.import_module("builder").build("triton", tmp_path)[0]
    name = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["id"]
    kernel = SimpleNamespace(__name__=name, __file__=str(folder / "__init__.py"))
    assert harness.describe(kernel) == "torch-cuda, up to date"
    kernel.__name__ = name[:-1] + ("0" if name[-1] != "0" else "1")
    assert harness.describe(kernel) == "torch-cuda, STALE: build it again"


# ----------------------------------------------------------------------------------------------- the official code


def test_official_code_is_imported_from_a_checkout(tmp_path, monkeypatch):
    """The stand-in imports the same modules as the official file; `sys.modules` and `sys.path` are restored afterwards."""
    functions = tmp_path / "classification" / "ops_dcnv3" / "functions"
    functions.mkdir(parents=True)
    (functions / "__init__.py").write_text(
        "import DCNv3, pkg_resources\n"
        "from timm.models.layers import DropPath, trunc_normal_\n"
        "version = float(pkg_resources.get_distribution('DCNv3').version)\n"
    )
    for name in ("DCNv3", "ops_dcnv3", "ops_dcnv3.functions"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    before, path = dict(sys.modules), list(sys.path)
    module = harness.import_official(tmp_path, "ops_dcnv3.functions")
    assert module.version > 1
    assert not harness.has_official_operator()
    assert sys.path == path
    for name in ("pkg_resources", "timm", "timm.models", "timm.models.layers"):
        assert sys.modules.get(name) is before.get(name)


def test_folder_without_official_code_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"--upstream {tmp_path} is not a checkout of OpenGVLab/InternImage"):
        harness.import_official(tmp_path, "ops_dcnv3.functions")


# ---------------------------------------------------------------------------------------------------------- programs


def test_op_cpu_measures_every_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(op_cpu, "CALLS", [TINY_CALL])
    op_cpu.main(["--batch", "2", "--repeats", "1", "--threads", "1", "--only", "chunked", "--output", str(tmp_path)])
    report, table = results(tmp_path, "op_cpu")
    assert table in capsys.readouterr().out
    assert list(report["measurements"]) == [f"{name}, batch 2" for name in ("forward", "backward", "forward+backward")]
    for by_formulation in report["measurements"].values():
        assert list(by_formulation) == ["materialising (yardstick)", "chunked implementation (embedding_bag)"]
        for result in by_formulation.values():
            (shape,) = result["shapes"]
            assert shape["shape"] == [2, 6, 6, 32]
            assert shape["peak_bytes"] > 0
            assert result["milliseconds"] == pytest.approx(3 * shape["milliseconds"])
        assert by_formulation["materialising (yardstick)"]["time_ratio"] == 1


def test_op_cpu_refuses_a_wrong_formulation(monkeypatch):
    monkeypatch.setattr(op_cpu, "CALLS", [TINY_CALL])
    monkeypatch.setitem(op_cpu.FORMULATIONS, "wrong", lambda *tensors: 2 * op_cpu.chunked(*tensors))
    with pytest.raises(SystemExit, match="wrong: its forward pass at 6x6x32 is wrong"):
        op_cpu.main(["--batch", "1", "--repeats", "1", "--only", "wrong", "--passes", "forward"])


@pytest.fixture
def reference_for_a_kernel(monkeypatch):
    """The reference implementation in place of a compiled kernel."""
    kernel = SimpleNamespace(dcnv3_softmax=lambda *tensors, groups: op_gpu.reference(*tensors, groups))
    monkeypatch.setattr(harness, "built_kernels", lambda device_type: {"CPU kernel": kernel})
    monkeypatch.setattr(harness, "describe", lambda kernel: "ready")
    return kernel


def test_op_gpu_measures_both_passes(tmp_path, reference_for_a_kernel):
    flags = ["--device", "cpu", "--seconds", "0.001", "--dtypes", "float32", "bfloat16", "--output", str(tmp_path)]
    assert op_gpu.main(flags) == 0
    report, table = results(tmp_path, "op_gpu")
    assert [(row["dtype"], row["pass"]) for row in report["rows"]] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in ("forward", "backward")
    ]
    assert all(set(row["milliseconds"]) == {op_gpu.REFERENCE, "CPU kernel"} for row in report["rows"])
    assert [row["pass"] for row in report["rows"] if row.get("bandwidth_share", 0) > 0] == ["forward", "forward"]
    assert "small, bfloat16, backward" in table


def test_op_gpu_omits_wrong_or_missing_implementations(tmp_path, reference_for_a_kernel, capsys):
    reference_for_a_kernel.dcnv3_softmax = lambda *tensors, groups: 1.1 * op_gpu.reference(*tensors, groups)
    flags = ["--device", "cpu", "--seconds", "0.001", "--dtypes", "float32", "--dcnv4", str(tmp_path / "absent")]
    assert op_gpu.main([*flags, "--output", str(tmp_path / "out")]) == 1
    report, _ = results(tmp_path / "out", "op_gpu")
    assert report["left_out"]["CPU kernel, float32"].startswith("its error is ")
    assert report["left_out"]["DCNv4"].startswith("cannot be loaded (ModuleNotFoundError")
    assert "wrong results: CPU kernel, float32" in capsys.readouterr().err


def test_op_gpu_needs_a_kernel(monkeypatch):
    monkeypatch.setattr(harness, "built_kernels", lambda device_type: {})
    with pytest.raises(SystemExit, match=r"run dcnv3_kernel/build\.py first"):
        op_gpu.main(["--device", "cpu"])


class TinyModel(nn.Module):
    """A classifier with every kind of layer that the profile distinguishes."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, model_speed.CLASSES)

    def forward(self, pixel_values):
        hidden_state = self.norm(self.convolution(pixel_values)).mean((2, 3))
        return SimpleNamespace(logits=self.classifier(hidden_state))


@pytest.fixture
def tiny_models(monkeypatch):
    models = {name: TinyModel() for name in ("InternImage-T", "ConvNeXt-T", "Swin-T")}
    monkeypatch.setattr(model_speed, "build", lambda size, device, upstream: models)
    return models


SMALL = ["--image_size", "16", "--batch", "2", "--train_batch", "2", "--repeats", "2", "--threads", "1"]


def test_model_speed_measures_every_group(tmp_path, tiny_models, capsys):
    assert model_speed.main([*SMALL, "--profile", "--output", str(tmp_path)]) == 0
    report, table = results(tmp_path, "model_speed")
    assert [(row["dtype"], row["pass"], row["model"]) for row in report["measurements"]] == [
        (dtype, name, model)
        for dtype in ("float32", "bfloat16")
        for name in ("inference", "training")
        for model in tiny_models
    ]
    for row in report["measurements"]:
        assert row["turns"] == 2
        assert row["peak_bytes"] > 0
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
    assert report["not_measured"] == []
    for kinds in report["profiles"].values():
        assert list(kinds) == ["InternImage-T", "ConvNeXt-T"]
        assert kinds["InternImage-T"].keys() >= {"norms", "linear layers", "convolutions"}
    assert table in capsys.readouterr().out


def test_model_speed_lists_cases_skipped_for_time(tmp_path, tiny_models):
    assert model_speed.main([*SMALL, "--seconds", "1e-9", "--output", str(tmp_path)]) == 0
    report, table = results(tmp_path, "model_speed")
    assert report["measurements"] == []
    assert "Not measured, out of time: t float32 eager inference;" in table
    assert len(report["not_measured"]) == 4


@pytest.mark.parametrize(("name", "status"), [("InternImage-T", 1), ("Swin-T", 0)])
def test_model_speed_reports_a_failure(tmp_path, tiny_models, name, status):
    tiny_models[name].convolution = nn.Conv2d(5, 8, 3)
    flags = [*SMALL, "--dtypes", "float32", "--passes", "inference", "--output", str(tmp_path)]
    assert model_speed.main(flags) == status
    report, table = results(tmp_path, "model_speed")
    failures = {row["model"]: row.get("failure", "") for row in report["measurements"]}
    assert failures.pop(name).startswith("RuntimeError: ")
    assert set(failures.values()) == {""}
    assert f"| {name} " in table


def test_detection_speed_times_every_part(tmp_path, monkeypatch):
    tiny = {"channels": 8, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]}
    monkeypatch.setattr(detection_speed, "QUERIES", 10)
    monkeypatch.setattr(
        detection_speed,
        "backbone_config",
        lambda variant, *stages: InternImageConfig(**tiny, out_features=list(stages)),
    )
    small = {"fpn_hidden_size": 8, "box_hidden_size": 8, "mask_hidden_size": 8}
    monkeypatch.setattr(detection_speed, "InternImageRcnnConfig", partial(InternImageRcnnConfig, **small))
    assert detection_speed.main(["--size", "50", "60", "--repeats", "1", "--output", str(tmp_path)]) == 0
    report, text = results(tmp_path, "detection_speed")
    assert report["environment"]["image_size"] == "50x60"
    assert [row["model"] for row in report["measurements"]] == ["DINO-T", "Deformable DETR-T", "Mask R-CNN-T"]
    for row in report["measurements"]:
        assert row["seconds"] > 0 and row["peak_bytes"] > 0 and f"## {row['model']}" in text
        assert all(seconds > 0 for seconds in row["parts"].values()), row
    assert {"RoIAlign", "non-maximum suppression", "mask head"} <= row["parts"].keys()
    assert detection_speed.modeling_internimage_rcnn.nms is region_ops.nms, "the functions are put back"


def test_models_are_built_for_given_size():
    with torch.device("meta"):
        models = model_speed.build("t", torch.device("cpu"), None)
        larger = model_speed.build("b", torch.device("cuda"), None)
    assert list(models) == ["InternImage-T", "InternImage-T, materialising op", "ConvNeXt-T", "ConvNeXtV2-T", "Swin-T"]
    assert list(larger) == ["InternImage-B", "ConvNeXt-B", "Swin-B"]
    millions = {name: round(sum(p.numel() for p in m.parameters()) / 1e6) for name, m in (models | larger).items()}
    assert millions["InternImage-T"] == 30
    assert millions["InternImage-B"] == 97
    assert {millions[name] for name in ("ConvNeXt-T", "ConvNeXtV2-T")} == {29}
    assert {millions[name] for name in ("ConvNeXt-B", "Swin-B")} <= {88, 89}


def test_materialising_model_equals_model():
    torch.manual_seed(0)
    config = InternImageConfig(channels=16, depths=[1, 1, 1, 1], groups=[1, 2, 4, 8], num_labels=5, offset_scale=2.0)
    model = InternImageForImageClassification(config).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images).logits
        actual = model_speed.materialising_internimage(model)(images).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- gpu_check.sh


def gpu_check(
    tmp_path, *arguments: str, python: str = sys.executable
) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Runs the script without a GPU; returns the process and the rows of its tables."""
    result = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--output", str(tmp_path / "out"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    tables = sorted((tmp_path / "out").glob("*.md"))
    lines = [line for file in tables for line in file.read_text().splitlines() if line.startswith("| ")]
    return result, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "outcome" not in line]


def test_gpu_check_without_a_gpu_skips_every_step(tmp_path):
    result, rows = gpu_check(tmp_path)
    assert result.returncode == 1, result.stderr
    assert len(rows) == 7 + 3
    assert all(row[1].startswith("skipped: ") and "finds no GPU" in row[1] for row in rows)


def test_gpu_check_records_each_step(tmp_path):
    """A stand-in for Python reports a GPU; one program fails, and one prints the summary of a run of skipped tests."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  *is_available*) echo ;;\n"
        '  *op_gpu*) echo "operator | broke"; exit 3 ;;\n'
        '  *model_speed*) echo "$*"; echo "3 skipped in 1 s" ;;\n'
        '  *) echo "did: $*" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    result, rows = gpu_check(tmp_path, "--speed", python=str(python))
    assert result.returncode == 1, result.stderr
    assert [row[:2] for row in rows] == [
        ["kernels in dcnv3_kernel/build", "passed"],
        ["operator", "FAILED: status 3"],
        ["models", "FAILED: every test was skipped"],
    ]
    assert rows[1][3] == "operator / broke"
    assert "--device cuda --profile" in (tmp_path / "out" / "gpu_check_speed.log").read_text()
    assert not (tmp_path / "out" / "gpu_check_tests.md").exists()


@pytest.mark.parametrize("arguments", [("--test",), ("--wheels",)])
def test_gpu_check_refuses_wrong_arguments(tmp_path, arguments):
    result, _ = gpu_check(tmp_path, *arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr


def test_model_speed_compares_flashinternimage_with_internimage():
    with torch.device("meta"):
        models = model_speed.build("flash_t", torch.device("cpu"), None)
    assert list(models)[:3] == ["FlashInternImage-T", "InternImage-T", "ConvNeXt-T"]
    assert [models[name].config.dcn_version for name in list(models)[:2]] == [4, 3]


# ---------------------------------------------------------------------------------------------- counts of instructions

# A loop over units. Each has one exponential, a rare part, two loads in a loop, of which a copy with more instructions
# follows, and a store.
DISASSEMBLY = """
.text._Zkernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @P0 EXIT ;
.L_x_0:
        /*0020*/                   MUFU.EX2 R2, R2 ;
        /*0030*/              @P2 BRA P3, `(.L_x_1) ;
        /*0040*/                   F2I.FLOOR.NTZ R3, R2 ;
        /*0050*/                   BSSY B0, `(.L_x_1) ;
.L_x_1:
        /*0060*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0080*/                   FFMA R8, R4, R5, R8 ;
        /*0090*/              @P4 BRA `(.L_x_2) ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*00b0*/                   CS2R R4, SRZ ;
        /*00c0*/              @P6 LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*00d0*/                   FFMA R8, R4, R5, R8 ;
        /*00e0*/              @P4 BRA `(.L_x_3) ;
.L_x_4:
        /*00f0*/                   F2FP.BF16.F32.PACK_AB R8, R9, R8 ;
        /*0100*/                   STG.E.128 desc[UR8][R2.64], R8 ;
        /*0110*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0120*/              @P5 BRA `(.L_x_0) ;
        /*0130*/                   EXIT ;
.L_x_5:
        /*0140*/                   BRA `(.L_x_5);
.text._Zother:
        /*0000*/                   BRX R2 -0x10 ;
.text._Zbackward:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   MUFU.RCP R2, R2 ;
        /*0020*/                   STS.128 [R4], R8 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   VOTE.ALL P0, !P1 ;
        /*0050*/                   LDS.64 R8, [R4] ;
        /*0060*/                   SHFL.BFLY PT, R8, R8, 0x2, 0x1f ;
        /*0070*/              @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   LDS R8, [R4] ;
        /*0090*/                   STG.E.U16 desc[UR8][R2.64], R8 ;
        /*00a0*/              @P0 BRA `(.L_x_0) ;
        /*00b0*/              @P2 BRA `(.L_x_4) ;
.L_x_3:
        /*00c0*/                   LDS.128 R8, [R4] ;
        /*00d0*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR8][R2.64], R8 ;
        /*00e0*/              @P3 BRA `(.L_x_3) ;
.L_x_4:
        /*00f0*/                   EXIT ;
"""


def test_sass_count_counts_the_instructions_of_a_unit(monkeypatch):
    functions = sass_count.functions_of(DISASSEMBLY)
    assert list(functions) == ["_Zkernel", "_Zother", "_Zbackward"]
    monkeypatch.setattr(sass_count, "INPUT_LOADS", 2)
    monkeypatch.setattr(sass_count, "EXPONENTIALS", 1)
    figures = sass_count.count(functions["_Zkernel"], stores=1)
    # prepare: 3 before the loop, 2 after the store; loop: 2 rounds of 3, but for the last branch; store: 2 branches, 2 others
    assert figures == {"start": 3, "prepare": 5, "loop": 5, "store": 4, "sum": 14, "slow": 1}
    with pytest.raises(sass_count.Failure, match="no way through"):
        sass_count.count(functions["_Zkernel"], stores=3)
    with pytest.raises(sass_count.Failure, match="target of the instruction BRX"):
        sass_count.count(functions["_Zother"], stores=1)


def test_sass_count_counts_the_backward_kernel(monkeypatch):
    monkeypatch.setattr(sass_count, "WRITES_OF_BATCH", 1)
    figures = sass_count.count_backward(sass_count.functions_of(DISASSEMBLY)["_Zbackward"], group_channels=16)
    # 16 units share what a batch executes, and 2 units a step of the loop; 8 cells share a step that writes the window out
    parts = {"start": 3, "prepare": 3 / 16, "loop": 4 / 2, "gradients": 3 / 16, "sum": 38 / 16}
    others = {"slow": 1 / 16, "shared": 10 / 16, "wavefronts": 4 / 16 + 3 / 2 + 2 / 16, "cell": 3 / 8}
    assert figures == pytest.approx(parts | others)


def test_backward_bounds_counts_the_additions_of_all_windows():
    assert backward_bounds.cells_inside(56, 8) == 11 + 5 * 14 + 11
    assert backward_bounds.cells_inside(7, 7) == 7
    counts = {"start": 100, "prepare": 20, "loop": 60, "gradients": 10, "wavefronts": 50, "cell": 2}
    call, tiles = harness.OperatorCall(8, 32, 2, 1), backward_bounds.Tiles(8, 8, 3, 31 * 1024)
    figures = backward_bounds.bounds(counts, 3, call, 2, tiles)
    # a block with the 128 units of a tile of two groups, whose windows have 14 x 14 cells
    assert figures["slots"] == pytest.approx(90 + 100 / 128 + 2 * 196 * 2 / 128)
    assert figures["adds"] == pytest.approx(64 * 4 / 64)
    assert figures["warps"] == 7 and figures["adds before"] == 144


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_backward_bounds_takes_the_tiles_of_the_launch_plan(tmp_path):
    program = backward_bounds.compile_plan(tmp_path)
    call = harness.operator_calls("t", 224)[0]
    tiles = backward_bounds.tiles_of(program, 32, call, 2)
    assert tiles[:3] == (8, 8, 32 * 7 * 7 * 2)
    with pytest.raises(sass_count.Failure, match="no windows"):
        backward_bounds.tiles_of(program, 1, call._replace(channels=96), 2)


@pytest.mark.skipif(
    shutil.which("nvcc") is None or sass_count.find_nvdisasm() is None, reason="needs nvcc and nvdisasm"
)
def test_sass_count_measures_every_kernel_without_spills(tmp_path):
    assert sass_count.main(["--json", str(tmp_path / "counts.json")]) == 0
    report = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))
    assert list(report["kernels"]) == [kernel.name for kernel in sass_count.KERNELS]
    for figures in report["kernels"].values():
        last = figures["gradients" if "gradients" in figures else "store"]
        assert figures["spilled"] == 0 and figures["sum"] == pytest.approx(figures["prepare"] + figures["loop"] + last)
    if report["nvcc"] == "13.0":
        most = {
            "bfloat16, width 16": 900,
            "bfloat16, width 32": 800,
            "float32, width 16": 350,
            "float32, width 32": 300,
            "backward, bfloat16, width 16": 105,
            "backward, bfloat16, width 32": 175,
            "backward, float32, width 16": 130,
            "backward, float32, width 32": 225,
        }
        assert all(figures["sum"] <= most[name] for name, figures in report["kernels"].items())


def test_sass_count_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sass_count, "find_nvdisasm", lambda: None)
    assert sass_count.main([]) == 1
    assert capsys.readouterr().err.startswith("sass_count.py: no nv")
