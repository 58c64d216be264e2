"""The operator in PyTorch: parity with the official one, every option, every kind of input, every kind of compiler."""

import contextlib
import itertools
import json
import random
import subprocess
import sys
import textwrap
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from utils import FIXTURES, ROOT, TINY, TINY_VARIANTS

from internimage_hf import InternImageConfig, InternImageForImageClassification
from internimage_hf.dcnv3 import dcnv3, dcnv3_backend_report, dcnv3_softmax, use_dcnv3_backend
from internimage_hf.dcnv3_chunked import dcnv3_cpu
from internimage_hf.dcnv3_reference import Geometry, dcnv3_plain, softmax_over_points
from internimage_hf.kernel_loader import get_dcnv3_kernel


CASES = {case["name"]: case for case in json.loads((FIXTURES / "ops.json").read_text())["cases"]}
TENSORS = load_file(FIXTURES / "ops.safetensors")
# the last one is what compilers take where there is no kernel and no operator of ours
FORMULATIONS = {"cpu": dcnv3_cpu, "plain": dcnv3_plain, "gathering": partial(dcnv3_plain, by_gathering=True)}


@pytest.fixture(autouse=True)
def _pytorch_definition():
    with use_dcnv3_backend("torch"):
        yield


def case_options(case: dict) -> dict:
    return {
        "kernel_size": (case["kernel_h"], case["kernel_w"]),
        "stride": (case["stride_h"], case["stride_w"]),
        "padding": (case["pad_h"], case["pad_w"]),
        "dilation": (case["dilation_h"], case["dilation_w"]),
        "groups": case["group"],
        "offset_scale": case["offset_scale"],
        "remove_center": case["remove_center"],
    }


