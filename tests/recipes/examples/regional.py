"""regional: the text sites of every denoiser whose text can be made longer, with texts given as tensors, or encoded by the pipeline."""

import json

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.interventions import Call, Clock, Grouped, Site
from reattend.recipes.kit.second_texts import text_sites
from reattend.recipes.regional import cross_groups, joint_groups
from tiny_denoisers import DENOISERS, TEXT

from examples.nag import BARE, BY_TENSORS, ENCODED, ENCODING, noise, saved
from examples.vsf import NEVER as NO_PLACE

TEXTS = saved("regions", {"prompt_embeds": noise(2, TEXT, 8)})
LEFT, RIGHT = [0, 0, 0.5, 1], [0.4, 0.3, 1, 1]
TWO = {"a dog": LEFT, "a map": RIGHT}


def layers(sites):
    return len(text_sites(sites))


OFF = {"base_ratio": 1}
EXAMPLES = {
    "": Example(
        "diffusion",
        {"regions": TWO, "stop": 1.0},
        off=OFF,
        layers=layers,
        refused={**dict.fromkeys(DENOISERS, BARE), **BY_TENSORS, **dict.fromkeys(ENCODING, "")},
    ),
    "tensors": Example(
        "diffusion",
        {"regions": TWO, "tensors": TEXTS, "stop": 1.0, "base_ratio": 0.2, "padding": False},
        off=OFF,
        layers=layers,
        refused={**NO_PLACE, **ENCODED},
    ),
}
BAD = [
    ({}, "regions is required"),
    ({"regions": {}}, "regions must name a text and its region for every prompt"),
    ({"regions": {"a": [0, 0, 64, 64]}}, r"regions.*0 <= left < right <= 1.*\[0, 0, 64, 64\]"),
    ({"regions": {"a": torch.zeros(8, 8)}}, "the mask is empty"),
    ({"regions": {" ": LEFT}}, "regions: must be"),
    ({"regions": TWO, "base_ratio": 1.5}, "base_ratio"),
    ({"regions": TWO, "start": 0.6, "stop": 0.5}, "start 0.6 must lie below stop 0.5"),
    ({"regions": TWO, "tensors": "nowhere.safetensors"}, "tensors must be a safetensors file"),
    ({"regions": TWO, "double_interval": 0}, "double_interval"),
]

GOLDEN = (
    "cross_couple_disjoint", "cross_couple_soft", "mask_overlap", "mask_two_regions_background", "processor_double",
    "processor_interval_off", "flux_model",
)  # fmt: skip


def golden(name, run):
    """Attention under the groups, one call at a time, and a whole model after its regions."""
    data, facts = golden_file("regional", name)
    if facts["kind"] == "cross_couple":
        yield from cross(data, facts, run)
    elif facts["kind"] == "mask":
        yield from mask(data, facts, run)
    elif facts["kind"] == "processor_double":
        yield from double(data, facts, run)
    else:
        yield from model(data, facts)


def grouped(groups):
    return Grouped(shares=groups[0], columns=groups[1])


def called(kind, query, key, value):
    site = Site("attn", 0, "denoiser", kind, query.shape[1], query.shape[1], query.shape[3], False, "sdpa")
    return Call(query, key, value, site=site, clock=Clock("denoise"))


def cross(data, facts, run):
    """The prompt, which nobody reads here since masks cover all, is the unconditional text."""
    heads, (height, width) = int(facts["heads"]), json.loads(facts["grid"])
    masks = torch.nn.functional.interpolate(data["masks"][None] / data["masks"].sum(dim=0), size=(height, width))[0].flatten(1)
    texts = [data["uncond_context"], *(data[f"context_{i}"] for i in range(len(masks)))]
    owner = torch.cat([torch.full((text.shape[1],), i) for i, text in enumerate(texts)])
    each = owner == torch.arange(1, len(texts))[:, None]

    def split(x, weight):
        return (x @ data[weight].T).unflatten(2, (heads, -1)).transpose(1, 2)

    query, key, value = (
        split(x, w) for x, w in ((data["hidden"], "w_q"), (torch.cat(texts, 1), "w_k"), (torch.cat(texts, 1), "w_v"))
    )
    row = json.loads(facts["order"]).index(0)  # the conditional one
    call = called("cross", query[row : row + 1], key, value)
    found = run(call, [grouped(cross_groups(masks, each, owner == 0, 0.0))])
    yield found.transpose(1, 2).flatten(2) @ data["w_out"].T, data["out"][row : row + 1]


