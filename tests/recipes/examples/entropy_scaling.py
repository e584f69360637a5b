"""entropy-scaling: every layer of every denoiser, told of a base size other than the one at hand."""

from math import isqrt

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.interventions import Call, Clock, Site, TokenGrid, TokenMap
from reattend.recipes.kit.denoisers import image_layers

LINEAR = {"SanaTransformer2DModel": "linear attention has no softmax"}


def layers(sites):
    return sum(map(len, image_layers(sites).values()))


# random weights hardly look anywhere: only sizes that nobody draws show on all of them
LARGE, SMALL = {"base": 2**24, "strength": 2.0}, {"base": [16, 32], "strength": 2.0}
EXAMPLES = {
    variant: Example("diffusion", parameters, off={"strength": 0}, layers=layers, unconditional=True, refused=LINEAR)
    for variant, parameters in {"": LARGE, "image": {**SMALL, "scope": "image"}}.items()
}
BAD = [
    ({"strength": 2.5}, "strength"),
    ({"base": 0}, "base: must be a number of pixels"),
    ({"base": [512]}, "base"),
    ({"layers": []}, "layers: must not be empty"),
    ({"scope": "text"}, "scope"),
]

GOLDEN = ("smaller", "larger_gqa", "same_size_identity")
SELF = Site("layers.0.attn", 0, "denoiser", "self", 4, 2, 4, False, "sdpa")


def golden(name, run):
    """Lumina's attention with proportional attention, and without."""
    data, facts = golden_file("entropy-scaling", name)
    heads, n, base = int(facts["heads"]), int(facts["tokens_N"]), int(facts["base_tokens_T"])

    def projected(which, count):
        return (data["x"] @ data[f"w.to_{which}.weight"].T).unflatten(2, (count, -1)).transpose(1, 2)

    def normed(x, which):
        weight = data[f"w.norm_{which}.weight"]
        return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)

    q = normed(projected("q", heads), "q")
    k, v = normed(projected("k", int(facts["kv_heads"])), "k"), projected("v", int(facts["kv_heads"]))
    batch = len(q)
    grids = [TokenGrid.of_image(row, torch.arange(n).view(isqrt(n), -1)) for row in range(batch)]
    tokens = TokenMap(batch, n, n, {"image": torch.ones(batch, n, dtype=torch.bool)}, grids)
    mask = data["key_mask"].bool()[:, None, None]
    call = Call(q, k, v, mask, site=SELF, clock=Clock("denoise"), tokens=tokens, scale=float(facts["base_scale"]))
    edit = reattend.recipe("entropy-scaling").scaled((isqrt(base), isqrt(base)), call)
    assert (edit is None) == (n == base)
    for edits, wanted in (([edit] if edit else [], "out"), ([], "out_plain")):
        yield run(call, edits).transpose(1, 2).flatten(2) @ data["w.to_out.0.weight"].T, data[wanted]


# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"canvas": ["entropy-scaling", "entropy-scaling:strength=2"]}
TIMED = {"entropy-scaling": {"base": 48}}
GALLERY = {
    "size": 96,
    "look": "Larger pictures than the model was trained on: whether things stay whole and are not drawn twice.",
}
