"""Tests of the whole package: import, registration, image processor, remote code, README, command lines."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from utils import FIXTURES, TINY, TINY_VARIANTS, bare_environment, run_python

import internimage_hf
from internimage_hf import InternImageConfig, InternImageForImageClassification, InternImageImageProcessor


# ------------------------------------------------------------------------------------------------------------- import


def test_import_is_silent_and_offline():
    output = run_python(
        """
        import socket, sys

        def refuse(*args, **kwargs):
            raise AssertionError("the network was used")
        socket.socket.connect = refuse

        import internimage_hf
        print(sorted({"datasets", "matplotlib", "timm"} & set(sys.modules)))
        """
    )
    assert output == "[]\n"


def test_import_registers_auto_classes():
    """Registration is complete after the import: two threads may use an Auto class for the first time at once."""
    output = run_python(
        """
        import sys, threading
        import internimage_hf
        auto = sys.modules["transformers.models.auto.modeling_auto"]
        configuration, processors = (
            sys.modules[f"transformers.models.auto.{name}_auto"] for name in ("configuration", "image_processing")
        )
        config_class = configuration.CONFIG_MAPPING["internimage"]
        for name in ("AutoModel", "AutoModelForImageClassification", "AutoBackbone"):
            print(getattr(auto, name)._model_mapping[config_class].__name__)
        print(*(c.__name__ for c in processors.IMAGE_PROCESSOR_MAPPING[config_class].values()))
        assert not [finder for finder in sys.meta_path if "internimage" in type(finder).__module__]

        barrier, made = threading.Barrier(4), []
        def make():
            barrier.wait()
            from transformers import AutoConfig, AutoModel
            config = AutoConfig.for_model("internimage", channels=8, depths=[1, 1, 1, 1], groups=[1, 1, 1, 1])
            made.append(type(AutoModel.from_config(config)).__name__)
        threads = [threading.Thread(target=make) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(*made)
        """
    )
    assert output.splitlines() == [
        "InternImageModel",
        "InternImageForImageClassification",
        "InternImageBackbone",
        "InternImageImageProcessor",
        "InternImageModel " * 3 + "InternImageModel",
    ]


@pytest.mark.parametrize(
    "imports",
    [
        "import internimage_hf; from transformers import AutoConfig, AutoModel, AutoBackbone",
        "from transformers import AutoConfig, AutoModel, AutoBackbone; import internimage_hf",
        "import internimage_hf.modeling_internimage; from transformers import AutoBackbone, AutoModel, AutoConfig",
    ],
)
def test_auto_classes_work_in_any_import_order(imports):
    output = run_python(
        imports
        + """
config = AutoConfig.for_model("internimage", channels=8, depths=[1, 1, 1, 1], groups=[1, 1, 1, 1])
print(type(AutoModel.from_config(config)).__name__, type(AutoBackbone.from_config(config)).__name__)
"""
    )
    assert output == "InternImageModel InternImageBackbone\n"


def test_public_names_exist():
    import internimage_hf

    for name in internimage_hf.__all__:
        assert getattr(internimage_hf, name) is not None
    assert set(internimage_hf.__all__) <= set(dir(internimage_hf))
    with pytest.raises(AttributeError, match="nonsense"):
        internimage_hf.nonsense  # noqa: B018


# -------------------------------------------------------------------------------------------------- image processor


def official_transform(image: Image.Image, size: int) -> torch.Tensor:
    """Applies torchvision's Resize(size, bicubic), CenterCrop(size), ToTensor and Normalize to a PIL image."""
    width, height = image.size
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1) / 255
    return (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]


@pytest.mark.parametrize("size", [(64, 64), (64, 67), (131, 97), (100, 300), (33, 20), (640, 427)])
def test_pixels_equal_official_transform(size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = InternImageImageProcessor.from_pretrained(FIXTURES / "hf_t_like")
    expected = official_transform(image, 64)
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"][0], expected, atol=1e-6, rtol=0)
    processor.save_pretrained(tmp_path)
    again = auto_image_processor().from_pretrained(tmp_path)
    assert type(again) is InternImageImageProcessor
    torch.testing.assert_close(again(image, return_tensors="pt")["pixel_values"][0], expected, atol=1e-6, rtol=0)


def auto_image_processor():
    # imported from its own module: without torchvision, `transformers.AutoImageProcessor` of 5.17 is a placeholder
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor


def test_published_preprocessor_config_loads():
    processor = auto_image_processor().from_pretrained(FIXTURES / "hf_t_like", backend="pil")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 130, 3), dtype=np.uint8))
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values[0], official_transform(image, 64), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------ remote code

