"""DCNv4 and FlashInternImage: parity with the official operator, model and module, and what the official operator gets wrong."""

import copy
import gzip
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations import hub_kernels
from utils import FIXTURES, TINY, TINY_VARIANTS, load_case, run_python

from internimage_hf import (
    DCNv3,
    DCNv4,
    InternImageBackbone,
    InternImageConfig,
    InternImageForImageClassification,
    dcnv4,
    use_dcnv3_backend,
)
from internimage_hf.checkpoint import join_offset_mask, split_offset_mask, translate_config, translate_state_dict
from internimage_hf.kernel_loader import get_dcnv3_kernel
from internimage_hf.training import parameter_groups


OPS = {case["name"]: case for case in json.loads((FIXTURES / "dcnv4_ops.json").read_text())["cases"]}
OP_TENSORS = load_file(FIXTURES / "dcnv4_ops.safetensors")
COUNTS = json.loads((FIXTURES / "dcnv4_keys" / "counts.json").read_text())
MODELS = ("dcnv4_t_like", "dcnv4_s_like", "dcnv4_l_like")


@pytest.fixture(params=["torch", "kernel"])
def backend(request):
    """Both ways to compute the operator on the CPU."""
    if request.param == "kernel" and get_dcnv3_kernel("cpu")[0] is None:
        pytest.skip(f"no kernel: {get_dcnv3_kernel('cpu')[1]}")
    with use_dcnv3_backend(request.param):
        yield request.param


def op_options(case: dict) -> dict:
    pairs = {"kernel_size": "kernel", "stride": "stride", "padding": "pad", "dilation": "dilation"}
    options = {name: (case[f"{theirs}_h"], case[f"{theirs}_w"]) for name, theirs in pairs.items()}
    return {
        **options,
        "groups": case["group"],
        "offset_scale": case["offset_scale"],
        "remove_center": case["remove_center"],
    }


# ------------------------------------------------------------------------------------------------------------ the operator


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPS)
def test_parity_with_the_official_operator(name, dtype, backend):
    tensors = {key: OP_TENSORS[f"{name}.{key}"] for key in ("input", "offset_mask", "grad_output")}
    input, offset_mask = (tensors[key].to(dtype, copy=True).requires_grad_() for key in ("input", "offset_mask"))
    output = dcnv4(input, offset_mask, **op_options(OPS[name]))
    gradients = torch.autograd.grad(output, (input, offset_mask), tensors["grad_output"].to(dtype))
    for key, actual in zip(("output", "grad_input", "grad_offset_mask"), (output, *gradients), strict=True):
        expected = OP_TENSORS[f"{name}.{key}"]
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5 * max(1, expected.abs().max().item())
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


def test_padding_is_optional_and_never_read():
    input, offset_mask = torch.randn(2, 5, 4, 32), torch.randn(2, 5, 4, 56)
    expected = dcnv4(input, offset_mask, groups=2)
    assert torch.equal(dcnv4(input, offset_mask[..., :54], groups=2), expected)
    offset_mask[..., 54:] = float("nan")
    assert torch.equal(dcnv4(input, offset_mask, groups=2), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offset_mask": None}, TypeError, "`offset_mask` must be a tensor, got NoneType"),
        ({"offset_mask": torch.zeros(5, 4, 56)}, ValueError, r"`offset_mask` .* got \(5, 4, 56\)"),
        ({"offset_mask": torch.zeros(1, 5, 4, 56, dtype=torch.int32)}, ValueError, "`offset_mask` .* torch.int32"),
        (
            {"offset_mask": torch.zeros(1, 5, 4, 64)},
            ValueError,
            "`offset_mask` must have 54, or 56 with padding, .* 64",
        ),
        ({"offset_mask": torch.zeros(1, 4, 5, 56)}, ValueError, r"`offset_mask` .*\(1, 5, 4, 36\).*\(1, 4, 5, 36\)"),
        ({"kernel_size": 0}, ValueError, "`kernel_size` .* got 0"),
        ({"kernel_size": (3,)}, ValueError, r"`kernel_size` .* got \(3,\)"),
        ({"groups": 2.0}, ValueError, "`groups` .* got 2.0"),
        ({"stride": 0}, ValueError, "`stride` .* got 0"),
        ({"input": torch.zeros(1, 5, 4, 33)}, ValueError, "`groups` must divide the channels of `input`, 33, got 2"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"input": torch.zeros(1, 5, 4, 32), "offset_mask": torch.zeros(1, 5, 4, 56), "groups": 2, **change}
    with pytest.raises(error, match=message):
        dcnv4(arguments.pop("input"), arguments.pop("offset_mask"), **arguments)


def test_compiled_and_transformed_operator():
    torch._dynamo.reset()
    input, offset_mask = torch.randn(2, 6, 5, 32), torch.randn(2, 6, 5, 56)
    expected = dcnv4(input, offset_mask, groups=2)
    compiled = torch.compile(lambda *tensors: dcnv4(*tensors, groups=2), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, offset_mask), expected)
    mapped = torch.func.vmap(lambda *tensors: dcnv4(*(t[None] for t in tensors), groups=2)[0])(input, offset_mask)
    torch.testing.assert_close(mapped, expected)


