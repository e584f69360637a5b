"""The plain model's queries decide how far the real pass is edited."""

import torch
from reattend.hooks import Capture, Edits, Plan, Probe, attach, sites
from reattend.interventions import HeadGain
from tiny_llama import tiny_llama


def use() -> None:
    model, ids = tiny_llama(), torch.arange(2, 14)[None]
    table, asked = sites(model), []

    def read(call, edits):
        call.memory["strength"] = call.query[0].norm(dim=(1, 2)).softmax(0)  # one number per head

    def edit(call):
        asked.append(call.clock.phase)
        return HeadGain(factor=1 + call.memory["strength"])

    with attach(model, [Plan("told before", [Probe([Capture(table[:1], read)]), Edits(table, edit)])]) as session:
        model(ids)
    assert asked == ["prefill"] * 3 and session.forwards == 1
