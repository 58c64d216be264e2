"""Conversion of the files in OpenGVLab/DCNv4: FlashInternImage, in both directions, and where its files are looked for."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import httpx
from utils import FIXTURES, load_case

from convert import all as convert_all
from convert import classification, source, upernet
from convert.conversion import REPORT
from convert.labels import class_names, id2label
from convert.released import DCNV4_REPOSITORY, RELEASED, released_as
from internimage_hf import InternImageConfig, InternImageForImageClassification
from internimage_hf.checkpoint import translate_state_dict


CASES = ("dcnv4_t_like", "dcnv4_s_like", "dcnv4_l_like")
COUNTS = json.loads((FIXTURES / "dcnv4_keys" / "counts.json").read_text())
FLASH = {name: released for name, released in RELEASED.items() if released.repository == DCNV4_REPOSITORY}


def convert(module, *arguments: object) -> int:
    return module.main([str(argument) for argument in arguments])


def padding_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[len(tensor) // 27 * 27 :]


@pytest.mark.parametrize("case", CASES)
def test_released_layout_there_and_back(case, tmp_path):
    folder = FIXTURES / case
    there, back = tmp_path / "there", tmp_path / "back.pth"
    arguments = [folder / "checkpoint.pth", "--config", folder / "config.json", "--output", there]
    assert convert(classification, *arguments) == 0
    state_dict, expected = load_case(case)
    model = InternImageForImageClassification.from_pretrained(there).eval()
    with torch.no_grad():
        logits = model(expected["pixel_values"]).logits
    torch.testing.assert_close(logits.double(), expected["logits"], atol=1e-4, rtol=0)
    report = json.loads((there / REPORT).read_text())
    packed = sum(".offset_mask." in name for name in state_dict)
    assert report["tensors"]["entries"] == len(state_dict) + packed and not report["unknown_config_fields"]
    card = (there / "README.md").read_text()
    assert "FlashInternImage" in card and "2401.06197" in card and "- dcnv4" in card

    assert convert(classification, there, "--output", back, "--reverse") == 0
    returned = torch.load(back, weights_only=True)["model"]
    assert returned.keys() == state_dict.keys()
    for name, tensor in state_dict.items():
        expected_tensor = tensor.clone()
        if ".offset_mask." in name:
            assert padding_rows(tensor).numel() == 0 or padding_rows(tensor).any(), "the fixture's padding is not zero"
            padding_rows(expected_tensor).zero_()
        assert torch.equal(returned[name], expected_tensor), name


@pytest.mark.parametrize("name", [name for name in FLASH if FLASH[name].task == "classification"])
def test_every_released_classification_checkpoint_maps_without_remainder(name):
    released = FLASH[name]
    num_labels = len(class_names(released.labels))
    size = released.variant.removeprefix("flash_")
    with gzip.open(FIXTURES / "dcnv4_keys" / f"{size}.json.gz", "rt") as file:
        shapes = {
            key: (num_labels, *shape[1:]) if key.startswith("head.") else shape for key, shape in json.load(file)
        }
    official = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    config = InternImageConfig.from_variant(released.variant, id2label=id2label(released.labels, num_labels))
    with torch.device("meta"):
        model = InternImageForImageClassification(config)
    model.load_state_dict(translate_state_dict(official), strict=True, assign=True)
    fields = COUNTS[size]["config"]
    assert (config.channels, config.depths, config.offset_scale) == (
        fields["channels"],
        fields["depths"],
        fields["offset_scale"],
    )
    assert released.published_repository is None, "there is no repository in the layout of transformers"
    assert released.task in convert_all.PLANS


def test_downstream_file_with_layer_scale(tmp_path):
    """The segmenters' T has layer scale, which the classifier's has not; the name tells the rest."""
    from transformers import UperNetForSemanticSegmentation

    config = InternImageConfig.from_variant("flash_t", layer_scale_init_value=1.0, num_labels=2)
    released = RELEASED["upernet_flash_internimage_t_512_160k_ade20k"]
    with torch.device("meta"):
        classifier = InternImageForImageClassification(config)
    official = {
        f"backbone.{key}": torch.zeros(tensor.shape)
        for key, tensor in classification.official_state_dict(classifier).items()
        if not key.startswith(("conv_head.", "head."))
    }
    head = UperNetForSemanticSegmentation.config_class(backbone_config=config, hidden_size=16, auxiliary_channels=8)
    head.backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    model = UperNetForSemanticSegmentation(head)
    for name, tensor in model.state_dict().items():
        if not name.startswith("backbone."):
            name = name.replace(".classifier.", ".conv_seg.").replace(".batch_norm.", ".bn.")
            official[name] = tensor
    torch.save({"state_dict": official}, tmp_path / f"{released.name}.pth")
    output = tmp_path / "out"
    assert convert(upernet, tmp_path / f"{released.name}.pth", "--output", output, "--no-verify") == 0
    backbone = UperNetForSemanticSegmentation.from_pretrained(output).config.backbone_config
    assert (backbone.dcn_version, backbone.layer_scale_init_value, backbone.mlp_fc2_bias) == (4, 1.0, False)
    assert backbone.drop_path_rate == 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[:-1], "must have 27 rows for each group"),
        (lambda tensor: tensor.to_sparse(), "is sparse"),
    ],
)
def test_wrong_offset_mask_is_one_line(change, message, tmp_path, capsys):
    folder = FIXTURES / "dcnv4_t_like"
    state_dict, _ = load_case("dcnv4_t_like")
    name = "levels.0.blocks.0.dcn.offset_mask.weight"
    torch.save({"model": {**state_dict, name: change(state_dict[name])}}, tmp_path / "wrong.pth")
    arguments = [tmp_path / "wrong.pth", "--config", folder / "config.json", "--output", tmp_path / "out"]
    assert convert(classification, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and name in line and message in line
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub_files(monkeypatch, tmp_path):
    """The names of the files that the Hub has; every other one is answered by 404."""
    files, asked = set(), []

    def download(repository, file, revision=None):
        asked.append((repository, file))
        if file not in files:
            response = httpx.Response(404, request=httpx.Request("GET", f"https://huggingface.co/{repository}/{file}"))
            raise RemoteEntryNotFoundError(f"404 Entry Not Found for {file}", response=response)
        path = tmp_path / file
        path.write_bytes(b"weights")
        return str(path)

    monkeypatch.setattr(source, "hf_hub_download", download)
    monkeypatch.setattr(source, "try_to_load_from_cache", lambda *_, **__: None)
    return SimpleNamespace(files=files, asked=asked)


L = ("flash_internimage_l_22kto1k_384", "flash_intern_image_l_22kto1k_384")


@pytest.mark.parametrize("asked_for", L)
@pytest.mark.parametrize("there", L)
def test_both_file_names_of_the_large_model_are_tried(asked_for, there, hub_files):
    hub_files.files.add(f"{there}.pth")
    found = source.find(asked_for, None, None)
    assert found.file.name == f"{there}.pth" and found.released is RELEASED[L[0]] is released_as(L[1])
    assert hub_files.asked == [(DCNV4_REPOSITORY, f"{name}.pth") for name in L[: L.index(there) + 1]]


def test_what_was_tried_is_named(hub_files):
    with pytest.raises(source.ConversionError) as error:
        source.find(L[0], None, None)
    message = str(error.value)
    assert all(f"{name}.pth" in message for name in L) and DCNV4_REPOSITORY in message and "\n" not in message


def test_other_failures_are_no_reason_to_try_the_other_name(hub_files, monkeypatch):
    def refuse(repository, file, revision=None):
        hub_files.asked.append(file)
        raise OSError("the network is down")

    monkeypatch.setattr(source, "hf_hub_download", refuse)
    with pytest.raises(source.ConversionError, match=f"cannot download {L[0]}.pth of {DCNV4_REPOSITORY}: the network"):
        source.find(L[0], None, None)
    assert hub_files.asked == [f"{L[0]}.pth"]


def test_each_file_comes_from_its_own_repository(hub_files):
    hub_files.files |= {"internimage_t_1k_224.pth", "flash_intern_image_t_1k_224.pth"}
    for name, repository in (
        ("internimage_t_1k_224", "OpenGVLab/InternImage"),
        ("flash_intern_image_t_1k_224", DCNV4_REPOSITORY),
    ):
        assert source.find(name, None, None).released.repository == repository
        assert hub_files.asked[-1] == (repository, f"{name}.pth")


def test_a_file_under_its_other_name_needs_no_configuration(tmp_path):
    (tmp_path / f"{L[1]}.pth").write_bytes(b"weights")
    assert source.find(str(tmp_path / f"{L[1]}.pth"), None, None).released is RELEASED[L[0]]