# --------------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("case", MODELS)
def test_parity_with_the_official_model(case, dtype, tolerance, backend):
    state_dict, expected = load_case(case)
    config = InternImageConfig.from_dict(json.loads((FIXTURES / case / "config.json").read_text()))
    model = InternImageForImageClassification(config).eval()
    model.load_state_dict(translate_state_dict(state_dict), strict=True)
    model.to(dtype)
    pixel_values = expected["pixel_values"].to(dtype)
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True)
        pooled = model.internimage(pixel_values).pooler_output
    actual = {"logits": outputs.logits, "pooled": pooled}
    actual |= {f"stage{i}": outputs.hidden_states[i] for i in range(1, 5)}
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor.double(), expected[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("size", COUNTS)
def test_variant_is_the_released_architecture(size):
    counts = COUNTS[size]
    variant = InternImageConfig.from_variant(f"flash_{size}")
    released = InternImageConfig.from_dict({**counts["config"], "drop_path_rate": 0.0})
    released.image_size = 384 if size == "l" else 224
    assert variant.to_dict() == released.to_dict()
    assert variant.dcn_version == 4 and variant.dcn_output_bias == variant.mlp_fc2_bias == (size == "l")
    with torch.device("meta"):
        model, backbone = InternImageForImageClassification(variant), InternImageBackbone(variant)
    padding = counts["num_padding_parameters"]
    assert model.num_parameters() == counts["num_parameters"] - padding
    assert model.internimage.num_parameters() == counts["num_parameters_without_head"] - padding
    assert backbone.num_parameters() == counts["num_backbone_parameters"] - padding
    assert sum(buffer.numel() for buffer in model.buffers()) == counts["num_buffer_elements"]


@pytest.mark.parametrize("size", COUNTS)
def test_every_released_name_has_its_place(size):
    with gzip.open(FIXTURES / "dcnv4_keys" / f"{size}.json.gz", "rt") as file:
        shapes = {key: tuple(shape) for key, shape in json.load(file)}
    official = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    translated = translate_state_dict(official)
    with torch.device("meta"):
        model = InternImageForImageClassification(InternImageConfig.from_variant(f"flash_{size}"))
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in translated.items()} == expected
    assert translate_state_dict(translated).keys() == expected.keys(), "our own names pass unchanged"


def test_offset_mask_is_split_by_group_and_joined_again():
    packed = torch.arange(56.0)[:, None].expand(56, 3)
    offset, mask = split_offset_mask("layer", packed)
    assert offset[:, 0].tolist() == [*range(18), *range(27, 45)] and mask[:, 2].tolist() == [
        *range(18, 27),
        *range(45, 54),
    ]
    joined = join_offset_mask(offset, mask)
    assert torch.equal(joined[:54], packed[:54]) and joined.shape == (56, 3) and not joined[54:].any()
    for rows in (0, 26, 27, 54, 57, 64):
        with pytest.raises(ValueError, match=rf"levels.0 must have 27 rows .*\({rows},\)"):
            split_offset_mask("levels.0", torch.zeros(rows))


