"""Methods that act on marked passages of a language model's prompt: how these are named, and what has none is left alone."""

from __future__ import annotations

import pytest
import reattend
import torch
from example import examples, modules
from matrix_models import Case, cases
from reattend.interventions import ReattendError
from reattend.recipes import recipe_class
from tiny_language import language_model

MARKING = [case for case in cases("marks", llm=["Llama"]) if examples("llm")[case.values[0]][1].rows]
HIGHLIGHTING = [case for case in MARKING if "text" in examples("llm")[case.values[0]][1].rows]
pytestmark = pytest.mark.filterwarnings("ignore:the borders of the segments")
parametrize = pytest.mark.parametrize(("name", "model", "kind"), MARKING)


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        (dict(), "text is required"),
        (dict(text=[]), "names no passage"),
        (dict(text=[[], []]), "names no passage"),
        (dict(text=""), "not empty"),
        (dict(text="a", ranges=[(0, 1)]), "not both"),
        (dict(ranges=[(3, 2)]), "start < stop"),
    ],
)
@pytest.mark.parametrize(("name", "model", "kind"), HIGHLIGHTING)
def test_passages_that_are_not_named(name, model, kind, parameters, problem):
    case = Case(name, model, kind)
    slug, given = case.choice()
    with pytest.raises(ReattendError, match=problem):
        reattend.apply(case.model, slug, **{k: v for k, v in given.items() if k != "text"}, **parameters)


@torch.no_grad()
@parametrize
def test_errors_come_before_any_layer_runs(name, model, kind):
    case, ran = Case(name, model, kind), []
    (mark,) = case.example.rows
    handle = case.model.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with case.apply(**{mark: ["Berlin", "Oslo"]}), pytest.raises(ReattendError, match="'Berlin'"):
        case.logits()
    with reattend.apply(case.model, case.choice()) as session, pytest.raises(ReattendError, match="tokenizer"):
        case.logits()
    handle.remove()
    assert not ran and not session.active


@torch.no_grad()
@parametrize
def test_a_row_without_passages_is_left_alone_beside_one_that_has_some(name, model, kind):
    case = Case(name, model, kind)
    (mark,) = case.example.rows
    real, plain = case.inputs()["attention_mask"].bool(), case.logits()
    fewest = recipe_class(case.slug).marks.get("segments") and [" a red"] or []  # one segment has no order
    with case.apply(**{mark: [case.example.rows[mark][0], fewest]}) as session:
        found = case.logits()
    near = 1e-5 if "bits" in case.example.skips else 0
    torch.testing.assert_close(found[1, real[1]], plain[1, real[1]], atol=near, rtol=near)
    assert session.applied
    assert (found[0, -1] - plain[0, -1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("name", "model", "kind"), HIGHLIGHTING)
def test_layers_and_heads_say_the_same_and_no_others_change(name, model, kind):
    case = Case(name, model, kind)
    if "heads" not in recipe_class(case.slug).model_fields:
        return
    outputs, found = {}, {}
    for form in ([2], {2: [0, 1, 2, 3]}, [(2, h) for h in range(4)], {2: [1]}, None):
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda m, args, i=i, f=str(form): outputs.setdefault((f, i), args[0])
            )
            for i, layer in enumerate(case.model.model.layers)
        ]
        if form is not None:
            with case.apply(heads=form) as session:
                found[str(form)] = case.logits()
            assert session.stats == {case.slug: {"model.layers.2.self_attn": 1}}
        else:
            case.logits()
        for handle in handles:
            handle.remove()
    whole, *same, one = found.values()
    for other in same:
        torch.testing.assert_close(other, whole, atol=2e-5, rtol=1e-4)
    assert not torch.equal(one, whole)
    real = case.inputs()["attention_mask"].bool()
    before, after = (outputs[form, 2].unflatten(2, (4, 8))[real] for form in ("None", "{2: [1]}"))
    assert all(torch.equal(outputs["None", layer], outputs["{2: [1]}", layer]) for layer in (0, 1))
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]]) and (before[:, 1] - after[:, 1]).abs().max() > 1e-2
    for heads, problem in (([4], "layers 0 to 3"), ({0: [4]}, "heads 0 to 3"), ([(9, 0)], "layer 9")):
        with pytest.raises(ReattendError, match=problem):
            case.apply(heads=heads)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slug", [slug for slug, module in modules().items() if hasattr(module, "EXTREME")])
def test_extreme_strengths_stay_finite(slug, dtype):
    """`EXTREME` of a method's example file: parameters at the ends of what it takes."""
    case = Case(slug, "Llama", "llm")
    case.model = language_model().to(dtype)
    for extreme in modules()[slug].EXTREME:
        with case.apply(**extreme) as session:
            logits = case.logits()[case.inputs()["attention_mask"].bool()]
        assert session.applied and logits.dtype == dtype and logits.isfinite().all()
