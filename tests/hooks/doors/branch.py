"""Logits minus those of the same text with its first four tokens out of sight."""

import torch
from reattend.hooks import Branch, Plan, attach
from tiny_llama import tiny_llama


def use() -> None:
    model, ids = tiny_llama(), torch.arange(2, 14)[None]
    plain = model(ids).logits[:, -1]

    def without_the_first(prompt):
        mask = torch.ones_like(prompt.arguments["input_ids"])
        return {**prompt.arguments, "attention_mask": mask.index_fill(1, torch.arange(4), 0)}

    def fuse(step):
        return 2 * step.logits - step.others[0]

    with attach(model, [Plan("contrast", [Branch([without_the_first], fuse)])]):
        fused = model(ids).logits[:, -1]
    hidden = model(ids, attention_mask=torch.tensor([[0] * 4 + [1] * 8])).logits[:, -1]
    assert torch.allclose(fused, 2 * plain - hidden, atol=1e-5)