def test_use_kernels_replaces_the_operator(tmp_path):
    """In a process of its own: the registration with the `kernels` library is global."""
    pytest.importorskip("kernels")
    kernel, reason = get_dcnv3_kernel("cpu")
    if kernel is None or not hub_kernels.is_kernels_available():
        pytest.skip(f"no kernel, or transformers does not take the installed kernels: {reason}")
    InternImageForImageClassification(InternImageConfig(**TINY, **TINY_VARIANTS["dcnv4"])).save_pretrained(tmp_path)
    program = """
        import sys
        import torch
        from internimage_hf import InternImageForImageClassification

        plain, model = (
            InternImageForImageClassification.from_pretrained(sys.argv[1], use_kernels=use).eval() for use in (False, True)
        )
        forward = model.internimage.encoder.stages[0].layers[0].dcn.sampling.forward.__func__
        print("dcnv3_kernel" in forward.__globals__["__file__"])
        pixel_values = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model(pixel_values).logits, plain(pixel_values).logits)
    """
    assert run_python(program, tmp_path) == "True\n"


def test_offsets_and_masks_are_the_slow_group():
    model = InternImageForImageClassification(InternImageConfig(**TINY, **TINY_VARIANTS["dcnv4_post_norm"]))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, offset_lr_multiplier=0.1)
    slow = {
        names[id(parameter)] for group in groups if group["lr"] == pytest.approx(0.1) for parameter in group["params"]
    }
    assert slow == {name for name in names.values() if ".dcn.offset." in name or ".dcn.mask." in name}


# ------------------------------------------------------------------------------------------------------- the configuration


def test_official_configuration_by_constructor_and_dictionary():
    official = {"core_op": "DCNv4", "channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8], "num_classes": 7}
    for biases in ({}, {"dcn_output_bias": True}, {"mlp_fc2_bias": True, "dcn_output_bias": False}):
        for config in (InternImageConfig(**official, **biases), InternImageConfig.from_dict({**official, **biases})):
            assert (config.dcn_version, config.dw_kernel_size, config.num_labels) == (4, None, 7)
            assert config.dcn_output_bias is biases.get("dcn_output_bias", False)
            assert config.mlp_fc2_bias is biases.get("mlp_fc2_bias", False)
            again = InternImageConfig.from_dict(json.loads(config.to_json_string()))
            assert again.to_dict() == config.to_dict()
    downstream = {"type": "FlashInternImage", "channels": 16, "groups": [1, 2, 4, 8], "out_indices": (0, 3)}
    for config in (InternImageConfig.from_dict(downstream), InternImageConfig(**downstream)):
        assert config.dcn_version == 4 and config.out_features == ["stage1", "stage4"]
    assert InternImageConfig().dcn_output_bias and InternImageConfig(core_op="DCNv3", act_layer="GELU").mlp_fc2_bias


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dcn_version": 5}, "`dcn_version` must be 3 or 4, got 5"),
        ({"dcn_version": 4, "remove_center": True}, "`remove_center` must be False with `dcn_version` 4"),
        (
            {"dcn_version": 4, "center_feature_scale": True},
            "`center_feature_scale` must be False with `dcn_version` 4",
        ),
        ({"core_op": "DCNv4", "remove_center": True}, "`remove_center` must be False with `dcn_version` 4"),
        ({"core_op": "DCNv5"}, "`core_op` must be one of 'DCNv3', 'DCNv3_pytorch', 'DCNv4', got 'DCNv5'"),
        (
            {"type": "InternImage", "core_op": "DCNv4"},
            "`core_op` must be an operator of `type` 'InternImage', got 'DCNv4'",
        ),
        ({"type": "FlashInternImage", "core_op": "DCNv3"}, "`core_op` .* `type` 'FlashInternImage', got 'DCNv3'"),
    ],
)
def test_contradictory_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        InternImageConfig(**fields)