def naive_dcnv3(input, offset, mask, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center):
    """The formula of the docstring, one sample at a time, in float64."""
    batch, height, width, channels = input.shape
    _, height_out, width_out, _ = offset.shape
    kernel = [
        (iy, ix)
        for ix in range(kernel_size[1])
        for iy in range(kernel_size[0])
        if not (remove_center and iy == kernel_size[0] // 2 and ix == kernel_size[1] // 2)
    ]
    half = [(dilation[axis] * (kernel_size[axis] - 1)) // 2 for axis in (0, 1)]
    offset = offset.double().reshape(batch, height_out, width_out, groups, len(kernel), 2)
    mask = mask.double().reshape(batch, height_out, width_out, groups, len(kernel))
    value = input.double().reshape(batch, height, width, groups, channels // groups)
    output = torch.zeros(batch, height_out, width_out, groups, channels // groups, dtype=torch.float64)
    for n, i, j, g in torch.cartesian_prod(*map(torch.arange, (batch, height_out, width_out, groups))).tolist():
        for p, (iy, ix) in enumerate(kernel):
            dx, dy = offset[n, i, j, g, p].tolist()
            x = j * stride[1] - padding[1] + half[1] - half[1] * offset_scale + (ix * dilation[1] + dx) * offset_scale
            y = i * stride[0] - padding[0] + half[0] - half[0] * offset_scale + (iy * dilation[0] + dy) * offset_scale
            if not (-1 < x < width and -1 < y < height):
                continue
            x0, y0 = int(x // 1), int(y // 1)
            for row, by_row in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
                for column, by_column in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
                    if 0 <= row < height and 0 <= column < width:
                        output[n, i, j, g] += mask[n, i, j, g, p] * by_row * by_column * value[n, row, column, g]
    return output.flatten(-2)


def random_arguments(batch, height, width, channels, dtype=torch.float32, spread=1.5, seed=0, **options):
    """Input, offset, mask, and all options of a call."""
    options = {
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 2,
        "offset_scale": 1.0,
        "remove_center": False,
        **options,
    }
    geometry = Geometry(**options)
    generator = torch.Generator().manual_seed(seed)
    out = (batch, *geometry.output_size(height, width))
    tensors = (
        torch.randn(batch, height, width, channels, generator=generator),
        torch.randn(*out, geometry.groups * geometry.points * 2, generator=generator) * spread,
        torch.randn(*out, geometry.groups * geometry.points, generator=generator),
    )
    return [tensor.to(dtype) for tensor in tensors], options


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_official_operator(name, formulation, dtype):
    geometry = Geometry(**case_options(CASES[name]))
    inputs = [TENSORS[f"{name}.{key}"].to(dtype, copy=True).requires_grad_() for key in ("input", "offset", "mask")]
    output = FORMULATIONS[formulation](*inputs, geometry, False)
    gradients = torch.autograd.grad(output, inputs, TENSORS[f"{name}.grad_output"].to(dtype))
    for key, actual in zip(("output", "grad_input", "grad_offset", "grad_mask"), (output, *gradients), strict=True):
        expected = TENSORS[f"{name}.{key}"]
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


OPTIONS = [
    {},
    {"kernel_size": (3, 5), "padding": (1, 2), "groups": 1},
    {"kernel_size": (1, 2), "padding": (0, 1), "stride": (2, 1), "groups": 4},
    {"kernel_size": (2, 2), "padding": (3, 0), "dilation": (2, 1), "offset_scale": 1.7},
    {"kernel_size": (5, 5), "padding": (2, 2), "remove_center": True, "offset_scale": 0.5},
    {"kernel_size": (3, 3), "dilation": (1, 3), "padding": (0, 3), "remove_center": True, "stride": (1, 3)},
    {"offset_scale": 0.0},
    {"offset_scale": -1.5},
    {"kernel_size": (1, 1), "padding": (0, 0)},
]


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_against_the_formula(options, formulation):
    tensors, options = random_arguments(2, 6, 5, 8, torch.float64, **options)
    expected = naive_dcnv3(*tensors, **options)
    actual = FORMULATIONS[formulation](*tensors, Geometry(**options), False)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_the_two_formulations_agree_on_large_inputs():
    """More than one chunk of images, of rows, and of points in the backward pass."""
    for shape, options in (
        ((5, 40, 31, 24), {"groups": 3}),
        ((1, 150, 170, 32), {"groups": 4, "remove_center": True}),
        ((7, 9, 9, 64), {"groups": 32, "offset_scale": 2.0}),
    ):
        tensors, options = random_arguments(*shape, torch.float64, **options)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        outputs, gradients = [], []
        for formulation in (dcnv3_cpu, dcnv3_plain):
            outputs.append(formulation(*tensors, Geometry(**options), True))
            gradients.append(torch.autograd.grad(outputs[-1].square().sum(), tensors))
        torch.testing.assert_close(*outputs, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("function", [dcnv3, dcnv3_softmax])
@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_gradients_equal_finite_differences(options, function):
    tensors, options = random_arguments(1, 4, 5, 4, torch.float64, seed=3, **options)
    assert torch.autograd.gradcheck(
        lambda *args: function(*args, **options), [tensor.requires_grad_() for tensor in tensors]
    )


def test_only_the_gradients_asked_for_are_computed():
    tensors, options = random_arguments(1, 4, 4, 4)
    tensors[1].requires_grad_()
    dcnv3(*tensors, **options).sum().backward()
    assert tensors[1].grad is not None and tensors[0].grad is None


@pytest.mark.parametrize("remove_center", [False, True])
def test_fused_softmax_equals_a_softmax_before_the_operator(remove_center):
    (input, offset, logits), options = random_arguments(2, 5, 6, 8, remove_center=remove_center)
    mask = logits.unflatten(-1, (2, -1)).softmax(-1).flatten(-2)
    torch.testing.assert_close(
        dcnv3_softmax(input, offset, logits * 1, **options), dcnv3(input, offset, mask, **options)
    )
    huge = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 0.0, 1.0]])
    torch.testing.assert_close(softmax_over_points(huge), huge.softmax(-1))


# ---------------------------------------------------------------------------------------------------- kinds of inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_half_precision_computes_in_float32(dtype, formulation):
    tensors, options = random_arguments(2, 7, 6, 32, dtype)
    # away from integers, where the gradient of the offset jumps: rounded to 16 bits, many would lie on them
    tensors[1] = (tensors[1] * 2).round() / 2 + 0.25
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output = FORMULATIONS[formulation](*tensors, Geometry(**options), False)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = dcnv3_plain(*wide, Geometry(**options), False)
    assert output.dtype == dtype
    # nothing but the rounding of the result
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=torch.finfo(dtype).eps)
    weight = torch.randn_like(expected)
    actual = torch.autograd.grad(output, tensors, weight.to(dtype))
    for gradient, wanted in zip(actual, torch.autograd.grad(expected, wide, weight.to(dtype).double()), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), wanted, atol=1e-4, rtol=torch.finfo(dtype).eps)


def test_autocast_and_mixed_dtypes():
    (input, offset, mask), options = random_arguments(1, 5, 5, 8)
    expected = dcnv3_softmax(input, offset, mask, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dcnv3_softmax(input, offset, mask, **options), expected)
        mixed = dcnv3_softmax(input, offset.bfloat16(), mask.bfloat16(), **options)
    assert mixed.dtype == torch.float32
    tensors = [input.bfloat16().requires_grad_(), offset.requires_grad_(), mask.double().requires_grad_()]
    output = dcnv3_softmax(*tensors, **options)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert [tensor.grad.dtype for tensor in tensors] == [torch.bfloat16, torch.float32, torch.float64]


def test_views_give_what_copies_give():
    (input, offset, mask), options = random_arguments(2, 6, 5, 8)
    expected = dcnv3(input, offset, mask, **options)
    channels_first = input.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    both = torch.cat((offset, mask), -1)
    offset_view, mask_view = both.split((offset.shape[-1], mask.shape[-1]), -1)
    every_other = torch.stack((mask, -mask), -1)[..., 0]
    for tensors in ((channels_first, offset_view, mask_view), (input.expand(2, -1, -1, -1), offset, every_other)):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        actual = dcnv3(*tensors, **options)
        torch.testing.assert_close(actual, expected)
        actual.sum().backward()
    one_image = input[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        dcnv3(one_image, offset, mask, **options), dcnv3(one_image.contiguous(), offset, mask, **options)
    )


def any_layout(tensor, choose):
    """Equal values, or the same for all of a dimension, in a layout that may not be contiguous."""
    kind = choose("as it is", "permuted", "every other", "a slice", "expanded")
    if kind == "permuted":
        order = choose(*itertools.permutations(range(4)))
        return tensor.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    if kind == "every other":
        return torch.stack((tensor, -tensor), -1)[..., 0]
    if kind == "a slice":
        dimension = choose(0, 1, 2, 3)
        return torch.cat((tensor, tensor), dimension).narrow(
            dimension, tensor.shape[dimension], tensor.shape[dimension]
        )
    if kind == "expanded" and tensor.shape[0]:
        dimension = choose(0, 1, 2, 3)
        return tensor.narrow(dimension, 0, 1).expand(tensor.shape)
    return tensor


@pytest.mark.parametrize("seed", range(4))
def test_random_layouts_are_computed_as_contiguous_ones(seed):
    rng = random.Random(seed)

    def choose(*values):
        return rng.choice(values)

    before = torch.get_num_threads()
    try:
        for case in range(60):
            torch.set_num_threads(choose(1, 2, 3))
            kernel_size = (choose(1, 2, 3), choose(1, 2, 3))
            options = {
                "kernel_size": kernel_size,
                "stride": (choose(1, 2, 3), choose(1, 2)),
                "padding": (choose(1, 2), choose(1, 2)),
                "groups": choose(1, 1, 2, 3),
                "offset_scale": choose(1.0, 2.0, -1.5),
                "remove_center": kernel_size == (3, 3) and choose(False, True),
            }
            shape = (
                choose(0, 1, 1, 2, 3),
                choose(1, 1, 2, 5),
                choose(1, 1, 2, 6),
                options["groups"] * choose(1, 2, 8),
            )
            tensors, options = random_arguments(*shape, torch.float64, seed=case, **options)
            views = [any_layout(tensor, choose) for tensor in tensors]
            dense = [view.clone(memory_format=torch.contiguous_format) for view in views]
            results = []
            function, weight = choose(dcnv3, dcnv3_softmax), None
            for arguments in (dense, views):
                leaves = [argument.detach().requires_grad_() for argument in arguments]
                output = function(*leaves, **options)
                weight = (
                    torch.randn(output.shape, dtype=torch.float64) if weight is None else any_layout(weight, choose)
                )
                if arguments is views:  # that of an expanded one is another
                    leaves_of_dense = [argument.detach().requires_grad_() for argument in dense]
                    results[0][1:] = torch.autograd.grad(
                        function(*leaves_of_dense, **options), leaves_of_dense, weight
                    )
                results.append([output, *torch.autograd.grad(output, leaves, weight)])
            for actual, expected in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(actual, expected, msg=lambda m, o=options, s=shape: f"{s}, {o}: {m}")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(0, 5, 6, 8), (1, 1, 1, 8), (3, 1, 7, 8), (2, 9, 1, 4)])
