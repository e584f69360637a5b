"""Half the weight of the first token goes to all others, in the last two layers."""

import torch
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import Transfer
from tiny_llama import tiny_llama


def use() -> None:
    model, ids = tiny_llama(), torch.arange(2, 14)[None]
    before = model(ids).logits
    last = sites(model).stack("decoder").layers(1, 2)
    step = Edits(last, lambda call: Transfer(source=[0], strength=0.5))
    with attach(model, [Plan("away from the first", [step])]) as session:
        after = model(ids).logits
    assert not torch.allclose(before, after) and session.stats["away from the first"][last[0].name] == 1
    assert torch.equal(model(ids).logits, before)
