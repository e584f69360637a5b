"""Every method that steers text, on tiny models of its kind, through every condition: see `example.py` for what a method says of itself.

What a method means is tested in its own file; here is what all of them owe to every model.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from asked_images import FAMILIES
from matrix_models import Case, cases, differs
from reattend.hooks import Edits, Plan, attach, sites
from reattend.interventions import HeadGain, reference
from tiny_llama import traces

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.filterwarnings("ignore:var. no first token is a sink"),  # its dimensions are no real ones here
    pytest.mark.filterwarnings("ignore:the borders of the segments"),
]
SOME = {"llm": ["Llama", "Gemma3"], "lvlm": ["llava", "gemma3"]}
WINDOWED = ("Mistral", "Gemma3")
ONE = {"llm": ["Llama"], "lvlm": ["llava"]}


def parametrize(condition: str, **models: list[str]):
    return pytest.mark.parametrize(("name", "model", "kind"), cases(condition, **models))


@parametrize("rows", llm=["Llama", "Mistral", "Gemma3"], lvlm=FAMILIES)
def test_rows_are_as_alone_and_passes_are_counted(name, model, kind):
    """Rows of other lengths and passages, padded on the left, through prefill and decoding."""
    case = Case(name, model, kind)
    if case.refused("rows"):
        return
    base = case.plain()
    with case.apply() as session:
        tokens, got = case.generate()
    (counts,) = session.stats.values()
    if model in WINDOWED:  # what a window has left is not counted
        assert len(counts) == case.example.layers and max(counts.values()) <= max(case.counts)
    else:
        assert sorted(counts.values()) == case.counts
    moved = differs(got, base)
    for row in case.models.rows:
        assert moved[row] > 1e-4 if row in case.moves else moved[row] < 3e-6, moved
        if row not in case.moves:
            continue
        with case.apply([row]):
            alone, single = case.generate([row])
        assert torch.equal(tokens[row], alone[0])
        torch.testing.assert_close(got[row], single[0], atol=2e-5, rtol=1e-4)
    assert torch.equal(case.generate()[1], base), "detached, the model is what it was"


@parametrize("right padding", llm=["Llama", "Gemma3"], lvlm=["llava", "gemma3", "qwen2_5_vl"])
def test_right_padding(name, model, kind):
    """One pass: the last token of every row as alone."""
    case = Case(name, model, kind)
    if case.refused("right padding", lambda: case.logits(side="right")):
        return
    mask = case.inputs(side="right")["attention_mask"]
    if "prefill" not in case.example.acts:
        return
    with case.apply():
        got = case.logits(side="right")
    for row in case.moves:
        with case.apply([row]):
            single = case.logits([row])[0, -1]
        last = int(mask[row].nonzero()[-1])
        torch.testing.assert_close(got[row, last], single, atol=2e-5, rtol=1e-4)


BEAMS, SAMPLES = {"num_beams": 2}, {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2}


@pytest.mark.parametrize("way", [BEAMS, SAMPLES], ids=["beams", "samples"])
@parametrize("beams", llm=["Llama", "Mistral", "Gemma3"], lvlm=["llava_next", "gemma3", "qwen2_vl", "qwen2_5_vl"])
def test_beams_and_samples_with_and_without_a_cache(name, model, kind, way):
    """Without a cache nothing has to follow beams or to leave windows; with beams each row is what it is alone."""
    case = Case(name, model, kind)
    if case.refused("beams"):
        return
    with case.apply():
        tokens, logits = case.generate(new=5, **way)
        if "no cache" not in case.example.skips:
            again, recomputed = case.generate(new=5, **way, use_cache=False)
            assert torch.equal(tokens, again)
            torch.testing.assert_close(logits, recomputed, atol=3e-4, rtol=1e-3)
    base = case.generate(new=5, **way)[1]
    moved = differs(logits[:, :2], base[:, :2]).view(len(case.models.rows), 2).amax(dim=1)
    assert (moved[case.moves] > 1e-4).all()
    for row in case.moves if way is BEAMS else ():  # samples share the random numbers
        with case.apply([row]):
            assert torch.equal(tokens[row], case.generate([row], new=5, **way)[0][0])


@parametrize("drafts", **ONE)
def test_drafted_tokens_change_nothing(name, model, kind):
    """The pass that reads the prompt holds drafts too, and rows of drafts are rows of generated tokens."""
    case = Case(name, model, kind)
    draft = copy.deepcopy(case.model)
    if case.refused("drafts", lambda: case.generate([0], assistant_model=draft)):
        return
    with case.apply([0]) as session:
        tokens, _ = case.generate([0], new=6)
        before = session.forwards
        drafted, _ = case.generate([0], new=6, assistant_model=draft)
        assert session.forwards - before < 6 or kind == "lvlm", "some drafts were accepted"
    assert torch.equal(tokens, drafted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@parametrize("half", **SOME)
def test_half_precision_is_near(name, model, kind, dtype):
    """Prompt and steps in half precision: finite, and no farther from float32 than the model itself is, three times over."""
    case = Case(name, model, kind)
    if case.refused("half"):
        return
    base = case.generate(logits_processor=[written])[1]
    with case.apply():
        wanted = case.generate(logits_processor=[written])[1]
    case.model = copy.deepcopy(case.model).to(dtype)
    half = case.generate(logits_processor=[written])[1]
    with case.apply():
        got = case.generate(logits_processor=[written])[1]
    assert got.isfinite().all()
    if "near" in case.example.skips:
        return
    possible = (got > -900) & (wanted > -900)  # what opera rules out are other tokens
    error, allowed = torch.where(possible, got - wanted, 0.0).norm(), 3 * (half - base).norm() + 0.02 * base.norm()
    assert error < allowed


def written(ids, scores):
    """The answer is the same whatever the logits."""
    return torch.zeros_like(scores).index_fill(1, torch.tensor([7]), 1.0)


@parametrize("reference", llm=["Llama", "Mistral", "Gemma3"], lvlm=["llava", "gemma3"])
def test_fused_is_the_reference(name, model, kind, monkeypatch):
    """The same generation with every edited call worked out from whole matrices."""
    case = Case(name, model, kind)
    if case.refused("reference"):
        return
    with case.apply():
        fused = case.generate()[1]
    materialised(monkeypatch)
    with case.apply():
        torch.testing.assert_close(case.generate()[1], fused, atol=1e-4, rtol=1e-3)


def materialised(monkeypatch):
    monkeypatch.setattr("reattend.hooks.steering.fused_as_it_is", reference)


@parametrize("heads", **SOME)
def test_beside_what_names_single_heads(name, model, kind):
    """Another recipe that changes one head by next to nothing: the same numbers, and the same counts."""
    case = Case(name, model, kind)
    decoder = sites(case.model).stack("decoder").kind("self")

    def nudge():
        return attach(case.model, [Plan("nudge", [Edits(decoder, lambda call: HeadGain(factor=1 + 1e-6, heads=[1]))])])

    if case.refused("heads", lambda: case.beside(nudge)):
        return
    with case.apply() as session:
        tokens, wanted = case.generate()
    for order in ((nudge, case.apply), (case.apply, nudge)):
        with order[0]() as one, order[1]() as other:
            again, got = case.generate()
        assert torch.equal(again, tokens)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert session.stats in (one.stats, other.stats)


@parametrize("together", **ONE)
def test_together_with_another_method(name, model, kind, monkeypatch):
    """Two recipes on one model: each of them shows and is counted, and the fused numbers are those of whole matrices."""
    case = Case(name, model, kind)
    companions = {"llm": ("spotlight", "act"), "lvlm": ("vhr", "emphasise, images")}[kind]
    other = Case(next(c for c in companions if c != name), model, kind)
    if case.refused("together", lambda: case.beside(other.apply)):
        return
    with case.apply():
        alone = case.generate()[1]
    with other.apply():
        without = case.generate()[1]
    with case.apply() as first, other.apply() as second:
        both = case.generate()[1]
    assert first.applied and second.applied
    for fewer in (alone, without):
        assert (both - fewer).abs().amax(dim=(1, 2))[[row for row in case.moves if row in other.moves]].min() > 1e-4
    materialised(monkeypatch)
    with case.apply(), other.apply():
        torch.testing.assert_close(case.generate()[1], both, atol=2e-4, rtol=1e-3)


@parametrize("off", **SOME)
def test_without_strength_no_bit_changes(name, model, kind):
    case = Case(name, model, kind)
    if case.example.off is None:
        pytest.skip(f"{name} has no strength at which it does nothing")
    if case.refused("off"):
        return
    session = case.apply(**case.example.off)
    got = case.generate()[1]
    assert session.applied == 0
    end(session)
    assert torch.equal(got, case.plain())


def end(session):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "recipe .* never acted")
        session.remove()


class Interrupted(Exception):
    pass


@parametrize("restore", **SOME)
def test_the_model_is_restored_whatever_happens(name, model, kind):
    """Hooks, configs, registered functions and every bit, also after an exception in the middle of a pass."""
    case = Case(name, model, kind)
    if case.refused("restore"):
        return
    base, before = case.plain(), traces(case.model)
    with case.apply():
        wanted = case.generate()[1]
        assert traces(case.model) != before
    assert traces(case.model) == before and torch.equal(case.generate()[1], base)
    sound = case.model
    last = sites(sound).stack("decoder").kind("self")[-1].name
    for ends in (False, True):
        broken = sound.get_submodule(last).register_forward_pre_hook(interrupt)
        session = case.apply()
        with pytest.raises(Interrupted):
            case.generate()
        broken.remove()
        if ends:
            assert torch.equal(case.generate()[1], wanted), "the session goes on as it was"
        end(session) if ends else session.__exit__(Interrupted, Interrupted(), None)
        assert traces(sound) == before and torch.equal(case.generate()[1], base)


def interrupt(*_):
    raise Interrupted
