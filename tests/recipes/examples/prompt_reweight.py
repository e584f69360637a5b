"""prompt-reweight: columns, which bare denoisers and texts that were encoded elsewhere have too; words are found by the door."""

import json
from types import SimpleNamespace

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.hooks import Share, Shared, SiteTable
from reattend.hooks.tokens.text_columns import Stream
from reattend.hooks.tokens.transcript import Transcript
from reattend.hooks.tokens.words import Text
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
    ({"words": [["red", " "]]}, "words must not hold an empty word"),
    ({"words": {"": 2.0}}, "words must not hold an empty word"),
    ({"words": 3}, "^recipe 'prompt-reweight': words: a value of another type is meant, got 3; words: the words: one, several"),
    ({"columns": []}, "columns names no column"),
    ({"words": "a (red:nan) fox"}, "a weight in a prompt is a number"),
    ({"words": "re(d:2) fox"}, "belongs to whole words or passages; '.d:2.' stands inside a word"),
    ({"words": {"red": 11}}, "a factor must lie between -2 and 10"),
    ({"words": "a (red:-3) fox"}, "a factor must lie between -2 and 10"),
    ({"words": "red", "factor": 20}, "factor.*less than or equal to 10"),
    ({"words": ["a (red:2) fox", "a fox"]}, "all words, or all whole prompts"),
    ({"words": "red", "layers": []}, "layers must not be empty"),
    ({"words": "red", "start": 0.8, "stop": 0.5}, "start 0.8 must lie below stop 0.5"),
    ({"words": "a (red:1,4) fox"}, "a weight in a prompt is a number"),
    ({"words": "a ( :2) fox"}, "belongs to a word or passage before its colon"),
    ({"words": "a ((red:2) fox:2)"}, "cannot stand in one another"),
    ({"edit": "replace", "columns": [([1], 2.0)]}, "edit reads the prompts itself"),
    ({"edit": "replace", "words": []}, "words names no word"),
    ({"edit": "refine", "aligned": True}, 'aligned goes with edit "replace"'),
    ({"edit": "refine", "self_start": 0.5}, "self_start 0.5 must lie below self_stop 0.4"),
    ({"words": "red", "source": "run"}, "source, pictures and aligned go with edit"),
    ({"edit": "swap"}, "edit.*'replace' or 'refine'"),
]

GOLDEN = ("p2p_reweight", "p2p_replace", "p2p_refine", "p2p_self_replace")
CROSS = Site("down_blocks.0.attn2", 0, "denoiser.down", "cross", 2, 2, 77, False, "sdpa")
SELF = Site("down_blocks.0.attn1", 0, "denoiser.down", "self", 2, 2, 16, False, "sdpa")


def read_text(prompt, pieces, ids):
    """What an encoder of these tokens, with start, end and 77 columns, has read."""
    offsets, end = [(0, 0)], 0
    for piece in pieces:
        start = prompt.index(piece, end)
        end = start + len(piece)
        offsets.append((start, end))
    columns = list(range(len(ids)))
    stream = Stream("toy", ids, columns, [0], [len(ids) - 1], set(range(77)))
    tokenizer = SimpleNamespace(all_special_ids=[0, 1], decode=lambda *_, **__: prompt)
    return Text(stream, Transcript(prompt, columns, [*offsets, (end, end)]), 0, tokenizer)


def golden(name, run):
    """The official controller's weights of two prompts, of which the first is the source, inside and after its part of the schedule: a
    head's output is its weights where the values are the identity."""
    data, facts = golden_file("prompt-reweight", name)
    heads, steps = int(facts["heads"]), int(facts["num_steps"])
    maps, read = data["attn_in"].unflatten(0, (4, heads)), []
    for prompt, pieces, ids in zip(*(json.loads(facts[key]) for key in ("prompts", "token_pieces", "token_ids"))):
        read.append(read_text(prompt, pieces, ids))
    named, keys = json.loads(facts["eq"]), maps.shape[3]
    words = {} if named is None else {"words": [{}, dict(zip(*named))]}
    site, kind = (CROSS if facts["is_cross"] == "True" else SELF), facts["kind"]
    windows = {"stop": float(facts["cross_replace_steps"]), "self_stop": float(facts["self_replace_steps"])}
    method = reattend.recipe("prompt-reweight", edit="replace" if kind == "reweight" else kind, **words, **windows)
    plan = method.plan(SiteTable([CROSS, SELF], {}, "UNet"))
    share = next(step for step in plan if isinstance(step, Share))
    editing = share.use.__self__
    marked = torch.zeros(4, keys, dtype=torch.bool)
    if named is not None:
        # the start token is the first column
        marked[3, 1 + json.loads(facts["token_pieces"])[1].index(named[0][0])] = True
    role = plan[0].name
    branches = {"unconditional": torch.arange(4) < 2, "conditional": torch.arange(4) >= 2}
    key, rows = torch.eye(keys).expand(4, heads, -1, -1), torch.tensor([0, 0, 2, 2])
    for step in json.loads(facts["at_steps"]):
        clock = Clock("denoise", step, steps, branches=branches)
        call = Call(maps.log(), key, key, scale=1.0, site=site, clock=clock, tokens=TokenMap(4, keys, keys, {role: marked}))
        call.memory[editing.words] = {2: [read[0]], 3: [read[1]]}
        edits = [share.use(call, Shared(step, rows, call.query[rows], call.key[rows]))] if share.at(call) else []
        if named is not None:
            edits += plan[-1].intervention(call) or []
            yield run(*alone(maps, call, role, named, inside=bool(edits))), wanted(data, step, heads)[3:]
        yield run(call, edits), wanted(data, step, heads)


def wanted(data, step, heads):
    return data[f"attn_out_step{step}"].unflatten(0, (4, heads))


def alone(maps, call, role, named, inside):
    """The edited row by itself: inside the schedule's part its weights are those of the run without the change, times the factors."""
    weights = maps[2:3] if inside else maps[3:]
    tokens = TokenMap(1, 77, 77, {role: call.tokens.roles[role][3:]})
    clock = Clock("denoise", call.clock.step, call.clock.steps, branches={"conditional": torch.tensor([True])})
    method = reattend.recipe("prompt-reweight", words=dict(zip(*named)))
    one = Call(weights.log(), call.key[:1], call.key[:1], scale=1.0, site=CROSS, clock=clock, tokens=tokens)
    return one, (method.reweight({role: named[1][0]}, None, one) or []) if inside else []


# -- what the benchmarks ask, see benchmarks/methods.py

TIMED = {"prompt-reweight": {"columns": [([1, 2], 2.0)]}}
TRIED = {
    "words": [
        "prompt-reweight:factor=1.4:stop=1", "prompt-reweight", "prompt-reweight:factor=2:stop=1", "prompt-reweight:factor=4:stop=1",
    ]
}  # fmt: skip
GALLERY = {"parameters": {"factor": 3.0, "stop": 1.0}, "look": "The last shape of most prompts, weighted threefold."}
