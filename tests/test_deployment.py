"""Tests of ONNX, AOTInductor, int8 weights and LoRA: exported models compute the model's outputs."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from utils import FIXTURES, ROOT, TINY_VARIANTS, run_example, run_python

from internimage_hf import (
    InternImageBackbone,
    InternImageConfig,
    InternImageForImageClassification,
    InternImageImageProcessor,
)
from internimage_hf.dcnv3 import dcnv3, dcnv3_as_operator, dcnv3_softmax
from internimage_hf.dcnv3_reference import Geometry


onnx = pytest.importorskip("onnx", reason="needs `pip install internimage-hf[export]`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs `pip install internimage-hf[export]`")
pytest.importorskip("onnxscript", reason="needs `pip install internimage-hf[export]`")

from internimage_hf.onnx_export import dcnv3_translation_table, expand_dcnv3, export_onnx  # noqa: E402


# One layer per stage: the exporter takes some seconds per layer.
SMALL = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [2, 4, 4, 8], "mlp_ratio": 2.0, "num_labels": 5}
VARIANTS = {**TINY_VARIANTS, "res_post_norm": {**TINY_VARIANTS["res_post_norm"], "level2_post_norm_block_ids": [0]}}
SLOW_VARIANTS = [variant for variant in VARIANTS if variant != "pre_norm"]


def random_model(model_class=InternImageForImageClassification, config: InternImageConfig | None = None, **fields):
    """A model with random parameters: each of them affects the outputs, offsets and masks included."""
    model = model_class(config or InternImageConfig(**{**SMALL, **fields})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif tensor.is_floating_point() and name.endswith("bias"):
                tensor.normal_(std=0.2, generator=generator)
    return model


def session(model: "onnx.ModelProto | str") -> "onnxruntime.InferenceSession":
    content = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def check(model, run: "onnxruntime.InferenceSession", shapes: list[tuple[int, ...]], atol: float = 1e-3) -> None:
    for shape in shapes:
        pixel_values = torch.randn(shape).to(model.dtype)
        with torch.no_grad():
            outputs = model(pixel_values)
        expected = outputs.feature_maps if isinstance(model, InternImageBackbone) else [outputs.logits]
        actual = run.run(None, {"pixel_values": pixel_values.numpy()})
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape
            np.testing.assert_allclose(a, e.numpy(), atol=atol, rtol=atol, err_msg=str(shape))


SIZES = [(1, 3, 64, 96), (3, 3, 75, 50), (2, 3, 33, 130)]


@pytest.mark.parametrize(
    "variant", ["pre_norm", *(pytest.param(variant, marks=pytest.mark.slow) for variant in SLOW_VARIANTS)]
)
def test_onnx_classifier_equals_model(variant):
    model = random_model(**VARIANTS[variant])
    program = export_onnx(model, dcnv3_op="custom")
    proto = program.model_proto
    onnx.checker.check_model(proto)
    assert [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [
        "batch_size", 3, "height", "width",
    ]  # fmt: skip
    nodes = [node for node in proto.graph.node if node.op_type == "DCNv3"]
    assert len(nodes) == sum(model.config.depths)
    for node, groups in zip(nodes, model.config.groups, strict=True):
        assert node.domain == "internimage_hf" and len(node.input) == 3 and len(node.output) == 1
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {
            "kernel_size": [3, 3], "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": groups,
            "offset_scale": model.config.offset_scale, "remove_center": int(model.config.remove_center),
        }  # fmt: skip
    assert not any(node.op_type == "GridSample" for node in proto.graph.node)
    assert str(ROOT) not in str(proto)

    assert expand_dcnv3(program.model) == len(nodes)
    proto = program.model_proto
    onnx.checker.check_model(proto)
    assert {node.domain for node in proto.graph.node} == {""}
    check(model, session(proto), SIZES)


class Op(torch.nn.Module):
    def __init__(self, softmax: bool, options: dict):
        super().__init__()
        self.function, self.options = dcnv3_softmax if softmax else dcnv3, options

    def forward(self, input, offset, mask):
        return self.function(input, offset, mask, **self.options)


# ONNX Runtime has no GridSample of doubles before opset 20.
@pytest.mark.parametrize(
    "opset, dtype, softmax, options",
    [
        (18, torch.float32, False, {"groups": 2, "kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 3), "dilation": (2, 1)}),
        (20, torch.float32, True, {"groups": 3, "offset_scale": 1.7, "remove_center": True}),
        (18, torch.float16, True, {"groups": 1, "kernel_size": (2, 2)}),
        (20, torch.float64, False, {"groups": 6, "kernel_size": (1, 1), "padding": (0, 0), "offset_scale": 0.5}),
    ],
)  # fmt: skip
def test_onnx_operator_equals_pytorch(opset, dtype, softmax, options):
    """All parameters of the operator; sampling points outside, infinite and NaN."""
    geometry = Geometry(
        **{
            "kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "offset_scale": 1.0,
            "remove_center": False, **options,
        }
    )  # fmt: skip

    def arguments(batch, height, width):
        sizes = (batch, *geometry.output_size(height, width), geometry.groups * geometry.points)
        offset = torch.randn(*sizes[:3], sizes[3] * 2) * 3
        offset[0, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
        offset[0, 1, 0, :2] = torch.tensor([6e4, -6e4])
        return [tensor.to(dtype) for tensor in (torch.randn(batch, height, width, 12), offset, torch.randn(sizes))]

    model, auto = Op(softmax, options), torch.export.Dim.AUTO
    with dcnv3_as_operator():
        program = torch.export.export(
            model, tuple(arguments(2, 8, 9)), dynamic_shapes=[{0: auto, 1: auto, 2: auto}] * 3, strict=False
        )
    proto = torch.onnx.export(
        program,
        (),
        dynamo=True,
        opset_version=opset,
        custom_translation_table=dcnv3_translation_table(),
        verbose=False,
    ).model_proto
    assert proto.opset_import[0].version == opset
    run = session(proto)
    names = [value.name for value in proto.graph.input]
    tolerance = {torch.float16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    for sizes in ((1, 9, 12), (3, 13, 8)):
        tensors = arguments(*sizes)
        (actual,) = run.run(None, dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True)))
        assert actual.dtype == tensors[0].numpy().dtype
        np.testing.assert_allclose(actual, model(*tensors).numpy(), atol=tolerance, rtol=tolerance)


def test_bad_arguments_are_named():
    model = random_model()
    with pytest.raises(ValueError, match="`opset` must be an int of at least 18, got 16"):
        export_onnx(model, opset=16)
    with pytest.raises(ValueError, match="`dcnv3_op` must be one of 'native', 'custom', got 'plugin'"):
        export_onnx(model, dcnv3_op="plugin")
    with pytest.raises(ValueError, match="training mode"):
        export_onnx(model.train())
    with pytest.raises(TypeError, match="`model` must be an InternImageForImageClassification"):
        export_onnx(torch.nn.Linear(2, 2))


# ----------------------------------------------------------------------------------------------------------- the program


def save(model, folder) -> None:
    model.save_pretrained(folder)
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    processor = InternImageImageProcessor(
        size={"shortest_edge": min(height, width)}, crop_size={"height": height, "width": width}
    )
    processor.save_pretrained(folder)


def test_program_exports_backbone(tmp_path):
    save(random_model(image_size=(64, 96)), tmp_path / "model")
    output = run_example(
        "export.py",
        "--model",
        "model",
        "--task",
        "backbone",
        "--out_features",
        "stage2",
        "stage4",
        "--output",
        "out",
        cwd=tmp_path,
    )
    assert "pixel_values -> stage2, stage4" in output and "on images 1x3x64x96" in output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json", "model.onnx", "preprocessor_config.json",
    ]  # fmt: skip
    backbone = InternImageBackbone.from_pretrained(tmp_path / "model", out_features=["stage2", "stage4"]).eval()
    check(backbone, session(str(tmp_path / "out" / "model.onnx")), SIZES)


@pytest.fixture
def export(monkeypatch):
    """The program as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import export

    return export


