"""tpg: the default blocks of every denoiser whose blocks know places; the others with force."""

import json
from functools import partial
from unittest.mock import patch

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.hooks import Entering, Inject, Plan, Predictions, attach
from reattend.hooks.doors.guide import away
from reattend.interventions import Clock, Site
from reattend.recipes.kit.guidance import rescaled
from reattend.recipes.tpg import blocks_of

AT_THE_INPUT = (
    "SD3Transformer2DModel", "SD3Transformer2DModel (3.5)", "PixArtTransformer2DModel", "AuraFlowTransformer2DModel",
    "CogVideoXTransformer3DModel",
)  # fmt: skip
PIPELINES = ("SD3", "SD3, two images, no guidance", "PixArt")
OFF = {"scale": 0}
EXAMPLES = {
    "": Example(
        "diffusion",
        off=OFF,
        layers=1,
        refused=dict.fromkeys((*AT_THE_INPUT, *PIPELINES), "is told where its image tokens lie at its input alone"),
    ),
    "forced": Example(
        "diffusion",
        {"force": True, "scale": 1.0},
        off=OFF,
        layers=1,
        refused={},
    ),
}
BAD = [
    ({"blocks": []}, "blocks must not be empty"),
    ({"blocks": [3, 3]}, "blocks must not name a block twice"),
    ({"scale": -1.0}, "scale"),
    ({"rescale": 1.5}, "rescale"),
    ({"seed": 0.5}, "seed"),
    ({"start": 0.6, "stop": 0.5}, "start 0.6 must lie below stop 0.5"),
]

GOLDEN = ("block_no_cfg", "block_cfg", "stack_cfg", "combine")
SITE = Site("down_blocks.1.attentions.0.transformer_blocks.0.attn1", 0, "denoiser.down", "self", 2, 2, 8, False, "sdpa")


def golden(name, run):
    """One block, a stack of them, and what becomes of the predictions. Attention runs as the model has it: `run` has no part in it."""
    data, facts = golden_file("tpg", name)
    yield from {"block": block, "stack": stack, "combine": combine}[facts["kind"]](data, facts)


def weights(module, data):
    module.load_state_dict({name[2:]: value for name, value in data.items() if name.startswith("w.")})
    return module.eval().requires_grad_(False)


def branch(data, facts):
    """Bool [rows]: the last chunk of the batch."""
    rows = len(data["hidden"])
    return torch.arange(rows) >= rows - rows // (3 if facts["cfg"] == "true" else 2)


def block(data, facts):
    from diffusers.models.attention import BasicTransformerBlock

    made = weights(BasicTransformerBlock(16, 2, 8, cross_attention_dim=6), data)
    hidden, rows = data["hidden"], branch(data, facts)
    seen = Entering(hidden, {}, rows, SITE, Clock("denoise", branches={"tpg": rows}), {}, lambda: None)
    torch.manual_seed(int(facts["seed"]))
    shuffled = reattend.recipe("tpg", official_rng=True).shuffled(0, seen)
    entering = torch.where(rows[:, None, None], shuffled, hidden)
    yield entering[rows], hidden[rows][:, data["permutation"]]
    plain, found = (made(states, encoder_hidden_states=data["context"]) for states in (hidden, entering))
    yield plain, data["out_plain"]
    yield found, data["out"]
    # nothing in a UNet's block knows places
    yield found[rows], plain[rows][:, data["permutation"]]
    assert torch.equal(found[~rows], plain[~rows]) and torch.equal(data["out"][~rows], data["out_plain"][~rows])


def stack(data, facts):
    from diffusers import Transformer2DModel

    made = weights(Transformer2DModel(**json.loads(facts["config"])), data)
    blocks, recipe = blocks_of(reattend.sites(made)), reattend.recipe("tpg", official_rng=True)
    rows = branch(data, facts)
    chosen = [
        Inject(blocks[n], partial(recipe.shuffled, n), rows=rows.nonzero()[:, 0].tolist()) for n in json.loads(facts["blocks"])
    ]
    plain = made(data["hidden"], encoder_hidden_states=data["context"], return_dict=False)[0]
    drawn = patch.object(torch, "randperm", side_effect=list(data["permutations"]))
    with attach(made, [Plan("tpg", chosen)]), drawn:
        found = made(data["hidden"], encoder_hidden_states=data["context"], return_dict=False)[0]
    yield plain, data["out_plain"]
    yield found, data["out"]
    assert torch.equal(found[~rows], plain[~rows])


def combine(data, facts):
    scale, guidance = float(facts["tpg_scale"]), float(facts["guidance_scale"])

    def predictions(guidance):
        return Predictions(data["cond"], data["perturbed"], {}, data["uncond"], scale, guidance, Clock("denoise"))

    yield data["cond"] + away(predictions(1.0)), data["out_no_cfg"]
    guided = data["uncond"] + guidance * (data["cond"] - data["uncond"])
    yield guided + away(predictions(guidance)), data["out_cfg"]
    yield guided + rescaled(predictions(guidance), float(facts["guidance_rescale"])), data["out_cfg_rescaled"]


# -- what the benchmarks ask, see benchmarks/methods.py

# the default is block 7 there
TRIED = {"pictures": ["tpg:blocks=[7]:scale=1.5", "tpg", "tpg:blocks=[1]:scale=1", "tpg:blocks=[0]"]}
GALLERY = {"parameters": {"scale": 1.5}, "look": "Whether shapes are whole; where they lie changes too."}