def test_empty_and_tiny_maps_equal_the_formula(shape):
    tensors, options = random_arguments(*shape)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output = dcnv3_softmax(*tensors, **options)
    assert output.shape == shape
    output.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in tensors)
    naive = naive_dcnv3(tensors[0], tensors[1], softmaxed(tensors[2], options["groups"]), **options)
    torch.testing.assert_close(output.double(), naive, atol=1e-5, rtol=1e-5)


def softmaxed(logits, groups):
    return logits.detach().unflatten(-1, (groups, -1)).softmax(-1).flatten(-2)


@pytest.mark.parametrize("group_channels", [1, 3, 5, 8, 33])
def test_group_widths_equal_the_formula(group_channels):
    tensors, options = random_arguments(2, 5, 4, 3 * group_channels, groups=3)
    torch.testing.assert_close(
        dcnv3(*tensors, **options).double(), naive_dcnv3(*tensors, **options), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_offsets_that_are_not_numbers_or_far_away(formulation):
    (input, offset, mask), options = random_arguments(3, 6, 5, 8)
    function = FORMULATIONS[formulation]
    clean = function(input, offset, mask, Geometry(**options), False)
    wild = offset.clone()
    wild[1] = (
        torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9])
        .repeat(1000)[: wild[1].numel()]
        .view_as(wild[1])
    )
    wild.requires_grad_()
    output = function(input, wild, mask, Geometry(**options), False)
    assert torch.equal(output[[0, 2]], clean[[0, 2]])
    assert not output[1].any(), "no point of this image lies inside it"
    output.sum().backward()
    assert not wild.grad[1].any()

    broken = input.clone()
    broken[1, 2, 2] = float("nan")
    output = function(broken, offset, mask, Geometry(**options), False)
    assert torch.equal(output[[0, 2]], clean[[0, 2]]) and output[1].isnan().any()


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_infinite_pixels_stay_out_of_samples_outside(formulation):
    """Zero offsets put points exactly on -1: their weight of zero must not meet an infinite pixel."""
    (input, offset, mask), options = random_arguments(1, 4, 4, 2, spread=0.0, groups=1)
    input[:] = float("inf")
    mask[:] = 1
    assert (FORMULATIONS[formulation](input, offset + 0.25, mask, Geometry(**options), False) == float("inf")).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_modulations_and_gradients_that_are_not_finite_count_inside_alone(formulation, value):
    tensors, options = random_arguments(3, 6, 5, 8, torch.float64)
    inside, outside = tensors[1].clone(), tensors[1].clone()
    inside.zero_().add_(0.25)
    outside[:] = 0.25
    outside.view(3, 6, 5, 2, 9, 2)[:, :, :, 1, 3, 0] = torch.tensor([100.0, -100.0, torch.nan]).view(3, 1, 1)
    mask = tensors[2].clone()
    mask.view(3, 6, 5, 2, 9)[..., 1, 3] = value

    def differentiate(offset, mask, of_output=1.0):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (tensors[0], offset, mask)]
        output = FORMULATIONS[formulation](*leaves, Geometry(**options), False)
        grad_output = torch.ones_like(output)
        grad_output[1, 3, 2, 4:] = of_output  # of the second group
        return output, *torch.autograd.grad(output, leaves, grad_output)

    expected = differentiate(outside, torch.where(mask.isfinite(), mask, 1.0))
    torch.testing.assert_close(differentiate(outside, mask), expected)
    assert not differentiate(inside, mask)[0][:, 2:4, 2:4, 4:].isfinite().any()
    _, grad_input, grad_offset, grad_mask = differentiate(outside, mask, of_output=value)
    assert (
        not grad_offset.view(3, 6, 5, 2, 9, 2)[..., 1, 3, :].any()
        and not grad_mask.view(3, 6, 5, 2, 9)[..., 1, 3].any()
    )
    assert grad_input[[0, 2]].isfinite().all() and not grad_input[1, 3, 2, 4:].isfinite().any()


