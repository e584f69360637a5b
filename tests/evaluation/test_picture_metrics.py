"""Overlap, removal and background, against values known without them. PSNR and SSIM themselves: tests/comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reattend import ReattendError
from reattend.evaluation.metrics.images import background, box_iou, change_inside, covered, mask_iou, removed, ssim


def test_boxes_and_masks():
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0 and box_iou((0, 0, 0, 0), (5, 5, 5, 5)) == 0
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert mask_iou(a, b) == 0
    a[:2], b[1:3] = True, True
    assert mask_iou(a, b) == pytest.approx(4 / 12)
    assert covered((0, 0, 4, 4), a) == 0.5 and covered((0, 0, 4, 1), a) == 1 and covered((2, 2, 2, 2), a) == 0
    assert covered((-2, 0, 2, 2), a) == 0.5, "what lies outside the picture is not covered"


def test_removal_looks_inside_the_mask_only():
    mask = np.zeros((10, 10), bool)
    mask[:5, :5] = True
    assert not removed("star", [("star", (1, 1, 4, 4))], mask)
    assert removed("star", [("star", (6, 6, 9, 9)), ("ring", (1, 1, 4, 4))], mask)
    assert removed("star", [], mask)
    assert removed("star", [("star", (4, 0, 8, 4))], mask) and not removed("star", [("star", (4, 0, 8, 4))], mask, least=0.25)


def test_the_background_is_what_lies_outside():
    x = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = np.zeros((24, 20), bool)
    mask[2:8, 3:9] = True
    y = x.clone()
    y[:, 2:8, 3:9] = 1 - y[:, 2:8, 3:9]
    same = background(x, y, mask)
    assert same["psnr"] == math.inf and same["ssim"] == pytest.approx(1) and same["mean_absolute_difference"] == 0
    assert same["pixels"] == 24 * 20 - 36
    assert change_inside(x, y, mask) == pytest.approx(float((x - y)[:, 2:8, 3:9].abs().mean()))
    shifted = (x * 0.5 + 0.2).clone()
    other = (x * 0.5 + 0.3).clone()
    found = background(shifted, other, mask)
    assert found["psnr"] == pytest.approx(20, abs=1e-9) and found["ssim"] < 1
    # without a mask it is the metric of the whole picture
    none = background(shifted, other, np.zeros((24, 20), bool))
    assert none["ssim"] == pytest.approx(ssim(shifted, other), abs=1e-12)
    # windows that touch the mask play no part: the rest is a crop
    half = np.zeros((24, 20), bool)
    half[:12] = True
    lower = background(shifted, other, half)
    assert lower["ssim"] == pytest.approx(ssim(shifted[:, 12:], other[:, 12:]), abs=1e-12)


def test_a_background_without_room_for_a_window():
    x, mask = torch.zeros(3, 12, 12), np.ones((12, 12), bool)
    mask[0, 0] = False
    assert math.isnan(background(x, x, mask)["ssim"])
    mask[0, 0] = True
    with pytest.raises(ReattendError, match="covers the whole picture"):
        background(x, x, mask)
    with pytest.raises(ReattendError, match="one size"):
        background(x, x, np.zeros((3, 3), bool))
