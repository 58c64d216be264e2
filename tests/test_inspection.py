"""Sampling points, receptive fields and FLOPs of models: against the operator, closed forms and the paper."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    ResNetConfig,
    ResNetModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from utils import SMALL_DETECTOR, SMALL_HEADS, TINY, TINY_VARIANTS

from internimage_hf import (
    InternImageBackbone,
    InternImageCompositeBackbone,
    InternImageCompositeConfig,
    InternImageConfig,
    InternImageDinoConfig,
    InternImageDinoForObjectDetection,
    InternImageForImageClassification,
    InternImageModel,
    InternImageRcnnConfig,
    InternImageRcnnForInstanceSegmentation,
    count_flops,
    effective_receptive_field,
    sampling_points,
)
from internimage_hf.inspection import LayerSampling


HEIGHT, WIDTH = 52, 76  # neither is a multiple of 32


def classifier(**fields) -> InternImageForImageClassification:
    return InternImageForImageClassification(InternImageConfig(**{**TINY, **fields}))


def backbone_config(**fields) -> InternImageConfig:
    return InternImageConfig(**TINY, out_features=["stage1", "stage2", "stage3", "stage4"], **fields)


def upernet() -> UperNetForSemanticSegmentation:
    fields = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 32}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone_config(), **fields))


def mask2former() -> Mask2FormerForUniversalSegmentation:
    fields = {**SMALL_HEADS["mask2former"], "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 5}
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone_config(), **fields))


def with_kernels(**fields) -> InternImageForImageClassification:
    model = classifier(**fields).eval()
    before = [module.forward for name, module in model.named_modules() if name.endswith("sampling")]
    model.set_use_kernels(True)
    after = [module.forward for name, module in model.named_modules() if name.endswith("sampling")]
    if before == after:
        pytest.skip("there is no compiled kernel for the CPU")
    return model


def compiled() -> nn.Module:
    return torch.compile(classifier(), backend="eager")


def dcnv4(**fields) -> InternImageForImageClassification:
    return classifier(dcn_version=4, offset_scale=0.5, dw_kernel_size=3, **fields)


def dino() -> InternImageDinoForObjectDetection:
    fields = {**SMALL_DETECTOR, "d_model": 32, "encoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return InternImageDinoForObjectDetection(
        InternImageDinoConfig(backbone_config=backbone_config(), num_queries=10, neck_groups=8, num_labels=3, **fields)
    )


def rcnn() -> InternImageRcnnForInstanceSegmentation:
    return InternImageRcnnForInstanceSegmentation(
        InternImageRcnnConfig(backbone_config=backbone_config(), fpn_channels=16, num_labels=3)
    )


def composite() -> InternImageCompositeBackbone:
    return InternImageCompositeBackbone(InternImageCompositeConfig(**TINY, out_features=["stage1", "stage4"]))


MODELS = {
    **{name: lambda fields=fields: classifier(**fields) for name, fields in TINY_VARIANTS.items()},
    "backbone": lambda: InternImageBackbone(backbone_config(remove_center=True, offset_scale=1.5)),
    "without_head": lambda: InternImageModel(InternImageConfig(**TINY), add_pooling_layer=False),
    "upernet": upernet,
    "mask2former": mask2former,
    "use_kernels": with_kernels,
    "use_kernels_dcnv4": lambda: with_kernels(dcn_version=4),
    "compiled": compiled,
    "dcnv4": dcnv4,
    "dino": dino,
    "rcnn": rcnn,
}


def move_points(model: nn.Module) -> nn.Module:
    """Gives a model random offsets and masks, as training does."""
    for name, parameter in model.named_parameters():
        if ".dcn.offset." in name or ".dcn.mask." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def bilinear(value: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Samples of (N, H, W, G, C) maps at (N, H', W', G, P, 2) positions: (N, H', W', G, P, C), zero outside."""
    batch, height, width, groups, _ = value.shape
    n, g = torch.arange(batch).view(-1, 1, 1, 1, 1), torch.arange(groups).view(-1, 1)
    corner, total = positions.floor(), 0
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            weight = (1 - (positions[..., 0] - x).abs()) * (1 - (positions[..., 1] - y).abs())
            weight = weight * ((x >= 0) & (x < width) & (y >= 0) & (y < height))
            total = (
                total + weight.unsqueeze(-1) * value[n, y.clamp(0, height - 1).long(), x.clamp(0, width - 1).long(), g]
            )
    return total