def all_backends():
    """The formulations and, if there is one, the CPU's kernel: functions of the tensors, a Geometry, and softmax or not."""
    backends = dict(FORMULATIONS)
    if get_dcnv3_kernel("cpu")[0] is not None:

        def kernel(*arguments):
            *tensors, geometry, softmax = arguments
            function = dcnv3_softmax if softmax else dcnv3
            return function(*tensors, **geometry._asdict(), backend="kernel")

        backends["kernel"] = kernel
    return backends


def test_a_softmax_that_is_not_finite_counts_inside_alone():
    tensors, options = random_arguments(2, 6, 5, 8, torch.float64)
    _, offset, logits = tensors
    offset.zero_().add_(0.25)
    points = offset.view(2, 6, 5, 2, 9, 2)
    points[0, :, :, 0] = torch.tensor([100.0, torch.nan, torch.inf]).repeat(3)[:, None]  # the whole group lies outside
    points[1, :, :, 0, 4:] = -100.0  # a part of it
    bad = logits.view(2, 6, 5, 2, 9)
    bad[:, :, :, 0, ::2] = torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf, 0.0])
    results = {}
    for name, backend in all_backends().items():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        output = backend(*leaves, Geometry(**options), True)
        results[name] = [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]
        output, grad_input, grad_offset, grad_mask = results[name]
        assert not output[0, ..., :4].any() and output[..., 4:].isfinite().all(), name
        assert output[1, 2:5, 2:4, :4].isnan().all(), name
        grad_offset = grad_offset.view(2, 6, 5, 2, 9, 2)
        assert not grad_offset[0, :, :, 0].any() and not grad_offset[1, :, :, 0, 4:].any(), name
        assert not grad_input[0, ..., :4].any() and grad_input[..., 4:].isfinite().all(), name
        grad_mask = grad_mask.view(2, 6, 5, 2, 9)
        assert grad_mask[:, :, :, 0].isnan().all() and grad_mask[:, :, :, 1].isfinite().all(), name
    expected = results.pop("cpu")
    for name, actual in results.items():
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------- points on a pixel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_points_exactly_on_the_edge(dtype):
    """Before training all offsets are zero, and the outermost points lie on -1 or on the size: outside, without gradient."""
    for size in (3, 5, 6, 7, 11, 28):
        (input, offset, mask), options = random_arguments(1, size, size, 4, dtype, spread=0.0, groups=1)
        for formulation in FORMULATIONS.values():
            offset = offset.detach().requires_grad_()
            formulation(input, offset, mask, Geometry(**options), False).sum().backward()
            gradient = offset.grad.view(
                size, size, 3, 3, 2
            )  # rows and columns of pixels, columns and rows of the kernel
            assert not gradient[0, :, :, 0].any() and not gradient[-1, :, :, 2].any()
            assert not gradient[:, 0, 0].any() and not gradient[:, -1, 2].any()


