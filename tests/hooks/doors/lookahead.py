"""Of the two likeliest next tokens the one whose query is longer gains."""

import torch
from reattend.hooks import Lookahead, Plan, attach, sites
from tiny_llama import tiny_llama


def use() -> None:
    model, ids, tried = tiny_llama(), torch.arange(2, 14)[None], []
    last = sites(model).layers(-1, -1)

    def score(trials):
        tried.append(trials.ids[0].tolist())
        gain = torch.stack(trials.readings, dim=1)  # [batch, tokens that were tried]
        return trials.logits.scatter_add(1, trials.ids, gain)

    step = Lookahead(2, last, lambda call: call.query[:, :, -1].norm(dim=(1, 2)), score)
    with attach(model, [Plan("look ahead", [step])]):
        after = model(ids, use_cache=True).logits[0, -1]
    gained = after - model(ids).logits[0, -1]
    assert sorted(gained.nonzero()[:, 0].tolist()) == sorted(tried[0])
