"""Under autocast the engine computes with operands that are cast as SDPA casts them, and with nothing else that is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from every_edit import a_call, examples
from reattend.interventions import fused, reference

NAMES = list(examples(a_call(8)))


def mixed(queries: int, mask: str):
    """A call as models make it under autocast: queries and keys that were turned in float32, values out of a projection in bfloat16."""
    call = a_call(queries, mask=mask)
    return dataclasses.replace(call, value=call.value.bfloat16())


def halved(call):
    return dataclasses.replace(call, **{name: getattr(call, name).bfloat16() for name in ("query", "key", "value")})


@torch.no_grad()
@pytest.mark.parametrize(("queries", "mask"), [(8, "causal"), (8, "holes"), (1, "none")])
@pytest.mark.parametrize("name", NAMES)
def test_every_edit(name, queries, mask):
    torch.manual_seed(0)
    # segments begin in the prompt that a call reads
    call = mixed(12 if name == "rearrange" and queries > 1 else queries, mask)
    edit = examples(call)[name]()
    with torch.autocast("cpu", torch.bfloat16):
        output = fused(call, [edit])
        assert output.dtype == F.scaled_dot_product_attention(call.query, call.query, call.query).dtype == torch.bfloat16
    assert torch.equal(output, fused(halved(call), [edit]))
    torch.testing.assert_close(output, reference(halved(call), [edit]), atol=2e-2, rtol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("number", [torch.float32, torch.float64])
def test_masks_of_numbers_and_double_precision(number):
    torch.manual_seed(0)
    call = a_call(12, mask="holes", dtype=number)
    call.mask = torch.zeros(call.mask.shape, dtype=number).masked_fill(~call.mask, torch.finfo(number).min)
    edit = examples(call)["gain"]()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = F.scaled_dot_product_attention(call.query, call.key, call.value, call.mask, enable_gqa=True)
        output, same = fused(call, [edit]), fused(call, [])
    assert output.dtype == wanted.dtype == (number if number == torch.float64 else torch.bfloat16)
    torch.testing.assert_close(same, wanted, atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_the_model_s_own_function_runs_under_autocast():
    call = mixed(12, "causal")
    seen = []

    def original():
        seen.append(torch.is_autocast_enabled("cpu"))
        return F.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=True, enable_gqa=True)

    call.original = original
    edit = examples(call, heads=[1])["gain"]
    with torch.autocast("cpu", torch.bfloat16):
        output, wanted = fused(call, [edit()]), original()
    assert seen and all(seen)
    assert torch.equal(output[:, [0, 2, 3]], wanted[:, [0, 2, 3]])
