"""The kernel by itself: against the definition in float64, on every backend that was built and has a device.

Run by kernel-builder's continuous integration (`-m kernels_ci`), by `make test`, and by hand with `pytest dcnv3_kernel/tests`.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.autograd import forward_ad


pytestmark = pytest.mark.kernels_ci

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT.parent / "tests" / "fixtures"


@pytest.fixture(autouse=True)
def _slow_ones_are_for_us(request):
    if request.config.option.markexpr == "kernels_ci" and request.node.get_closest_marker("slow"):
        pytest.skip("too slow for kernel-builder's continuous integration")


def load_variant(folder: Path):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def built(pattern: str) -> Path | None:
    """The variant to test: of LOCAL_KERNELS, which kernel-builder's shells and continuous integration set, or built here."""
    roots = [ROOT / "build"]
    for entry in filter(None, os.environ.get("LOCAL_KERNELS", "").split(":")):
        name, _, path = entry.partition("=")
        if name.strip().endswith("/dcnv3"):
            roots = [Path(path), Path(path) / "build", Path(path).parent]  # the last one of a variant itself
    found = (folder for root in roots for folder in sorted(root.glob(pattern), reverse=True))
    return next((folder for folder in found if (folder / "metadata.json").is_file()), None)


# The patterns of the folders, and the device of the tensors. Where there is no GPU, two stand in for one: the CUDA kernels
# run by a CPU (tests/emulation), and Triton's interpreter, which wants TRITON_INTERPRET=1 before anything imports Triton.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = {
    "cpu": ("torch-stable-abi*-cpu-*", "cpu"),
    "emulation": ("torch-stable-abi*-emulation-*", "cpu"),
    "cuda": ("torch-stable-abi*-cu1*", "cuda"),
    "triton": ("torch-cuda", "cpu" if INTERPRETED else "cuda"),
}


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request):
    """A kernel module and its device."""
    pattern, device = BACKENDS[request.param]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "triton":
        pytest.importorskip("triton")
    folder = built(pattern)
    if folder is None:
        pytest.skip(f"no {request.param} variant was built: run dcnv3_kernel/build.py --backend {request.param}")
    return load_variant(folder), device


# --------------------------------------------------------------------------------------------------- the definition


def definition(
    input, offset, mask, *, kernel_size=3, stride=1, padding=1, dilation=1, groups, offset_scale=1.0, remove_center=False,
    softmax=False,
):  # fmt: skip
    """DCNv3 by its formula, one corner of one point at a time; differentiable in all three tensors."""
    pair = lambda v: (v, v) if isinstance(v, int) else tuple(v)  # noqa: E731
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = map(pair, (kernel_size, stride, padding, dilation))
    batch, height, width, channels = input.shape
    out_h, out_w = offset.shape[1:3]
    points = [(ix, iy) for ix in range(kw) for iy in range(kh)]
    if remove_center:
        points.remove((kw // 2, kh // 2))
    offset = offset.reshape(batch, out_h, out_w, groups, len(points), 2)
    mask = mask.reshape(batch, out_h, out_w, groups, len(points))
    mask = mask.softmax(-1) if softmax else mask
    value = input.reshape(batch, height, width, groups, -1)
    image = torch.arange(batch).view(-1, 1, 1, 1)
    group = torch.arange(groups).view(1, 1, 1, -1)
    output = 0
    for i, (ix, iy) in enumerate(points):
        half_x, half_y = dw * (kw - 1) // 2, dh * (kh - 1) // 2
        x = torch.arange(out_w, dtype=offset.dtype).view(1, 1, -1, 1) * sw - pw + half_x
        y = torch.arange(out_h, dtype=offset.dtype).view(1, -1, 1, 1) * sh - ph + half_y
        x = x + (ix * dw - half_x + offset[..., i, 0]) * offset_scale
        y = y + (iy * dh - half_y + offset[..., i, 1]) * offset_scale
        inside = (x > -1) & (x < width) & (y > -1) & (y < height)
        x, y = torch.where(inside, x, 0.0), torch.where(inside, y, 0.0)
        x0, y0 = x.detach().floor(), y.detach().floor()
        for cx, cy in itertools.product((0, 1), (0, 1)):
            column, row = (x0 + cx).long(), (y0 + cy).long()
            valid = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            # what does not count is replaced before it is multiplied, so that it has no part in the derivatives either
            modulation = torch.where(valid, mask[..., i], 0.0)
            corner = value[image, row.clamp(0, height - 1), column.clamp(0, width - 1), group]
            corner = torch.where(valid.unsqueeze(-1), corner, 0.0)
            weight = (x - x0 if cx else 1 - (x - x0)) * (y - y0 if cy else 1 - (y - y0)) * modulation
            output = output + corner * weight.unsqueeze(-1)
    return output.reshape(batch, out_h, out_w, channels)


def output_size(size, kernel, stride, padding, dilation):
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def random_case(rng, pick=None, dtype=torch.float64):
    """Random hyper-parameters, and inputs whose sampling points keep away from integers, where gradients jump.

    `pick` chooses one of its arguments; None if what it chose does not go together.
    """
    pick = pick or (lambda *values: values[torch.randint(len(values), (), generator=rng).item()])
    kernel = (pick(1, 2, 3, 3, 5), pick(1, 2, 3, 3, 5))
    remove_center = pick(False, True) and kernel[0] == kernel[1] and kernel[0] % 2 == 1 and kernel[0] > 1
    options = {
        "kernel_size": kernel,
        "stride": (pick(1, 1, 2, 3), pick(1, 1, 2)),
        "padding": (pick(0, 1, 2), pick(0, 1, 2)),
        "dilation": (pick(1, 1, 2), pick(1, 1, 2)),
        "groups": pick(1, 2, 3, 4, 7),
        "offset_scale": pick(1.0, 2.0, 0.5, -1.5),
        "remove_center": remove_center,
    }
    group_channels = pick(1, 2, 3, 4, 5, 8, 12, 16, 17, 20, 32, 33, 48)
    batch, height, width = pick(1, 2, 3), pick(1, 4, 7, 12), pick(1, 5, 9, 16)
    out = [
        output_size(
            size, options["kernel_size"][a], options["stride"][a], options["padding"][a], options["dilation"][a]
        )
        for a, size in enumerate((height, width))
    ]
    if min(out) < 1:
        return None
    points = options["groups"] * (kernel[0] * kernel[1] - remove_center)
    spread = pick(0.3, 2.0, 30.0)
    offset = torch.randn(batch, *out, points * 2, generator=rng, dtype=torch.float64) * spread
    # offset_scale 0.5 or 1.5 and half positions included, all coordinates are multiples of 1/4 plus scale * offset
    step = 0.25 / abs(options["offset_scale"])
    offset = (offset / step).floor() * step + step * (
        0.3 + 0.4 * torch.rand(offset.shape, generator=rng, dtype=torch.float64)
    )
    return (
        torch.randn(batch, height, width, options["groups"] * group_channels, generator=rng, dtype=torch.float64).to(
            dtype
        ),
        offset.to(dtype),
        torch.randn(batch, *out, points, generator=rng, dtype=torch.float64).to(dtype),
    ), options


def run_and_differentiate(function, tensors, options, grad_output=None):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*tensors, **options)
    if grad_output is None:
        generator = torch.Generator().manual_seed(5)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(output, tensors, grad_output.to(output), allow_unused=True)
    return [output.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True))]


