"""What methods that read blocks of keys share: their layers, the rows they are for, and what stays dense."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from reattend.hooks import sites
from reattend.hooks.trackers.caches import cache_name
from reattend.interventions import Blocks, Call, Keep, ReattendError, ReattendWarning
from reattend.recipes.kit.apply import apply
from reattend.recipes.kit.base import Info
from reattend.recipes.kit.sparse import BlockSparse
from tiny_llama import IDS, logits, tiny_llama
from transformers import DynamicCache


class Near(BlockSparse):
    """Rows read their own block and the one before."""

    slug = "near"
    info = Info("Near blocks.", "None", 2026, "0000.00000", ("sparsity",), ("llm",), "free")
    reads: ClassVar[Literal["prompt", "answer", "all"]] = "all"
    least: int = 0

    @property
    def dense_until(self) -> int:
        return self.least

    def keep(self, call: Call, written: int) -> Keep:
        places = [torch.arange(-(-size // self.block_size)) for size in (call.total, call.num_keys)]
        near = (places[0][:, None] - places[1]).abs() < 2
        rows = torch.arange(call.total - call.num_queries, call.total) // self.block_size
        return Keep(pattern=near[rows][:, torch.arange(call.num_keys) // self.block_size])


class OfPrompts(Near):
    reads = "prompt"


class OfAnswers(Near):
    reads = "answer"


def answered(model, recipe) -> tuple[torch.Tensor, int]:
    """(logits of twelve tokens of a prompt and of three more, how often it acted)."""
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad(), apply(model, recipe) as session:
        for ids in (IDS[:1], *torch.tensor([5, 7, 9]).view(3, 1, 1)):
            parts.append(model(ids, **{cache_name(model): cache}, use_cache=True).logits)
    return torch.cat(parts, dim=1), session.applied


def test_rows_that_a_method_is_not_for_read_everything():
    model = tiny_llama()
    with pytest.warns(ReattendWarning, match="never acted"):
        plain, none = answered(model, Near(block_size=4, least=100))
    assert none == 0
    everything, prompt, answer = (answered(model, kind(block_size=4)) for kind in (Near, OfPrompts, OfAnswers))
    assert (everything[1], prompt[1], answer[1]) == (12, 3, 9)
    assert torch.equal(answer[0][:, :12], plain[:, :12]) and not torch.equal(answer[0][:, 12:], plain[:, 12:])
    # the first two blocks see all there is to see
    torch.testing.assert_close(prompt[0][:, :8], plain[:, :8], atol=1e-5, rtol=1e-4)
    assert (prompt[0][:, 8:12] - plain[:, 8:12]).abs().max() > 1e-3
    torch.testing.assert_close(everything[0][:, :12], prompt[0][:, :12])


def test_dense_layers_and_short_calls_keep_their_bits():
    model, recipe = tiny_llama(), Near(block_size=4, dense_layers=[0, 2])
    assert [site.layer for site in recipe.sparse(sites(model))] == [1]
    plain = logits(model)
    with apply(model, recipe) as session:
        assert not torch.equal(logits(model), plain)
    assert set(session.stats["near"]) == {"model.layers.1.self_attn"}
    with pytest.warns(ReattendWarning, match="never acted"), apply(model, Near(block_size=4, least=12)):
        assert torch.equal(logits(model), plain)


def test_a_pattern_of_blocks_gives_the_same():
    class Same(Near):
        def keep(self, call: Call, written: int) -> Keep:
            places = torch.arange(-(-call.num_keys // self.block_size))
            return Keep(pattern=Blocks((places[:, None] - places).abs() < 2, self.block_size))

    model = tiny_llama()
    with apply(model, Near(block_size=4)):
        wanted = logits(model)
    with apply(model, Same(block_size=4)):
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dense_layers": [3]}, "dense_layers names layer 3; .* has layers 0 to 2"),
        ({"dense_layers": [0, 1, 2]}, "dense_layers leaves no layer of .* that reads blocks"),
        ({"dense_layers": [-1]}, "counted from 0"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_bad_input(given: dict, words: str):
    with pytest.raises(ReattendError, match=words):
        apply(tiny_llama(), Near(**given))
