"""spa: golden data of the official code, and whole models with passages hidden from a second branch."""

from __future__ import annotations

import pytest
import reattend
import torch
from golden_files import golden_file
from reattend.hooks import Fusion
from reattend.interventions import Clock, ReattendError, TokenMap, UnsupportedError
from reattend.interventions.families.logits import anchored
from reattend.recipes import recipe
from tiny_language import language_model, tokenizer
from torch.nn.functional import pad

PROMPTS = ["Answer in French. The capital of Italy is Rome. What is the capital?", "Anna has a red house. Answer in one word."]
PASSAGES = [["Answer in French."], ["red house", "one word"]]
LOGITS = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("name", ["modulated", "plain", "strength_one", "strength_zero"])
def test_golden_logits_of_the_official_code(name):
    data, facts = golden_file("spa", name)
    full, hidden, wanted = (data[f"scores_{kind}"] for kind in ("full", "masked", "out"))
    chosen = recipe("spa", text="x", strength=float(facts["strength"]), modulated=facts["modulated_by_prob"] == "True")
    found = fused_logits(chosen, full, hidden)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def fused_logits(chosen, full, hidden):
    """What the recipe makes of the logits [B, V] with and without the passages."""
    told = {"rows": torch.ones(len(full), dtype=torch.bool)}
    step = Fusion(full[:, None], [hidden[:, None]], Clock("decode"), TokenMap(len(full), 4, 4), told)
    return chosen.fuse(step)[:, 0]


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("strength", [-50.0, -1.5, -1.0, -0.5, 0.3, 0.9, 1.0, 1.1, 2.0, 20.0])
def test_the_formula_at_every_strength(strength, modulated):
    """By hand: between -1 and 1 the change of every token counts in full, beyond it in proportion to the token's probability."""
    torch.manual_seed(0)
    full, hidden = 3 * torch.randn(2, 3, 9)
    full[0, 2] = -torch.inf
    wanted = full.clone()
    for row in range(3):
        chance = [max(1e-6, float(p)) for p in full[row].softmax(0)]
        for token in range(9):
            change = (strength - 1) * float(full[row, token] - hidden[row, token])
            if modulated and abs(strength) > 1:
                change = max(-100.0, min(100.0, change * chance[token] / max(chance)))
            wanted[row, token] = full[row, token] + max(-1000.0, min(1000.0, change))
    wanted[0, 2] = -torch.inf
    found = fused_logits(recipe("spa", text="x", strength=strength, modulated=modulated), full, hidden)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


# -- whole models ----------------------------------------------------------------------------------------------------


def inputs(prompts=PROMPTS):
    return tokenizer()(prompts, return_tensors="pt", padding=True)


def tokens_of(row, passages):
    """Bool [T]: tokens of one prompt that overlap any of the passages, from its offsets."""
    x = tokenizer()(PROMPTS[row], return_offsets_mapping=True)
    found = torch.zeros(len(x["input_ids"]), dtype=torch.bool)
    for text in passages:
        start = PROMPTS[row].index(text)
        found |= torch.tensor([a < start + len(text) and b > start for a, b in x["offset_mapping"]])
    return torch.tensor(x["input_ids"]), found


def wanted(model, row, tail, strength, modulated, passages=PASSAGES, placeholder=None, hide=True):
    """Logits [V] of one prompt and the tokens after it, from two whole passes of the plain model."""
    ids, found = tokens_of(row, passages[row])
    full = model(torch.cat([ids, tail])[None]).logits[0, -1]
    if placeholder is None:
        shown = ~found
    else:
        starts = found & ~pad(found, (1, 0))[:-1]
        pieces, shown = [], []
        for token, inside, first in zip(ids.tolist(), found.tolist(), starts.tolist()):
            if not inside or first:
                pieces += placeholder if first else [token]
                shown += [hide is False] * len(placeholder) if first else [True]
        ids, shown = torch.tensor(pieces), torch.tensor(shown)
    mask = pad(shown.long(), (0, len(tail)), value=1)[None]
    hidden = model(torch.cat([ids, tail])[None], attention_mask=mask, position_ids=torch.arange(mask.shape[1])[None])
    return anchored(full, hidden.logits[0, -1], strength, modulated)


@pytest.mark.parametrize(
    "parameters",
    [
        dict(strength=1.4, modulated=False),
        dict(strength=6.0),
        dict(strength=-2.0),
        dict(strength=0.0),
        dict(strength=3.0, placeholder=[7, 9], hide=False),
        dict(strength=3.0, placeholder=[7]),
    ],
)
def test_every_step_equals_two_whole_passes(parameters):
    """Left padding, other passages per row: each generated step as passes over one prompt alone, and ends restored."""
    model, x = language_model(), inputs()
    plain = model(**x).logits
    with reattend.apply(model, "spa", text=PASSAGES, tokenizer=tokenizer(), **parameters) as session:
        out = model.generate(**x, max_new_tokens=4, **LOGITS)
        assert session.stats == {"spa": {"logits": 4}}
    rest = {"modulated": True, **{k: v for k, v in parameters.items()}}
    for step, logits in enumerate(out.logits):
        for row in range(2):
            tail = out.sequences[row, x["input_ids"].shape[1] :][:step]
            torch.testing.assert_close(logits[row], wanted(model, row, tail, **rest), atol=2e-4, rtol=1e-3)
    assert ((out.logits[0] - plain[:, -1]).abs().amax(dim=1) > 1e-2).all()
    assert torch.equal(model(**inputs()).logits, plain)