def test_evaluated_classes_are_matched_by_name(export):
    match = export.matching_classes
    assert match(["a", "b", "c"], ["c", "a"], "d") == ({0: 2, 1: 0}, "2 of 2 classes matched by name")
    assert match(["a", "b"], ["b", "zebra"], "d") == ({0: 1}, "1 of 2 classes matched by name")
    found, how = match(["Golden retriever", "tabby cat"], ["tabby_cat", "golden_Retriever"], "d")
    assert found == {0: 1, 1: 0} and "without regard to case" in how
    found, how = match(["LABEL_0", "LABEL_1"], ["dog", "cat"], "d")
    assert found == {0: 0, 1: 1} and "matched by number" in how
    assert match(["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], "d")[0] == {0: 1, 1: 0}
    with pytest.raises(ValueError, match="has 3 classes, the model 2 without names"):
        match(["LABEL_0", "LABEL_1"], ["a", "b", "c"], "d")
    with pytest.raises(ValueError, match=r"none of its 1 classes \(x\) is one of the model's 2 \(a, b\)"):
        match(["a", "b"], ["x"], "d")


def test_accuracy_matches_class_names(export, tmp_path):
    """The model has the classes in another order than the dataset, and lacks one of them."""
    shades = {"ant": 20, "bee": 120, "zebra": 220}
    for split in ("train", "test"):
        for name, shade in shades.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / split / name / f"{i}.png")
    config = InternImageConfig(**SMALL, id2label={0: "wasp", 1: "bee", 2: "ant", 3: "fly", 4: "gnat"})
    images, lines = export.evaluation_images(export.ExportArguments(dataset=str(tmp_path)), config)
    assert any("3 of 9 images are left out of the accuracy" in line and "zebra 3" in line for line in lines)

    def run(pixel_values):
        return [torch.eye(5)[[2 if image.mean() < 60 else 1 for image in pixel_values]]]

    def processor(images, return_tensors):
        return {"pixel_values": torch.stack([torch.from_numpy(np.array(image)) for image in images])}

    assert export.accuracy(run, images, processor, torch.float32, batch_size=4) == 1.0
    with pytest.raises(ValueError, match="none of its 3 classes"):
        export.evaluation_images(
            export.ExportArguments(dataset=str(tmp_path)), InternImageConfig(id2label={0: "x", 1: "y"})
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "--model nowhere cannot be used"),
        (["--image_size", "64", "64", "64"], "--image_size must be one or two positive numbers"),
        (["--image_size", "0"], "--image_size must be one or two positive numbers"),
        (
            ["--no_dynamic", "--image_size", "32", "--dataset", "photos"],
            "gives images of 64x96, .*--image_size 64 96 was",
        ),
        (["--dataset", "nowhere"], "--dataset nowhere cannot be loaded"),
        (["--output", "model.pt2"], "must end in .onnx"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_flags_are_one_line(export, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    save(random_model(image_size=(64, 96)), tmp_path / "model")
    with pytest.raises(ValueError, match=message) as error:
        export.main(["--model", "model", *flags])
    assert "\n" not in str(error.value)


def test_demo_data_with_model_of_other_classes_is_refused(export, tmp_path, monkeypatch):
    """The classification program's default folder may hold any model."""
    import demo_model

    monkeypatch.chdir(tmp_path)
    save(random_model(), tmp_path / "outputs" / "image_classification")
    started = []
    monkeypatch.setattr(demo_model.image_classification, "main", lambda argv: started.append(argv))
    assert demo_model.demo_model() == Path("outputs/demo") and started[0][1] == "outputs/demo"
    names = {i: f"digit {i}" for i in range(10)}
    save(random_model(num_labels=10, id2label=names), tmp_path / "outputs" / "demo")
    assert demo_model.demo_model() == Path("outputs/demo") and len(started) == 1


@pytest.mark.slow
def test_program_exports_static_custom_node_and_int8(tmp_path):
    model = random_model(image_size=64)
    save(model, tmp_path / "model")
    common = ["--model", "model", "--no_dynamic"]
    run_example("export.py", *common, "--dcnv3_op", "custom", "--output", "out/custom.onnx", cwd=tmp_path)
    nodes = [node for node in onnx.load(tmp_path / "out" / "custom.onnx").graph.node if node.op_type == "DCNv3"]
    assert len(nodes) == 4 and [file.name for file in (tmp_path / "out").iterdir()] == ["custom.onnx"]

    output = run_example(
        "export.py", *common, "--quantize", "int8", "--opset", 20, "--output", "out/int8.onnx", cwd=tmp_path
    )
    assert "int8 weights" in output
    proto = onnx.load(tmp_path / "out" / "int8.onnx")
    # the exporter makes constants of up to 8192 bytes float again
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    large = sum(module.weight.numel() > 8192 for module in linear)
    assert large > 0
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in proto.graph.initializer) >= large


@pytest.mark.slow
def test_program_exports_float16_and_reports_failure(tmp_path):
    model = random_model(image_size=64)
    save(model, tmp_path / "model")
    common = ["--model", "model", "--no_dynamic"]
    run_example("export.py", *common, "--dtype", "float16", "--output", "out/half.onnx", cwd=tmp_path)
    check(model.half(), session(str(tmp_path / "out" / "half.onnx")), [(1, 3, 64, 64)], atol=2e-2)

    error = run_example("export.py", *common, "--tolerance", 1e-12, "--output", "bad", cwd=tmp_path, expect=1)
    assert "was not written" in error and list((tmp_path / "bad").iterdir()) == []


@pytest.mark.slow
def test_internimage_t_exports_in_two_minutes(tmp_path):
    save(random_model(config=InternImageConfig.from_variant("t")), tmp_path / "t")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = run_example("export.py", "--model", "t", "--output", "out", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "differ by up to" in output
    # CPU time, with the imports and the check: other programs on the machine do not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--no_dynamic", "--quantize", "int8"]])
def test_aotinductor_package_equals_model(tmp_path, flags):
    model = random_model(image_size=64)
    save(model, tmp_path / "model")
    run_example("export.py", "--model", "model", "--format", "aoti", "--output", "out", *flags, cwd=tmp_path)
    package = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    for batch in (1, 2, 5) if not flags else (1,):
        pixel_values = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            expected = model(pixel_values).logits
        torch.testing.assert_close(package(pixel_values)[0], expected, atol=1e-3 if not flags else 0.1, rtol=1e-3)


@pytest.mark.slow
def test_demo_model_keeps_accuracy_in_int8(tmp_path):
    """Without arguments the program trains, exports, and reports the accuracy with int8 weights."""
    output = run_example("export.py", "--quantize", "int8", cwd=tmp_path)
    before, after = (
        float(line.split("accuracy of the ")[1].split("%")[0].split()[1])
        for line in output.splitlines()
        if "accuracy of the" in line
    )
    assert before > 95 and after > before - 2
    assert json.loads((tmp_path / "outputs" / "export" / "config.json").read_text())["image_size"] == 32


# ------------------------------------------------------------------------------------------------------- int8 and LoRA


def test_int8_weights_stay_close_to_float32():
    torchao = pytest.importorskip("torchao", reason="needs `pip install internimage-hf[export]`")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, pixel_values = random_model(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values).logits
        quantize_(model, Int8WeightOnlyConfig())
        actual = model(pixel_values).logits
    assert isinstance(model.classifier.weight, torchao.utils.TorchAOBaseTensor)
    assert 0 < (actual - expected).abs().max() < 0.1 * expected.abs().max()


def train_with_lora(base, steps=3):
    """The README's LoRA model after some steps: all statistics, low-rank matrices and saved modules have changed."""
    peft = pytest.importorskip("peft", reason="needs `pip install internimage-hf[export]`")
    from internimage_hf.training import LORA_MODULES_TO_SAVE, LORA_TARGET_MODULES

    config = peft.LoraConfig(r=4, target_modules=LORA_TARGET_MODULES, modules_to_save=LORA_MODULES_TO_SAVE)
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        pixel_values = torch.randn(4, 3, 64, 64) + 1
        model(pixel_values=pixel_values, labels=torch.arange(4) % base.config.num_labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_lora_trains_targets_and_saved_modules():
    base = InternImageForImageClassification.from_pretrained(FIXTURES / "hf_t_like")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = train_with_lora(base, steps=2)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or ".modules_to_save." in name for name in trainable)
    per_layer = {
        name.split(".dcn.")[-1].split(".mlp.")[-1].split(".lora_")[0] for name in trainable if ".lora_" in name
    }
    assert per_layer == {"input_proj", "output_proj", "fc1", "fc2"}
    assert sum(".lora_A." in name for name in trainable) == 4 * sum(base.config.depths)
    moved = {
        name
        for name, tensor in model.state_dict().items()
        if name.endswith("weight") and "lora_B" in name and tensor.any()
    }
    assert len(moved) == 4 * sum(base.config.depths)
    for name, tensor in model.get_base_model().state_dict().items():
        original = name.replace(".base_layer", "").replace(".original_module", "")
        if original in before:
            assert torch.equal(tensor, before[original]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_adapter_holds_every_trained_tensor(variant, tmp_path):
    """BatchNorm statistics included: the reloaded adapter and the merged model give the same logits."""
    peft = pytest.importorskip("peft", reason="needs `pip install internimage-hf[export]`")
    torch.manual_seed(0)
    random_model(**VARIANTS[variant]).save_pretrained(tmp_path / "base")
    model = train_with_lora(InternImageForImageClassification.from_pretrained(tmp_path / "base"))
    pixel_values = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values).logits
        model.save_pretrained(tmp_path / "adapter")
        base = InternImageForImageClassification.from_pretrained(tmp_path / "base")
        assert (base(pixel_values).logits - expected).abs().max() > 0.01
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(loaded(pixel_values).logits, expected)
        merged = loaded.merge_and_unload()
        assert type(merged) is InternImageForImageClassification
        torch.testing.assert_close(merged(pixel_values).logits, expected, atol=1e-4, rtol=1e-4)


def test_lora_adapter_reproduces_outputs_in_new_process(tmp_path):
    pytest.importorskip("peft", reason="needs `pip install internimage-hf[export]`")
    torch.manual_seed(0)
    random_model(norm_layer="BN").save_pretrained(tmp_path / "base")
    model = train_with_lora(InternImageForImageClassification.from_pretrained(tmp_path / "base"))
    pixel_values = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.save({"pixel_values": pixel_values, "logits": model(pixel_values).logits}, tmp_path / "expected.pt")
    model.save_pretrained(tmp_path / "adapter")
    run_python(
        f"""
        import peft, torch
        from internimage_hf import InternImageForImageClassification
        torch.set_num_threads({torch.get_num_threads()})
        expected = torch.load("expected.pt")
        base = InternImageForImageClassification.from_pretrained("base")
        model = peft.PeftModel.from_pretrained(base, "adapter").eval()
        with torch.no_grad():
            assert torch.equal(model(expected["pixel_values"]).logits, expected["logits"])
        """,
        cwd=tmp_path,
        PYTHONPATH=str(ROOT),
    )
