"""Half of the key heads keep a whole prompt, the others its first token and its last three."""

import torch
from reattend.hooks import Evict, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from tiny_llama import tiny_llama


def use() -> None:
    model, ids = tiny_llama(), torch.arange(2, 14)[None]

    def keep(seen):
        stays = torch.ones_like(seen.held)
        stays[:, 1, 1:-3] = False  # [batch, key heads, tokens]
        return stays

    with attach(model, [Plan("half", [Evict(sites(model), keep)])]):
        cache = cache_of(model(ids, use_cache=True))
        after = model(torch.tensor([[5]]), **{cache_name(model): cache}).logits
    assert cache.get_seq_length() == 13 and [part.key.shape[2] for part in cache.layers[0].parts] == [13, 5]
    assert not torch.allclose(after, model(torch.cat([ids, torch.tensor([[5]])], dim=1)).logits[:, -1:])
