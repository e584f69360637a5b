"""How long hidden states are at each layer's input."""

import torch
from reattend.hooks import Observe, Plan, attach, sites
from tiny_llama import tiny_llama


def use() -> None:
    model, ids, lengths = tiny_llama(), torch.arange(2, 14)[None], {}

    def tap(seen):
        lengths[seen.site.layer] = seen.hidden.norm(dim=-1)  # [batch, tokens]

    with attach(model, [Plan("look", [Observe(sites(model), tap)])]):
        model(ids)
    assert sorted(lengths) == [0, 1, 2] and lengths[0].shape == (1, 12)
    assert torch.equal(lengths[0], model.model.embed_tokens(ids).norm(dim=-1))
