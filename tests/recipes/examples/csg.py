"""csg: pipelines with a UNet; redistribution alone (scale 0) also on a bare UNet, with columns."""

import json

import torch
from example import Example
from golden_files import golden_file
from reattend.interventions import Call, Clock, Site, TokenGrid, TokenMap
from reattend.recipes.csg import CSG, Layout
from tiny_denoisers import DENOISERS

NO_UNET = "reads a UNet's cross-attention"
OTHERS = ("SD3", "SD3, two images, no guidance", "Flux, two calls", "Flux, no guidance", "PixArt")
REFUSED = {
    **dict.fromkeys((*DENOISERS, *OTHERS), NO_UNET),
    "UNet2DConditionModel": "",
    "UNetMotionModel": "denoises videos",
    **dict.fromkeys(("ControlNet", "ControlNet without weight"), "belongs to another pipeline"),
}
BARE = {**REFUSED, "UNet2DConditionModel, UNet2DConditionModel": "apply the recipe to the pipeline"}
# weights are redistributed beside a ControlNet as they are without
ALONE = {place: said for place, said in REFUSED.items() if "ControlNet" not in place}
BOXES = {"a": [0, 0, 0.5, 0.6], "fox": [0.4, 0.3, 1, 1]}
PLACED = {"boxes": BOXES, "columns": {"a": [1], "fox": [2, 3]}}
TWO = [BOXES, {"map": [0, 0.5, 0.5, 1], "a": [0.5, 0, 1, 1]}]


def layers(sites):
    """The tiny UNets see their 8 x 8 latents in one down and two up layers."""
    return len(sites.kind("cross").where(lambda s: s.stack in ("denoiser.down", "denoiser.up")))


EXAMPLES = {
    "": Example(
        "diffusion",
        {**PLACED, "scale": 5.0, "tries": 2},
        off={"scale": 0, "strength": 0},
        layers=lambda sites: layers(sites) + 1,
        refused=BARE,
    ),
    "redistribution": Example(
        "diffusion",
        {**PLACED, "scale": 0},
        off={"strength": 0},
        layers=layers,
        refused=ALONE,
    ),
    "gradient": Example(
        "diffusion",
        {"boxes": {"a": [0, 0, 0.5, 0.6]}, "scale": 5.0, "tries": 1, "strength": 0},
        off={"steps": 0},
        layers=1,
        refused={**BARE, "UNet2DConditionModel, UNet2DConditionModel": "give columns"},
    ),
}
BAD = [
    ({}, "boxes is required"),
    ({"boxes": {}}, "boxes must name a word and its box for every prompt"),
    ({"boxes": {}, "background": {"a": [0, 0, 1, 1]}}, "boxes must name a word and its box for every prompt"),
    ({"boxes": [{"a": [0, 0, 1, 1]}, {}]}, "boxes must name a word and its box for every prompt"),
    ({"boxes": {"a": [0, 0, 64, 64]}}, r"boxes.*0 <= left < right <= 1.*\[0, 0, 64, 64\]"),
    ({"boxes": {"a": [0.5, 0, 0.5, 1]}}, "boxes.*0 <= left < right <= 1"),
    ({"boxes": {"a": torch.zeros(8, 8)}}, "the mask is empty"),
    ({"boxes": {"a": "mask.png"}}, "boxes: 'a': no mask of 'a' at 'mask.png'"),
    ({"boxes": "a"}, "boxes: must be .text: box or mask"),
    ({"boxes": [BOXES, 3]}, "boxes: must be .text: box or mask"),
    ({"boxes": {" ": [0, 0, 1, 1]}}, "boxes: must be .text: box or mask"),
    ({"boxes": BOXES, "background": {"sky": [0, 0, 0, 1]}}, "background: 'sky': a box must be"),
    ({"boxes": {"a": [0, 0, 1, 1]}, "background": {"a": [0, 0, 1, 1]}}, "'a' is in boxes and in background"),
    ({"boxes": TWO, "background": [{}] * 3}, "boxes are for 2 prompts, background for 3"),
    ({"boxes": TWO, "columns": {"a": [1], "fox": [2]}}, "columns must say where 'map' stands"),
    ({"boxes": TWO, "columns": [{"a": [1], "fox": [2]}] * 3}, "one mapping for each of the 2 prompts"),
    ({"boxes": {"a": [0, 0, 1, 1]}, "columns": {"a": [1], "fox": [2]}}, "columns say where 'fox' stands, which has no box"),
    ({"boxes": {"a": [0, 0, 1, 1]}, "columns": {"a": [-1]}}, "columns count from 0"),
    ({"boxes": {"a": [0, 0, 1, 1]}, "scale": 51}, "scale.*less than or equal to 50"),
    ({"boxes": {"a": [0, 0, 1, 1]}, "dropout": 0}, "dropout.*greater than 0"),
]
TIMED = {
    "csg, half of the steps": {
        "boxes": {"circle": [0.1, 0.3, 0.4, 0.7], "square": [0.55, 0.3, 0.95, 0.7]},
        "steps": 2,
        "tries": 2,
    }
}
FLOORS = {"csg, half of the steps": ("2 passes of the prompt's row with gradients before 2 of 4 steps", "")}
TRIED = {
    "layout": [
        "csg:steps=10:tries=2",
        "csg:steps=10:tries=2:conditional_only=true",
        "csg:steps=10",
        "csg",
    ]
}
GALLERY = {
    "parameters": {"steps": 10, "tries": 2},
    "look": "Whether the things stand in their boxes: the first of the prompt in the leftmost one.",
}

