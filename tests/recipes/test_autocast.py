"""Every method under autocast: its numbers are those of float32 but for the error that autocast has without it, three times at most."""

from __future__ import annotations

import pytest
import torch
from matrix_models import Case, cases
from reattend.hooks.trackers.caches import cache_name, cache_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:var. no first token is a sink"),
    pytest.mark.filterwarnings("ignore:the borders of the segments"),
]

# What these do hangs on which of several numbers is the largest, so that a last bit can change it. SPA takes an error times its strength.
DECIDING = ("seka, adaptive", "gift, from a probe", "vhr", "opera", "pai", "spa", "spa, images")
# methods in every run; the others with the matrix
ALWAYS = ("emphasise", "act", "var", "spotlight", "seka", "retrieval-heads, mask, in every row", "gift")


def steps(case: Case) -> torch.Tensor:
    """Logits [3, B, V] of a prompt and two steps after it."""
    inputs = case.inputs([0])
    mask, cache, logits = inputs["attention_mask"], None, []
    for token in (None, 7, 8):
        if token is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            inputs = {"input_ids": torch.full((len(mask), 1), token), "attention_mask": mask, cache_name(case.model): cache}
        output = case.model(**inputs, use_cache=True)
        cache = cache_of(output)
        logits.append(output.logits[:, -1].float())
    return torch.stack(logits)


PLACES = [
    pytest.param(*one.values, id=one.id, marks=[*one.marks, *([] if one.values[0] in ALWAYS else [pytest.mark.matrix])])
    for one in cases("autocast", llm=["Llama"], lvlm=["llava"])
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "model", "kind"), PLACES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_numbers_are_those_of_float32(name, model, kind, implementation):
    case = Case(name, model, kind)
    if case.example.refusal(model):
        return
    case.model.set_attn_implementation(implementation)
    try:
        untouched = steps(case)
        with case.apply([0]):
            wanted = steps(case)
        with torch.autocast("cpu", torch.bfloat16):
            plain = steps(case)
            with case.apply([0]):
                found = steps(case)
    finally:
        case.model.set_attn_implementation("sdpa")
    assert found.isfinite().all()
    if case.label not in DECIDING:
        assert (found - wanted).norm() <= 3 * (plain - untouched).norm()
