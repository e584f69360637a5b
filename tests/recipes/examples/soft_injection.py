"""soft-injection: a made-up task, with shares of all heads."""

import torch
from example import Example
from reattend.recipes import Profile
from reattend.recipes.kit.profile import fingerprint


def profile(model, tokenizer):
    torch.manual_seed(2)
    tensors = {"task_embedding": torch.randn(1, 4, 4, 8), "alpha": torch.rand(4, 4)}
    return Profile("soft-injection", fingerprint(model), tensors, {"tasks": ["made up"]})


EXAMPLES = {"": Example("llm", off={"scale": 0}, acts=["prefill"], profile=profile, operations=(0, 0))}