GOLDEN = (
    "ar_two_boxes", "ar_fg_and_bg_overlap", "ar_after_window", "ar_other_resolution", "loss_deterministic", "loss_dropout_half",
)  # fmt: skip


def layout(facts, **more):
    """The recipe for the boxes of a golden file; words are called by their columns."""
    indices = json.loads(facts["indices"])
    boxes = [[side / 512 for side in box] for kind in ("fg", "bg") for box in json.loads(facts[f"{kind}_bboxes_xyxy_512"])]
    named = dict(zip(map(str, indices), boxes, strict=True))
    front = len(json.loads(facts["fg_bboxes_xyxy_512"]))
    parts = dict(list(named.items())[:front]), dict(list(named.items())[front:])
    return CSG(boxes=parts[0], background=parts[1], columns={word: [int(word)] for word in named}, **more), indices


def golden(name, run):
    """Weights as outputs (the values are the unit vectors), both halves; losses and their gradients in shares of the largest."""
    data, facts = golden_file("csg", name)
    yield from (losses if name.startswith("loss") else weights)(data, facts, run)


def weights(data, facts, run):
    recipe, indices = layout(facts, steps=int(facts["max_iter_to_alter"]))
    heads = int(facts["heads"])
    given = data["probs_in"].unflatten(0, (-1, heads))
    batch, _, places, columns = given.shape
    side = round(places**0.5)
    image = [TokenGrid(row, torch.arange(places).view(1, side, side), whole=(64, 64)) for row in range(batch)]
    conditional = torch.arange(batch) >= batch // 2
    roles = {f"word.{n}": (torch.arange(columns) == index) & conditional[:, None] for n, index in enumerate(indices)}
    roles["word"] = torch.stack([*roles.values()]).any(dim=0)
    call = Call(
        torch.zeros(batch, heads, places, 8), torch.zeros(batch, heads, columns, 8), torch.eye(columns).expand(batch, heads, -1, -1),
        mask=given.log(), site=Site("attn2", 0, "denoiser.up", "cross", heads, heads, 8, False),
        clock=Clock("denoise", int(facts["timestep"]), branches={"conditional": conditional, "unconditional": ~conditional}),
        tokens=TokenMap(batch, columns, columns, roles), query_tokens=TokenMap(batch, places, places, grids=image),
    )  # fmt: skip
    if side == int(facts["target_res"]):
        yield recipe.words(call, 0, 1, image[0].image).float(), data["bbox_masks"]
    edit = recipe.redistribute("word", call)
    yield run(call, [] if edit is None else [edit]).flatten(0, 1), data["probs_out"]


def losses(data, facts, run):
    named = {"topk": "topk_coef", "dropout": "dropout", "margin": "margin"}
    recipe, indices = layout(facts, **{ours: float(facts[theirs]) for ours, theirs in named.items()})
    side = int(facts["res"])
    words = recipe.words(Call(*[torch.zeros(1, 1, 1, 1)] * 3), 0, 1, torch.arange(side * side).view(side, side))
    yield words.float(), data["bbox_masks"]
    drawn = iter(data["perms"])
    cross, own = data["cross"].clone().requires_grad_(), data["self_attn"].clone().requires_grad_()
    given = Layout(words, [(column, word) for word, column in enumerate(indices)])
    found = recipe.losses(cross, own @ words.float().T, given, lambda count: next(drawn)[:count])
    for got, wanted in zip(found, (data["cross_loss"], data["self_loss"]), strict=True):
        yield got / wanted, torch.ones(1)
    slopes = torch.autograd.grad(found[0], cross)[0], torch.autograd.grad(found[1], own)[0]
    pairs = {"grad_cross": slopes[0], "grad_self_rowsum": slopes[1].sum(dim=1), "grad_self_colsum": slopes[1].sum(dim=0)}
    for key, got in pairs.items():
        largest = data[key].abs().max()
        yield got / largest, data[key] / largest