def check_against_operator(model: nn.Module) -> list[LayerSampling]:
    """Compares sampling by `bilinear` at the positions with what each layer of the model computes."""
    move_points(model)
    images = torch.randn(2, 3, HEIGHT, WIDTH)
    calls = {}

    def record(path: str, args: tuple, output: torch.Tensor) -> None:
        calls[path] = args[0].detach(), output.detach()

    for path, module in model.named_modules():
        if path.endswith("sampling"):
            module.register_forward_hook(lambda _, args, output, path=path: record(path, args, output))
    found = sampling_points(model, images)

    assert {f"{layer.name}.sampling" for layer in found} == calls.keys()
    for layer in found:
        value, output = calls[f"{layer.name}.sampling"]
        samples = bilinear(value.unflatten(-1, (layer.positions.shape[3], -1)), layer.positions / layer.stride)
        samples = (samples * layer.weights.unsqueeze(-1)).sum(-2).flatten(-2)
        torch.testing.assert_close(samples, output, atol=1e-5, rtol=1e-5)
        assert layer.stride * output.shape[1] >= HEIGHT > layer.stride * (output.shape[1] - 1)
    return found


LAYERS = [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2), (4, 0)]


@pytest.mark.parametrize("name", MODELS)
def test_positions_and_weights_reproduce_operator(name):
    found = check_against_operator(MODELS[name]())
    assert [(layer.stage, layer.layer) for layer in found] == LAYERS


def test_composite_backbone_has_points_of_both_encoders_and_fields_of_last():
    model = composite()
    found = check_against_operator(model)
    assert [(layer.stage, layer.layer) for layer in found] == LAYERS * 2
    assert [layer.name.partition(".")[0] for layer in found] == ["assistant"] * 6 + ["lead"] * 6
    fields = effective_receptive_field(model, torch.randn(1, 3, 64, 64))
    assert [field.name for field in fields] == [f"lead.stages.{stage}" for stage in range(4)]


def test_untrained_points_lie_on_grid():
    model = classifier(remove_center=True, offset_scale=2.0)
    for layer in sampling_points(model, torch.randn(1, 3, HEIGHT, WIDTH)):
        expected = [(x * 2 * layer.stride, y * 2 * layer.stride) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y]
        assert layer.grid.tolist() == [list(map(float, point)) for point in expected]
        row, column = layer.positions.shape[1] - 1, 1
        around = layer.positions[0, row, column] - torch.tensor([column, row]) * layer.stride
        torch.testing.assert_close(around, layer.grid.expand_as(around))
        torch.testing.assert_close(layer.weights, torch.full_like(layer.weights, 1 / 8))
        assert layer.reach[0, row, column].item() == pytest.approx(layer.grid.norm(dim=-1).mean().item())


def test_query_gives_nearest_position_as_at_does():
    model = move_points(classifier())
    images = torch.randn(2, 3, HEIGHT, WIDTH)
    everything = sampling_points(model, images)
    query = (75, 21.5)  # the last column of pixels
    for alone, layer in zip(sampling_points(model, images, query=query), everything, strict=True):
        column = min(math.floor(75 / layer.stride + 0.5), layer.positions.shape[2] - 1)
        assert alone.cell == (math.floor(21.5 / layer.stride + 0.5), column)
        row, column = alone.cell
        for name in ("positions", "weights"):
            expected = getattr(layer, name)[:, row : row + 1, column : column + 1]
            torch.testing.assert_close(getattr(alone, name), expected)
            torch.testing.assert_close(getattr(layer.at(query), name), expected)
        torch.testing.assert_close(alone.origins[0, 0], torch.tensor([column, row]) * float(layer.stride))
        torch.testing.assert_close(alone.reach[:, 0, 0], layer.reach[:, row, column])
    (second, *_) = sampling_points(model, images, stages=3)
    torch.testing.assert_close(second.positions, everything[2].positions)


def test_spread_groups_are_far_apart():
    model = classifier()
    layer = sampling_points(model, torch.randn(1, 3, 64, 64), query=(32, 32), stages=4)[0]
    shifts = torch.tensor([[0, 0], [9, 0], [8, 0], [0, -7], [1, 0], [0, 0], [0, 2], [0, 0.0]])  # of the 8 groups
    layer.positions.add_(shifts[:, None])
    assert layer.spread_groups(3) == [1, 3, 6]
    assert len(layer.spread_groups(100)) == 8


