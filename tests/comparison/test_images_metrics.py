"""PSNR and SSIM against values known without them."""

from __future__ import annotations

import math

import pytest
import reattend
import torch
from reattend.comparison.images import difference_picture, picture_metrics, psnr, ssim, to_tensor


def test_psnr_of_a_known_error():
    a = torch.zeros(3, 16, 16)
    assert psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-5)
    assert psnr(a, a) == math.inf


def test_ssim_of_constant_pictures_is_the_luminance_term():
    a, b = 0.2, 0.7
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(*(torch.full((1, 20, 24), v, dtype=torch.float64) for v in (a, b))) == pytest.approx(expected, abs=1e-12)


def test_ssim_equals_its_formula_window_by_window():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 13, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weights))
    values = []
    for channel in range(2):
        for top in range(3):
            for left in range(2):
                sums = dict.fromkeys(("x", "y", "xx", "yy", "xy"), 0.0)
                for i in range(11):
                    for j in range(11):
                        w = weights[i][j] / total
                        p, q = x[channel, top + i, left + j].item(), y[channel, top + i, left + j].item()
                        for name, value in (("x", p), ("y", q), ("xx", p * p), ("yy", q * q), ("xy", p * q)):
                            sums[name] += w * value
                mx, my = sums["x"], sums["y"]
                vx, vy, cov = sums["xx"] - mx * mx, sums["yy"] - my * my, sums["xy"] - mx * my
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(x, y) == pytest.approx(sum(values) / len(values), abs=1e-12)
    assert ssim(x, x) == pytest.approx(1.0, abs=1e-12)


def test_pictures_of_any_kind_become_the_same_tensor():
    import numpy as np
    from PIL import Image

    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = torch.from_numpy(array).permute(2, 0, 1).double() / 255
    for kind in (Image.fromarray(array), array, torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(to_tensor(kind), expected)


def test_small_and_unequal_pictures():
    a = torch.rand(3, 4, 6)
    assert picture_metrics(a, a)["identical"] is True
    assert ssim(a, a) == pytest.approx(1.0)
    with pytest.raises(reattend.ReattendError, match="different sizes"):
        picture_metrics(a, torch.rand(3, 6, 4))


def test_the_difference_picture_is_scaled_to_the_largest():
    a = torch.zeros(3, 2, 2, dtype=torch.float64)
    b = a.clone()
    b[:, 0, 1] = 0.5
    picture = difference_picture(a, b, 0.5)
    assert [picture.getpixel((x, y)) for y in range(2) for x in range(2)] == [0, 255, 0, 0]