def test_translation_of_a_configuration_is_idempotent():
    for counts in COUNTS.values():
        translated = translate_config(counts["config"])
        assert translate_config(translated) == translated


# -------------------------------------------------------------------------------------------------------------- the modules


def module_for(config: InternImageConfig, stage: int) -> DCNv3 | DCNv4:
    """The official module of a layer, as the official model builds it."""
    common = {
        "channels": config.hidden_sizes[stage],
        "group": config.groups[stage],
        "offset_scale": config.offset_scale,
    }
    common["dw_kernel_size"] = config.dw_kernel_size
    if config.dcn_version == 4:
        return DCNv4(output_bias=config.dcn_output_bias, **common)
    return DCNv3(
        act_layer={"gelu": "GELU", "silu": "SiLU", "relu": "ReLU"}[config.hidden_act],
        norm_layer=config.norm_layer,
        center_feature_scale=config.center_feature_scale,
        remove_center=config.remove_center,
        **common,
    )


@pytest.mark.parametrize("case", [*MODELS, "t_like", "s_like", "h_like"])
def test_official_modules_load_their_weights_and_give_their_outputs(case):
    """Within a model whose outputs are the official ones, every deformable convolution is that of the module."""
    state_dict, expected = load_case(case)
    config = InternImageConfig.from_dict(json.loads((FIXTURES / case / "config.json").read_text()))
    model = InternImageForImageClassification(config).eval()
    model.load_state_dict(translate_state_dict(state_dict), strict=True)
    seen = {}
    for i, stage in enumerate(model.internimage.encoder.stages):
        for j, layer in enumerate(stage.layers):
            layer.dcn.register_forward_hook(
                lambda _, inputs, output, key=(i, j): seen.update({key: (inputs[0], output)})
            )
    with torch.no_grad():
        logits = model(expected["pixel_values"]).logits
        torch.testing.assert_close(logits, expected["logits"].float(), atol=1e-4, rtol=0)
        for (i, j), (hidden_states, output) in seen.items():
            prefix = f"levels.{i}.blocks.{j}.dcn."
            module = module_for(config, i).eval()
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
            torch.testing.assert_close(module(hidden_states), output, atol=1e-5, rtol=1e-5)
            if config.dcn_version == 4:
                tokens = module(hidden_states.flatten(1, 2), shape=hidden_states.shape[1:3])
                torch.testing.assert_close(tokens, output.flatten(1, 2), atol=1e-5, rtol=1e-5)
    assert len(seen) == sum(config.depths)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


