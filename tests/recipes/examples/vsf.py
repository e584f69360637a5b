"""vsf: the text sites of every denoiser whose text can be made longer, with a negative text given as tensors, or encoded by the pipeline."""

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.hooks import SecondText
from reattend.interventions import Call, Clock, Site, TokenMap
from reattend.recipes.kit.second_texts import text_sites
from tiny_denoisers import DENOISERS

from examples.nag import BARE, BY_TENSORS, ENCODED, ENCODING, POOLED, TOKENS

NEVER = {
    "CogVideoXTransformer3DModel": "has places for 5 text tokens",
    "HunyuanDiT2DModel": "joins its text from several inputs",
    "Lumina2Transformer2DModel": "lays out the text of each sample by its length",
    "MochiTransformer3DModel": "lays out the text of each sample by its length",
}


def layers(sites):
    return len(text_sites(sites))


STRONG = {"scale": 8.0, "offset": -0.5}
OFF = {"negative": "", "tensors": None}
EXAMPLES = {
    "": Example(
        "diffusion",
        {"negative": "a dog", **STRONG},
        off=OFF,
        layers=layers,
        refused={**dict.fromkeys(DENOISERS, BARE), **BY_TENSORS, **dict.fromkeys(ENCODING, "")},
    ),
    "tensors": Example(
        "diffusion",
        {"tensors": TOKENS, **STRONG},
        off=OFF,
        layers=layers,
        refused={**NEVER, **ENCODED},
    ),
    "script": Example(
        "diffusion",
        {"tensors": POOLED, "text_rows": "script", **STRONG},
        off=OFF,
        layers=layers,
        refused={**NEVER, **ENCODED},
    ),
}
BAD = [
    ({"scale": -1}, "scale"),
    ({"offset": 1000}, "offset"),
    ({"text_rows": "both"}, "text_rows"),
    ({"negative": []}, "negative must be a text or one per prompt"),
    ({"start": 0.6, "stop": 0.5}, "start 0.6 must lie below stop 0.5"),
    ({"negative": "a dog", "tensors": POOLED}, "negative or as tensors, not both"),
]

GOLDEN = ("joint_pipeline_layout", "joint_script_layout", "cross_wan")


def golden(name, run):
    """One call of attention at a time."""
    data, facts = golden_file("vsf", name)
    vsf = reattend.recipe("vsf", negative="a dog", text_rows="script" if "script" in name else "pipeline")
    query, key, value = (data[which] for which in ("query", "key", "value"))
    found = run(*called(vsf, query, key, value, facts))
    heads = found.transpose(1, 2).flatten(2)
    if facts["kind"] == "cross":
        yield found, data["out"]
        yield heads, data["before_to_out"]
        return
    count = int(facts["image_length"])
    yield found, data["attention"]
    yield heads[:, :count], data["image_before_to_out"]
    yield heads[:, count:], data["text_before_to_add_out"]


def called(vsf, query, key, value, facts, scale=None, offset=None):
    """(call, edits) of operands whose last columns are the negative text's; joint ones with the image first."""
    batch, keys = len(query), key.shape[2]
    negative = (torch.arange(keys) >= keys - int(facts["negative_length"])).expand(batch, -1)
    clock, tokens = Clock("denoise", branches={"conditional": torch.ones(batch, dtype=torch.bool)}), None
    if facts["kind"] == "joint":
        image = (torch.arange(keys) < int(facts["image_length"])).expand(batch, -1)
        tokens = TokenMap(batch, keys, keys, {"image": image, "text": ~image})
    site = Site("attn", 0, "denoiser", facts["kind"], query.shape[1], query.shape[1], query.shape[3], False, "sdpa")
    call = Call(query, key, value, site=site, clock=clock, tokens=tokens)
    scale, offset = (float(facts[n]) if given is None else given for n, given in (("scale", scale), ("offset", offset)))
    return call, vsf.flip(call, SecondText(columns=negative), scale, offset)


# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"negatives": ["vsf:scale=1", "vsf", "vsf:scale=3"]}
PAPER = {
    "negatives": "SD3.5 turbo on NegGenBench, negative score 0.420 (or 0.545), few-step methods before it 0.32 to 0.38, CFG in many steps 0.30"
}
GALLERY = {
    "model": "shapes-turbo",
    "steps": 4,
    "guidance": 1.0,
    "look": "Whether the thing that the negative text names stays away, and the others stay.",
}
