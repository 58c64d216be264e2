"""Finding a kernel at run time: what is taken, in which order, and that nothing that goes wrong reaches the user's model."""

import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from utils import ROOT, TINY, bare_environment, run_python

from internimage_hf import InternImageConfig, InternImageForImageClassification, dcnv3_backend_report, kernel_loader
from internimage_hf.dcnv3 import dcnv3, use_dcnv3_backend


FAKE = """
calls = []
def dcnv3(input, offset, mask, *, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center):
    calls.append("dcnv3")
    return input * 0 + 7
dcnv3_softmax = dcnv3
"""


@pytest.fixture(autouse=True)
def _nothing_found(monkeypatch, tmp_path):
    """No kernel of this checkout, none remembered."""
    monkeypatch.setattr(kernel_loader, "_HERE", tmp_path / "package")
    for name in ("LOCAL_KERNELS", "DCNV3_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    kernel_loader.forget_kernels()
    yield
    kernel_loader.forget_kernels()


@pytest.fixture
def warnings(caplog):
    return lambda: [r.getMessage() for r in caplog.records if r.name == "internimage_hf.kernel_loader"]


def variant(folder, backend="cpu", code=FAKE, name=None, **more):
    folder.mkdir(parents=True)
    name = name or f"_dcnv3_{folder.name.replace('-', '_')}_{abs(hash(str(folder)))}"
    metadata = {"id": name, "name": "dcnv3", "version": 1, "license": "mit", "python-depends": []}
    (folder / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": backend, **more}}))
    (folder / "__init__.py").write_text(code)
    return folder


def bundled(tmp_path, abi="211", machine=None, **options):
    name = f"torch-stable-abi{abi}-cpu-{machine or platform.machine().lower()}-{platform.system().lower()}"
    return variant(tmp_path / "package" / "_kernels" / name, **options)


def call(**options):
    tensors = [torch.randn(1, 4, 4, c) for c in (8, 18, 9)]
    return dcnv3(*tensors, groups=1, **options)


def test_a_bundled_kernel_is_used(tmp_path):
    folder = bundled(tmp_path)
    assert (call() == 7).all()
    assert not (call(backend="torch") == 7).all()
    with use_dcnv3_backend("torch"):
        assert not (call() == 7).all()
        assert dcnv3_backend_report()["cpu"]["backend"] == "torch"
    assert dcnv3_backend_report()["cpu"] == {"backend": "kernel", "reason": str(folder)}


def test_local_kernels_come_first(tmp_path, monkeypatch):
    bundled(tmp_path)
    for path in (variant(tmp_path / "mine" / "build" / bundled_name(tmp_path)).parents[1], variant(tmp_path / "one")):
        kernel_loader.forget_kernels()
        monkeypatch.setenv("LOCAL_KERNELS", f"other/kernel=/nowhere:kernels-community/dcnv3={path}")
        assert "LOCAL_KERNELS" in dcnv3_backend_report()["cpu"]["reason"]
        assert (call() == 7).all()


def bundled_name(tmp_path):
    return next((tmp_path / "package" / "_kernels").iterdir()).name


@pytest.mark.parametrize(
    "code, complaint",
    [
        ("raise OSError('undefined symbol')", "undefined symbol"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("x = 1", "no function dcnv3"),
        ("def (", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_broken_kernel_is_one_warning(tmp_path, warnings, code, complaint):
    bundled(tmp_path, code=code)
    for _ in range(3):
        assert call().isfinite().all()
    (message,) = warnings()
    assert complaint in message and "PyTorch definition" in message
    report = dcnv3_backend_report()["cpu"]
    assert report["backend"] == "torch" and complaint in report["reason"]
    with pytest.raises(RuntimeError, match=complaint):
        call(backend="kernel")


def test_a_broken_one_does_not_hide_the_next(tmp_path, monkeypatch, warnings):
    bad = variant(tmp_path / "bad", code="1/0")
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/dcnv3={bad}")
    folder = bundled(tmp_path)
    assert (call() == 7).all() and (call() == 7).all()
    (message,) = warnings()
    assert f"LOCAL_KERNELS, {bad}: ZeroDivisionError" in message and f"is {folder}." in message
    report = dcnv3_backend_report()["cpu"]
    assert report["backend"] == "kernel" and report["reason"].startswith(str(folder))
    assert f"LOCAL_KERNELS, {bad}: ZeroDivisionError" in report["reason"]


def test_a_damaged_bundled_kernel_is_named_beside_the_one_in_use(tmp_path, warnings):
    good = bundled(tmp_path, abi="210")
    damaged = bundled(tmp_path, abi="211")
    metadata = json.loads((damaged / "metadata.json").read_text())
    metadata["digest"] = {"algorithm": "sha256", "files": {"__init__.py": "bm90IGl0cyBkaWdlc3Q="}}
    (damaged / "metadata.json").write_text(json.dumps(metadata))
    assert (call() == 7).all()
    (message,) = warnings()
    assert f"{damaged}: ValueError: its __init__.py is not the one that was built" in message
    assert f"is {good}." in message


@pytest.mark.parametrize("path", ["/nowhere", "~nobody-of-this-name/x", "/" + "a" * 300, "", "not-a-folder"])
def test_missing_local_kernel_falls_back(tmp_path, monkeypatch, warnings, path):
    (tmp_path / "not-a-folder").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/dcnv3={path}")
    assert call().isfinite().all()
    (message,) = warnings()
    assert not path or f"LOCAL_KERNELS, {path}: " in message
    kernel_loader.forget_kernels()
    folder = bundled(tmp_path)
    assert (call() == 7).all()
    _, message = warnings()
    assert f"LOCAL_KERNELS, {path or repr('kernels-community/dcnv3=')}: " in message and f"is {folder}." in message


@pytest.mark.parametrize("entry", ["/a/path/alone", "kernels-community/dcnv3", "=/a/path", "other/kernel="])
def test_a_malformed_entry_is_named(tmp_path, monkeypatch, warnings, entry):
    good = variant(tmp_path / "good")
    monkeypatch.setenv("LOCAL_KERNELS", f"{entry}::kernels-community/dcnv3={good}:")
    assert (call() == 7).all()
    (message,) = warnings()
    assert f"LOCAL_KERNELS, {entry!r}: ValueError: an entry must be OWNER/NAME=PATH" in message
    assert message in message.splitlines()


@pytest.mark.parametrize("metadata", ["", "[]", "{}", '{"id": "x"}', '{"id": "x", "backend": "cpu"}'])
def test_malformed_metadata_is_named(tmp_path, warnings, metadata):
    (bundled(tmp_path) / "metadata.json").write_text(metadata)
    assert call().isfinite().all()
    (message,) = warnings()
    assert "ValueError: Cannot parse metadata from" in message


def test_folders_whose_names_are_no_variants_are_passed_over(tmp_path):
    machine = f"{platform.machine().lower()}-{platform.system().lower()}"
    for name in ("abi2.11-cpu", "abi2-cpu", "abi-cpu", "abi211-cpu-x"):
        variant(tmp_path / "package" / "_kernels" / f"torch-stable-{name}-{machine}", code="1/0")
    folder = bundled(tmp_path)
    assert kernel_loader.find_variants(folder.parent, "cpu") == [folder]


@pytest.mark.parametrize(
    "cuda, hip, device_type, expected",
    [
        ("12.8", None, "cuda", ["cu126", "torch-cuda"]),
        ("12.9", None, "cuda", ["cu129", "cu126", "torch-cuda"]),
        ("13.0", None, "cuda", ["cu130", "torch-cuda"]),
        (None, "7.1.25424", "cuda", ["rocm71", "torch-rocm"]),
        (None, "6.4.1", "cuda", ["torch-rocm"]),
        (None, None, "xpu", []),  # torch is not built for it
        ("13.0", None, "cpu", ["cpu"]),
    ],
)
def test_variants_follow_what_torch_was_built_for(tmp_path, monkeypatch, cuda, hip, device_type, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    machine = f"{platform.machine().lower()}-{platform.system().lower()}"
    for compute in ("cu126", "cu129", "cu130", "rocm70", "rocm71", "cpu"):
        (tmp_path / "build" / f"torch-stable-abi211-{compute}-{machine}").mkdir(parents=True)
    for name in ("torch-cuda", "torch-rocm", "torch-xpu"):
        (tmp_path / "build" / name).mkdir()
    found = [folder.name for folder in kernel_loader.find_variants(tmp_path, device_type)]
    assert [name.removeprefix("torch-stable-abi211-").removesuffix(f"-{machine}") for name in found] == expected


def test_a_kernel_named_like_another_module_leaves_it_alone(tmp_path, warnings):
    bundled(tmp_path, name="json")
    assert call().isfinite().all()
    assert "no function dcnv3" in warnings()[0] and json.loads("1") == 1


@pytest.mark.parametrize(
    "archs, fits",
    [
        (["8.0", "9.0+PTX"], True),
        (["9.0+PTX"], True),
        (["8.0+PTX"], True),
        (["10.2"], True),
        (["10.0", "12.0+PTX"], True),
        (["10.4"], False),
        (["9.0"], False),
        (["11.0", "12.0+PTX"], False),
        (None, True),
    ],
)
def test_kernel_for_other_gpus_is_refused(tmp_path, monkeypatch, archs, fits):
    """A GPU of the capability 10.3 beside one of 12.1: code is for later minor versions, PTX for all later ones."""
    capabilities = [(10, 3)] if archs and "12.0+PTX" not in archs else [(10, 3), (12, 1)] if archs else [(7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    folder = variant(tmp_path / "one", backend="cuda", archs=archs)
    if fits:
        assert kernel_loader.load_variant(folder, "cuda").dcnv3
    else:
        with pytest.raises(ValueError, match=r"compute capabilities .*, cuda:0 has 10\.3"):
            kernel_loader.load_variant(folder, "cuda")


def test_kernel_for_another_machine_falls_back(tmp_path, warnings):
    bundled(tmp_path, machine="riscv128")
    bundled(tmp_path, abi="299")
    assert call().isfinite().all()
    assert "make kernel" in warnings()[0]


def test_kernel_for_another_device_falls_back(tmp_path, monkeypatch, warnings):
    path = variant(tmp_path / "gpu", backend="cuda")
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/dcnv3={path}")
    assert call().isfinite().all()
    assert "built for cuda, not for cpu" in warnings()[0]


def test_truncated_library_falls_back(tmp_path, warnings):
    """A truncated binary: the dynamic linker's complaint, and the definition."""
    code = "import torch, pathlib\ntorch.ops.load_library(str(pathlib.Path(__file__).with_name('x.so')))"
    folder = bundled(tmp_path, code=code)
    (folder / "x.so").write_bytes(b"\x7fELF" + b"\0" * 100)
    assert call().isfinite().all()
    assert len(warnings()) == 1


@pytest.mark.parametrize("damage", ["cut short", "zeros", "gone", "changed", "fails late"])
def test_a_damaged_copy_does_not_end_the_process(tmp_path, damage):
    """Nor does the undamaged build of the same name after it, whose operators must not be registered twice."""
    built = next((ROOT / "dcnv3_kernel" / "build").glob("torch-stable-abi*-cpu-*"), None)
    if built is None:
        pytest.skip("no kernel was built: `make kernel`")
    folder = tmp_path / built.name
    shutil.copytree(built, folder)
    (library,) = folder.glob("*.so")
    content = library.read_bytes()
    if damage == "cut short":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "zeros":
        library.write_bytes(content[: len(content) // 4] + bytes(len(content) // 2) + content[-len(content) // 4 :])
    elif damage == "gone":
        library.unlink()
    elif damage == "changed":
        (folder / "layers.py").write_text("raise SystemExit(3)")
    else:  # as built, but for something that this machine lacks
        (folder / "layers.py").write_text("import nothing_of_this_name")
        metadata = json.loads((folder / "metadata.json").read_text())
        del metadata["digest"]
        (folder / "metadata.json").write_text(json.dumps(metadata))
    program = """
        import json, sys, torch
        from internimage_hf import dcnv3_backend_report, kernel_loader
        from internimage_hf.dcnv3 import dcnv3
        tensors = [torch.randn(1, 4, 4, c) for c in (8, 18, 9)]
        for here in (kernel_loader.Path(sys.argv[1]) / "nothing", kernel_loader._HERE):
            kernel_loader._HERE = here
            kernel_loader.forget_kernels()
            torch.testing.assert_close(dcnv3(*tensors, groups=1), dcnv3(*tensors, groups=1, backend="torch"))
            print(json.dumps(dcnv3_backend_report()["cpu"]))
    """
    output = run_python(program, tmp_path, LOCAL_KERNELS=f"kernels-community/dcnv3={folder}", HF_HUB_OFFLINE="1")
    alone, with_ours = map(json.loads, output.splitlines())
    assert alone["backend"] == "torch" and "LOCAL_KERNELS" in alone["reason"]
    assert with_ours["backend"] == ("torch" if damage == "fails late" else "kernel"), with_ours


# ------------------------------------------------------------------------------------------------------- cache and Hub


@pytest.fixture
def kernel_hub(hub, tmp_path, monkeypatch):
    """The Hub with a kernel for this machine's CPU, as a function that runs a program against it."""
    folder = bundled(tmp_path / "source", name="_dcnv3_from_the_hub")
    files = {f"build/{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
    hub.repositories["kernels-community/dcnv3"] = files
    hub.commits["kernels-community/dcnv3"] = ["1" * 40]
    hub.trusted_kernel_publishers.add("kernels-community")
    prologue = """
        import torch
        from internimage_hf import dcnv3_backend_report, kernel_loader, load_dcnv3_kernel
        from internimage_hf.dcnv3 import dcnv3
        kernel_loader._HERE = kernel_loader._HERE / "no kernels here"
        tensors = [torch.randn(1, 4, 4, c) for c in (8, 18, 9)]
    """

    def run(program, **environment):
        program = textwrap.dedent(prologue) + textwrap.dedent(program)
        # without telemetry, kernels 0.17.2 sends a user agent that ends with a space, which httpx refuses
        ours = {**hub.environment(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "0"}
        return run_python(program, cwd=tmp_path, **{**ours, **environment})

    return run


def test_automatic_choice_asks_nobody_and_takes_what_the_cache_holds(kernel_hub, hub):
    first = "print((dcnv3(*tensors, groups=1) == 7).all().item(), dcnv3_backend_report()['cpu']['reason'])"
    output = kernel_hub(first)
    assert output.startswith("False no variant for cpu") and "load_dcnv3_kernel" in output and hub.requests == []
    explicit = """
        print((dcnv3(*tensors, groups=1) == 7).all().item())
        kernel = load_dcnv3_kernel()
        assert kernel.dcnv3_softmax and load_dcnv3_kernel("cpu") is kernel
        print((dcnv3(*tensors, groups=1) == 7).all().item(), dcnv3_backend_report()["cpu"]["reason"])
    """
    assert kernel_hub(explicit) == "False\nTrue kernels-community/dcnv3 on the Hub, v1\n"
    assert hub.requests
    hub.requests.clear()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        answer, _, reason = kernel_hub(first, **environment).partition(" ")
        assert answer == "True" and "models--" not in reason and "kernels--kernels-community--dcnv3" in reason
    assert hub.requests == []


def test_load_refuses_an_untrusted_publisher(kernel_hub, hub):
    hub.trusted_kernel_publishers.clear()
    program = """
        try:
            load_dcnv3_kernel("cpu")
        except ValueError as error:
            print(error)
        print(dcnv3_backend_report()["cpu"]["backend"])
    """
    output = kernel_hub(program)
    assert "not from a trusted" in output and output.endswith("torch\n")


def test_load_names_what_is_missing(kernel_hub, hub):
    program = """
        for device_type in ("cpu", "xpu"):
            try:
                load_dcnv3_kernel(device_type)
            except (FileNotFoundError, ValueError) as error:
                print(type(error).__name__, str(error).splitlines()[0])
    """
    files = hub.repositories["kernels-community/dcnv3"]
    hub.repositories["kernels-community/dcnv3"] = {n.replace("abi211", "abi299"): f for n, f in files.items()}
    cpu, xpu = kernel_hub(program).splitlines()
    assert cpu.startswith("FileNotFoundError Cannot find a build variant for this system in kernels-community/dcnv3")
    assert xpu.startswith("ValueError Invalid backend 'xpu'")


def test_load_prefers_local_kernels(tmp_path, monkeypatch):
    path = variant(tmp_path / "mine")
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/dcnv3={path}")
    assert kernel_loader.load_dcnv3_kernel("cpu").calls == []
    assert dcnv3_backend_report()["cpu"] == {"backend": "kernel", "reason": f"LOCAL_KERNELS, {path}"}
    monkeypatch.setenv("LOCAL_KERNELS", "kernels-community/dcnv3=/nowhere")
    with pytest.raises(FileNotFoundError, match="no variant for cpu"):
        kernel_loader.load_dcnv3_kernel("cpu")


def test_use_kernels_asks_the_hub(kernel_hub, hub, tmp_path):
    """transformers' own way, where no kernel is at hand; a Hub without one is a warning, and the definition serves."""
    pytest.importorskip("kernels")
    InternImageForImageClassification(InternImageConfig(**TINY)).save_pretrained(tmp_path / "model")
    program = """
        from internimage_hf import InternImageForImageClassification
        model = InternImageForImageClassification.from_pretrained("model", use_kernels=True)
        print(dcnv3_backend_report()["cpu"]["reason"], model(torch.zeros(1, 3, 64, 64)).logits.isfinite().all().item())
    """
    files = hub.repositories["kernels-community/dcnv3"]
    (init,) = (name for name in files if name.endswith("__init__.py"))
    layers = """
import types, torch
class DCNv3(torch.nn.Module):
    has_backward = can_torch_compile = True
    def forward(self, input, offset, mask, groups, offset_scale=1.0, remove_center=False):
        return input
layers = types.SimpleNamespace(DCNv3=DCNv3)
"""
    files[init] += layers.encode()
    assert kernel_hub(program) == "kernels-community/dcnv3 on the Hub, v1 True\n"
    del hub.repositories["kernels-community/dcnv3"]
    shutil.rmtree(tmp_path / "hf_home")
    output = kernel_hub(program)
    assert output.startswith("no variant for cpu") and output.endswith(" True\n")


def test_without_the_kernels_library_the_definition_serves(tmp_path, monkeypatch, warnings):
    bundled(tmp_path)
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert call().isfinite().all() and not (call() == 7).all()
    (message,) = warnings()
    assert "the library `kernels`, 0.17 or newer, is not installed" in message
    with pytest.raises(ImportError, match="the library `kernels`"):
        kernel_loader.load_dcnv3_kernel("cpu")


# -------------------------------------------------------------------------------------------- what was built here


@pytest.fixture
def real_kernel(monkeypatch):
    import pathlib

    monkeypatch.setattr(kernel_loader, "_HERE", pathlib.Path(kernel_loader.__file__).resolve().parent)
    kernel_loader.forget_kernels()
    if kernel_loader.get_dcnv3_kernel("cpu")[0] is None:
        pytest.skip("no kernel was built: `make kernel`")


def test_models_give_the_same_with_and_without_kernel(real_kernel):
    torch.manual_seed(0)
    model = InternImageForImageClassification(InternImageConfig(**TINY))
    for name, parameter in model.named_parameters():
        if ".dcn.offset." in name or ".dcn.mask." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    pixel_values, labels = torch.randn(2, 3, 64, 96), torch.tensor([1, 3])
    results = []
    for backend in ("torch", "kernel"):
        model.zero_grad()
        with use_dcnv3_backend(backend):
            outputs = model.eval()(pixel_values, labels=labels)
            outputs.loss.backward()
        results.append([outputs.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_a_compiled_model_uses_the_kernel_without_graph_breaks(real_kernel):
    model = InternImageForImageClassification(InternImageConfig(**TINY)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # Inductor's code is test_modeling's concern
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits, atol=1e-5, rtol=1e-4)
        with torch.profiler.profile() as profile:
            compiled(pixel_values)
    assert any("dcnv3_forward" in event.key for event in profile.key_averages())


def test_the_kernels_library_loads_it_too(real_kernel, monkeypatch):
    """The layout is that of Hub kernels: `get_local_kernel` takes it, and transformers' kernel layers use it."""
    kernels = pytest.importorskip("kernels")
    from transformers.integrations import hub_kernels

    folder = next((ROOT / "dcnv3_kernel" / "build").glob("torch-stable-abi*-cpu-*"))
    kernel = kernels.get_local_kernel(folder)
    tensors = [torch.randn(1, 4, 4, c) for c in (8, 18, 9)]
    torch.testing.assert_close(kernel.dcnv3(*tensors, groups=1), dcnv3(*tensors, groups=1, backend="torch"))
    if not hub_kernels.is_kernels_available():
        pytest.skip("this transformers does not take the installed kernels")


def test_use_kernels_of_from_pretrained(real_kernel, tmp_path):
    kernels = pytest.importorskip("kernels")
    from transformers.integrations import hub_kernels

    if not hub_kernels.is_kernels_available():
        pytest.skip("this transformers does not take the installed kernels")
    folder = next((ROOT / "dcnv3_kernel" / "build").glob("torch-stable-abi*-cpu-*"))
    model = InternImageForImageClassification(InternImageConfig(**TINY)).eval()
    model.save_pretrained(tmp_path / "model")
    layer = kernels.LocalLayerRepository(folder, layer_name="DCNv3")
    kernels.register_kernel_mapping({"DCNv3": {"cpu": layer}})
    loaded = InternImageForImageClassification.from_pretrained(tmp_path / "model", use_kernels=True).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, atol=1e-5, rtol=1e-4)
        sampling = loaded.internimage.encoder.stages[0].layers[0].dcn.sampling
        assert sampling.forward.__func__.__code__.co_filename.startswith(str(folder))


def test_use_kernels_needs_no_registration(real_kernel, tmp_path):
    """And what the user registered comes first: in a process of its own, as the registration is global."""
    pytest.importorskip("kernels")
    from transformers.integrations import hub_kernels

    if not hub_kernels.is_kernels_available():
        pytest.skip("this transformers does not take the installed kernels")
    model = InternImageForImageClassification(InternImageConfig(**TINY)).eval()
    model.save_pretrained(tmp_path / "model")
    program = """
        import warnings
        import torch
        from kernels import register_kernel_mapping
        from internimage_hf import InternImageForImageClassification, use_dcnv3_backend

        def load():
            model = InternImageForImageClassification.from_pretrained("model", use_kernels=True)
            return model, model.internimage.encoder.stages[0].layers[0].dcn.sampling.forward.__func__.__globals__

        with use_dcnv3_backend("torch"):
            print(load()[1]["__name__"])
        warnings.simplefilter("error")
        model, where = load()
        print(where["__file__"].endswith("layers.py") and "dcnv3_kernel" in where["__file__"])
        print(model(torch.zeros(1, 3, 64, 64)).logits.shape[0])

        class Mine(torch.nn.Module):
            has_backward = can_torch_compile = True
            def forward(self, input, offset, mask, groups, offset_scale=1.0, remove_center=False):
                return input

        class Layer:
            def load(self):
                return Mine

        register_kernel_mapping({"DCNv3": {"cpu": Layer()}})
        print(load()[1]["__name__"])
    """
    assert run_python(program, cwd=tmp_path) == "internimage_hf.modeling_internimage\nTrue\n1\n__main__\n"


def test_a_copied_build_is_the_same_kernel(real_kernel, tmp_path, monkeypatch):
    """Through LOCAL_KERNELS, from a folder elsewhere."""
    source = next((ROOT / "dcnv3_kernel" / "build").glob("torch-stable-abi*-cpu-*"))
    shutil.copytree(source, tmp_path / "kernel" / "build" / source.name)
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/dcnv3={tmp_path / 'kernel'}")
    kernel_loader.forget_kernels()
    assert "LOCAL_KERNELS" in dcnv3_backend_report()["cpu"]["reason"]
    assert call(backend="kernel").shape == (1, 4, 4, 8)


def test_the_binary_runs_on_older_systems(real_kernel):
    """manylinux_2_28 and Python's stable ABI, as the Hub asks of kernels."""
    kernel_abi_check = pytest.importorskip("kernel_abi_check")
    (library,) = (ROOT / "dcnv3_kernel" / "build").glob("torch-stable-abi*-cpu-*/*.so")
    binary = kernel_abi_check.ObjectFile(library)
    assert binary.check_manylinux("manylinux_2_28") == [] and binary.check_python_abi("3.9") == []
    assert str(ROOT).encode() not in library.read_bytes()


@pytest.mark.parametrize("with_kernel", [True, False])
def test_a_wheel_brings_the_kernel(request, tmp_path, with_kernel):
    """Built, installed into an environment that has the dependencies alone, and asked there."""
    pytest.importorskip("hatchling")
    compiled = ""
    if with_kernel:
        request.getfixturevalue("real_kernel")
        (compiled,) = (ROOT / "dcnv3_kernel" / "build").glob("torch-stable-abi*-cpu-*")
    environment = {**os.environ, "INTERNIMAGE_HF_KERNELS": str(compiled)}
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist", ROOT]
    subprocess.run(build, check=True, env=environment)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith(f"manylinux_2_28_{platform.machine()}.whl" if with_kernel else "py3-none-any.whl")
    bare = bare_environment(tmp_path)
    site = tmp_path / "site-packages"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    variants = {folder.name for folder in (site / "internimage_hf" / "_kernels").iterdir()}
    triton_variants = {"torch-cuda", "torch-rocm", "torch-xpu"}
    assert variants == triton_variants | ({compiled.name} if with_kernel else set())
    for name in triton_variants:
        files = {file.name for file in (site / "internimage_hf" / "_kernels" / name).iterdir()}
        assert {"triton_kernels.py", "triton_launch.py"} <= files
    output = run_python(
        """
        import internimage_hf, torch
        report = internimage_hf.dcnv3_backend_report()["cpu"]
        print(report["backend"], "_kernels" in report["reason"])
        model = internimage_hf.InternImageModel(internimage_hf.InternImageConfig(depths=[1, 1, 1, 1]))
        print(model(torch.randn(1, 3, 64, 64)).last_hidden_state.shape[1])
        """,
        cwd=tmp_path,
        **bare,
    )
    assert output == f"{'kernel True' if with_kernel else 'torch False'}\n512\n"

    # What a machine with a GPU would take; no GPU is needed to import it.
    has_triton = not with_kernel
    if has_triton:
        triton = pytest.importorskip("triton")
        if not (site / "triton").exists():
            (site / "triton").symlink_to(os.path.dirname(triton.__file__))
    elif (site / "triton").exists():
        (site / "triton").unlink()
    output = run_python(
        """
        import sys
        import torch
        from internimage_hf import dcnv3_backend_report, kernel_loader

        assert not any(name.endswith(("triton_kernels", "triton_launch")) for name in sys.modules)
        torch.cuda.is_available, torch.version.cuda = lambda: True, "13.0"
        messages = []
        kernel_loader.logger.addFilter(lambda record: messages.append(record.getMessage()))
        for _ in range(2):
            report = dcnv3_backend_report()["cuda"]
        of_cuda = [message for message in messages if "No DCNv3 kernel for cuda" in message]
        print(report["backend"], "torch-cuda" in report["reason"], len(of_cuda), "No module named 'triton'" in str(of_cuda))
        if report["backend"] == "kernel":
            kernel, _ = kernel_loader.get_dcnv3_kernel("cuda")
            tensors = [torch.empty(1, 4, 4, c, device="meta") for c in (8, 18, 9)]
            print(tuple(kernel.dcnv3_softmax(*tensors, groups=1).shape))
        """,
        cwd=tmp_path,
        **bare,
    )
    assert output == ("kernel True 0 False\n(1, 4, 4, 8)\n" if has_triton else "torch True 1 True\n")
