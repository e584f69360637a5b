"""A prompt whose first token draws most of the attention gets another one before it."""

import torch
from reattend.hooks import Capture, Plan, Rewrite, attach, sites
from reattend.interventions import row_weights
from tiny_llama import tiny_llama


def use() -> None:
    model, inputs = tiny_llama(), {"input_ids": torch.arange(2, 14)[None]}
    last = sites(model).layers(-1, -1)

    def read(call, edits):
        call.memory["first"] = row_weights(call, edits, torch.tensor([11]))[:, :, 0, 0].mean()

    def change(request):
        if request.look()["first"] < 0.01:
            return None
        ids = request.arguments["input_ids"]
        return {"input_ids": torch.cat([torch.ones_like(ids[:, :1]), ids], dim=1)}

    with attach(model, [Plan("one more", [Rewrite(change, look=[Capture(last, read)])])]) as session:
        inputs = session.rewrite(inputs)
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert inputs["input_ids"][0, :2].tolist() == [1, 2] and out.shape == (1, 15)
    assert session.stats == {"one more": {"requests": 1}}
