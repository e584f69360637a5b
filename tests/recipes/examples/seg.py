"""seg: the default layer of every denoiser."""

import math

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.interventions import Call, Clock, Site, TokenGrid, TokenMap
from reattend.interventions.families.guidance import blur_matrix

EXAMPLES = {
    "": Example(
        "diffusion",
        {"sigma": 2.0},
        off={"sigma": 0},
        layers=1,
        refused={
            "SanaTransformer2DModel": "cannot be intercepted: .*linear attention",
        },
    )
}

GOLDEN = ("blur_sigma1", "blur_kernel_clipped", "attn_cfg_finite", "attn_cfg_infinite", "attn_nocfg_infinite")
SELF = Site("mid_block.attn1", 0, "denoiser.mid", "self", 2, 2, 4, False, "sdpa")


def golden(name, run):
    """The blur alone, or the official processor's attention, whose last chunk of rows is perturbed."""
    data, facts = golden_file("seg", name)
    sigma = float(facts["sigma"])
    if name.startswith("blur"):
        down, across = (blur_matrix(sigma, data["x"].shape[axis]) for axis in (2, 3))
        yield down @ data["x"] @ across.T, data["out"]
        return

    def linear(x, weight):
        return torch.nn.functional.linear(x, data[f"w.{weight}.weight"], data.get(f"w.{weight}.bias"))

    q, k, v = (linear(data["x"], f"to_{n}").unflatten(2, (int(facts["heads"]), -1)).transpose(1, 2) for n in "qkv")
    batch, n = len(q), q.shape[2]
    branch = torch.arange(batch) >= batch - batch // int(facts["chunks"])
    grids = [TokenGrid.of_image(row, torch.arange(n).view(math.isqrt(n), -1)) for row in range(batch)]
    tokens = TokenMap(batch, n, n, {"image": torch.ones(batch, n, dtype=torch.bool)}, grids)
    call = Call(q, k, v, site=SELF, clock=Clock("denoise", branches={"seg": branch}), tokens=tokens)
    edit = reattend.recipe("seg", sigma=sigma).weaken(None, call)
    for edits, wanted in (([edit], "out"), ([], "out_plain")):
        yield linear(run(call, edits).transpose(1, 2).flatten(2), "to_out.0"), data[wanted]


# -- what the benchmarks ask, see benchmarks/methods.py

TRIED = {"pictures": ["seg:sigma=1", "seg:scale=1.5", "seg", "seg:layers=[8]", "seg:layers=[7,8]:scale=1.5"]}
TIMED = {"seg": {}, "seg, sigma 1": {"sigma": 1.0}}
GALLERY = {"parameters": {"scale": 2.0}, "look": "Whether shapes are whole, and what becomes of the background."}