MODULES = {
    "dcnv3": lambda **fields: DCNv3(32, group=2, **fields),
    "dcnv3_gate": lambda **fields: DCNv3(32, group=2, center_feature_scale=True, norm_layer="BN", **fields),
    "dcnv4": lambda **fields: DCNv4(32, group=2, **fields),
    "dcnv4_gate": lambda **fields: DCNv4(32, group=2, center_feature_scale=True, dw_kernel_size=3, **fields),
    "dcnv4_without_pointwise": lambda **fields: DCNv4(32, group=2, without_pointwise=True, **fields),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_begin_as_the_official_ones(name):
    module = MODULES[name]()
    for key, parameter in module.named_parameters():
        zero = key.startswith(("offset.", "mask.", "offset_mask.", "center_feature_scale")) or key.endswith(
            "_proj.bias"
        )
        assert not zero or not parameter.any(), key
        if key.endswith("_proj.weight"):
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert parameter.abs().max() <= bound and parameter.std() > 0.4 * bound, key


@pytest.mark.parametrize("name", MODULES)
def test_every_image_of_a_batch_is_computed_alone(name, backend):
    """The official DCNv4 reads from other images of the batch, and refuses batches above 256 that 256 does not divide."""
    module = randomised(MODULES[name]()).eval()
    images = torch.randn(257, 7, 7, 32)
    with torch.no_grad():
        together = module(images)
        for i in (0, 1, 7, 255, 256):
            torch.testing.assert_close(together[i], module(images[i : i + 1])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_stride_takes_every_second_pixel(name, backend):
    """The official modules read the offsets of other pixels there, or abort."""
    images = torch.randn(3, 9, 8, 32)
    one, two = randomised(MODULES[name]()).eval(), MODULES[name](stride=2).eval()
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(two(images), one(images)[:, ::2, ::2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kernel_size", "pad", "dilation"), [(1, 0, 1), (5, 2, 1), (7, 1, 1), (3, 0, 2), (2, 1, 3)])
def test_other_kernels_without_offsets_are_convolutions(kernel_size, pad, dilation, backend):
    """Without offsets and with a constant mask, DCNv4 is a depth-wise convolution; the official one takes 3x3 alone."""
    module = DCNv4(32, kernel_size, pad=pad, dilation=dilation, group=2, without_pointwise=True).double()
    taps = torch.randn(2, kernel_size**2, dtype=torch.float64)
    with torch.no_grad():
        bias = torch.cat([torch.zeros(2, 2 * kernel_size**2), taps], dim=1).flatten()
        module.offset_mask.bias[: len(bias)] = bias
    images = torch.randn(2, 11, 10, 32, dtype=torch.float64)
    weight = taps.unflatten(1, (kernel_size, kernel_size)).transpose(1, 2)  # points run down the columns first
    weight = weight[:, None].repeat_interleave(16, dim=0)
    expected = torch.nn.functional.conv2d(
        images.permute(0, 3, 1, 2), weight, padding=pad, dilation=dilation, groups=32
    )
    torch.testing.assert_close(module(images), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_trains(name, backend):
    """The official DCNv4 fails in the backward pass."""
    module = randomised(MODULES[name]())
    half = copy.deepcopy(module).bfloat16()
    images = torch.randn(2, 6, 5, 32)
    expected, output = module(images), half(images.bfloat16())
    assert (output.float() - expected).abs().max() < 0.1 * expected.abs().max()
    output.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in half.parameters() if p.requires_grad)


def test_last_stage_of_the_large_model_trains(backend):
    """1280 channels: the official backward pass asks for more threads than a CUDA block has."""
    module = randomised(DCNv4(1280, group=80, dw_kernel_size=3))
    module(torch.randn(1, 9, 1280), shape=(3, 3)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    padding = module.offset_mask.weight.grad[80 * 27 :]
    assert not padding.any() and module.offset_mask.weight.grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DCNv4(64, group=5), "`group` must divide the 64 channels, got 5"),
        (lambda: DCNv3(64, kernel_size=0), "`kernel_size` .* got 0"),
        (lambda: DCNv3(64, dw_kernel_size=4), "`dw_kernel_size` .* got 4"),
        (lambda: DCNv3(64, act_layer="Tanh"), "`act_layer` .* got 'Tanh'"),
        (lambda: DCNv3(64, norm_layer="GN"), "`norm_layer` .* got 'GN'"),
        (lambda: DCNv4(64, kernel_size=4, remove_center=True), "`kernel_size` .* got 4"),
        (lambda: DCNv4(64)(torch.zeros(1, 12, 64)), "`shape` .* 12 pixels"),
        (lambda: DCNv4(64)(torch.zeros(1, 12, 64), shape=(3, 5)), r"`shape` .* got \(3, 5\)"),
        (lambda: DCNv4(64)(torch.zeros(1, 3, 4, 64), shape=(4, 3)), r"`shape` .* got \(4, 3\)"),
        (lambda: DCNv4(64)(torch.zeros(1, 9, 32)), r"`input` .* 64 channels, got \(1, 9, 32\)"),
        (lambda: DCNv3(64)(torch.zeros(1, 9, 64)), r"`input` .* got \(1, 9, 64\)"),
        (lambda: DCNv4(64, 7, pad=0)(torch.zeros(1, 3, 3, 64)), "`input` .* is too small"),
    ],
)
def test_bad_arguments_of_modules_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ignored_arguments_of_the_official_module_are_named():
    with pytest.warns(UserWarning, match="DCNv4 ignores the arguments 'act_layer'"):
        DCNv4(64, act_layer="GELU")