# sizes, options, and the integers of which the offsets are chosen
ON_PIXELS = [
    ((5, 7), {}, (0,)),
    ((14, 13), {"offset_scale": 2.0}, (0,)),
    ((9, 28), {"offset_scale": 1.7, "groups": 1}, (0,)),
    ((28, 6), {"remove_center": True}, (0,)),
    ((1, 1), {}, (0, 1, -1)),
    ((6, 11), {"stride": (2, 1), "dilation": (1, 2), "padding": (2, 2)}, (-2, 0, 1, 3)),
    ((7, 3), {"offset_scale": 0.5, "kernel_size": (2, 3)}, (-2, 0, 1, 2)),
    ((10, 7), {"offset_scale": -1.5}, (-2, 0, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size, options, offsets", ON_PIXELS, ids=str)
def test_on_a_pixel_the_derivative_is_that_to_the_right(size, options, offsets, dtype):
    """Along one coordinate the operator is linear up to the next pixel: a difference of values is the derivative."""
    tensors, options = random_arguments(1, *size, options.get("groups", 2) * 4, torch.float64, **options)
    input, offset, mask = tensors
    offset = torch.tensor(offsets, dtype=torch.float64)[torch.randint(len(offsets), offset.shape)]
    geometry, step = Geometry(**options), 2.0**-12
    value = dcnv3_plain(input, offset, mask, geometry, False)
    weight = torch.randn_like(value)
    expected = torch.empty_like(offset).unflatten(-1, (options["groups"], -1))
    for i in range(expected.shape[-1]):
        moved = offset.clone().unflatten(-1, (options["groups"], -1))
        moved[..., i] += step if options["offset_scale"] > 0 else -step
        change = dcnv3_plain(input, moved.flatten(-2), mask, geometry, False) - value
        change = change if options["offset_scale"] > 0 else -change
        expected[..., i] = (change * weight).unflatten(-1, (options["groups"], -1)).sum(-1) / step
    # a point on the edge lies outside
    kernel_rows, kernel_columns = geometry.kernel_positions(offset.device)
    x, y = (offset.unflatten(-1, (options["groups"], -1, 2)) * options["offset_scale"]).unbind(-1)
    x = x + geometry.base_positions(1, offset.shape[2], kernel_columns, torch.float64).unsqueeze(1)
    y = y + geometry.base_positions(0, offset.shape[1], kernel_rows, torch.float64)[:, None, None]
    inside = (x > -1) & (x < size[1]) & (y > -1) & (y < size[0])
    expected *= inside.repeat_interleave(2, -1)
    for name, backend in all_backends().items():
        leaf = offset.to(dtype).requires_grad_()
        output = backend(input.to(dtype), leaf, mask.to(dtype), geometry, False)
        (actual,) = torch.autograd.grad(output, leaf, weight.to(dtype))
        error = (actual.double() - expected.flatten(-2)).norm() / expected.norm().clamp_min(1e-3)
        assert error < (1e-6 if dtype == torch.float32 else 1e-10), (name, error.item())


def gradients_of_a_fresh_model(model, pixel_values, backend):
    labels = torch.arange(len(pixel_values))
    with use_dcnv3_backend(backend):
        loss = model(pixel_values, labels=labels).loss
        return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters()), strict=True))