LOAD_WITHOUT_THE_PACKAGE = """
    import importlib.util, sys
    import torch
    from safetensors.torch import load_file
    assert importlib.util.find_spec("internimage_hf") is None, "the package must not be importable here"
    from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
    folder, expected = sys.argv[1], load_file(sys.argv[2])
    for auto_class in (AutoModelForImageClassification, AutoModel):
        model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
        outputs = model(expected["pixel_values"])
        name = "logits" if "logits" in outputs else "pooler_output"
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-6, rtol=1e-6)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, out_features=["stage1", "stage4"])
    assert len(AutoBackbone.from_config(config, trust_remote_code=True)(expected["pixel_values"]).feature_maps) == 2
    print("equal", type(model).__module__.split(".")[0])
"""


@pytest.mark.parametrize(
    "route, variant", [("save_with_remote_code", "clip"), ("register_for_auto_class", "res_post_norm")]
)
def test_remote_code_loads_without_package(route, variant, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    program = f"""
        import torch
        from safetensors.torch import save_file
        from internimage_hf import InternImageConfig, InternImageForImageClassification, InternImageModel
        from internimage_hf import InternImageBackbone, save_with_remote_code
        torch.manual_seed(0)
        model = InternImageForImageClassification(InternImageConfig(**{ {**TINY, **TINY_VARIANTS[variant]}!r})).eval()
        torch.nn.init.normal_(model.internimage.encoder.stages[0].layers[0].dcn.offset.weight)
        if {route == "save_with_remote_code"}:
            save_with_remote_code(model, {str(folder)!r})
        else:
            InternImageConfig.register_for_auto_class()
            InternImageForImageClassification.register_for_auto_class("AutoModelForImageClassification")
            model.save_pretrained({str(folder)!r})
        pixel_values = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            save_file(
                {{
                    "pixel_values": pixel_values,
                    "logits": model(pixel_values).logits,
                    "pooler_output": model.internimage(pixel_values).pooler_output,
                }},
                {str(tmp_path / "expected.safetensors")!r},
            )
    """
    assert save_file
    run_python(program, DCNV3_BACKEND="torch")  # the run without the package has no kernel
    load = LOAD_WITHOUT_THE_PACKAGE
    if route == "register_for_auto_class":  # this route names one Auto class only
        load = load.replace("(AutoModelForImageClassification, AutoModel)", "(AutoModelForImageClassification,)")
        load = re.sub(r"    config = .*\n    assert len.*\n", "", load)
    bare = bare_environment(tmp_path, without=("kernels",) if route == "register_for_auto_class" else ())
    output = run_python(load, folder, tmp_path / "expected.safetensors", cwd=tmp_path, **bare)
    assert output == "equal transformers_modules\n"
    # with the package, its own classes load, without `trust_remote_code`
    output = run_python(
        """
        import sys, internimage_hf
        from transformers import AutoModelForImageClassification
        print(type(AutoModelForImageClassification.from_pretrained(sys.argv[1])).__module__)
        """,
        folder,
    )
    assert output == "internimage_hf.modeling_internimage\n"


HEADS = {
    "detr": (
        "DetrForObjectDetection(DetrConfig(backbone_config=backbone('stage4'), use_timm_backbone=False, backbone=None,"
        " encoder_layers=1, decoder_layers=1, d_model=32, encoder_attention_heads=2, decoder_attention_heads=2,"
        " num_queries=5, encoder_ffn_dim=32, decoder_ffn_dim=32, num_labels=3))",
        "AutoModelForObjectDetection",
    ),
    "deformable_detr": (
        "DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=backbone('stage2', 'stage3', 'stage4'),"
        " use_timm_backbone=False, backbone=None, encoder_layers=1, decoder_layers=2, d_model=32, num_queries=5,"
        " encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_labels=3))",
        "AutoModelForObjectDetection",
    ),
    "upernet": (
        "UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone('stage1', 'stage2', 'stage3', 'stage4'),"
        " hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=4))",
        "AutoModelForSemanticSegmentation",
    ),
    "mask2former": (
        "Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone('stage1', 'stage2', 'stage3',"
        " 'stage4'), hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=2, encoder_layers=1,"
        " decoder_layers=2, num_queries=5, dim_feedforward=32, encoder_feedforward_dim=32, num_labels=4))",
        "AutoModelForUniversalSegmentation",
    ),
    "dino": (
        "InternImageDinoForObjectDetection(InternImageDinoConfig(backbone_config=backbone('stage3', 'stage4'), d_model=32,"
        " encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,"
        " decoder_ffn_dim=32, num_queries=5, num_feature_levels=3, num_labels=3))",
        "AutoModelForObjectDetection",
    ),
    "rcnn": (
        "InternImageRcnnForInstanceSegmentation(InternImageRcnnConfig(backbone_config=composite('stage1', 'stage2',"
        " 'stage3', 'stage4'), fpn_hidden_size=16, box_hidden_size=32, mask_hidden_size=16, box_conv_size=16,"
        " num_labels=3))",
        "AutoModelForInstanceSegmentation",
    ),
}


def test_heads_load_without_package(tmp_path):
    """A loaded head can be saved and loaded again."""
    imports = re.findall(r"(\w+)\(", " ".join(model for model, _ in HEADS.values()))
    own = [name for name in imports if name.startswith("InternImage")]
    imports = [name for name in imports if name not in ("backbone", "composite", *own)]
    build = ";".join(f"models[{name!r}] = {model}" for name, (model, _) in HEADS.items())
    run_python(
        f"""
        import sys
        import torch
        from transformers import {", ".join(imports)}
        from internimage_hf import InternImageConfig, InternImageCompositeConfig, save_with_remote_code
        from internimage_hf import {", ".join(own)}
        def backbone(*stages):
            return InternImageConfig(**{TINY!r}, out_features=list(stages))
        def composite(*stages):
            return InternImageCompositeConfig(**{TINY!r}, out_features=list(stages))
        torch.manual_seed(0)
        models = {{}}
        {build}
        for name, model in models.items():
            for parameter_name, parameter in model.eval().named_parameters():
                if ".dcn.offset." in parameter_name:
                    torch.nn.init.normal_(parameter)
            save_with_remote_code(model, sys.argv[1] + "/" + name)
            pixel_values = torch.randn(1, 3, 96, 96)
            with torch.no_grad():
                output = model(pixel_values)
            output = output[0] if output[0].ndim else output[1]
            torch.save({{"pixel_values": pixel_values, "output": output}}, sys.argv[1] + "/" + name + ".pt")
        """,
        tmp_path,
    )
    load = f"""
        import sys
        import torch
        without = sys.argv[2] == "without"
        if not without:
            import internimage_hf
        else:
            import importlib.util
            assert importlib.util.find_spec("internimage_hf") is None
        import transformers
        kwargs = {{"trust_remote_code": True}} if without else {{}}
        for name, auto_class in {[(name, auto_class) for name, (_, auto_class) in HEADS.items()]}:
            expected = torch.load(sys.argv[1] + "/" + name + ".pt")
            for folder in (sys.argv[1] + "/" + name, sys.argv[1] + "/" + name + "_again"):
                model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True, **kwargs)
                assert not any(info.values()), (name, info)
                with torch.no_grad():
                    output = model.eval()(expected["pixel_values"])
                output = output[0] if output[0].ndim else output[1]
                torch.testing.assert_close(output, expected["output"], atol=1e-5, rtol=1e-5, msg=lambda m: name + ": " + m)
                model.save_pretrained(sys.argv[1] + "/" + name + "_again")
            print(name, type(model).__module__.split(".")[0])
    """
    packages = {
        name: "internimage_hf" if "InternImage" in model else "transformers" for name, (model, _) in HEADS.items()
    }
    assert run_python(load, tmp_path, "with") == "".join(f"{name} {package}\n" for name, package in packages.items())
    bare = bare_environment(tmp_path)
    expected = "".join(f"{name} transformers_modules\n" for name in HEADS)
    assert run_python(load, tmp_path, "without", cwd=tmp_path, **bare) == expected


def test_remote_code_refuses_other_models(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    from internimage_hf import save_with_remote_code

    with pytest.raises(TypeError, match="Linear"):
        save_with_remote_code(torch.nn.Linear(1, 1), tmp_path / "model")
    with pytest.raises(TypeError, match="ResNetModel"):
        save_with_remote_code(
            ResNetModel(ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8)), tmp_path / "model"
        )
    assert not (tmp_path / "model").exists()


CODE_FILES = {
    "checkpoint.py", "compatibility.py", "configuration_base.py", "configuration_internimage.py", "dcnv3.py", "dcnv3_chunked.py",
    "dcnv3_reference.py", "image_processing_internimage.py", "imagenet_labels.py", "kernel_loader.py", "modeling_internimage.py",
}  # fmt: skip


def tiny_model():
    return InternImageForImageClassification(InternImageConfig(**{**TINY, "depths": [1, 1, 1, 1]})).eval()


def tiny_segmenter():
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    backbone = InternImageConfig(
        **{**TINY, "depths": [1, 1, 1, 1]}, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8)
    return UperNetForSemanticSegmentation(config)


def content(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize(
    "make, names",
    [(tiny_model, sorted(CODE_FILES)), (tiny_segmenter, ["dcnv3.py", "modeling_internimage_head.py"])],
)
def test_remote_code_keeps_foreign_files(make, names, tmp_path):
    model = make()
    for i, name in enumerate(names):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / name).write_text("# my own\nvalue = 1\n")
        with pytest.raises(
            FileExistsError, match=f"{re.escape(str(folder / name))} exists and is not a file of"
        ) as error:
            internimage_hf.save_with_remote_code(model, folder)
        assert "\n" not in str(error.value)
        assert content(folder) == {name: b"# my own\nvalue = 1\n"}  # nothing was written, weights and config included


def test_remote_code_keeps_foreign_folders_and_links(tmp_path):
    model, folder = tiny_model(), tmp_path / "model"
    (folder / "dcnv3.py").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"dcnv3\.py"):
        internimage_hf.save_with_remote_code(model, folder)
    (folder / "dcnv3.py").rmdir()
    (tmp_path / "mine.py").write_text("value = 1\n")
    for target in ("mine.py", "nowhere.py"):
        (folder / "dcnv3.py").symlink_to(tmp_path / target)
        with pytest.raises(FileExistsError, match=r"dcnv3\.py"):
            internimage_hf.save_with_remote_code(model, folder)
        (folder / "dcnv3.py").unlink()
    assert (tmp_path / "mine.py").read_text() == "value = 1\n" and not (tmp_path / "nowhere.py").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file must be a folder"):
        internimage_hf.save_with_remote_code(model, tmp_path / "file")