def test_inspection_leaves_model_as_it_was():
    model = move_points(classifier(norm_layer="BN", drop_path_rate=0.5, hidden_dropout_prob=0.5)).train()
    model.internimage.stem.eval()
    model.classifier.requires_grad_(False)
    images = torch.randn(2, 3, HEIGHT, WIDTH)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with torch.no_grad():  # which must not reach the gradient of the receptive field
        first, second = (effective_receptive_field(model, images, stages=3)[0].gradient for _ in range(2))
        layer, other = (sampling_points(model, images, query=(5, 5))[0].positions for _ in range(2))
        count_flops(model, 64)
    assert torch.equal(first, second) and torch.equal(layer, other) and first.max() > 0
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.classifier.parameters()] == [False, False]
    assert all(p.requires_grad and p.grad is None for p in model.internimage.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------ receptive fields


def test_receptive_field_of_convolutions_equals_closed_form():
    stack = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3)))
    for layer in stack:
        nn.init.ones_(layer.weight)
    (field,) = effective_receptive_field(stack, torch.rand(2, 3, 21, 30), position=(12, 9), module=stack)
    # each layer is a box of ones: three of them are the coefficients of (1 + x + x^2)^3, in x and in y
    profile = torch.tensor([1.0, 3, 6, 7, 6, 3, 1])
    expected = torch.zeros(21, 30)
    expected[6:13, 9:16] = torch.outer(profile, profile) * 3**4  # 3 channels in each of 4 places
    torch.testing.assert_close(field.gradient, expected.expand(2, -1, -1))
    assert (field.stage, field.stride, field.cell) == (None, 1, (9, 12))
    # 27^2 in all; the square of side 5 holds 25^2, the one of side 3 holds 19^2
    assert field.share_of_square(1.0) == 49 / 630
    assert field.share_of_square(0.99 * 25**2 / 27**2) == 25 / 630
    assert field.share_of_square(19**2 / 27**2) == pytest.approx(9 / 630)
    assert field.share_of_pixels(1.0) == 49 / 630
    assert field.share_of_pixels(1e-6) == 1 / 630
    # brightest first: 49, four of 42, four of 36
    assert field.share_of_pixels((49 + 4 * 42) / 729) == pytest.approx(5 / 630)


def test_receptive_field_of_strided_module_is_found_by_name():
    stack = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1))
    nn.init.ones_(stack[0].weight)
    (field,) = effective_receptive_field(stack, torch.rand(1, 3, 20, 20), position=(8, 13), module="0")
    assert (field.name, field.stride, field.cell) == ("0", 2, (7, 4))
    expected = torch.zeros(1, 20, 20)
    expected[:, 13:16, 7:10] = 3
    torch.testing.assert_close(field.gradient, expected)
    resnet = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1]))
    (field,) = effective_receptive_field(resnet, torch.rand(1, 3, 64, 64), module=resnet.encoder.stages[1])
    assert field.name == "encoder.stages.1" and field.stride == 8 and field.gradient.max() > 0


@pytest.mark.parametrize("make", [classifier, upernet])
def test_receptive_field_of_stages_without_branches_is_that_of_stem_and_downsamples(make):
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith(("dcn.output_proj.weight", "fc2.weight")):
            nn.init.zeros_(parameter)
    fields = effective_receptive_field(model, torch.randn(1, 3, 128, 128), position=(64, 64))
    assert [field.stage for field in fields] == [1, 2, 3, 4]
    for field in fields:
        # 3x3 convolutions of stride 2 reach 2^n - 1 pixels to each side of the position's pixel
        reach = field.stride - 1
        inside = torch.zeros(128, 128, dtype=torch.bool)
        inside[64 - reach : 65 + reach, 64 - reach : 65 + reach] = True
        assert field.cell == (64 // field.stride, 64 // field.stride)
        assert (field.gradient[0][inside] > 0).all() and (field.gradient[0][~inside] == 0).all()
        assert field.share_of_square(1.0) == pytest.approx((2 * reach + 1) ** 2 / 128**2)


def test_receptive_field_of_batch_is_that_of_each_image():
    model = classifier(norm_layer="BN")
    images = torch.randn(2, 3, 64, 64)
    both = effective_receptive_field(model, images, position=(10, 50), stages=(4, 2))
    assert [field.stage for field in both] == [2, 4]
    for i in range(2):
        for field, alone in zip(
            both, effective_receptive_field(model, images[i : i + 1], (10, 50), [2, 4]), strict=True
        ):
            torch.testing.assert_close(field.gradient[i : i + 1], alone.gradient)


def test_receptive_field_of_constant_is_nan_not_zero():
    stack = nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU())
    nn.init.zeros_(stack[0].weight)
    (field,) = effective_receptive_field(stack, torch.rand(1, 3, 8, 8), module=stack)
    assert math.isnan(field.share_of_pixels(0.5)) and math.isnan(field.share_of_square(0.5))


# -------------------------------------------------------------------------------------------------------------------- FLOPs


PLAIN_H = {
    "center_feature_scale": False,
    "use_clip_projector": False,
    "res_post_norm": False,
    "level2_post_norm_block_ids": None,
}


