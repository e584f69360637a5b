"""headhunter: the heads of a profile, here those of the default layer of every denoiser; how they are searched is in test_headhunter.py."""

from __future__ import annotations

from typing import Any

import torch
from example import Example
from reattend.recipes.kit.denoisers import default_layers


def profile(model: Any, tokenizer: Any) -> Any:
    """As a search would leave it that found all heads of one layer."""
    import reattend
    from reattend.recipes import Profile
    from reattend.recipes.kit.denoisers import image_layers
    from reattend.recipes.kit.profile import fingerprint

    table = reattend.sites(model)
    (layer, *_) = default_layers(table)
    heads = range(image_layers(table)[layer][0].num_heads or 0)
    facts = {"objective": "none", "perturbation": "identity"}
    return Profile("headhunter", fingerprint(model), {"selected": torch.tensor([[layer, head] for head in heads])}, facts)


EXAMPLES = {"": Example("diffusion", {"strength": 1.0}, off={"strength": 0}, layers=1, profile=profile)}
BAD = [
    ({"strength": 1.5}, "strength"),
    ({"top": 0}, "top"),
    ({"heads": [(0, 1)], "profile_path": "x"}, "heads or profile_path, not both"),
    ({"heads": []}, "must not be empty"),
    ({"profile_path": []}, "must not be empty"),
    ({"start": 0.6, "stop": 0.5}, "start 0.6 must lie below stop 0.5"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

OWN = "headhunter:profile_path={headhunter}"
TRIED = {
    "pictures": [
        OWN,
        f"{OWN}:strength=1:scale=1",
        f"{OWN}:strength=1:scale=2",
        f"{OWN}:strength=1:scale=2:random_heads=true",
    ]
}
PAPER = {
    "pictures": "SD3, PickScore of 50 unseen prompts: 19.66 without guidance, 20.70 with 24 heads, 20.87 with CFG, 20.92 with both"
}
PROFILED = {"scenes": 12, "k": 4, "rounds": 1, "scale": 2.0, "layers": [6, 7, 8, 9]}
TIMED = {"headhunter, 2 heads": lambda sites: {"heads": [(default_layers(sites)[0], head) for head in (0, 2)], "strength": 1.0}}
# what the search finds
HEADS = [[8, 1], [7, 3], [7, 2], [7, 0]]
GALLERY = {"parameters": {"heads": HEADS, "strength": 1.0, "scale": 2.0}, "look": "Four heads that were searched for, alone."}
