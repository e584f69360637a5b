"""primecomposer: pipelines with a UNet alone; the official attention on its own inputs."""

import json

import reattend
import torch
from example import Example
from golden_files import golden_file
from PIL import Image
from reattend.interventions import Call, Clock, Memory, Site, TokenGrid, TokenMap
from reattend.recipes.kit.pasting import Placed

from examples.attend_and_excite import REFUSED as NO_UNETS

REFUSED = {
    **{name: said and "changes a UNet's self-attention" for name, said in NO_UNETS.items()},
    **{name: said for name, said in NO_UNETS.items() if "UNet" in name and name != "UNetMotionModel" or "ControlNet" in name},
    "UNetMotionModel": "composes pictures",
}


def photo(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((pixels * 255).byte().numpy())


MASK = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
GIVEN = {"background": photo(1), "reference": photo(2), "mask": MASK, "box": [0.0, 0.25, 0.6, 0.85], "scores_until": 1.0}


def changed(kinds):
    """The latents, and all sites of these kinds."""
    return lambda sites: 1 + len(sites.stack("denoiser").kind(*kinds))


BESIDE = "it also changes the latents before the first step: see tests/recipes/test_primecomposer.py"
EXAMPLES = {
    "": Example("diffusion", GIVEN, layers=changed(["self"]), further=True, skips={"guidance": BESIDE}, refused=REFUSED),
    "words": Example(
        "diffusion",
        {**GIVEN, "words": ["a"], "same_domain": False, "centred": False, "object_until": 0.0},
        layers=changed(["self", "cross"]),
        further=True,
        skips={"guidance": BESIDE},
        refused=REFUSED,
    ),
}
BAD = [
    ({}, "background"),
    ({**GIVEN, "background": []}, "at least one picture"),
    ({**GIVEN, "reference": 3}, "path of a file, or a PIL picture"),
    ({**GIVEN, "mask": [[0, 0], [0, 0]]}, "mask is empty"),
    ({**GIVEN, "box": [0.5, 0.5, 1.5, 1.0]}, "0 <= left < right <= 1"),
    ({**GIVEN, "box": [0.5, 0.5, 0.5, 1.0]}, "0 <= left < right <= 1"),
    ({**GIVEN, "box": torch.ones(3, 3)}, "box: a box must be"),
    ({**GIVEN, "box": []}, "box: a box must be"),
    ({**GIVEN, "words": ["a"], "columns": [[1]]}, "words of the thing or columns, not both"),
    ({**GIVEN, "words": []}, "words must hold at least one entry"),
    ({**GIVEN, "columns": [[]]}, "columns must hold at least one entry"),
    ({**GIVEN, "scores_until": 2}, "scores_until"),
]

GOLDEN = ("inject_down", "inject_up", "inject_full_rect", "rca")
SELF = Site("down_blocks.0.attn1", 0, "denoiser.down", "self", 2, 2, 4, False, "sdpa")
CROSS = Site("down_blocks.0.attn2", 1, "denoiser.down", "cross", 2, 2, 4, False, "sdpa")


def placed(data, facts):
    """The official geometry, in pixels of a picture of 512 x 512."""
    sides, where = int(facts["target_height"]), json.loads(facts["geometry"])
    size = where["height"] / sides, where["width"] / sides
    return Placed((0.5, 0.5), (where["center_row"], where["center_col"]), size, data["seg_map_latent"].bool())


def image_tokens(rows, side):
    grids = [TokenGrid.of_image(row, torch.arange(side * side).view(side, side)) for row in range(rows)]
    return TokenMap(rows, side * side, side * side, {"image": torch.ones(rows, side * side, dtype=torch.bool)}, grids)


def halves(rows):
    conditional = torch.arange(rows) >= rows // 2
    return {"unconditional": ~conditional, "conditional": conditional}


def golden(name, run):
    """The pass of the reference and the scores it leaves, then [unconditional, conditional] rows of the generator."""
    data, facts = golden_file("primecomposer", name)
    heads, side, where = int(facts["heads"]), int(facts["side"]), placed(data, facts)
    memory = Memory()
    memory["placed"] = [where]
    tokens = image_tokens(2, side)
    if name == "rca":
        recipe = reattend.recipe("primecomposer", **{**GIVEN, "columns": [json.loads(facts["ref_id_list"])]})
        q, k, v = (data[key].unflatten(0, (2, heads)) for key in "qkv")
        composed = torch.zeros(2, 77, dtype=torch.bool)
        composed[1, json.loads(facts["ref_id_list"])] = True
        text = TokenMap(2, 77, 77, {"composed": composed, "text": torch.ones(2, 77, dtype=torch.bool)})
        call = Call(
            q, k, v, site=CROSS, clock=Clock("denoise", 0, 20, branches=halves(2)), tokens=text, query_tokens=tokens,
            memory=memory,
        )  # fmt: skip
        yield run(call, []).transpose(1, 2).flatten(2), data["out_plain"]
        yield run(call, [recipe.restrict(call)]).transpose(1, 2).flatten(2), data["out"]
        return
    recipe = reattend.recipe("primecomposer", **GIVEN)

    def projected(x):
        return [(x @ data[f"w.to_{one}"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for one in "qkv"]

    # the official pass takes queries from its last row, keys and values from the one before, which is the same picture under the same prompt
    q, k, v = projected(data["x_correlation"])
    memory["looking"], memory["seen"] = True, {}
    clock = Clock("denoise", 0, 20, branches={"conditional": torch.ones(1, dtype=torch.bool)})
    call = Call(q[3:], k[2:3], v[2:3], site=SELF, clock=clock, tokens=image_tokens(1, side), memory=memory)
    recipe.note(call, [])
    yield run(call, recipe.alone(call)).transpose(1, 2).flatten(2)[0], data["out_correlation"][3]
    query, keys = memory["seen"][SELF.name]
    yield call.scaling * query[0] @ keys[0].transpose(1, 2), data["prior_scores"]
    del memory["looking"]
    q, k, v = projected(data["x_generator"])
    call = Call(q, k, v, site=SELF, clock=Clock("denoise", 0, 20, branches=halves(2)), tokens=tokens, memory=memory)
    yield run(call, []).transpose(1, 2).flatten(2), data["out_plain"]
    yield run(call, recipe.correlate(call)).transpose(1, 2).flatten(2), data["out_injected"]


# -- what the benchmarks ask, see benchmarks/methods.py

FLOORS = {"primecomposer": ("a pass of each of two pictures for every step, and one more of the prompt's row at 2 of 4", "")}
TRIED = {
    "composition": [
        "primecomposer",
        "primecomposer:scores_until=0.2",
        "primecomposer:background_until=1",
        "primecomposer:centred=false",
        "primecomposer:same_domain=false:object_until=0.3",
    ]
}
GALLERY = {"look": "Whether the thing is in its place, as itself, and has the light of the picture that it went into."}
