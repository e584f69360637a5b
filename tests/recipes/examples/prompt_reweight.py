"""prompt-reweight: columns, which bare denoisers and texts that were encoded elsewhere have too; words are found by the door."""

import json

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.interventions import Call, Clock, Site, TokenMap

EXAMPLES = {
    "": Example(
        "diffusion",
        {"columns": [([1, 2], 6.0)], "stop": 1.0, "layers": [1]},
        layers=1,
        off={"columns": [([1, 2], 1.0)]},
    ),
}
BAD = [
    ({}, "give words to reweight, or columns"),
    ({"words": "red", "columns": [([1], 2.0)]}, "give words to reweight, or columns"),
    ({"words": []}, "words names no word"),
    ({"words": {"red": 11}}, "a factor must lie between -2 and 10"),
    ({"words": "a (red:-3) fox"}, "a factor must lie between -2 and 10"),
    ({"words": "red", "factor": 20}, "factor.*less than or equal to 10"),
    ({"words": ["a (red:2) fox", "a fox"]}, "all words, or all whole prompts"),
    ({"words": "red", "layers": []}, "layers must not be empty"),
    ({"words": "red", "start": 0.8, "stop": 0.5}, "start 0.8 must lie below stop 0.5"),
]

GOLDEN = ("p2p_reweight",)
CROSS = Site("down_blocks.0.attn2", 0, "denoiser.down", "cross", 2, 2, 77, False, "sdpa")


def golden(name, run):
    """The official controller's weights of the second prompt, which is the first one with a word reweighted, inside and after its part of
    the schedule: a head's output is its weights where the values are the identity."""
    data, facts = golden_file("prompt-reweight", name)
    heads, steps = int(facts["heads"]), int(facts["num_steps"])
    maps, (words, factors) = data["attn_in"].unflatten(0, (4, heads)), json.loads(facts["eq"])
    pieces = json.loads(facts["token_pieces"])[1]
    method = reattend.recipe("prompt-reweight", words=dict(zip(words, factors)), stop=float(facts["cross_replace_steps"]))
    marked = torch.zeros(2, 77, dtype=torch.bool)
    marked[1, 1 + pieces.index(words[0])] = True
    for step in json.loads(facts["at_steps"]):
        # inside the part its weights are those of the run without the change
        inside = bool(data["cross_replace_alpha"][step, 0, 1])
        weights = torch.stack([maps[1], maps[2] if inside else maps[3]])
        key = torch.eye(77).expand(2, heads, -1, -1)
        branches = {"unconditional": torch.tensor([True, False]), "conditional": torch.tensor([False, True])}
        tokens = TokenMap(2, 77, 77, {"word": marked})
        clock = Clock("denoise", step, steps, branches=branches)
        call = Call(weights.log(), key, key, scale=1.0, site=CROSS, clock=clock, tokens=tokens)
        edits = method.reweight({"word": factors[0]}, call) or []
        assert bool(edits) == inside
        out = data[f"attn_out_step{step}"].unflatten(0, (4, heads))
        yield run(call, edits), torch.stack([out[1], out[3]])


# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"prompt-reweight": {"columns": [([1, 2], 2.0)]}}
# which columns a word has differs from prompt to prompt, and no suite names words of its prompts yet
TRIED = {}
GALLERY = {"parameters": {"columns": [([2], 3.0)]}, "look": "The first colour of each prompt, weighted threefold."}
