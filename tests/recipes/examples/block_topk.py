"""block-topk: budgets smaller than the prompts."""

import json

import reattend
import torch
from example import Example
from golden_files import golden_file
from reattend.interventions import Call, Clock, reference_with_weights

EXAMPLES = {
    "": Example(
        "llm",
        {"blocks": 1, "block_size": 2, "local": 2, "sinks": 1},
        off={"blocks": 1000},
        layers=3,
        acts=["decode"],
        skips={"no cache": "without a cache every pass reads a prompt, which is read whole"},
    )
}

GOLDEN = ("blockwise_gqa", "blockwise_mha_bs16", "blockwise_short_is_dense")


def golden(name, run):
    """Each sequence's decode step: the output, and which columns are left."""
    data, facts = golden_file("block-topk", name)
    given = json.loads(facts["kwargs"])
    parameters = {
        "blocks": given["topk_block"],
        "local": given["local"],
        "sinks": given["sink"],
        "block_size": given["block_size"],
    }
    method = reattend.recipe("block-topk", **parameters)
    for row, n in enumerate(data["seq_len"].tolist()):
        key, value = (data[name][row : row + 1, :, :n] for name in "kv")
        call = Call(data["q"][row : row + 1], key, value, clock=Clock("decode"))
        edit = method.read_blocks(call)
        edits = [] if edit is None else [edit]
        yield run(call, edits)[0, :, 0], data["out"][row]
        yield reference_with_weights(call, edits)[1][0, :, 0] > 0, data["keep"][row, :, :n] > 0
        # beside shorter rows, padded on the left: the same columns by another path
        pad = torch.nn.functional.pad
        mask = (torch.arange(n + 5) >= 5).expand(1, 1, 1, -1)
        wide = Call(call.query, pad(key, (0, 0, 5, 0)), pad(value, (0, 0, 5, 0)), mask, clock=Clock("decode"))
        edit = method.read_blocks(wide)
        yield run(wide, [] if edit is None else [edit])[0, :, 0], data["out"][row]


# -- what the benchmarks ask, see benchmarks/methods.py: budgets below the few hundred tokens that these prompts have

TRIED = {"copying": [f"block-topk:blocks={n}:local=16" for n in (2, 4, 8)] + ["block-topk"]}
