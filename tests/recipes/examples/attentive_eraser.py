"""attentive-eraser: the second half of the layers of every denoiser, with a box; the official class on its masks."""

import json

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.interventions import Call, Clock, Site, TokenGrid, TokenMap
from reattend.recipes.kit.denoisers import image_layers


def redirected(sites):
    """A UNet's up blocks, the second half of other models."""
    layers = image_layers(sites)
    up = [table for table in layers.values() if table[0].stack == "denoiser.up"]
    return sum(len(table) for table in up or list(layers.values())[len(layers) // 2 :])


EXAMPLES = {
    "": Example(
        "diffusion",
        {"boxes": [[0.25, 0.25, 0.75, 0.6]]},
        off={"scale": 0},
        layers=redirected,
        refused={"SanaTransformer2DModel": "cannot be intercepted: .*linear attention"},
    )
}
BOX = [[0.25, 0.25, 0.75, 0.6]]
BAD = [
    ({}, "give a mask of what is to go, or boxes"),
    ({"boxes": BOX, "mask": [[0, 1]]}, "give a mask of what is to go, or boxes"),
    ({"boxes": []}, "boxes: must not be empty"),
    ({"boxes": [[]]}, "boxes: must not be empty"),
    ({"boxes": [BOX, BOX[0]]}, "boxes: must be a list of boxes for all pictures, or a list of such lists"),
    ({"boxes": [[10, 20, 300, 400]]}, "boxes: a box must be .*divide pixels by these"),
    ({"boxes": [[0.1, 0.2, 0.5]]}, "boxes: a box must be"),
    ({"boxes": "0.1,0.2,0.5,0.5"}, "boxes: a box must be"),
    ({"boxes": [[0, 0, 1, 0.5], [0, 0.5, 1, 1]]}, "boxes: it covers the whole picture"),
    ({"boxes": [[0.2, 0.2, 0.8, 0.8]], "grow": 0.25}, "boxes: it covers the whole picture"),
    ({"boxes": [[0.5, 0.5, 1.5, 1.0]]}, "0 <= left < right <= 1"),
    ({"boxes": [[0, 0, 1, 1]]}, "boxes: it covers the whole picture"),
    ({"mask": [[0, 0], [0, 0]]}, "mask is empty"),
    ({"mask": [0.1, 0.1, 0.5, 0.5]}, "mask: a mask must be a picture, its path, or .*boxes go by a name of their own"),
    ({"boxes": BOX, "invert": True}, "invert needs image"),
    ({"boxes": BOX, "image": []}, "at least one picture"),
    ({"boxes": BOX, "image": 3}, "path of a file, or a PIL picture"),
    ({"boxes": BOX, "scale": -1}, "scale"),
    ({"boxes": BOX, "factor": 2}, "factor"),
    ({"boxes": BOX, "layers": []}, "must not be empty"),
]

GOLDEN = (
    "suppress_phase", "mask_only_phase", "phase_boundary_step9", "empty_mask", "layer_outside_range", "cross_attention_untouched",
)  # fmt: skip
SELF = Site("up_blocks.1.attn1", 7, "denoiser.up", "self", None, None, 8, False, "sdpa")


def golden(name, run):
    """[source row, redirected row], and the mask of the tokens."""
    data, facts = golden_file("attentive-eraser", name)
    heads, size = int(facts["heads"]), int(facts["image_size"])
    q, k, v = (data[key].unflatten(0, (2, heads)) for key in "qkv")
    side = data["mask_tokens"].shape[0]
    rectangles = json.loads(facts["mask_rects_y0y1x0x1"])
    mask = torch.zeros(size, size, dtype=torch.bool)
    for top, bottom, left, right in rectangles:
        mask[top:bottom, left:right] = True
    # an empty mask is refused, so that it is no mask to the recipe
    recipe = reattend.recipe("attentive-eraser", mask=mask, factor=float(facts["ss_scale"])) if rectangles else None
    if recipe is not None:
        yield recipe.places(0, 1, side, side).float(), data["mask_tokens"].float()
    first, last = json.loads(facts["layer_range"])
    inside = first <= int(facts["block_index"]) < last and facts["is_cross"] == "False"
    grids = [TokenGrid.of_image(row, torch.arange(side * side).view(side, side)) for row in (0, 1)]
    tokens = TokenMap(2, side * side, side * side, {"image": torch.ones(2, side * side, dtype=torch.bool)}, grids)
    branches = {"conditional": torch.tensor([True, False]), "attentive-eraser": torch.tensor([False, True])}
    clock = Clock("denoise", int(facts["cur_step"]), branches=branches, source=torch.tensor([0, 0]))
    edits = recipe.weaken(None, Call(q, k, v, site=SELF, clock=clock, tokens=tokens)) if recipe and inside else []
    yield run(Call(q, k, v, site=SELF, clock=clock), edits).transpose(1, 2).flatten(2), data["out"]


# -- what the benchmarks ask, see benchmarks/methods.py

# a box is filled by what the model takes for background: on the zoo's pictures the flat reading (factor) costs more than it gives
TRIED = {
    "removal": [
        "attentive-eraser:scale=3:factor=1",
        "attentive-eraser:scale=3",
        "attentive-eraser",
        "attentive-eraser:scale=3:layers=[8,9]",
        "attentive-eraser:scale=3:invert=true",
    ]
}
GALLERY = {
    "parameters": {"scale": 3.0},
    "guidance": 1.0,
    "look": "Whether the largest thing of each picture is gone, and whether another one came in its place.",
}