@pytest.mark.parametrize(
    ("variant", "fields", "size", "paper"),
    [
        ("t", {}, 224, 5),
        ("s", {}, 224, 8),
        ("b", {}, 224, 16),
        ("l", {}, 384, 108),
        ("xl", {}, 384, 163),
        ("h", PLAIN_H, 640, 1478),
    ],
)
def test_flops_agree_with_paper(variant, fields, size, paper):
    with torch.device("meta"):
        model = InternImageForImageClassification(InternImageConfig.from_variant(variant, **fields))
    # the paper has whole billions
    assert abs(count_flops(model, size) / 1e9 - paper) < max(0.02 * paper, 0.5)


def test_flops_equal_sum_over_layers():
    config = InternImageConfig(channels=8, depths=[1, 1, 1, 1], groups=[2, 4, 4, 8], num_labels=5, mlp_ratio=2.0)
    model = InternImageModel(config, add_pooling_layer=False)
    expected, height, width = 0, 32, 64
    height, width = height // 2, width // 2
    expected += height * width * 27 * 4
    height, width = height // 2, width // 2
    expected += height * width * 36 * 8
    for stage, groups in enumerate(config.groups):
        channels = 8 * 2**stage
        per_position = 9 * channels + channels * groups * 27 + 2 * channels**2 + 2 * channels * 2 * channels
        expected += height * width * (per_position + 5 * 9 * channels)
        if stage < 3:
            height, width = height // 2, width // 2
            expected += height * width * 9 * channels * 2 * channels
    assert count_flops(model, (32, 64)) == expected
    assert count_flops(model, [32, 64], device="cpu") == expected


def test_detector_that_selects_by_values_counts_on_real_device():
    model = rcnn().eval()
    with pytest.raises(ValueError, match=r'does not run on the meta device .*device="cpu"'):
        count_flops(model, 64)
    assert count_flops(model, 64, device="cpu") > count_flops(model.backbone, 64)


@pytest.mark.parametrize("make", [upernet, mask2former, with_kernels, compiled, dcnv4, dino])
def test_flops_of_heads_include_backbone(make):
    model = make()
    backbone = next(m for m in model.modules() if isinstance(m, (InternImageBackbone, InternImageModel)))
    assert count_flops(model, 64) > count_flops(backbone, 64) > 0
    assert all(p.device.type == "cpu" for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_wrong_arguments_give_one_line():
    model, images = classifier(), torch.rand(1, 3, 32, 48)
    resnet = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1]))
    layer = sampling_points(model, images, query=(0, 0))[0]
    field = effective_receptive_field(model, images, stages=1)[0]
    for message, call in {
        r"`model` must hold one InternImage, the ResNetModel holds none": lambda: sampling_points(resnet, images),
        r"`model` must be a torch.nn.Module, got str": lambda: count_flops("model", 32),
        r"the ModuleList holds 2 \(0.internimage, 1.internimage\)": lambda: effective_receptive_field(
            nn.ModuleList([classifier(), classifier()]), images
        ),
        r"`query` \(x, y\) must lie in the image, 0 <= x < 48 and 0 <= y < 32, got \(48, 2\)": lambda: sampling_points(
            model, images, query=(48, 2)
        ),
        r"`position` .* got \(2, nan\)": lambda: effective_receptive_field(model, images, position=(2, math.nan)),
        r"`query` must be a pair of numbers \(x, y\), got \(1, 2, 3\)": lambda: sampling_points(
            model, images, (1, 2, 3)
        ),
        r"`query` must be a pair of numbers \(x, y\), got 7": lambda: sampling_points(model, images, 7),
        r"`stages` must be one or several of 1 to 4, got 0": lambda: sampling_points(model, images, stages=0),
        r"`stages` must be .* got \(\)": lambda: sampling_points(model, images, stages=()),
        r"`stages` must be .* got \['stage5'\]": lambda: effective_receptive_field(model, images, stages=["stage5"]),
        r"`pixel_values` must be floats .* got \(3, 32, 48\) of torch.float32": lambda: sampling_points(
            model, images[0]
        ),
        r"`pixel_values` must be floats .* got list": lambda: effective_receptive_field(model, [images]),
        r"`pixel_values` must have 3 channels": lambda: sampling_points(model, images[:, :1]),
        r"`stages` and `module` exclude each other": lambda: effective_receptive_field(
            model, images, stages=1, module=model
        ),
        r"`module` must be a module of `model`, .* got encoder": lambda: effective_receptive_field(
            model, images, module="encoder"
        ),
        r"`module` classifier must give a map .* got \(1, 5\)": lambda: effective_receptive_field(
            model, images, module=model.classifier
        ),
        r"`image_size` must be a positive int .* got \(32, 0\)": lambda: count_flops(model, (32, 0)),
        r"`part` must be above 0 and at most 1, got 0": lambda: field.share_of_pixels(0),
        r"`number` must be at least 1, got 0": lambda: layer.spread_groups(0),
        r"`at` needs the sampling points of all positions": lambda: layer.at((0, 0)),
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