def parts(regions, length, masks, base=0):
    """(held, each, base, image, nothing) of rows [base text, text of region 0.., image]."""
    texts, places = regions * length, masks[0].numel()
    count = base + texts + places
    held = torch.zeros(regions, count, dtype=torch.bool)
    held[:, base + texts :] = masks.flatten(1) > 0
    owner = (torch.arange(count) - base).div(length, rounding_mode="floor")
    each = owner == torch.arange(regions)[:, None]
    return held, each, ~each.any(dim=0), torch.arange(count) >= base + texts, torch.zeros(count, dtype=torch.bool)


def mask(data, facts, run):
    """Without a prompt, and nothing of it blended in."""
    masks = data["region_masks"]
    groups = joint_groups(*parts(len(masks), int(facts["tokens_per_prompt"]), masks), 0.0, True)
    allowed = torch.einsum("qg,kg->qk", groups[0], groups[1].float())
    yield allowed, data["attention_mask"].float()
    yield run(called("joint", data["query"], data["key"], data["value"]), [grouped(groups)]), data["out"]


def double(data, facts, run):
    """The regional and the base attention of one block, which see the same image tokens, as one call."""
    regions, length, base, ratio = (facts[n] for n in ("regions", "tokens_per_prompt", "tokens_base", "base_ratio"))
    regions, length, base, ratio = int(regions), int(length), int(base), float(ratio)
    apart, texts = facts["masked"] == "true", regions * length
    places = data["query"].shape[2] - texts
    masks = torch.ones(regions, places)  # the official code leaves no place without a region
    if apart:
        masks = data["attention_mask"][::length][:regions, texts:].float()
    query, key, value = (torch.cat([data[f"{n}_base"][:, :, :base], data[n]], dim=2) for n in ("query", "key", "value"))
    out = run(called("joint", query, key, value), [grouped(joint_groups(*parts(regions, length, masks, base), ratio, apart))])
    yield out[:, :, base : base + texts], data["attention"][:, :, :texts]
    yield out[:, :, :base], data["attention_base"][:, :, :base]
    blended = (1 - ratio) * data["attention"][:, :, texts:] + ratio * data["attention_base"][:, :, base:]
    yield out[:, :, base + texts :], blended


@torch.no_grad()
def model(data, facts):
    """After its regions a run is the plain model's."""
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel(**json.loads(facts["config"])).eval()
    flux.load_state_dict({name[2:]: value for name, value in data.items() if name.startswith("w.")})
    step = int(facts["mask_inject_steps"])
    texts = saved("flux", {"prompt_embeds": torch.cat([data["region_prompt_0"], data["region_prompt_1"]])})
    regions = {f"region {i}": mask for i, mask in enumerate(data["region_masks"])}
    with reattend.apply(flux, "regional", regions=regions, tensors=texts, base_ratio=1, stop=1.0):
        found = flux(
            hidden_states=data["model_inputs"][step][None], encoder_hidden_states=data["base_prompt"],
            pooled_projections=data["pooled"], timestep=data["timesteps"][step, None], img_ids=data["img_ids"],
            txt_ids=torch.zeros(data["base_prompt"].shape[1], 3),
        )[0]  # fmt: skip
    yield found[0], data["model_outputs"][step]


# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {
    "layout": [
        "regional",
        "regional:base_ratio=0.1",
        "regional:base_ratio=0.3",
        "regional:stop=0.5",
    ]
}
GALLERY = {"look": "Whether each thing stands in its region with its own colour, and the seams between regions."}