def compare_backends_on_a_fresh_model(config, size):
    if get_dcnv3_kernel("cpu")[0] is None:
        pytest.skip("there is no kernel to compare with")
    torch.manual_seed(0)
    model = InternImageForImageClassification(config).eval()
    pixel_values = torch.randn(2, 3, *size)
    expected = gradients_of_a_fresh_model(model, pixel_values, "kernel")
    actual = gradients_of_a_fresh_model(model, pixel_values, "torch")
    largest = max(gradient.norm() for gradient in expected.values())
    # A fresh DCNv4 multiplies all samples by a mask of zero: only the mask has a gradient.
    learning = "dcn.mask" if config.dcn_version == 4 else "dcn.offset"
    assert any(learning in name and gradient.norm() > 1e-4 * largest for name, gradient in expected.items())
    for name, gradient in expected.items():  # (the bias of the keys of an attention has the gradient zero)
        difference = (actual[name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-7 * largest, (name, (difference / gradient.norm()).item())


@pytest.mark.parametrize("size", [(64, 64), (75, 98), (112, 56)], ids=str)
@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_the_backends_have_the_gradients_of_a_fresh_model_in_common(variant, size):
    compare_backends_on_a_fresh_model(InternImageConfig(**{**TINY, **TINY_VARIANTS[variant]}), size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (201, 260)], ids=str)
def test_the_backends_have_the_gradients_of_a_fresh_internimage_t_in_common(size):
    compare_backends_on_a_fresh_model(InternImageConfig.from_variant("t"), size)


def test_memory_does_not_grow_with_the_batch():
    from torch.profiler import ProfilerActivity, profile

    def peak(batch):
        tensors, options = random_arguments(batch, 28, 28, 64, groups=4)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
            dcnv3_softmax(*tensors, **options)
        current = highest = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                current += event.nbytes()
                highest = max(highest, current)
        return highest - batch * 28 * 28 * 64 * 4  # less the result

    assert peak(16) < 1.1 * peak(8)


@pytest.mark.parametrize("which", range(3))
def test_double_backward_is_refused(which):
    """Also where the gradient of the output is a constant, and something else of the loss can be differentiated."""
    tensors, options = random_arguments(1, 4, 4, 4)
    leaf = tensors[which].requires_grad_()
    for power in (1, 2):
        output = dcnv3_cpu(*tensors, Geometry(**options), True)
        (gradient,) = torch.autograd.grad(output.pow(power).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="dcnv3 cannot be differentiated twice"):
            (gradient.square().sum() + leaf.sum()).backward()


def test_many_gradients_at_once_equal_single_ones():
    tensors, options = random_arguments(1, 4, 5, 8, torch.float64)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output = dcnv3_softmax(*tensors, **options)
    weights = torch.randn(3, *output.shape, dtype=torch.float64)
    together = torch.autograd.grad(output, tensors, weights, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate(weights):
        alone = torch.autograd.grad(output, tensors, weight, retain_graph=True)
        torch.testing.assert_close([gradient[i] for gradient in together], list(alone))


def test_transforms_of_torch_func():
    """Gradients of each image by itself, the second derivative that `backward` refuses, and forward mode."""
    tensors, options = random_arguments(3, 5, 4, 8, torch.float64)

    def loss(*args):
        return dcnv3_softmax(*args, **options).square().sum()

    each = [torch.autograd.functional.vjp(loss, tuple(t[i : i + 1] for t in tensors))[1] for i in range(3)]
    of_one = torch.func.grad(lambda *args: loss(*(t.unsqueeze(0) for t in args)), argnums=(0, 1, 2))
    with use_dcnv3_backend("auto"):
        for actual, expected in zip(torch.func.vmap(of_one)(*tensors), zip(*each, strict=True), strict=True):
            torch.testing.assert_close(actual, torch.cat(expected))

        def slope(scale):
            return torch.func.grad(lambda s: loss(s * tensors[0], *tensors[1:]))(scale)

        one = torch.ones((), dtype=torch.float64)
        # what depends on PyTorch's version: right, or refused
        with contextlib.suppress(RuntimeError):
            torch.testing.assert_close(torch.func.grad(slope)(one), 2 * loss(*tensors))
        with contextlib.suppress(NotImplementedError):
            _, tangent = torch.func.jvp(lambda t: loss(t, *tensors[1:]), (tensors[0],), (tensors[0],))
            torch.testing.assert_close(tangent, 2 * loss(*tensors))


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_per_sample_gradients_of_the_classifier(variant):
    torch.manual_seed(0)
    model = InternImageForImageClassification(InternImageConfig(**{**TINY, **TINY_VARIANTS[variant]})).double().eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pixel_values, labels = torch.randn(3, 3, 48, 40, dtype=torch.float64), torch.arange(3)

    def loss(parameters, image, label):
        inputs = {"pixel_values": image.unsqueeze(0), "labels": label.unsqueeze(0)}
        return torch.func.functional_call(model, (parameters, buffers), kwargs=inputs).loss

    with use_dcnv3_backend("auto"):
        together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, pixel_values, labels)
        for i in range(3):
            alone = torch.autograd.grad(loss(parameters, pixel_values[i], labels[i]), parameters.values())
            for (name, gradients), expected in zip(together.items(), alone, strict=True):
                torch.testing.assert_close(
                    gradients[i], expected, atol=1e-10, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("backend", ["auto", "torch", "kernel"])
def test_dtypes_that_the_kernel_lacks_take_the_definition(backend):
    tensors, options = random_arguments(1, 5, 4, 8)
    narrow = tensors[0].to(torch.float8_e4m3fn)
    expected = dcnv3_plain(narrow.float(), *tensors[1:], Geometry(**options), False)
    if backend == "kernel":
        with pytest.raises(RuntimeError, match=r"float8_e4m3fn|there is no DCNv3 kernel"):
            dcnv3(narrow, *tensors[1:], **options, backend=backend)
    else:
        actual = dcnv3(narrow, *tensors[1:], **options, backend=backend)
        assert actual.dtype == torch.float8_e4m3fn
        torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.01)


# ---------------------------------------------------------------------------------------------------- compilers


def test_meta_and_fake_tensors_have_the_shapes_of_real_ones():
    from torch._subclasses import FakeTensorMode

    tensors, options = random_arguments(2, 6, 5, 8, stride=(2, 1))
    expected = dcnv3(*tensors, **options)
    output = dcnv3(*(tensor.to("meta") for tensor in tensors), **options)
    assert output.is_meta and output.shape == expected.shape and output.dtype == expected.dtype
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert dcnv3(*(mode.from_tensor(tensor) for tensor in tensors), **options).shape == expected.shape


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_operator_equals_eager(dynamic):
    torch._dynamo.reset()
    tensors, options = random_arguments(2, 8, 6, 16)

    def function(*args):
        return dcnv3_softmax(*args, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), function(*tensors), atol=1e-5, rtol=1e-5)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    actual = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_transforms_of_torch_func(backend):
    torch._dynamo.reset()
    tensors, options = random_arguments(3, 4, 5, 8, torch.float64)

    def gradients(*args):
        def loss(*one):
            return dcnv3_softmax(*(t.unsqueeze(0) for t in one), **options).square().sum()

        return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*args)

    with use_dcnv3_backend(backend):
        compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors), gradients(*tensors))


