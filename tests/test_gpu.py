"""Tests of the model on a GPU: training step against the CPU, compiled, CUDA graph, two streams, second device."""

import copy
from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import nn

from internimage_hf import InternImageConfig, InternImageForImageClassification
from internimage_hf.dcnv3 import use_dcnv3_backend


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def _kernel_and_full_precision():
    """The GPU uses the kernel, with float32 convolutions; the CPU's backend is chosen automatically."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def model():
    """A model with the widths of InternImage-T, few layers, and offsets of about a pixel."""
    torch.manual_seed(0)
    config = InternImageConfig(channels=64, depths=[1, 1, 2, 1], groups=[4, 8, 16, 32], num_labels=10)
    model = InternImageForImageClassification(config)
    for name, module in model.named_modules():
        if name.endswith(("dcn.offset", "dcn.mask")):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def images(number=4, device=DEVICE):
    return torch.randn(number, 3, 64, 96, device=device)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).norm() / expected.norm())


def worst_error(actual: Iterable[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Returns the largest relative error of a gradient; for near-zero gradients (bias before BatchNorm), relative to the others."""
    floor = 1e-2 * max(float(gradient.norm()) for gradient in expected)
    return max(
        float((a.double().cpu() - e.double().cpu()).norm()) / max(float(e.norm()), floor)
        for a, e in zip(actual, expected, strict=True)
    )


def loss_and_gradients(model, pixel_values, labels):
    loss = model(pixel_values=pixel_values, labels=labels).loss
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_step_agrees_with_float64_on_the_cpu(model, dtype, tolerance, compiled):
    pixel_values, labels = images(), torch.arange(4, device=DEVICE)
    reference = copy.deepcopy(model).double().train()
    loss, gradients = loss_and_gradients(reference, pixel_values.cpu().double(), labels.cpu())

    on_gpu = copy.deepcopy(model).to(DEVICE).train()
    step = torch.compile(on_gpu) if compiled else on_gpu
    optimizer = torch.optim.AdamW(on_gpu.parameters(), lr=1e-3)
    losses = []
    for turn in range(6):
        with (
            use_dcnv3_backend("kernel"),
            torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32),
        ):
            losses.append(step(pixel_values=pixel_values, labels=labels).loss)
        losses[-1].backward()
        if turn == 0:
            assert relative_error(losses[0], loss) < tolerance
            assert worst_error([parameter.grad for parameter in on_gpu.parameters()], gradients) < tolerance
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_cuda_graph_equals_model(model):
    on_gpu = copy.deepcopy(model).to(DEVICE).eval()
    pixel_values = images()
    with use_dcnv3_backend("kernel"), torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                on_gpu(pixel_values)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = on_gpu(pixel_values).logits
        graph.replay()
        before = captured.clone()
        pixel_values.normal_()
        graph.replay()
        expected = on_gpu(pixel_values).logits
    torch.testing.assert_close(captured, expected)
    assert not torch.allclose(captured, before)


def test_two_streams_do_not_interfere(model):
    on_gpu = copy.deepcopy(model).to(DEVICE).eval()

    def outputs(pixel_values):
        logits = on_gpu(pixel_values).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), pixel_values)[0]

    inputs = [images(8).requires_grad_() for _ in range(2)]
    with use_dcnv3_backend("kernel"):
        expected = [outputs(pixel_values) for pixel_values in inputs]
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in inputs], []
        for _ in range(10):
            for number, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results.append((number, outputs(inputs[number])))
        torch.cuda.synchronize()
    for number, (logits, gradient) in results:
        assert relative_error(logits, expected[number][0]) < 1e-5
        assert relative_error(gradient, expected[number][1]) < 1e-4


def test_second_device_equals_first(model):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pixel_values = images()
    results = []
    for device in ("cuda:0", "cuda:1"):
        on_gpu = copy.deepcopy(model).to(device).train()
        with use_dcnv3_backend("kernel"):
            results.append(loss_and_gradients(on_gpu, pixel_values.to(device), torch.arange(4, device=device)))
    (loss, gradients), (second_loss, second_gradients) = results
    assert second_gradients[0].device.index == 1
    assert relative_error(second_loss, loss) < 1e-5
    assert worst_error(second_gradients, gradients) < 1e-3
