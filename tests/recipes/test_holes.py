"""Zeros anywhere in the attention mask: what the mask hides is as if it were not in the prompt, or the method says that it cannot."""

from __future__ import annotations

import pytest
import reattend
import torch
from matrix_models import Case, cases
from reattend.recipes import recipe_class

LENGTH = 20
PLACES = {"text": [(3, 6)], "segments": [(3, 6), (6, 9), (9, 11)]}
HOLES = {
    "before the passages": [1, 2],
    "inside them": [4, 5],
    "after them": [14, 15],
    "on the right": [18, 19],
    "on the left": [0, 1],
    "everywhere": [0, 2, 15, 19],
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
parametrize = pytest.mark.parametrize(("name", "model", "kind"), cases("holes", llm=["Llama"]))


def marked(case):
    """The example's parameters, with places in tokens instead of its words."""
    slug, given = case.choice([0])
    for mark in case.example.rows:
        del given[mark]
        given["ranges"] = PLACES[mark]
    return slug, given


def prompt(holes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    ids, mask = torch.randint(3, 400, (1, LENGTH)), torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, holes] = 0
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("where", HOLES)
@parametrize
def test_a_prompt_with_holes_is_the_prompt_without_what_they_hide(name, model, kind, where):
    case, (ids, mask) = Case(name, model, kind), prompt(HOLES[where])
    if "prefill" not in case.example.acts:
        return
    places, kept = torch.arange(LENGTH)[None], mask[0].bool()
    with reattend.apply(case.model, marked(case)) as session:
        if case.example.refusal(f"holes {where}"):
            with pytest.raises(reattend.ReattendError, match=case.example.refusal(f"holes {where}")):
                case.model(input_ids=ids, attention_mask=mask, position_ids=places)
            return
        got = case.model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, kept]
        assert session.applied
        wanted = case.model(input_ids=ids[:, kept], position_ids=places[:, kept]).logits
    plain = case.model(input_ids=ids[:, kept], position_ids=places[:, kept]).logits
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=3e-6, rtol=1e-5)


@parametrize
def test_generation_after_a_prompt_with_holes(name, model, kind):
    case, (ids, mask) = Case(name, model, kind), prompt([0, 2, 15])  # generation goes on from the last token, hidden or not
    found = []
    for given, hidden in ((ids, mask), (ids[:, mask[0].bool()], torch.ones(1, int(mask.sum()), dtype=torch.long))):
        with reattend.apply(case.model, marked(case)):
            found.append(torch.stack(case.model.generate(given, attention_mask=hidden, **GREEDY).logits, dim=1))
    torch.testing.assert_close(found[0], found[1], atol=3e-6, rtol=1e-5)


@parametrize
def test_a_row_that_is_hidden_as_a_whole_has_no_passages(name, model, kind):
    case, (ids, mask) = Case(name, model, kind), prompt([])
    if not recipe_class(case.slug).marks:
        return
    ends = pytest.raises(reattend.ReattendError, match="ends beyond prompt 1, which has 0 tokens without padding")
    with ends, torch.no_grad(), reattend.apply(case.model, marked(case)):
        case.model(input_ids=ids.expand(2, -1), attention_mask=torch.cat([mask, torch.zeros_like(mask)]))
