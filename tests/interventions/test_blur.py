"""Queries blurred over a raster: the Gaussian, its edges, and what stays."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from reattend.interventions import Call, ReattendError, fused, reference
from reattend.interventions.families.guidance import BlurQuery, blur_matrix

GRID = torch.arange(1, 13).view(3, 4)


def a_call() -> Call:
    torch.manual_seed(0)
    return Call(*(torch.randn(2, 3, 14, 8) for _ in range(3)))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 40.0, math.inf])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_rows_of_the_blur_are_means(sigma: float, size: int) -> None:
    blur = blur_matrix(sigma, size)
    assert (blur >= 0).all()
    torch.testing.assert_close(blur.sum(dim=1), torch.ones(size))
    torch.testing.assert_close(blur, blur.flip(0, 1))


@pytest.mark.parametrize("run", [fused, reference])
@pytest.mark.parametrize("sigma", [0.8, math.inf])
def test_blurred_queries_of_a_raster_that_is_not_square(run, sigma: float) -> None:
    call, rows = a_call(), torch.zeros(2, 14, dtype=torch.bool)
    rows[1, 1:9] = True
    query = call.query.clone()
    places = query[:, :, GRID.flatten()].unflatten(2, (3, 4))
    blurred = torch.einsum("ij,kl,bhjld->bhikd", blur_matrix(sigma, 3), blur_matrix(sigma, 4), places).flatten(2, 3)
    query[1, :, 1:9] = blurred[1, :, :8]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, call.key, call.value)
    found = run(call, [BlurQuery(grid=GRID, sigma=sigma, rows=rows)])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    plain = fused(call, [])
    assert torch.equal(fused(call, [BlurQuery(grid=GRID, sigma=sigma, rows=rows)])[0], plain[0])
    of_one = fused(call, [BlurQuery(grid=GRID, sigma=sigma, rows=rows, heads=[1])])
    assert torch.equal(of_one[:, [0, 2]], plain[:, [0, 2]])
    torch.testing.assert_close(of_one[:, 1], wanted[:, 1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_a_blur_that_sees_no_neighbour_changes_no_bit(sigma: float) -> None:
    assert BlurQuery(grid=GRID, sigma=sigma).is_identity
    assert torch.equal(fused(a_call(), [BlurQuery(grid=GRID, sigma=sigma)]), fused(a_call(), []))


def test_without_limit_all_rows_of_the_raster_are_one() -> None:
    output = fused(a_call(), [BlurQuery(grid=GRID, sigma=math.inf)])[:, :, 1:13]
    torch.testing.assert_close(output, output[:, :, :1].expand_as(output))


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("heads", [None, [2, 0]])
def test_without_limit_it_costs_one_row_of_attention(heads: list[int] | None, kv: int, mask: str) -> None:
    torch.manual_seed(0)
    call = Call(torch.randn(3, 4, 14, 8), *(torch.randn(3, kv, 14, 8) for _ in range(2)), ways=Counter())
    shown = torch.rand(3, 1, 1, 14) > 0.3
    call.mask = {"none": None, "bool": shown, "added": torch.randn(shown.shape).masked_fill(~shown, -1e30)}[mask]
    rows = torch.zeros(3, 14, dtype=torch.bool)
    rows[2] = rows[1, 3:9] = True
    edits = [BlurQuery(grid=GRID, sigma=math.inf, rows=rows, heads=heads)]
    got = fused(call, edits)
    assert call.ways == {"one query": 1}
    torch.testing.assert_close(got, reference(call, edits), atol=1e-6, rtol=1e-6)
    plain = fused(call, [])
    assert torch.equal(got[0], plain[0]) and torch.equal(got[2, :, [0, 13]], plain[2, :, [0, 13]])
    if heads is not None:
        assert torch.equal(got[:, [1, 3]], plain[:, [1, 3]])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sigma": -1.0}, "sigma must be finite and in"),
        ({"sigma": math.nan}, "sigma must be finite and in"),
        ({"grid": torch.arange(4)}, "grid must be a long tensor .height, width."),
        ({"grid": torch.ones(2, 2)}, "grid must be a long tensor .height, width."),
        ({"grid": torch.arange(11, 15).view(2, 2)}, "grid names query row 14, the call has rows 0 to 13"),
    ],
)
def test_bad_input(given: dict, words: str) -> None:
    with pytest.raises(ReattendError, match=words):
        fused(a_call(), [BlurQuery(**{"grid": GRID, "sigma": 1.0, **given})])
