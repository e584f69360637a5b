"""soft-injection: a made-up task, with shares of all heads."""

import torch
from example import Example
from reattend.recipes import Profile
from reattend.recipes.kit.profile import fingerprint


def profile(model, tokenizer):
    torch.manual_seed(2)
    tensors = {"task_embedding": torch.randn(1, 4, 4, 8), "alpha": torch.rand(4, 4)}
    return Profile("soft-injection", fingerprint(model), tensors, {"tasks": ["made up"]})


EXAMPLES = {
    "": Example(
        "llm", off={"scale": 0}, acts=["prefill"], refused={"in pieces": "comes in pieces"}, profile=profile, operations=(0, 0)
    )
}
BAD = [({"scale": 1.5}, "scale"), ({"top_k": 0}, "top_k")]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"soft-injection": lambda subject: {"profile_path": subject.evenly("soft-injection")}}
OWN = "soft-injection:profile_path={soft-injection opposite}"
TRIED = {"tasks": [f"{OWN}:scale=0.5", OWN, f"{OWN}:alpha=0.5"]}
PAPER = {"tasks": "12 models of 4B to 70B, 57 tasks, 10.2 to 14.3 points over ten demonstrations (abstract)"}
PROFILED = {"prompts": 12, "iterations": 40, "check_every": 20}