def relative_error(actual, expected):
    return ((actual.cpu().double() - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


NAMES = ("output", "grad_input", "grad_offset", "grad_mask")

# ------------------------------------------------------------------------------------------------------ correctness


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_the_official_operator(backend, dtype):
    kernel, device = backend
    if not (PARITY / "ops.safetensors").is_file():
        pytest.skip("no golden outputs of the official operator here")
    tensors = load_file(PARITY / "ops.safetensors")
    cases = json.loads((PARITY / "ops.json").read_text())["cases"]
    assert len(cases) == 10
    for case in cases:
        name, options = case["name"], official_options(case)
        case_tensors = {key: tensors[f"{name}.{key}"] for key in ("input", "offset", "mask", *NAMES, "grad_output")}
        arguments = [case_tensors[key].to(device, dtype) for key in ("input", "offset", "mask")]
        for what, actual in zip(
            NAMES, run_and_differentiate(kernel.dcnv3, arguments, options, case_tensors["grad_output"]), strict=True
        ):
            tolerance = 1e-10 if dtype == torch.float64 else 1e-5
            assert relative_error(actual, case_tensors[what]) < tolerance, (name, what)


def official_options(case):
    """The hyper-parameters of a case, which has the official names."""
    names = {"kernel_size": "kernel", "stride": "stride", "padding": "pad", "dilation": "dilation"}
    sizes = {ours: (case[f"{theirs}_h"], case[f"{theirs}_w"]) for ours, theirs in names.items()}
    others = {"groups": case["group"], "offset_scale": case["offset_scale"], "remove_center": case["remove_center"]}
    return {**sizes, **others}


@st.composite
def random_cases(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    case = random_case(torch.Generator().manual_seed(seed), lambda *values: draw(st.sampled_from(values)))
    assume(case is not None)
    return case


def compare_random_cases(backend, count):
    kernel, device = backend

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=random_cases())
    def compare(case):
        tensors, options = case
        for softmax in (False, True):
            expected = run_and_differentiate(definition, tensors, {**options, "softmax": softmax})
            function = kernel.dcnv3_softmax if softmax else kernel.dcnv3
            for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-5)):
                actual = run_and_differentiate(function, [t.to(device, dtype) for t in tensors], options)
                for what, a, e in zip(NAMES, actual, expected, strict=True):
                    assert a.dtype == dtype and relative_error(a, e) < tolerance, (what, dtype, softmax, options)

    compare()


def test_random_shapes_equal_the_definition(backend):
    """Two hundred; less where a CPU stands in for a GPU, the others in the slow test below."""
    kernel, device = backend
    stands_in = device == "cpu" and "-cpu-" not in kernel.__file__
    compare_random_cases(backend, 40 if stands_in else 200)


@pytest.mark.slow
def test_two_hundred_random_shapes_equal_the_definition(backend):
    compare_random_cases(backend, 200)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("group_channels", [3, 8, 16, 32, 40])
def test_16_bit_tensors_compute_in_float32(backend, dtype, tolerance, group_channels):
    kernel, device = backend
    torch.manual_seed(0)
    # offsets are quarters and a bit, which both dtypes hold exactly
    tensors = [
        torch.randn(2, 9, 7, 2 * group_channels).to(dtype),
        (torch.randint(-8, 8, (2, 9, 7, 36)) * 0.25 + 0.125).to(dtype),
        torch.randn(2, 9, 7, 18).to(dtype),
    ]
    expected = run_and_differentiate(definition, [t.double() for t in tensors], {"groups": 2, "softmax": True})
    actual = run_and_differentiate(kernel.dcnv3_softmax, [t.to(device) for t in tensors], {"groups": 2})
    for what, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.dtype == dtype and relative_error(a, e) < tolerance, what


def test_every_16_bit_number_survives(backend):
    """A 1x1 kernel without offset copies: conversions there and back are exact, subnormals included."""
    kernel, device = backend
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = torch.where(numbers.isfinite(), numbers, 0)  # 0 * inf, of a corner of weight 0, is not 0
        if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
            # Triton's interpreter makes other numbers of bfloat16's subnormals (3.7, `x.to(tl.float32)`)
            numbers = torch.where(numbers.abs() >= torch.finfo(dtype).tiny, numbers, 0)
        for channels in (1, 16, 64):
            image = numbers.view(1, -1, 1, channels).to(device)
            zeros = torch.zeros(1, image.shape[1], 1, 2, device=device, dtype=dtype)
            ones = torch.ones(1, image.shape[1], 1, 1, device=device, dtype=dtype)
            copy = kernel.dcnv3(image, zeros, ones, kernel_size=1, padding=0, groups=1)
            torch.testing.assert_close(copy, image, rtol=0, atol=0)


def test_mixed_dtypes_are_kept_by_outputs_and_gradients(backend):
    kernel, device = backend
    torch.manual_seed(0)
    tensors = [torch.randn(1, 5, 6, 16), torch.randn(1, 5, 6, 18), torch.randn(1, 5, 6, 9)]
    expected = kernel.dcnv3(*(t.to(device) for t in tensors), groups=1)
    mixed = [tensors[0].to(device, torch.float16), tensors[1].to(device), tensors[2].to(device, torch.bfloat16)]
    outputs = run_and_differentiate(kernel.dcnv3, mixed, {"groups": 1})
    assert [t.dtype for t in outputs] == [torch.float16, torch.float16, torch.float32, torch.bfloat16]
    torch.testing.assert_close(outputs[0].float(), expected, atol=3e-2, rtol=3e-2)


def test_softmax_of_extreme_logits(backend):
    kernel, device = backend
    torch.manual_seed(0)
    image = torch.randn(1, 4, 5, 32, dtype=torch.float64)
    offset = torch.rand(1, 4, 5, 36, dtype=torch.float64) * 0.8 + 0.1
    for scale in (1e-3, 1.0, 30.0, 1e3, 1e6):
        logits = torch.randn(1, 4, 5, 18, dtype=torch.float64) * scale
        logits[..., :9] += 5 * scale  # groups far from each other
        expected = run_and_differentiate(definition, (image, offset, logits), {"groups": 2, "softmax": True})
        actual = run_and_differentiate(
            kernel.dcnv3_softmax, [t.to(device) for t in (image, offset, logits)], {"groups": 2}
        )
        for what, a, e in zip(NAMES, actual, expected, strict=True):
            assert relative_error(a, e) < 1e-11, (what, scale)
    logits[..., 0] = -torch.inf
    logits[..., 9] = torch.nan
    output = kernel.dcnv3_softmax(image.to(device), offset.to(device), logits.to(device), groups=2)
    assert output[..., :16].isfinite().all() and output[..., 16:].isnan().all()