def test_the_official_mask_shows_the_placeholder_again():
    model, x = language_model(), inputs()
    found = {}
    for official in (False, True):
        with reattend.apply(
            model, "spa", text=PASSAGES, strength=0, placeholder=[7], official_mask=official, tokenizer=tokenizer()
        ):
            found[official] = model.generate(**x, max_new_tokens=2, **LOGITS)
    assert torch.equal(found[True].logits[0], found[False].logits[0])
    assert not torch.allclose(found[True].logits[1], found[False].logits[1], atol=1e-4)
    with reattend.apply(model, "spa", text=PASSAGES, strength=0, placeholder=[7], official_mask=True, tokenizer=tokenizer()):
        model(**x)
        with pytest.raises(ReattendError, match="needs a cache"):
            model(**x, use_cache=False)


def test_more_strength_makes_what_the_passage_says_likelier():
    """A token that the passage makes likelier becomes likelier still; without the passage's share it falls back."""
    model, x = language_model(), inputs(PROMPTS[:1])

    def logprobs(strength):
        with reattend.apply(model, "spa", text=PASSAGES[0], strength=strength, modulated=False, tokenizer=tokenizer()):
            return model(**x).logits[0, -1].log_softmax(-1)

    without, full, more = (logprobs(s) for s in (0.0, 1.0, 2.0))
    word = (full - without).argmax()
    assert more[word] > full[word] > without[word]


@pytest.mark.parametrize("other", [("instaboost", {"multiplier": 20}), ("spotlight", {"target": 0.6})], ids=lambda o: o[0])
def test_it_composes_with_recipes_of_attention(other):
    """The other recipe edits the real branch alone: with strength 0 nothing of it is left, with 1 nothing of spa."""
    model, x = language_model(), inputs()

    def logits(*recipes):
        if not recipes:
            return model(**x).logits[:, -1]
        with reattend.apply(model, *recipes, tokenizer=tokenizer()):
            return model(**x).logits[:, -1]

    marked = {"text": PASSAGES}
    boost = (other[0], {**marked, **other[1]})
    boosted, hidden = logits(boost), logits(("spa", {**marked, "strength": 0}))
    torch.testing.assert_close(logits(boost, ("spa", {**marked, "strength": 0})), hidden)
    anchor = ("spa", {**marked, "strength": 1.5, "modulated": False})
    for order in ((boost, anchor), (anchor, boost)):
        torch.testing.assert_close(logits(*order), hidden + 1.5 * (boosted - hidden), atol=1e-5, rtol=1e-4)
    assert (boosted - logits()).abs().max() > 1e-2


def test_an_image_model_reads_its_prompt_twice():
    import tiny_models
    from asked_images import ONE, TWO
    from asked_images import tokenizer as words

    tiny = tiny_models.build("qwen2_5_vl")
    x = tiny.inputs([ONE, TWO])
    plain = tiny.model.generate(**x, max_new_tokens=4, **LOGITS)
    offset = tiny.model.model.rope_deltas
    with reattend.apply(tiny.model, "spa", text=[["red dog"], ["how many"]], occurrence=-1, strength=4, tokenizer=words()):
        steered = tiny.model.generate(**x, max_new_tokens=4, **LOGITS)
        again = tiny.model.generate(**x, max_new_tokens=4, **LOGITS, use_cache=False)
    assert torch.equal(tiny.model.model.rope_deltas, offset)
    with (
        reattend.apply(tiny.model, "spa", text="cats", occurrence=-1, placeholder=[5], tokenizer=words()),
        pytest.raises(ReattendError, match="move the images"),
    ):
        tiny.model(**tiny.inputs([TWO]))
    for a, b, c in zip(steered.logits, again.logits, plain.logits):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        assert (a - c).abs().amax(dim=1).min() > 1e-3


def test_the_highlight_suite_drives_it():
    from reattend.evaluation import suite
    from suite_checks import ask

    asked = suite("highlight")
    items = asked.items(2, 0)
    plain, steered = ask(asked, items), ask(asked, items, [("spa", {"strength": 3})])
    assert [r["logprobs"] for r in plain] != [r["logprobs"] for r in steered]


def test_what_does_not_fit_the_model_or_the_prompt_is_refused():
    model = language_model()
    with pytest.raises(UnsupportedError, match="placeholder names token 400.*0 to 399"):
        reattend.apply(model, "spa", text="a", placeholder=[3, 400])
    with pytest.raises(UnsupportedError, match="language head"):
        reattend.apply(model.model, "spa", text="a")
    whole = reattend.apply(model, "spa", ranges=[(0, len(tokens_of(1, [])[0]))])
    with whole, pytest.raises(ReattendError, match="all of prompt 1"):
        model(**inputs())
