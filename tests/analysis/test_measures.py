"""The measures equal the papers' official code, and the chunked census equals the formulas on the whole matrix."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from golden_files import golden_file
from reattend.analysis import Analysis, measures
from reattend.analysis.reading import Reader, Settings
from reattend.hooks import Observation, SiteTable
from reattend.interventions import (
    Call,
    Clock,
    Gain,
    KeyBias,
    PoolKV,
    ReattendError,
    Reorder,
    Site,
    TokenMap,
    reference_with_weights,
)
from reattend.interventions.engine.census import census

golden = functools.partial(golden_file, "")


def call_with(weights: torch.Tensor) -> Call:
    """A causal call whose weights are the given ones [B, H, T, T]: scores are their logarithms."""
    size = weights.shape[-1]
    eye = torch.eye(size).expand_as(weights)
    return Call(weights.clamp_min(1e-30).log(), eye, eye, is_causal=True, scale=1.0)


def random_call(n: int = 70, batch: int = 2, heads: int = 4, **more) -> Call:
    torch.manual_seed(3)
    query, key = torch.randn(batch, heads, n, 8) * 2, torch.randn(batch, heads // 2, n, 8) * 2
    return Call(query, key, torch.randn(batch, heads // 2, n, 8), is_causal=True, **more)


# -- official code ---------------------------------------------------------------------------------------------------


def test_sink_rate_equals_the_official_code():
    data, facts = golden("sink-metrics/sink_rate")
    samples, layers, heads, size, _ = data["attn"].shape
    found = census(call_with(data["attn"].view(samples * layers, heads, size, size))).means.view(samples, layers, heads, size)
    torch.testing.assert_close(found, data["importance"], atol=1e-5, rtol=1e-5)
    rates = measures.sink_rate(found, float(facts["epsilon"]))
    torch.testing.assert_close(rates.float(), data["sink_percent_per_position"], atol=1e-4, rtol=0)
    assert rates[0] > rates[1:8].max(), "the golden matrix has its sink on the first position"


@pytest.mark.parametrize("name", ["massive_set_mean", "massive_set_zero"])
def test_massive_activations_are_those_of_the_official_code(name):
    data, facts = golden(f"sink-metrics/{name}")
    hidden = data["hidden"][0]
    torch.testing.assert_close(measures.largest_and_median(hidden), data["top3_median"], atol=1e-5, rtol=1e-6)
    dims = json.loads(facts["dims"].replace("(", "[").replace(")", "]"))
    wanted = {(int(t), int(d)) for _, t, d in data["changed_index"]}
    found = measures.massive_activations(hidden, ratio=50, absolute=20)
    assert {(m.position, m.dim) for m in found if m.dim in dims} >= {(t, d) for t, d in wanted if abs(hidden[t, d]) > 60}
    assert [abs(m.value) for m in found] == sorted((abs(m.value) for m in found), reverse=True)
    assert all(m.value == float(hidden[m.position, m.dim]) for m in found)


@pytest.mark.parametrize("name", ["basic", "batch"])
def test_decorrelation_equals_the_official_code(name):
    data, facts = golden(f"avsr-sinks/decorrelation_{name}")
    cosines = measures.similarity_with_first(data["hidden_states"])
    found = measures.decorrelation(cosines[1:-1], int(facts["non_output_tokens_count"]))
    assert found == pytest.approx(float(data["decorrelation"]), abs=1e-6)
    assert (cosines[1:-1, :, 3] > 0.9).all(), "the planted token points where the first one points"


def test_norms_equal_the_official_code():
    data, _ = golden("sink-metrics/norms")
    samples, layers, heads, size, dim = data["keys"].shape
    table = SiteTable([Site(f"layer{n}", n, "decoder", "self", heads, heads, dim, True) for n in range(layers)], {})
    reader = Reader(table, Settings(), [0] * samples)
    clock = Clock("encode")
    for site in table:
        states, key, value = (data[name][:, site.layer] for name in ("hidden_states", "keys", "values"))
        reader.look(Observation(states, site, clock, None, {}))
        reader.count(Call(torch.zeros_like(key), key, value, is_causal=True, site=site), [])
    for sample in reader.samples:
        sample.tokens = ["x"] * size
    norms = Analysis({}, "decoder", reader.samples, list(range(layers)), 0.3, 0, Settings()).norms()
    torch.testing.assert_close(norms["hidden"], data["hidden_norm"][:-1], atol=1e-5, rtol=1e-5)
    for name in ("key", "value"):
        torch.testing.assert_close(norms[name], data[f"{name}_norm"], atol=1e-5, rtol=1e-5)


def test_decorrelation_runs_from_0_to_1():
    same = torch.randn(1, 1, 1, 8).expand(3, 2, 6, 8) * torch.rand(3, 2, 6, 1).add(0.1)
    assert measures.decorrelation(measures.similarity_with_first(same), 5) == pytest.approx(1, abs=1e-6)
    across = torch.eye(6).expand(3, 2, 6, 6)
    assert measures.decorrelation(measures.similarity_with_first(across), 5) == 0
    hidden = torch.randn(2, 3, 6, 8)
    scaled = hidden * torch.rand(2, 3, 6, 1).add(0.1)
    torch.testing.assert_close(measures.similarity_with_first(scaled), measures.similarity_with_first(hidden))
    with pytest.raises(ReattendError, match=r"1\.\.5"):
        measures.decorrelation(torch.zeros(2, 6), 6)


# -- the census against the whole matrix -----------------------------------------------------------------------------


def dense(weights: torch.Tensor, window: int = 10, low: int = 10, high: int = 50):
    """The formulas on the matrix [B, H, T, T]."""
    size = weights.shape[-1]
    gap = (torch.arange(size)[:, None] - torch.arange(size)).clamp_min(0).float()
    band = ((gap >= low) & (gap <= high)).float()
    ahead = (weights * band).sum(2) / band.sum(0).clamp_min(1)
    return (weights * gap).sum(3), (weights * gap.clamp_max(window)).sum(3), ahead


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("chunk", [1 << 10, 1 << 22])
def test_census_equals_the_dense_formulas(monkeypatch, edited, chunk):
    from reattend.interventions.engine import kernels, statistics

    monkeypatch.setattr(statistics, "CHUNK_WEIGHTS", chunk)
    monkeypatch.setattr(kernels, "CHUNK_VALUES", chunk)
    call = random_call()
    bias = torch.zeros(70).index_fill(0, torch.tensor([5]), 3.0)
    edits = [KeyBias(bias=bias, heads=(1,)), Gain(columns=torch.arange(70) == 0, factor=0.5)] if edited else []
    weights = reference_with_weights(call, edits)[1]
    found = census(call, edits)
    distance, near, ahead = dense(weights)
    close = dict(atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.means, weights.sum(2) / torch.arange(70, 0, -1), **close)
    torch.testing.assert_close(found.sums.sum(dim=2), torch.full((2, 4), 70.0))
    torch.testing.assert_close(found.distance, distance, **close)
    torch.testing.assert_close(found.near, near, **close)
    torch.testing.assert_close(found.ahead / found.ahead_rows[:, None].clamp_min(1), ahead, **close)
    assert (found.ahead_rows[:, -10:] == 0).all() and (found.ahead_rows[:, :-10] > 0).all()
    assert (found.near >= 0).all() and (found.near <= 10 + 1e-4).all()
    torch.testing.assert_close(found.span, distance.mean(dim=2), **close)


def test_known_matrices():
    size = 40
    uniform = torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]
    identity = torch.eye(size)
    first = torch.zeros(size, size).index_fill(1, torch.tensor([0]), 1.0)
    found = census(call_with(torch.stack([uniform, identity, first])[None]))
    rows = torch.arange(size).float()
    expected = torch.stack([(1 / (rows[k:] + 1)).mean() for k in range(size)])
    torch.testing.assert_close(found.means[0, 0], expected)
    torch.testing.assert_close(found.means[0, 1], 1 / torch.arange(size, 0, -1).float())
    assert found.span[0, 1] < 1e-20 and found.near[0, 1].max() < 1e-20
    assert measures.sink_rate(found.means[:, 2:], 0.3)[0] == 100
    torch.testing.assert_close(found.near[0, 2], rows.clamp_max(10))
    torch.testing.assert_close(found.span[0, 2], rows.mean())


def test_rows_and_left_padding():
    call = random_call(n=30, batch=1)
    answer = torch.arange(30)[None] >= 20
    some = census(call, rows=answer)
    weights = reference_with_weights(call, [])[1]
    torch.testing.assert_close(some.span[0], dense(weights)[0][0, :, 20:].mean(dim=1), atol=1e-4, rtol=1e-4)
    assert (some.distance[..., :20] == 0).all()
    torch.testing.assert_close(some.means, census(call).means), "the mean weights always are those of all rows"
    # the same call behind five positions of padding
    padding = torch.arange(35)[None] < 5
    shift = [torch.nn.functional.pad(x, (0, 0, 5, 0), value=9.0) for x in (call.query, call.key, call.value)]
    mask = (torch.ones(35, 35, dtype=torch.bool).tril() & ~padding)[None, None]
    mask = mask | torch.eye(35, dtype=torch.bool)
    tokens = TokenMap(1, 35, 35, {"padding": padding})
    padded = census(Call(*shift, mask=mask, tokens=tokens), rows=torch.nn.functional.pad(answer, (5, 0)))
    torch.testing.assert_close(padded.means[..., 5:], some.means, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded.span, some.span, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.ahead[..., 5:], some.ahead, atol=1e-5, rtol=1e-4)
    assert (padded.means[..., :5] == 0).all()


def test_columns_are_counted_where_their_tokens_are():
    call = random_call(n=12, batch=1)
    call.is_causal = False
    order = torch.randperm(12)
    torch.testing.assert_close(census(call, [Reorder(order=order)]).means, census(call).means, atol=1e-6, rtol=1e-5)
    order[1] = order[0]  # what a token gets where it stands twice is its own
    torch.testing.assert_close(census(call, [Reorder(order=order)]).sums.sum(dim=2), torch.full((1, call.num_heads), 12.0))
    with pytest.raises(ReattendError, match="merged"):
        census(call, [PoolKV(groups=torch.arange(12) // 2)])


# -- what is made of the numbers -------------------------------------------------------------------------------------


def test_planted_dimensions_are_found():
    hidden = torch.randn(5, 600)
    hidden[0, 17] = hidden[3, 17] = 2000.0
    assert [(m.position, m.dim) for m in measures.massive_activations(hidden)] in ([(0, 17), (3, 17)], [(3, 17), (0, 17)])
    assert measures.massive_activations(torch.randn(5, 600)) == []
    scores = torch.rand(2, 6, 50)
    scores[:, 1:5, 31], scores[:, 3:, 8], scores[:, 4, 9] = 30, 25, 99
    assert measures.sink_dimensions(scores) == [31, 8]
    assert measures.sink_dimensions(torch.zeros(1, 3, 50)) == []


def test_sets_and_anchors():
    near, far = measures.local_and_global(torch.tensor([5.0, 1.0, 9.0, 3.0, 7.0]), 0.4, 0.2)
    assert near.tolist() == [1, 3] and far.tolist() == [2]
    assert measures.strongest(torch.tensor([1.0, float("nan"), 5.0, 3.0, 0.0]), 0.5) == [2, 3]
    waad = torch.tensor([1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 8.0])
    assert measures.transitions(waad).tolist() == [8, 8, 0, 0, 0, 7]
    assert measures.dominated_anchors(waad, [3, 5, 6], low=2, jump=5) == [(3, 0)]
