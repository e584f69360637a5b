"""Attention weights of one call under a recipe that highlights passages: what its edits do, without a model."""

from __future__ import annotations

import torch
from reattend.hooks import Edits, SiteTable, Spans
from reattend.hooks.tokens.spans import add_spans
from reattend.interventions import Call, Clock, Site, TokenMap, fused
from reattend.recipes import recipe
from torch import nn


def site(heads):
    return Site("decoder", 0, "decoder", "self", heads, heads, 8, True)


def weights_of(slug, scores, mask, ranges, pads, prompt, execute=fused, **parameters):
    """Weights [B, H, Tq, Tk] of a call with these scores under the recipe: keys and values are unit vectors, so outputs are weights."""
    return weights_under([recipe(slug, ranges=ranges, **parameters)], scores, mask, pads, prompt, execute)


def weights_under(recipes, scores, mask, pads, prompt, execute=fused):
    """The same under several recipes, in the order given."""
    batch, heads, _, keys = scores.shape
    unit = torch.eye(keys, dtype=scores.dtype).expand(batch, heads, keys, keys)
    tokens = TokenMap(batch, prompt, keys)
    places = torch.arange(prompt)
    tokens.roles["padding"] = places < torch.tensor(pads)[:, None]
    tokens.roles["bos"] = places == torch.tensor(pads)[:, None]
    call = Call(scores, unit, unit, mask, scale=1.0, site=site(heads), clock=Clock("prefill"), tokens=tokens)
    table = SiteTable([site(heads)], {"decoder": nn.Module()})
    edits = []
    for chosen in recipes:
        call.memory = {}
        for step in chosen.plan(table):
            if isinstance(step, Spans):
                add_spans(tokens, None, step, lambda: None)
            elif isinstance(step, Edits):
                edit = step.intervention(call)
                edits += [] if edit is None else [edit]
    return execute(call, edits)


def random_call(batch=2, heads=4, queries=12, keys=15):
    """(scores [B, H, Tq, Tk], causal mask)."""
    torch.manual_seed(1)
    scores = 2 * torch.randn(batch, heads, queries, keys)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return scores, torch.zeros(1, 1, queries, keys).masked_fill(~visible, float("-inf"))
