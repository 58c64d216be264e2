"""RoIAlign, non-maximum suppression and mask pasting against their definitions, written as loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from internimage_hf import region_ops
from internimage_hf.region_ops import (
    box_giou,
    box_iou,
    decode_boxes,
    encode_boxes,
    nms,
    paste_masks,
    roi_align,
    roi_align_masks,
)


def sample(plane: torch.Tensor, y: float, x: float) -> float:
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    above = plane[top, left] * (1 - across) + plane[top, right] * across
    below = plane[bottom, left] * (1 - across) + plane[bottom, right] * across
    return (above * (1 - down) + below * down).item()


def roi_align_by_loops(feature_map: torch.Tensor, rois: torch.Tensor, size: int, scale: float) -> torch.Tensor:
    result = feature_map.new_zeros(len(rois), feature_map.shape[1], size, size)
    for r, (image, *box) in enumerate(rois.tolist()):
        left, top, right, bottom = (value * scale - 0.5 for value in box)
        bin_height, bin_width = (bottom - top) / size, (right - left) / size
        rows, columns = math.ceil(bin_height), math.ceil(bin_width)
        for channel, plane in enumerate(feature_map[int(image)]):
            for i in range(size):
                for j in range(size):
                    total = sum(
                        sample(
                            plane,
                            top + i * bin_height + (k + 0.5) * bin_height / rows,
                            left + j * bin_width + (m + 0.5) * bin_width / columns,
                        )
                        for k in range(rows)
                        for m in range(columns)
                    )
                    result[r, channel, i, j] = total / max(rows * columns, 1)
    return result


# regions: ordinary ones, of less than a pixel, very wide, of no area, beyond every side of the image, on pixel borders
ROIS = [
    [0, 3.3, 5.1, 21.7, 17.2],
    [1, 10.0, 10.0, 10.3, 10.2],
    [1, 0.0, 12.0, 40.0, 13.0],
    [0, 8.0, 8.0, 8.0, 20.0],
    [0, -30.0, -20.0, 70.0, 60.0],
    [1, 33.0, 25.0, 90.0, 90.0],
    [0, 0.0, 0.0, 24.0, 24.0],
    [1, 60.0, 60.0, 80.0, 80.0],
]


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("chunk", [2**24, 1])
def test_roi_align_is_its_definition(size, scale, chunk, monkeypatch):
    monkeypatch.setattr(region_ops, "_CHUNK", chunk)
    feature_map = torch.randn(2, 2, round(28 * scale), round(40 * scale), dtype=torch.float64)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    expected = roi_align_by_loops(feature_map, rois, size, scale)
    torch.testing.assert_close(roi_align(feature_map, rois, size, scale), expected, atol=1e-12, rtol=0)
    shuffled = torch.randperm(len(rois))
    torch.testing.assert_close(
        roi_align(feature_map, rois[shuffled], size, scale), expected[shuffled], atol=1e-12, rtol=0
    )


def test_roi_align_gradient():
    feature_map = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda maps: roi_align(maps, rois, 2, 0.2), feature_map)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_roi_align_in_other_dtypes(dtype, tolerance):
    feature_map = torch.randn(2, 8, 7, 10)
    rois = torch.tensor(ROIS)
    feature_map = feature_map.to(dtype)
    expected = roi_align(feature_map.double(), rois.double(), 7, 0.25)
    actual = roi_align(feature_map, rois, 7, 0.25)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


def test_roi_align_of_nothing_and_of_nan():
    feature_map = torch.randn(1, 4, 8, 8)
    assert roi_align(feature_map, torch.zeros(0, 5), 7, 1.0).shape == (0, 4, 7, 7)
    with pytest.raises(ValueError, match="`rois` must be finite"):
        roi_align(feature_map, torch.tensor([[0, 0, 0, float("nan"), 1]]), 7, 1.0)


def test_masks_are_aligned_like_maps():
    masks = torch.rand(2, 28, 40) > 0.5
    rois = torch.tensor(ROIS, dtype=torch.float64)
    expected = roi_align(masks.double()[:, None], rois, 28, 1.0)[:, 0]
    actual = roi_align_masks(list(masks), rois[:, 0].long(), rois[:, 1:], 28)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    as_bytes = roi_align_masks(list(masks.byte() * 255), rois[:, 0].long(), rois[:, 1:], 28)
    assert torch.equal(as_bytes, actual), "what is not zero belongs to the object"


def nms_by_loop(boxes, scores, groups, threshold):
    order = sorted(range(len(boxes)), key=lambda i: -scores[i].item())
    iou = box_iou(boxes, boxes)
    kept = []
    for i in order:
        if all(groups[i] != groups[j] or iou[i, j] <= threshold for j in kept):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


def random_boxes(number: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    corner = 60 * torch.rand(number, 2, dtype=dtype)
    return torch.cat([corner, corner + 1 + 30 * torch.rand(number, 2, dtype=dtype)], 1)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("block", [7, 256])
def test_nms_is_its_definition(threshold, groups, block, monkeypatch):
    monkeypatch.setattr(region_ops, "_NMS_BLOCK", block)
    boxes, groups = random_boxes(150), torch.randint(groups, (150,))
    scores = torch.randint(100, (150,)) / 100  # equal ones among them
    expected = nms_by_loop(boxes, scores, groups, threshold)
    assert torch.equal(nms(boxes, scores, groups, threshold), expected)
    assert torch.equal(nms(boxes, scores, groups, threshold, limit=10), expected[:10])


def test_nms_keeps_boxes_that_overlap_by_the_threshold_itself():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 7, 10], [0, 0, 10, 10], [3, 3, 3, 3]], dtype=torch.float64)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert nms(boxes, scores, torch.zeros(4, dtype=torch.long), 0.7).tolist() == [0, 1, 3]
    assert nms(boxes[:0], scores[:0], torch.zeros(0, dtype=torch.long), 0.7).tolist() == []


def test_torchvision_is_used_where_it_gives_the_same_numbers_and_only_there(monkeypatch):
    calls = []

    def fake_roi_align(maps, rois, size, scale, sampling_ratio, aligned):
        assert sampling_ratio == 0 and aligned
        calls.append("roi_align")
        return region_ops._roi_align(maps, rois, size, scale)

    def fake_nms(boxes, scores, threshold):
        calls.append("nms")
        order = scores.argsort(descending=True, stable=True)
        return order[region_ops._nms(boxes[order], threshold, len(boxes))]

    def unaligned(maps, rois, size, scale, sampling_ratio, aligned):
        return region_ops._roi_align(maps, rois + torch.tensor([0, 1.0, 1.0, 1.0, 1.0]) / scale / 2, size, scale)

    good = SimpleNamespace(roi_align=fake_roi_align, nms=fake_nms)
    assert region_ops._gives_the_same_numbers(good, "cpu")
    assert not region_ops._gives_the_same_numbers(SimpleNamespace(roi_align=unaligned, nms=fake_nms), "cpu")
    wrong = SimpleNamespace(roi_align=fake_roi_align, nms=lambda *_: torch.arange(3))
    assert not region_ops._gives_the_same_numbers(wrong, "cpu")

    boxes, scores, groups = random_boxes(60), torch.rand(60), torch.randint(3, (60,))
    feature_map, rois = torch.randn(1, 2, 8, 8), nn.functional.pad(boxes, (1, 0))
    expected = nms(boxes, scores, groups, 0.5), roi_align(feature_map, rois, 2, 0.1)
    monkeypatch.setattr(region_ops, "_torchvision_ops", lambda device_type: good)
    calls.clear()
    assert torch.equal(nms(boxes, scores, groups, 0.5), expected[0])
    assert torch.equal(roi_align(feature_map, rois, 2, 0.1), expected[1])
    assert calls == ["nms"] * 3 + ["roi_align"]


def test_a_broken_torchvision_is_named_and_not_used(monkeypatch, caplog):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(region_ops, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(region_ops.importlib, "import_module", broken)
    monkeypatch.setattr(region_ops.logger, "propagate", True)
    region_ops._torchvision_ops.cache_clear()
    try:
        assert region_ops._torchvision_ops("cpu") is None and not caplog.records
        assert region_ops._torchvision_ops("cuda") is None
        assert "cannot be used on cuda: operator torchvision::nms does not exist" in caplog.text
    finally:
        region_ops._torchvision_ops.cache_clear()


def test_deltas_there_and_back():
    boxes, targets = random_boxes(20, torch.float64), random_boxes(20, torch.float64)
    stds = (0.1, 0.1, 0.2, 0.2)
    torch.testing.assert_close(decode_boxes(boxes, encode_boxes(boxes, targets, stds), stds), targets)
    deltas = torch.tensor([[0.0, 0.0, 1e4, -1e4]], dtype=torch.float64)
    left, top, right, bottom = decode_boxes(torch.tensor([[0.0, 0, 16, 16]]), deltas, (1, 1, 1, 1))[0].tolist()
    assert right - left == pytest.approx(1000) and bottom - top == pytest.approx(16 * 16 / 1000)


def test_iou_of_boxes_without_area():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 1, 1]])
    assert box_iou(boxes, boxes).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert box_giou(boxes[:1], boxes[:1]).item() == pytest.approx(1)
    assert box_giou(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[3.0, 0, 4, 1]])).item() == pytest.approx(-0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masks_are_pasted_as_grid_sample_does(dtype):
    height, width = 50, 70
    masks = torch.rand(6, 28, 28, dtype=dtype)
    boxes = torch.tensor(
        [
            [3.2, 4.1, 60.7, 44.4],
            [-10, -5, 20, 30],
            [60, 40, 90, 80],
            [10, 10, 10.4, 10.3],
            [5, 5, 6, 49],
            [80, 5, 90, 9],
        ],
        dtype=dtype,
    )
    x = (torch.arange(width, dtype=dtype)[None] + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (torch.arange(height, dtype=dtype)[None] + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[..., None].expand(-1, -1, width)], -1)
    values = nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    for threshold in (0.5, 0.2):
        assert torch.equal(paste_masks(masks, boxes, height, width, threshold), values >= threshold)


def test_pasting_a_box_without_area_or_nothing():
    masks = torch.ones(1, 28, 28)
    assert not paste_masks(masks, torch.tensor([[4.0, 4.0, 4.0, 9.0]]), 20, 20).any()
    assert paste_masks(masks[:0], torch.zeros(0, 4), 20, 30).shape == (0, 20, 30)