def test_remote_code_replaces_links_to_own_files(tmp_path):
    """A folder of links, as in the Hub's cache: their targets stay unchanged."""
    model, store, folder = tiny_model(), tmp_path / "store", tmp_path / "model"
    internimage_hf.save_with_remote_code(model, folder)
    folder.rename(store)
    old = b"# Copyright 2025 The internimage-hf authors. Licensed under the MIT License.\nold = 1\n"
    (store / "dcnv3.py").write_bytes(old)
    folder.mkdir()
    for name in (*CODE_FILES, "config.json"):
        (folder / name).symlink_to(store / name)
    before = content(store)
    internimage_hf.remote_code.write_remote_code(folder)
    assert content(store) == before and content(folder)["dcnv3.py"] != old
    assert not any(file.is_symlink() for file in folder.iterdir())
    assert {file.name for file in folder.iterdir()} == {*CODE_FILES, "config.json"}  # no temporary file is left


def test_config_names_code_after_code_is_written(tmp_path, monkeypatch):
    """An interrupted save leaves no `auto_map` that names missing files."""
    from internimage_hf import remote_code

    replace, names = remote_code.os.replace, []

    def stop_at_the_fifth(source, target):
        names.append(target.name)
        if len(names) == 5:
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(remote_code.os, "replace", stop_at_the_fifth)
    with pytest.raises(OSError, match="the disk is full"):
        remote_code.save_with_remote_code(tiny_model(), tmp_path)
    assert "config.json" not in names and "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("text, problem", [("{", "it is not JSON"), ("[1]", "it is a list")])
def test_broken_configuration_is_named(text, problem, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json must be a JSON object, {problem}"):
        internimage_hf.remote_code.write_remote_code(tmp_path)
    assert content(tmp_path) == {"config.json": text.encode()}


def test_saving_without_code_removes_its_names_from_config(tmp_path):
    """`save_pretrained` writes no code, so models of the package's own classes drop `auto_map`."""
    from transformers import AutoConfig, AutoModelForImageClassification

    first, again, third = (tmp_path / name for name in ("first", "again", "third"))
    InternImageImageProcessor().save_pretrained(first)
    internimage_hf.save_with_remote_code(tiny_model(), first)
    assert "auto_map" in json.loads((first / "preprocessor_config.json").read_text())
    for model in (
        AutoModelForImageClassification.from_pretrained(first),
        AutoModelForImageClassification.from_pretrained(first, trust_remote_code=True),
        InternImageForImageClassification.from_pretrained(first),
        InternImageForImageClassification(AutoConfig.from_pretrained(first)),
    ):
        model.save_pretrained(again)
        auto_image_processor().from_pretrained(first).save_pretrained(again)
        for name in ("config.json", "preprocessor_config.json"):
            assert "auto_map" not in json.loads((again / name).read_text())
        assert not list(again.glob("*.py"))
    internimage_hf.save_with_remote_code(model, third)
    internimage_hf.save_with_remote_code(model, again)
    for folder in (again, third):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert all((folder / f"{reference.partition('.')[0]}.py").is_file() for reference in auto_map.values())
    assert "auto_map" in json.loads((again / "preprocessor_config.json").read_text())


def test_push_to_hub_uploads_weights_and_code_in_one_commit(hub, tmp_path):
    hub.required_metadata = ()
    folder = tmp_path / "my-model"
    program = f"""
        import sys
        from pathlib import Path
        from internimage_hf import InternImageConfig, InternImageForImageClassification, save_with_remote_code
        model = InternImageForImageClassification(InternImageConfig(**{ {**TINY, "depths": [1, 1, 1, 1]}!r}))
        folder = Path(sys.argv[1])
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        save_with_remote_code(model, folder, push_to_hub=True, repo_id="me/x", private=True, commit_message="first")
        save_with_remote_code(model, folder, push_to_hub=True, token="hf_good")
    """
    run_python(program, folder, **hub.environment(tmp_path))
    expected = {*CODE_FILES, "config.json", "model.safetensors", "README.md"}
    assert hub.repositories.keys() == {"me/x", "somebody/my-model"}
    for name, files in hub.repositories.items():
        assert files.keys() == expected and len(hub.commits[name]) == 2  # the repository's creation and one commit
        assert all(data == (folder / file).read_bytes() for file, data in files.items())
    assert (folder / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------ memory of loading


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_weights_in_memory_once(tmp_path):
    run_python(
        """
        import sys, torch
        from internimage_hf import InternImageConfig, InternImageForImageClassification
        torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            model = InternImageForImageClassification(InternImageConfig.from_variant("s"))
        model.to_empty(device="cpu").save_pretrained(sys.argv[1])
        """,
        tmp_path,
    )
    output = run_python(
        """
        import os, sys
        import torch
        from transformers import AutoModelForImageClassification
        import internimage_hf
        from internimage_hf import InternImageConfig, InternImageForImageClassification

        def memory(name):
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

        InternImageForImageClassification(InternImageConfig(channels=16, groups=[1, 1, 1, 1]))  # loads modules that are imported late
        before = memory("VmRSS")
        model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
        for parameter in model.parameters():
            parameter.sum()  # reads every byte: untouched pages of a mapped file do not count
        print((memory("VmHWM") - before) / os.path.getsize(sys.argv[1] + "/model.safetensors"))
        """,
        tmp_path,
    )
    assert float(output) < 1.15


# ------------------------------------------------------------------------------------------------------------ pipeline


def test_pipeline_returns_class_names(tmp_path):
    from transformers import pipeline

    model = InternImageForImageClassification(InternImageConfig(**{**TINY, "num_labels": 1000}))
    model.save_pretrained(tmp_path)
    shutil.copy(FIXTURES / "hf_t_like" / "preprocessor_config.json", tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    file = tmp_path / "image.png"
    image.save(file)
    classifier = pipeline("image-classification", model=str(tmp_path))
    for result in (*classifier([image, str(file)], top_k=3), classifier(image.convert("L"), top_k=3)):
        assert len(result) == 3 and all(not r["label"].startswith("LABEL") for r in result)
