"""seka: other passages in every row, with made-up directions."""

import torch
from example import NOT_CAUSAL, PASSAGES, WORDS_BESIDE_IMAGES, Example
from reattend.recipes import Profile
from reattend.recipes.kit.profile import fingerprint


def profile(model, tokenizer):
    """Four layers with two key heads of size 8."""
    torch.manual_seed(2)
    tensors = {}
    for layer in range(4):
        for kind in ("relevant", "irrelevant"):
            tensors[f"{layer}.{kind}.vectors"] = torch.linalg.qr(torch.randn(2, 8, 8)).Q
            tensors[f"{layer}.{kind}.values"] = torch.rand(2, 8).sort(descending=True).values
        tensors[f"{layer}.distance"] = tensors[f"{layer}.mean_distance"] = torch.rand(2)
    for layer in range(4):
        tensors[f"{layer}.experts.vectors"] = torch.linalg.qr(torch.randn(4, 2, 8, 8)).Q
        tensors[f"{layer}.experts.values"] = torch.rand(4, 2, 8).sort(descending=True).values
        tensors[f"{layer}.experts.mean_distance"] = torch.ones(4, 2)
    return Profile("seka", fingerprint(model), tensors, {"kinds": []})


OFF = {"gain": 0, "negative_gain": 0}
GIVEN = {"layers": "all", "gain": 2.0}
EXAMPLES = {
    "": Example("llm", GIVEN, {"text": PASSAGES}, OFF, acts=["prefill"], profile=profile, operations=(2, 0)),
    "adaptive": Example("llm", {**GIVEN, "adaptive": True}, {"text": PASSAGES}, OFF, acts=["prefill"], profile=profile),
    "images": Example(
        "lvlm",
        {**GIVEN, "occurrence": -1},
        {"text": WORDS_BESIDE_IMAGES},
        OFF,
        acts=["prefill"],
        text_too=True,
        refused=NOT_CAUSAL,
        profile=profile,
    ),
}
BAD = [
    ({"text": "a", "gain": float("nan")}, "gain"),
    ({"text": "a", "top_pct": 0}, "top_pct"),
    ({"text": "a", "layers": "most"}, "layers must be"),
    ({"text": "a", "layers": [1, 1]}, "layers must be"),
    ({"text": "a", "feature": "squared-exponential"}, "feature"),
    ({"text": "a", "feature": "tanh", "adaptive": True}, "does not go with adaptive"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"seka": lambda subject: {**subject.marked, "profile_path": subject.learned("seka")}}
TRIED = {
    "highlight": [
        "seka:profile_path={seka}:gain=0.4",
        "seka:profile_path={seka}",
        "seka:profile_path={seka}:gain=1.6",
        "seka:profile_path={seka}:adaptive=true",
    ]
}
PAPER = {
    "highlight": "Qwen3-4B, share of CounterFact prompts that follow the marked fact 45.0 to 99.0; in the same table `emphasise` (PASTA) "
    "97.2, `spa` 65.2, adaptive `seka` 98.9 (the official routing, whose numbers are not reproduced here: decisions.md)"
}
