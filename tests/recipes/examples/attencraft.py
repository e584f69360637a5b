"""attencraft: pipelines with a UNet alone, which it reads; the official maps and masks of its own attention weights."""

import json

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.interventions import Call, Clock, Memory, Site, TokenGrid, TokenMap
from reattend.recipes.attencraft import leading
from reattend.recipes.kit.descent import Looked

from examples.attend_and_excite import REFUSED as NO_UNETS

REFUSED = {
    **{name: said and "reads a UNet's attention to itself" for name, said in NO_UNETS.items()},
    **{name: said for name, said in NO_UNETS.items() if name.startswith("UNet2D") or "ControlNet" in name},
    "UNetMotionModel": "reads pictures",
}
SKIPS = {"guidance": "it reads, and changes no picture: see tests/recipes/test_attencraft.py"}
EXAMPLES = {
    "": Example("diffusion", {"columns": [[1], [2, 3]]}, reads=True, skips=SKIPS, refused=REFUSED),
    "words": Example("diffusion", {"words": ["a"], "timestep": 999}, reads=True, skips=SKIPS, refused=REFUSED),
}
BAD = [
    ({}, "give words of the things to find, or columns"),
    ({"words": ["red"], "columns": [[1]]}, "give words of the things to find, or columns"),
    ({"words": []}, "at least one thing"),
    ({"words": [[]]}, "at least one thing"),
    ({"columns": [[]]}, "at least one thing"),
    ({"words": ["red"], "image": []}, "at least one picture"),
    ({"words": ["red"], "timestep": 1000}, "timestep"),
    ({"words": ["red"], "threshold": 2}, "threshold"),
]

GOLDEN = ("two_concepts", "with_descriptions")
LATENTS = (64, 64)


def golden(name, run):
    """The weights are given to the readers as scores: of each layer, of the text and of the picture itself."""
    data, facts = golden_file("attencraft", name)
    tokens, targets = json.loads(facts["tokens"]), json.loads(facts["target_indices"])
    if json.loads(facts["replaced_by_description"]):
        # between "of" or "and" and the next of them or the end
        edges = [place for place, token in enumerate(tokens) if token in (539, 537, 49407)]
        things = [list(range(first + 1, last)) for first, last in zip(edges, edges[1:], strict=False)]
        wanted = torch.cat([data["refined_maps_descriptive"][:2], data["refined_maps"][2:]])
    else:
        things, wanted = [[place] for place in targets[:2]], data["refined_maps"]
    recipe = reattend.recipe("attencraft", columns=things, threshold=float(facts["threshold"]))
    looked, clock = Looked(), Clock("denoise", 0, branches={"conditional": torch.ones(1, dtype=torch.bool)})

    def read(kind, scores, side, number):
        memory = Memory()
        memory["looked"] = looked
        grid = TokenGrid(0, torch.arange(side * side).view(1, side, side), whole=LATENTS)
        picture = TokenMap(1, side * side, side * side, {"image": torch.ones(1, side * side, dtype=torch.bool)}, [grid])
        columns = torch.arange(scores.shape[1])
        roles = {f"craft.{n}": torch.isin(columns, torch.tensor(own))[None] for n, own in enumerate(things)}
        text = TokenMap(1, len(columns), len(columns), roles)
        tokens = {"tokens": text, "query_tokens": picture} if kind == "cross" else {"tokens": picture}
        eye = torch.eye(scores.shape[1])[None, None]
        site = Site(f"{kind}.{number}", number, "denoiser.up", kind, 1, 1, len(columns), False, "sdpa")
        call = Call(scores[None, None], eye, eye, scale=1.0, site=site, clock=clock, memory=memory, **tokens)
        (recipe.read_places(call, []) if kind == "self" else recipe.read_words(list(roles), call, []))

    for layer in range(int(facts["layers"])):
        read("cross", data[f"cross_layer{layer}"].log(), 16, layer)
    read("self", data["self_features"] @ data["self_features"].T / float(facts["self_temperature"]), 32, 0)
    (found,) = recipe.composed(looked, 1, LATENTS)
    yield found.maps, wanted
    masks = torch.stack([data["mask_class_a"], data["mask_class_b"], data["mask_background"]])
    yield found.masks().float(), masks.float()
    yield leading(found.maps[[1, 0, 2]], recipe.threshold).float(), masks[[1, 0, 2]].float()


# -- what the benchmarks ask, see benchmarks/methods.py

FLOORS = {"attencraft": ("one pass of the prompt's row in a run, whatever its steps", "")}
TRIED = {
    "masks": [
        "attencraft",
        "attencraft:spread=1:threshold=0.02",
        "attencraft:cross_resolution=16:spread=1:threshold=0.02",
        "attencraft:cross_resolution=16:spread=0",
        "attencraft:cross_resolution=16:spread=0:threshold=0.05",
    ]
}
GALLERY = {
    "parameters": {"cross_resolution": 16, "spread": 0},
    "look": "Whether each mask is one whole thing, and none is swapped with another.",
}