def test_offsets_that_are_not_numbers_or_far_away(backend):
    kernel, device = backend
    torch.manual_seed(0)
    image = torch.randn(1, 6, 6, 16, dtype=torch.float64)
    offset = torch.rand(1, 6, 6, 18, dtype=torch.float64) * 0.8 + 0.1
    for value in (torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 3e9, -3e9, 2.0**31, -(2.0**31)):
        wild = offset.clone()
        wild[..., ::4] = value
        mask = torch.rand(1, 6, 6, 9, dtype=torch.float64)
        expected = definition(image, wild, mask, groups=1)
        for dtype in (torch.float64, torch.float32):
            tensors = [t.to(device, dtype) for t in (image, wild, mask)]
            outputs = run_and_differentiate(kernel.dcnv3, tensors, {"groups": 1})
            assert relative_error(outputs[0], expected) < 1e-5
            assert all(t.isfinite().all() for t in outputs)


@pytest.mark.parametrize("width", [2**20, 2**20 + 1])
@pytest.mark.parametrize("dtype, group_channels", [(torch.float32, 16), (torch.bfloat16, 32)])
def test_offsets_across_a_wide_image(backend, dtype, group_channels, width):
    """CUDA has another kernel above 2^20 pixels."""
    kernel, device = backend
    columns = torch.arange(width, device=device)
    image = (columns % 256).to(dtype).view(1, 1, width, 1).repeat(1, 1, 1, group_channels)
    stride = 2**16
    wanted = torch.tensor([0, 1, 77777, width - 2, width - 1, width // 2, 5, 2**19 + 3] * 2, dtype=torch.float64)
    starts = torch.arange(16) * stride
    mask = torch.zeros(1, 1, (width - 1) // stride + 1, 9)
    offset = torch.zeros(1, 1, mask.shape[2], 9, 2)
    mask[..., 4] = 1.0
    offset[0, 0, :16, :, 0] = (wanted - starts)[:, None] + 0.5  # bfloat16 rounds it
    offset = offset.to(dtype)
    at = offset[0, 0, :16, 4, 0].double() + starts
    low = at.floor().long()
    sample = [torch.where((c >= 0) & (c < width), c % 256, 0) for c in (low, low + 1)]
    expected = sample[0] + (at - low) * (sample[1] - sample[0])
    expected = torch.where((at > -1) & (at < width), expected, 0.0)
    tensors = [image, offset.flatten(3).to(device), mask.to(device, dtype)]
    output = kernel.dcnv3(*tensors, groups=1, stride=(1, stride))
    assert torch.equal(output[0, 0, :16, 0].cpu().double(), expected.to(dtype).double())
    assert torch.equal(output, output[..., :1].expand_as(output))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("group_channels", [5, 16])
def test_infinite_pixels_stay_out_of_samples_outside(backend, group_channels, dtype):
    kernel, device = backend
    image = torch.ones(1, 3, 3, group_channels, dtype=torch.float64)
    image[0, 0, 0] = torch.inf
    offset = torch.zeros(1, 3, 3, 18, dtype=torch.float64) + 0.25
    mask = torch.ones(1, 3, 3, 9, dtype=torch.float64)
    tensors = [t.to(device, dtype) for t in (image, offset, mask)]
    output, _, _, grad_mask = run_and_differentiate(kernel.dcnv3, tensors, {"groups": 1}, torch.ones_like(image))
    assert torch.equal(output.cpu().isfinite(), definition(image, offset, mask, groups=1).isfinite())
    for point in range(9):  # what the point alone samples
        alone = torch.full_like(offset, 100.0)  # all others lie outside
        alone[..., 2 * point : 2 * point + 2] = 0.25
        sampled = definition(image, alone, mask, groups=1).sum(-1)
        assert torch.equal(grad_mask[..., point].cpu().isfinite(), sampled.isfinite()), point


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("group_channels", [5, 16])
@pytest.mark.parametrize("fraction", [0.25, 0.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_modulations_that_are_not_finite_count_inside_alone(
    backend, value, group_channels, fraction, dtype, tolerance
):
    kernel, device = backend
    torch.manual_seed(0)
    image = torch.randn(1, 6, 6, group_channels, dtype=torch.float64)
    offset = torch.zeros(1, 6, 6, 18, dtype=torch.float64) + fraction
    offset[..., 6:8] = 100.0  # point 3 lies outside everywhere, others at the border
    mask = torch.rand(1, 6, 6, 9, dtype=torch.float64)
    mask[..., 3] = value
    mask[0, 0, 0, 0] = mask[0, 3, 3, 8] = value  # one outside, one inside
    expected = run_and_differentiate(definition, (image, offset, mask), {"groups": 1})
    actual = run_and_differentiate(kernel.dcnv3, [t.to(device, dtype) for t in (image, offset, mask)], {"groups": 1})
    for what, a, e in zip(NAMES, actual, expected, strict=True):
        if what != "grad_offset" or fraction:  # at a pixel the derivative by the position jumps
            finite = e.isfinite()
            assert torch.equal(a.cpu().isfinite(), finite), what  # inf or NaN: that depends on the order of a sum
            assert relative_error(a.cpu()[finite], e[finite]) < tolerance, what
    assert actual[2].view(36, 9, 2)[1:21].isfinite().all()


@pytest.mark.parametrize(
    "group_channels, scale, offsets",
    [(16, 1.0, (-2, -1, 0, 1)), (16, 2.0, (0,)), (5, 0.5, (-2, 0, 2)), (16, 1.7, (0,)), (5, 0.3, (0,))],
)
def test_on_a_pixel_the_derivative_is_that_to_the_right(backend, group_channels, scale, offsets):
    """The definition's cell is that to the right and below, as it takes the position's floor."""
    kernel, device = backend
    torch.manual_seed(0)
    tensors = [torch.randn(1, 7, 30, c, dtype=torch.float64) for c in (2 * group_channels, 36, 18)]
    tensors[1] = torch.tensor(offsets, dtype=torch.float64)[torch.randint(len(offsets), tensors[1].shape)]
    options = {"groups": 2, "offset_scale": scale}
    expected = run_and_differentiate(definition, tensors, {**options, "softmax": True})
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-5)):
        actual = run_and_differentiate(kernel.dcnv3_softmax, [t.to(device, dtype) for t in tensors], options)
        for what, a, e in zip(NAMES, actual, expected, strict=True):
            assert relative_error(a, e) < tolerance, (what, dtype)


@pytest.mark.parametrize("group_channels", [5, 16])
def test_a_softmax_that_is_not_finite_counts_inside_alone(backend, group_channels):
    kernel, device = backend
    torch.manual_seed(0)
    tensors = [torch.randn(1, 6, 6, c, dtype=torch.float64) for c in (2 * group_channels, 36, 18)]
    _, offset, logits = tensors
    offset.zero_().add_(0.25)
    offset[0, :3, :, :18] = 100.0  # the first group lies outside
    logits[..., 0] = torch.nan
    output, grad_input, grad_offset, grad_mask = run_and_differentiate(
        kernel.dcnv3_softmax, [t.to(device) for t in tensors], {"groups": 2}
    )
    first = slice(group_channels)
    assert not output[0, :3, :, first].any() and output[0, 3:, :4, first].isnan().all()
    assert not grad_offset[0, :3, :, :18].any()
    assert not grad_input[0, 0, :, first].any() and grad_input[0, 3:5, :, first].isnan().all()
    assert grad_mask[..., :9].isnan().all() and grad_mask[..., 9:].isfinite().all()
    assert output[..., group_channels:].isfinite().all() and grad_input[..., group_channels:].isfinite().all()


@pytest.mark.parametrize(
    "dtype, group_channels",
    [(torch.float32, 16), (torch.float32, 32), (torch.bfloat16, 16), (torch.bfloat16, 32), (torch.float16, 16)],
)
def test_gradients_that_are_not_finite_stay_where_they_belong(backend, dtype, group_channels):
    kernel, device = backend
    torch.manual_seed(0)
    first = slice(group_channels)
    image = torch.randn(1, 8, 8, 2 * group_channels)
    image[0, 7, 7, first] = torch.inf
    tensors = [image, torch.rand(1, 8, 8, 36) * 0.5 + 0.2, torch.rand(1, 8, 8, 18)]
    grad_output = torch.ones(1, 8, 8, 2 * group_channels)
    grad_output[0, 0, 0, first] = torch.inf
    tensors = [t.to(device, dtype) for t in tensors]
    gradients = run_and_differentiate(kernel.dcnv3, tensors, {"groups": 2}, grad_output)[1:]
    assert not gradients[0][0, :2, :2, first].isfinite().any() and gradients[0][0, 3:, :, first].isfinite().all()
    for gradient in gradients:  # the other group, and the pixels that take no part
        of_group = gradient.unflatten(-1, (2, -1))
        assert of_group[..., 1, :].isfinite().all() and of_group[0, 3:5, :, 0].isfinite().all()
    assert gradients[2][0, 6, 6, 0].isfinite() and not gradients[2][0, 6, 6, 8].isfinite()  # points above and below


def test_outputs_are_written_whole(backend):
    """New memory is full of sentinels; nothing of them may be left."""
    kernel, device = backend
    torch.manual_seed(0)
    tensors = [torch.randn(2, 7, 5, 3 * 17), torch.randn(2, 7, 5, 3 * 18), torch.randn(2, 7, 5, 3 * 9)]
    tensors = [t.to(device) for t in tensors]
    for _ in range(3):
        rubbish = [torch.full_like(t, torch.nan) for t in tensors for _ in range(4)]
        del rubbish
        assert all(t.isfinite().all() for t in run_and_differentiate(kernel.dcnv3_softmax, tensors, {"groups": 3}))


@pytest.mark.parametrize("shape", [(0, 4, 4, 16), (1, 1, 1, 16), (2, 1, 9, 16), (0, 1, 1, 3)])
def test_empty_and_tiny_maps_keep_their_shapes(backend, shape):
    kernel, device = backend
    tensors = [torch.randn(*shape), torch.randn(*shape[:3], 18), torch.randn(*shape[:3], 9)]
    outputs = run_and_differentiate(kernel.dcnv3, [t.to(device) for t in tensors], {"groups": 1})
    assert [t.shape for t in outputs] == [tensors[0].shape, *(t.shape for t in tensors)]
    if shape[0]:
        expected = run_and_differentiate(definition, [t.double() for t in tensors], {"groups": 1})
        assert all(relative_error(a, e) < 1e-5 for a, e in zip(outputs, expected, strict=True))


def test_views_give_what_copies_give(backend):
    kernel, device = backend
    torch.manual_seed(0)
    tensors = [torch.randn(2, 6, 8, 32), torch.randn(2, 6, 8, 36), torch.randn(2, 6, 8, 18)]
    tensors = [t.to(device) for t in tensors]
    expected = run_and_differentiate(kernel.dcnv3, tensors, {"groups": 2})
    views = [
        tensors[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.cat((tensors[1], tensors[1]), -1)[..., :36],
        torch.stack((tensors[2], tensors[2]), 1)[:, 1],
    ]
    leaves = [view.detach().requires_grad_() for view in views]
    output = kernel.dcnv3(*leaves, groups=2)
    torch.testing.assert_close(output, expected[0], rtol=0, atol=0)
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grad_output = grad_output.to(output).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for actual, wanted in zip(torch.autograd.grad(output, leaves, grad_output), expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, group_channels, groups, softmax, options",
    [
        (torch.float32, 16, 4, True, {}),
        (torch.float32, 32, 1, False, {"remove_center": True}),
        (torch.bfloat16, 16, 5, True, {"offset_scale": 0.5}),
        (torch.float16, 32, 2, False, {"kernel_size": (2, 3), "stride": 2}),
        (torch.float64, 5, 3, True, {"kernel_size": (5, 5), "padding": 2}),
    ],
)
@pytest.mark.parametrize("gap", [0, 1, 6])  # unaligned pairs of offsets, too
def test_columns_of_one_matrix_are_read_in_place(backend, dtype, group_channels, groups, softmax, options, gap):
    kernel, device = backend
    torch.manual_seed(0)
    function = kernel.dcnv3_softmax if softmax else kernel.dcnv3
    image = torch.randn(2, 9, 14, groups * group_channels).to(device, dtype)
    options = {"kernel_size": (3, 3), "stride": 1, "padding": 1, "remove_center": False, "groups": groups, **options}
    kernel_size, stride, padding = options["kernel_size"], options["stride"], options["padding"]
    points = groups * (kernel_size[0] * kernel_size[1] - options["remove_center"])
    size = [output_size(s, k, stride, padding, 1) for s, k in zip((9, 14), kernel_size, strict=True)]
    matrix = torch.randn(2, *size, gap + 3 * points + gap).to(device, dtype)
    matrix[..., :gap] = matrix[..., gap + 3 * points :] = torch.nan
    views = [image, *(part for part in matrix.split([gap, 2 * points, points, gap], -1)[1:3])]
    whole = [tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in views]
    views = [tensor.detach().requires_grad_() for tensor in views]
    assert not (views[1].is_contiguous() or views[2].is_contiguous())
    tolerance = 0.02 if dtype.itemsize == 2 else 1e-5  # unaligned pairs are served by another kernel
    grad_output = torch.randn(2, *size, image.shape[3]).to(device, dtype)
    for deterministic in (False, True):
        with deterministic_algorithms() if deterministic else contextlib.nullcontext():
            output, expected = function(*views, **options), function(*whole, **options)
            assert relative_error(output, expected.double().cpu()) < tolerance
            grads = torch.autograd.grad(output, views, grad_output)
            for actual, wanted in zip(grads, torch.autograd.grad(expected, whole, grad_output), strict=True):
                assert actual.is_contiguous() and actual.isfinite().all()
                assert relative_error(actual, wanted.double().cpu()) < tolerance


@pytest.mark.parametrize("pitch", [2**30 + 1, 2**30 + 2])  # unaligned pairs of offsets, too
def test_rows_of_2_30_elements_are_addressed(backend, pitch):
    kernel, device = backend
    if device != "cpu":
        pytest.skip("tensors that take memory only where they are written")
    torch.manual_seed(0)
    image, offset, mask = (torch.randn(1, 1, 3, channels, dtype=torch.bfloat16) for channels in (32, 36, 18))
    far_apart = torch.empty(2 * pitch + 36, dtype=torch.bfloat16).as_strided(
        offset.shape, (3 * pitch, 3 * pitch, pitch, 1)
    )
    far_apart.copy_(offset)
    options = (3, 3, 1, 1, 1, 1, 1, 1, 2, 1.0, False, True)
    expected, actual = (
        [
            kernel.ops.dcnv3_forward(image, tensor, mask, *options),
            *kernel.ops.dcnv3_backward(image, image, tensor, mask, *options, False),
        ]
        for tensor in (offset, far_apart)
    )
    for what, a, e in zip(NAMES, actual, expected, strict=True):
        assert relative_error(a, e.double()) < 0.02, what


def test_more_points_than_an_int_counts_are_refused(backend):
    kernel, device = backend
    if device != "cpu" or "-cpu-" in kernel.__file__:
        pytest.skip("tensors that take no memory as nothing reads them, by the GPU kernels")
    groups, kernel_size, padding = 2**21, (15, 35), (7, 17)
    points = groups * 15 * 35
    tensors = [torch.empty(1, 1, 1, channels, dtype=torch.bfloat16) for channels in (groups, 2 * points, points)]
    with pytest.raises(RuntimeError, match=r"an output pixel has 2\^30 points or more"):
        kernel.dcnv3(*tensors, kernel_size=kernel_size, padding=padding, groups=groups)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter copies all tensors")
def test_columns_of_one_matrix_are_not_copied(backend):
    kernel, device = backend
    image = torch.randn(2, 8, 8, 32, device=device)
    offset, mask, _ = torch.randn(2, 8, 8, 56, device=device).split([36, 18, 2], -1)
    copied = {"aten::clone", "aten::copy_"}
    options = (3, 3, 1, 1, 1, 1, 1, 1, 2, 1.0, False, True)
    calls = [
        lambda offset: kernel.ops.dcnv3_forward(image, offset, mask, *options),
        lambda offset: kernel.ops.dcnv3_backward(image, image, offset, mask, *options, False),
    ]
    for call in calls:
        for tensor, expected in ((offset, False), (offset.transpose(1, 2), True)):
            with torch.profiler.profile() as profile:
                call(tensor)
            assert bool(copied & {event.key for event in profile.key_averages()}) == expected


def test_gradcheck_and_opcheck(backend):
    kernel, device = backend
    torch.manual_seed(0)
    image = torch.randn(1, 4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    offset = (torch.rand(1, 4, 5, 36, dtype=torch.float64, device=device) * 0.8 + 0.1).requires_grad_()
    mask = torch.randn(1, 4, 5, 18, dtype=torch.float64, device=device, requires_grad=True)
    for function in (kernel.dcnv3, kernel.dcnv3_softmax):
        assert torch.autograd.gradcheck(
            lambda *t, f=function: f(*t, groups=2),
            (image, offset, mask),
            nondet_tol=1e-12,
            fast_mode=INTERPRETED,  # along random directions: the interpreter is slow
        )
    options = (3, 3, 1, 1, 1, 1, 1, 1, 2, 1.0, False, True)
    torch.library.opcheck(kernel.ops.dcnv3_forward.default, (image, offset, mask, *options))
    grad_output = torch.randn_like(image)
    arguments = (grad_output, *(t.detach() for t in (image, offset, mask)), *options, False)
    torch.library.opcheck(kernel.ops.dcnv3_backward.default, arguments)


def test_double_backward_is_refused(backend):
    kernel, device = backend
    image = torch.randn(1, 4, 4, 8, device=device, requires_grad=True)
    offset, mask = torch.randn(1, 4, 4, 18, device=device), torch.randn(1, 4, 4, 9, device=device)
    (grad,) = torch.autograd.grad(kernel.dcnv3(image, offset, mask, groups=1).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(backend, dynamic):
    kernel, device = backend
    torch.manual_seed(0)

    def function(image, offset, mask):
        return kernel.dcnv3_softmax(image * 2, offset, mask, groups=2).relu()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for size in (6, 8):
        tensors = [torch.randn(2, size, size, c, device=device) for c in (32, 36, 18)]
        for a, e in zip(
            run_and_differentiate(compiled, tensors, {}), run_and_differentiate(function, tensors, {}), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_export_with_symbolic_sizes(backend):
    kernel, device = backend

    class Model(torch.nn.Module):
        def forward(self, image, offset, mask):
            return kernel.dcnv3_softmax(image, offset, mask, groups=2)

    tensors = [torch.randn(2, 6, 7, c, device=device) for c in (32, 36, 18)]
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    shapes = [{0: batch, 1: height, 2: width}] * 3
    program = torch.export.export(Model(), tuple(tensors), dynamic_shapes=shapes)
    others = [torch.randn(3, 9, 5, c, device=device) for c in (32, 36, 18)]
    torch.testing.assert_close(program.module()(*others), Model()(*others))


def test_autocast_leaves_the_operator_alone(backend):
    kernel, device = backend
    tensors = [torch.randn(1, 5, 5, c, device=device) for c in (16, 18, 9)]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert kernel.dcnv3(*tensors, groups=1).dtype == torch.float32
        assert kernel.dcnv3(tensors[0].bfloat16(), *tensors[1:], groups=1).dtype == torch.bfloat16


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_number_of_threads_does_not_matter(threads):
    folder = built("torch-stable-abi*-cpu-*")
    if folder is None:
        pytest.skip("no cpu variant was built: run dcnv3_kernel/build.py")
    kernel = load_variant(folder)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    try:
        for shape, groups in (((1, 20, 31, 64), 4), ((3, 9, 9, 80), 5), ((1, 33, 17, 6), 1)):
            tensors = [torch.randn(*shape[:3], c) for c in (shape[3], groups * 18, groups * 9)]
            torch.set_num_threads(1)
            expected = run_and_differentiate(kernel.dcnv3_softmax, tensors, {"groups": groups})
            torch.set_num_threads(threads)
            actual = run_and_differentiate(kernel.dcnv3_softmax, tensors, {"groups": groups})
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    finally:
        torch.set_num_threads(before)


# (batch, height, width, group width), groups, kernel size, padding: the backward pass takes one or several groups at a time and
# one or several slices of rows, blocks end at rows, images and groups that do not divide them
BLOCKS = [
    ((1, 5, 7, 8), 3, 3, 1),
    ((1, 12, 3, 16), 1, 3, 1),
    ((1, 40, 3, 16), 8, 3, 1),
    ((2, 4, 5, 32), 7, 3, 1),
    ((9, 3, 4, 5), 19, 3, 1),
    ((1, 1, 11, 16), 18, (1, 3), (0, 1)),
    ((3, 13, 1, 16), 33, (3, 1), (1, 0)),
    ((1, 6, 6, 3), 2, (13, 13), 6),
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape, groups, kernel_size, padding", BLOCKS)
def test_blocks_of_every_kind_equal_the_definition(backend, shape, groups, kernel_size, padding, dtype, tolerance):
    kernel, device = backend
    if device != "cpu":
        pytest.skip("about how the CPU's kernel divides its work")
    torch.manual_seed(0)
    (batch, height, width, group_channels), before = shape, torch.get_num_threads()
    pair = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    points = pair[0] * pair[1]
    sizes = (groups * group_channels, groups * points * 2, groups * points)
    tensors = [(torch.randn(batch, height, width, size) * 2).to(dtype).double() for size in sizes]
    grad_output = torch.randn(batch, height, width, sizes[0]).to(dtype).double()
    options = {"groups": groups, "kernel_size": kernel_size, "padding": padding}
    expected = run_and_differentiate(definition, tensors, {**options, "softmax": True}, grad_output)
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            narrow = [tensor.to(dtype) for tensor in tensors]
            results.append(run_and_differentiate(kernel.dcnv3_softmax, narrow, options, grad_output.to(dtype)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))
    for what, actual, wanted in zip(NAMES, results[0], expected, strict=True):
        assert relative_error(actual, wanted) < tolerance, what


# (batch, height, width), groups, padding, scale and spread of the offsets: the backward pass on GPUs adds tiles up, whose size
# depends on the work; points lie inside and outside of what it keeps of the image
TILES = [
    ((2, 14, 14), 3, 1, 1.0, 0.5),
    ((1, 17, 22), 3, 0, 2.0, 1.0),
    ((3, 9, 5), 2, (2, 0), -1.5, 3.0),
    ((1, 3, 41), 1, (0, 3), 1.0, 8.0),
    ((1, 1, 1), 1, 1, 1.0, 0.5),
]


@pytest.mark.parametrize(
    "group_channels, remove_center, softmax, dtype, tolerance",
    [
        (16, False, True, torch.float32, 5e-5),
        (16, True, False, torch.float32, 5e-5),
        (16, True, True, torch.float16, 5e-3),
        (16, False, False, torch.bfloat16, 2e-2),
        (32, False, True, torch.float32, 5e-5),
        (32, True, False, torch.float32, 5e-5),
        (32, False, False, torch.float16, 5e-3),
        (32, True, True, torch.bfloat16, 2e-2),
    ],
)
def test_tiles_of_the_backward_pass_equal_the_definition(
    backend, group_channels, remove_center, softmax, dtype, tolerance
):
    kernel, device = backend
    torch.manual_seed(0)
    function = kernel.dcnv3_softmax if softmax else kernel.dcnv3
    # what fills a GPU comes in the largest of tiles
    large = [((9, 56, 55), 4, 1, 1.0, 1.5)] if device == "cuda" and dtype == torch.float32 else []
    for size, groups, padding, scale, spread in TILES + large:
        batch, height, width = size
        pair, points = padding if isinstance(padding, tuple) else (padding, padding), groups * (9 - remove_center)
        out = [batch, height - 2 + 2 * pair[0], width - 2 + 2 * pair[1]]
        tensors = [
            torch.randn(*size, groups * group_channels),
            torch.randn(*out, points * 2) * spread,
            torch.randn(*out, points),
        ]
        grad_output = torch.randn(*out, groups * group_channels).to(dtype)
        options = {"groups": groups, "padding": padding, "offset_scale": scale, "remove_center": remove_center}
        expected = run_and_differentiate(
            definition, [t.to(dtype).double() for t in tensors], {**options, "softmax": softmax}, grad_output.double()
        )
        tensors = [t.to(device, dtype) for t in tensors]
        results = [run_and_differentiate(function, tensors, options, grad_output)]
        with deterministic_algorithms():
            results += [run_and_differentiate(function, tensors, options, grad_output) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
        for actual in results[:2]:
            for what, a, wanted in zip(NAMES, actual, expected, strict=True):
                assert relative_error(a, wanted) < tolerance, (what, size)


def test_what_is_not_finite_changes_nothing_else(backend):
    """A unit of work whose values are not finite is computed in another way; its neighbours must not notice."""
    kernel, device = backend
    if device != "cpu":
        pytest.skip("about how the CPU's kernel divides its work")
    torch.manual_seed(0)
    tensors = [torch.randn(1, 9, 9, 64), torch.rand(1, 9, 9, 72) * 0.5 + 0.2, torch.randn(1, 9, 9, 36)]
    grad_output = torch.randn(1, 9, 9, 64)
    clean = run_and_differentiate(kernel.dcnv3_softmax, tensors, {"groups": 4}, grad_output)
    logits = tensors[2].clone()
    logits[0, 0, 0, 0] = torch.nan  # group 0 of the first pixel
    logits[0, 8, 8, 35] = 80.0  # group 3 of the last one: its softmax needs the maximum
    changed = run_and_differentiate(kernel.dcnv3_softmax, [*tensors[:2], logits], {"groups": 4}, grad_output)
    assert changed[0][0, 0, 0, :16].isnan().all() and changed[0][0, 8, 8, 48:].isfinite().all()
    same = torch.ones(9, 9, 4, dtype=torch.bool)
    same[0, 0, 0] = same[8, 8, 3] = False
    for before, after in ((clean[i], changed[i]) for i in (0, 2, 3)):
        by_group = [tensor.view(9, 9, 4, -1)[same] for tensor in (before, after)]
        assert torch.equal(*by_group)
    grad_input = changed[1].view(9, 9, 4, 16)
    assert (
        grad_input[:2, :2, 0].isnan().any()
        and grad_input[3:].isfinite().all()
        and grad_input[..., 1:, :].isfinite().all()
    )


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lesser_instruction_sets_equal_the_definition(capability):
    """What runs on older machines, in a process of its own: the choice is made once."""
    folder = built("torch-stable-abi*-cpu-*")
    if folder is None:
        pytest.skip("no cpu variant was built: run dcnv3_kernel/build.py")
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_dcnv3_kernel import *
        kernel = load_variant(Path({str(folder)!r}))
        rng = torch.Generator().manual_seed(7)
        for case in filter(None, (random_case(rng) for _ in range(40))):
            tensors, options = case
            expected = run_and_differentiate(definition, tensors, {{**options, "softmax": True}})
            for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 5e-5)):
                actual = run_and_differentiate(kernel.dcnv3_softmax, [t.to(dtype) for t in tensors], options)
                assert all(relative_error(a, e) < tolerance for a, e in zip(actual, expected)), options
        test_every_16_bit_number_survives((kernel, "cpu"))
        test_16_bit_tensors_compute_in_float32((kernel, "cpu"), torch.float16, 2e-3, 16)
        print(kernel.ops.dcnv3_cpu_capability())
    """
    environment = {**os.environ, "DCNV3_CPU_CAPABILITY": capability}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() != capability:
        assert result.stdout.strip() == "baseline", "a machine without AVX2 has nothing else"


def test_out_of_memory_error_names_tensor_and_size(backend):
    """The error says so, and how much was to be allocated: PyTorch's own gets lost on the way through the stable ABI."""
    kernel, device = backend
    if device != "cpu" or INTERPRETED:
        pytest.skip("tensors that take no memory until they are copied, by operators written in C++")
    batch = 2**40
    tensors = [torch.zeros(1, 1, 1, c).expand(batch, 1, 1, c) for c in (16, 18, 9)]
    with pytest.raises(RuntimeError, match=rf" out of memory\. Tried to allocate {batch * 64} bytes for .*input"):
        kernel.dcnv3(*tensors, groups=1)
    # the output alone: one pixel and its padding
    side = 2**12 + 1
    tensors = [torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 2**22).contiguous()]
    tensors += [torch.zeros(1, side, side, c) for c in (2, 1)]
    with pytest.raises(
        RuntimeError, match=rf" out of memory\. Tried to allocate {side**2 * 2**24} bytes for the output"
    ):
        kernel.dcnv3(*tensors, kernel_size=1, padding=side // 2, groups=1)


def test_out_of_memory_error_names_the_sums_of_the_backward_pass():
    resource = pytest.importorskip("resource")
    folder = built("torch-stable-abi*-cpu-*")
    if folder is None:
        pytest.skip("no cpu variant was built: run dcnv3_kernel/build.py")
    kernel = load_variant(folder)
    size, mebibytes = 2**11, 2**20
    image = torch.zeros(1, size, size, 4)  # 64 MiB, the sums of seven slices 448
    gradient, offset, mask = (torch.zeros(1, 8, 8, c) for c in (4, 2, 1))
    options = (1, 1, size // 8, size // 8, 0, 0, 1, 1, 1, 1.0, False, False, False)
    kernel.ops.dcnv3_backward(gradient, image[:, :64, :64], offset, mask, 1, 1, 8, 8, *options[4:])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 256 * mebibytes, before[1]))
    try:
        with pytest.raises(
            RuntimeError, match=rf"out of memory\. Tried to allocate {7 * 64 * mebibytes} bytes for sums of"
        ):
            kernel.ops.dcnv3_backward(gradient, image, offset, mask, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    kernel.ops.dcnv3_backward(gradient, image, offset, mask, *options)


BAD_INPUT = [
    ({"offset": (1, 5, 5, 17)}, r"offset must be \(1, 5, 5, 18\), got \(1, 5, 5, 17\)"),
    ({"mask": (1, 5, 4, 9)}, r"mask must be \(1, 5, 5, 9\), got \(1, 5, 4, 9\)"),
    ({"mask": (2, 5, 5, 9)}, r"mask must be \(1, 5, 5, 9\), got \(2, 5, 5, 9\)"),
    ({"input": (5, 5, 16)}, "input must have 4 dimensions .* got 3"),
    ({"offset": (1, 5, 5, 9, 2)}, "offset must have 4 dimensions .* got 5"),
    ({"input": (1, 5, 5, 0)}, "input must have a number of channels of at least 1, got 0"),
    ({"input": (1, 0, 5, 16)}, "input must have a height of at least 1, got 0"),
    ({"groups": 3}, "groups must divide the channels of input, 16, got 3"),
    ({"groups": 0}, "groups must be at least 1, got 0"),
    ({"kernel_size": 7, "padding": 0}, r"too small for kernel_size \(7, 7\)"),
    ({"kernel_size": (3, 0)}, r"kernel_size must be at least 1 .* got \(3, 0\)"),
    ({"stride": 0}, r"stride must be at least 1 .* got \(0, 0\)"),
    ({"padding": (1, -1)}, r"padding must be at least 0 .* got \(1, -1\)"),
    ({"dilation": (-1, 1)}, r"dilation must be at least 1 .* got \(-1, 1\)"),
    # what overflows an integer, to a kernel without points and to sizes that fit
    ({"kernel_size": 2**32, "padding": 2**31}, "kernel_size must be .* at most 2147483647"),
    ({"kernel_size": 2**16, "padding": 2**15}, "kernel_size must have at most 2147483647 points"),
    ({"padding": 2**63 - 1}, "padding must be .* at most 2147483647"),
    ({"dilation": 2**62, "kernel_size": 5}, "dilation must be .* at most 2147483647"),
    ({"stride": 2**62}, "stride must be .* at most 2147483647"),
    ({"offset_scale": float("inf")}, "offset_scale must be finite, got inf"),
    ({"offset_scale": float("nan")}, "offset_scale must be finite, got nan"),
    ({"kernel_size": 2, "remove_center": True}, r"square kernel_size of odd size above 1, got \(2, 2\)"),
    ({"dtype": torch.int32}, "input must have the dtype float32, .* got torch.int32"),
    ({"dtype": (torch.int64, torch.float32, torch.float32)}, "input must have the dtype float32, .* got torch.int64"),
    ({"dtype": (torch.float32, torch.int32, torch.float32)}, "offset must have the dtype float32, .* got torch.int32"),
    ({"dtype": (torch.float32, torch.float32, torch.bool)}, "mask must have the dtype float32, .* got torch.bool"),
    ({"dtype": torch.complex64}, "input must have the dtype float32, .* got torch.complex64"),
]


def bad_call(function, change, device):
    change = {"groups": 1, **change}
    dtypes = change.pop("dtype", torch.float32)
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,) * 3
    shapes = [
        change.pop(name, shape)
        for name, shape in (("input", (1, 5, 5, 16)), ("offset", (1, 5, 5, 18)), ("mask", (1, 5, 5, 9)))
    ]
    tensors = [torch.ones(shape, dtype=d, device=device) for shape, d in zip(shapes, dtypes, strict=True)]
    return function(*tensors, **change)


@pytest.mark.parametrize("change, message", BAD_INPUT)
def test_bad_input_is_named_in_the_error(backend, change, message):
    kernel, device = backend
    with pytest.raises(RuntimeError, match=message):
        bad_call(kernel.dcnv3, change, device)


@pytest.mark.parametrize("change, message", BAD_INPUT)
def test_bad_input_without_data_is_named_in_the_error(backend, change, message):
    """What computes shapes alone refuses what the operators refuse."""
    kernel, _ = backend
    with pytest.raises(RuntimeError, match=message):
        bad_call(kernel.dcnv3, change, "meta")


@pytest.mark.parametrize("position", range(3))
def test_tensors_of_two_devices_are_refused(backend, position):
    """Whichever of them is without data, the operators' own answer would be without data or not written."""
    kernel, device = backend
    tensors = [torch.ones(1, 5, 5, c, device=device) for c in (16, 18, 9)]
    tensors[position] = tensors[position].to("meta")
    with pytest.raises(RuntimeError, match="must be on the device of input"):
        kernel.dcnv3(*tensors, groups=1)
    gradient = [torch.ones(1, 5, 5, 16, device=device), *tensors]
    with pytest.raises(RuntimeError, match="must be on the device of input"):
        kernel.ops.dcnv3_backward(*gradient, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1.0, False, False, False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": None}, "input must be a tensor, got NoneType"),
        ({"offset": [1.0]}, "offset must be a tensor, got list"),
        ({"kernel_size": (3,)}, r"kernel_size must be an int or .* got \(3,\)"),
        ({"kernel_size": (3,), "stride": (3, 1, 1)}, r"kernel_size must be an int or .* got \(3,\)"),
        ({"padding": 1.0}, r"padding must be an int or .* got 1.0"),
        ({"dilation": "1"}, r"dilation must be an int or .* got '1'"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(backend, change, message):
    kernel, device = backend
    tensors = {n: torch.ones(1, 5, 5, c, device=device) for n, c in (("input", 16), ("offset", 18), ("mask", 9))}
    with pytest.raises(TypeError, match=message):
        kernel.dcnv3(**{**tensors, "groups": 1, **change})


@pytest.mark.parametrize("change", [{"shape": (1, 5, 4, 16)}, {"dtype": torch.float64}, {"shape": (5, 5, 16)}])
@pytest.mark.parametrize("meta", [False, True])
def test_bad_gradients_are_refused(backend, change, meta):
    kernel, device = backend
    device = "meta" if meta else device
    gradient = torch.ones(change.get("shape", (1, 5, 5, 16)), dtype=change.get("dtype"), device=device)
    tensors = [torch.ones(1, 5, 5, c, device=device) for c in (16, 18, 9)]
    with pytest.raises(RuntimeError, match="grad_output must"):
        kernel.ops.dcnv3_backward(gradient, *tensors, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1.0, False, False, False)


def test_forward_mode_differentiation_is_refused(backend):
    """PyTorch would take the derivative for zero."""
    kernel, device = backend
    tensors = [torch.ones(1, 5, 5, c, device=device) for c in (16, 18, 9)]
    for i, name in enumerate(("input", "offset", "mask_logits")):

        def function(tensor, i=i):
            return kernel.dcnv3_softmax(*tensors[:i], tensor, *tensors[i + 1 :], groups=1)

        with pytest.raises(RuntimeError, match=f"no forward-mode derivative, and {name}"):
            torch.func.jvp(function, (tensors[i],), (tensors[i],))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(forward_ad.make_dual(tensors[i], tensors[i]))


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("group_channels", [5, 16])
def test_deterministic_backward(backend, dtype, group_channels):
    kernel, device = backend
    torch.manual_seed(0)
    size = 28 if device == "cuda" else 6
    tensors = [torch.randn(2, size, size, c) for c in (4 * group_channels, 4 * 18, 4 * 9)]
    for function, softmax in ((kernel.dcnv3_softmax, True), (kernel.dcnv3, False)):
        for scale in (1.0, 1e-30, 1e-36, 1e30):  # of the gradient
            grad_output = torch.randn(tensors[0].shape, dtype=torch.float64) * scale
            with deterministic_algorithms():
                arguments = [t.to(device, dtype) for t in tensors]
                first, *others = (
                    run_and_differentiate(function, arguments, {"groups": 4}, grad_output) for _ in range(3)
                )
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
            expected = run_and_differentiate(
                definition,
                [t.to(dtype).double() for t in tensors],
                {"groups": 4, "softmax": softmax},
                grad_output.to(dtype).double(),
            )
            tolerance = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2}[dtype]
            error = (first[1].cpu().double() - expected[1]).abs().max()
            # each term is a multiple of 2^-126, float32's smallest normal number, or of less
            assert error < tolerance * expected[1].abs().max() + (2.0**-122 if scale < 1e-30 else 0), (softmax, scale)


def test_deterministic_backward_of_gradients_that_are_not_finite(backend):
    with deterministic_algorithms():
        test_gradients_that_are_not_finite_stay_where_they_belong(backend, torch.float32, 16)
        test_gradients_that_are_not_finite_stay_where_they_belong(backend, torch.bfloat16, 32)


# ------------------------------------------------------------------------------------------------------ GPUs alone


@pytest.fixture(params=["cuda", "triton"], scope="module")
def gpu_kernel(request):
    if not torch.cuda.is_available() or INTERPRETED:
        pytest.skip("needs a GPU")
    folder = built(BACKENDS[request.param][0])
    if folder is None:
        pytest.skip(f"no {request.param} variant was built")
    return load_variant(folder)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_values(gpu_kernel):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 14, 14, c, device="cuda", dtype=torch.bfloat16) for c in (64, 4 * 18, 4 * 9)]
    options = (3, 3, 1, 1, 1, 1, 1, 1, 4, 1.0, False, True)

    def work():
        output = gpu_kernel.ops.dcnv3_forward(*tensors, *options)
        return output, *gpu_kernel.ops.dcnv3_backward(output, *tensors, *options, True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for tensor in tensors:
        tensor.normal_()
    expected = work()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_second_device_gives_what_the_first_gives(gpu_kernel):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.manual_seed(0)
    tensors = [torch.randn(2, 9, 9, c) for c in (64, 4 * 18, 4 * 9)]
    first, second = (
        run_and_differentiate(gpu_kernel.dcnv3_softmax, [t.to(device) for t in tensors], {"groups": 4})
        for device in ("cuda:0", "cuda:1")
    )
    assert all(t.device.index == 1 for t in second)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["batch", "image"])
def test_more_than_2_31_elements_are_addressed(gpu_kernel, what):
    """Of the input, by a large batch and by one large image; compared at the far end."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    torch.manual_seed(0)
    channels = 2048
    shape = (1100, 32, 32) if what == "batch" else (1, 1100, 1024)
    image = torch.empty(*shape, channels, device="cuda", dtype=torch.bfloat16)
    assert image.numel() > 2**31
    window = torch.randn(*((2, 32, 32) if what == "batch" else (1, 20, 1024)), channels, dtype=torch.bfloat16)
    far = (slice(-2, None),) if what == "batch" else (slice(None), slice(-20, None))
    image.zero_()[far] = window.to("cuda")
    offset = (torch.randint(-4, 4, (*shape, 18), device="cuda") * 0.25 + 0.125).bfloat16()
    mask = torch.randn(*shape, 9, device="cuda", dtype=torch.bfloat16)
    output = gpu_kernel.dcnv3_softmax(image, offset, mask, groups=1)[far]
    expected = definition(
        window[..., :64].double(), offset[far].cpu().double(), mask[far].cpu().double(), groups=1, softmax=True
    )
    keep = slice(None) if what == "batch" else slice(4, None)  # rows above reach out of the window
    actual = output[..., :64].cpu().double()
    assert ((actual - expected).abs()[:, keep].max() / expected.abs().max()) < 1e-2
