"""How much each token matters for the model's answer: the gradient of its logits with respect to attention, at one layer."""

import torch
from reattend.hooks import Capture, Plan, Probe, attach, sites
from tiny_llama import IDS, tiny_llama


def use() -> None:
    model, seen = tiny_llama(), {}
    table = sites(model).layers(1, 1)

    def at_end(kept, output):
        (one,) = kept[table[0].name]
        loss = output.logits[0, -1].log_softmax(-1).max()
        (slope,) = torch.autograd.grad(loss, one.output)
        seen["last row"] = one.weights_gradient(slope, torch.tensor([-1]))

    probe = Probe([Capture(table, at_end=at_end, grad=True)], early_exit=False, grad=True)
    with torch.inference_mode(), attach(model, [Plan("matter", [probe])]):
        model(IDS)
    assert seen["last row"].shape == (len(IDS), table[0].num_heads, 1, IDS.shape[1]) and bool(seen["last row"].any())