def test_gathering_is_compiled_for_sizes_that_are_symbolic():
    """Its gradients too: on pixels, they are those of `dcnv3_cpu`."""
    torch._dynamo.reset()
    _, options = random_arguments(1, 4, 4, 8)
    function = partial(FORMULATIONS["gathering"], geometry=Geometry(**options), softmax=True)
    compiled = torch.compile(function, backend="eager", dynamic=True, fullgraph=True)
    for size in ((6, 7), (9, 5)):
        tensors, _ = random_arguments(2, *size, 8, spread=0.0)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        with torch.compiler.set_stance("default" if size == (6, 7) else "fail_on_recompile"):
            actual = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
        expected = torch.autograd.grad(dcnv3_softmax(*tensors, **options).square().sum(), tensors)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_compiled_training_step_keeps_the_heap_whole():
    """A loop of `grid_sample`s, compiled for the CPU, corrupts the heap at this shape: a crash, hence a process."""
    program = """
        import torch
        from internimage_hf.dcnv3 import dcnv3_softmax
        torch.manual_seed(0)
        tensors = [torch.randn(1, 14, 14, size, requires_grad=True) for size in (256, 16 * 18, 16 * 9)]
        function = torch.compile(lambda *args: dcnv3_softmax(*args, groups=16), fullgraph=True)
        for _ in range(3):
            actual = torch.autograd.grad(function(*tensors).square().sum(), tensors)
        expected = torch.autograd.grad(dcnv3_softmax(*tensors, groups=16).square().sum(), tensors)
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
        print("equal")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0 and result.stdout == "equal\n", result.stderr


def test_export_with_symbolic_sizes():
    class Op(torch.nn.Module):
        def forward(self, input, offset, mask):
            return dcnv3_softmax(input, offset, mask, groups=2)

    tensors, options = random_arguments(2, 6, 7, 8)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(Op(), tuple(tensors), dynamic_shapes=[{0: auto, 1: auto, 2: auto}] * 3, strict=False)
    tensors, options = random_arguments(3, 9, 5, 8)
    torch.testing.assert_close(program.module()(*tensors), dcnv3_softmax(*tensors, **options), atol=1e-5, rtol=1e-5)
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert all(str(operator).startswith(("aten.", "<built-in", "_operator")) for operator in operators), operators


# ----------------------------------------------------------------------------------------------------- bad input


GOOD = {"input": (1, 5, 5, 8), "offset": (1, 5, 5, 36), "mask": (1, 5, 5, 18)}


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        ({"input": (5, 5, 8)}, {}, ValueError, "input.*shape"),
        ({"offset": (1, 5, 5, 35)}, {}, ValueError, "offset.*shape"),
        ({"offset": (1, 5, 4, 36)}, {}, ValueError, "offset.*shape"),
        ({"offset": (2, 5, 5, 36)}, {}, ValueError, "offset.*shape"),
        ({"mask": (1, 5, 5, 16)}, {}, ValueError, "mask.*shape"),
        ({"input": (1, 5, 5, 7)}, {}, ValueError, "groups.*channels"),
        ({"input": (1, 0, 5, 8)}, {}, ValueError, "input.*shape"),
        ({"input": (1, 1, 1, 8)}, {"padding": 0}, ValueError, "too small"),
        ({}, {"groups": 0}, ValueError, "groups"),
        ({}, {"groups": 2.0}, ValueError, "groups"),
        ({}, {"groups": True}, ValueError, "groups"),
        ({}, {"kernel_size": 0}, ValueError, "kernel_size"),
        ({}, {"kernel_size": (3, 3, 3)}, ValueError, "kernel_size"),
        ({}, {"stride": 0}, ValueError, "stride"),
        ({}, {"padding": -1}, ValueError, "padding"),
        ({}, {"dilation": 1.5}, ValueError, "dilation"),
        ({}, {"offset_scale": float("inf")}, ValueError, "offset_scale"),
        ({}, {"offset_scale": "1"}, ValueError, "offset_scale"),
        ({}, {"offset_scale": 10**400}, ValueError, "offset_scale"),
        ({}, {"kernel_size": 2**32, "padding": 2**31}, ValueError, "offset.*shape"),
        ({}, {"remove_center": 2}, ValueError, "remove_center"),
        ({}, {"remove_center": True, "kernel_size": 2}, ValueError, "remove_center"),
        ({}, {"remove_center": True, "kernel_size": (3, 5)}, ValueError, "remove_center"),
        ({}, {"remove_center": True, "kernel_size": 1}, ValueError, "remove_center"),
        ({}, {"backend": "cuda"}, ValueError, "backend"),
        ({"input": torch.int64}, {}, ValueError, "input.*dtype"),
        ({"mask": torch.bool}, {}, ValueError, "mask.*dtype"),
        ({"offset": "meta"}, {}, ValueError, "offset.*device"),
        ({"mask": None}, {}, TypeError, "mask.*tensor"),
    ],
)
def test_bad_input_is_named_in_the_error(shapes, options, error, message):
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    for name, change in shapes.items():
        if isinstance(change, tuple):
            tensors[name] = torch.zeros(change)
        else:
            tensors[name] = None if change is None else tensors[name].to(change)
    with pytest.raises(error, match=f"(?s){message}"):
        dcnv3(**tensors, **{"groups": 2, **options})


# ------------------------------------------------------------------------------------------------- choice of backend


def test_choice_of_backend(monkeypatch):
    assert dcnv3_backend_report()["cpu"] == {"backend": "torch", "reason": "chosen by `use_dcnv3_backend`"}
    with pytest.raises(RuntimeError, match="left"), use_dcnv3_backend("auto"):
        raise RuntimeError("left")
    assert dcnv3_backend_report()["cpu"]["reason"] == "chosen by `use_dcnv3_backend`"
    with pytest.raises(ValueError, match="'tensorflow'"), use_dcnv3_backend("tensorflow"):
        pass

    found = {}

    def in_another_thread():  # where the context of this test does not reach
        monkeypatch.setenv("DCNV3_BACKEND", "torch")
        found.update(dcnv3_backend_report()["cpu"])
        monkeypatch.setenv("DCNV3_BACKEND", "nonsense")
        try:
            dcnv3_backend_report()
        except ValueError as error:
            found["error"] = str(error)
        monkeypatch.delenv("DCNV3_BACKEND")

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    assert "DCNV3_BACKEND" in found["reason"] and "nonsense" in found["error"]
