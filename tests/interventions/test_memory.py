"""The fused path holds no n x n tensor: the largest single allocation stays O(n), counted by torch's profiler, not by a clock."""

from __future__ import annotations

import pytest
import torch
from reattend.interventions import Band, Call, Gain, HeadGain, Keep, KeyBias, Mix, Transfer, WeightMap, fused, reference
from reattend.interventions.engine.kernels import CHUNK_VALUES
from torch.profiler import ProfilerActivity, profile

HEADS, KEY_HEADS, DIM = 4, 2, 16

EDITS = {
    "untouched": lambda n: [],
    "key bias": lambda n: [KeyBias(bias=torch.linspace(0, 1, n))],
    "key bias on two heads": lambda n: [KeyBias(bias=torch.linspace(0, 1, n), heads=[0, 3])],
    "three-column transfer": lambda n: [Transfer(source=[0, 5, 9], strength=0.5)],
    "even transfer": lambda n: [Transfer(source=[0, 5, 9], strength=0.5, how="even")],
    "gain then transfer": lambda n: [Gain(columns=[1], factor=0.5), Transfer(source=[0], strength=0.5)],
    "identity mix": lambda n: [Mix(target="identity", strength=0.5)],
    "uniform mix": lambda n: [Mix(target="uniform", strength=0.5)],
    "head gain": lambda n: [HeadGain(factor=0.5)],
    "band": lambda n: [Keep(pattern=Band(4, 256))],
    "last rows": lambda n: [WeightMap(function=lambda w, rows: w.square(), rows=torch.arange(n) >= n - 8)],
    "all rows, chunked": lambda n: [WeightMap(function=lambda w, rows: w.square())],
}


def largest_allocation(function, *arguments) -> int:
    """Bytes of the largest tensor storage that torch allocated while the function ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function(*arguments)
    sizes = [e.cpu_memory_usage for e in record.events() if e.name == "[memory]" or e.cpu_memory_usage]
    return max(sizes, default=0)


def make(n: int) -> Call:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, n, DIM) for h in (HEADS, KEY_HEADS, KEY_HEADS))
    return Call(query, key, value, is_causal=True)


@pytest.mark.parametrize("name", EDITS)
def test_no_quadratic_allocation_at_8192(name):
    n = 8192
    largest = largest_allocation(fused, make(n), EDITS[name](n))
    linear = HEADS * n * (DIM + 8) * 4
    # chunked rows may hold a fixed number of values, whatever n is; n x n for one head would be 256 MiB
    assert largest <= 2 * max(linear, 4 * CHUNK_VALUES) < n * n * 4 / 4


def test_the_measure_sees_the_matrix():
    n = 2048
    assert largest_allocation(reference, make(n), EDITS["three-column transfer"](n)) >= n * n * 4
