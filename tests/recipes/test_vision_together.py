"""Vision-language recipes together: what several of them do is what the reference makes of their edits, in a stated order, or is refused."""

from __future__ import annotations

import functools

import pytest
import reattend
import torch
from asked_images import ONE, PROMPTS, tiny_models, tokenizer
from reattend.hooks import Edits, Plan, attach, capture, sites
from reattend.interventions import UnsupportedError
from reattend.interventions.edits import Rows
from reattend.recipes import recipe
from test_visual_token_exit import logits_of

# the last turn's words, as the tokenizer writes them
MARKED = "red dog"
METHODS = {
    "var": {"tau": 1.5, "sink_dims": list(range(8)), "first_layer": 1, "rho": 1.0, "summ": 0.0},
    "vhr": {"layers": [1, 3]},
    "gift": {"saliency_layers": [1], "enhance_layers": [1, 3], "words": "content", "alpha": 3.0},
    "emphasise": {"text": [[MARKED], ["cats"], [MARKED]], "alpha": 0.1, "occurrence": -1},
    "pai": {"first_layer": 1, "alpha": 0.5, "gamma": 1.0},
    "cmai": {"first_layer": 1},
    "selective-emphasis": {"first_layer": 1, "local_share": 0.5},
    "visual-token-exit": {"exit_layer": 1},
}
PAIRS = [
    ("var", "vhr"), ("vhr", "var"), ("gift", "emphasise"), ("emphasise", "gift"), ("pai", "vhr"), ("vhr", "pai"), ("cmai", "pai"),
    ("pai", "var"), ("selective-emphasis", "gift"), ("vhr", "visual-token-exit"),
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:var. no first token is a sink")


@functools.cache
def model():
    return reattend.wrap(tiny_models.llava().model)


@functools.cache
def inputs():
    return tiny_models.llava().inputs(PROMPTS)


@functools.cache
def together(*methods):
    """(logits [3, steps, V], stats) under these recipes, in this order."""
    choices = [(name, METHODS[name]) for name in methods]
    if not choices:
        return logits_of(model(), inputs()), {}
    with model().use(*choices, tokenizer=tokenizer()) as session:
        return logits_of(model(), inputs()), session.stats


def whole_matrices(call, edits):
    """The edits level by level on all rows, all heads at once: gift compares heads, and the reference executor shows an edit one."""
    key, value = (x.repeat_interleave(call.num_heads // x.shape[1], dim=1) for x in (call.key, call.value))
    scores = call.query @ key.transpose(2, 3) * call.scaling
    visible = torch.ones(scores.shape[2:], dtype=torch.bool).tril(call.num_keys - call.num_queries)[None, None]
    if call.mask is not None:
        visible = visible & call.mask if call.is_causal else call.mask
    scores = scores.masked_fill(~visible, -torch.inf)
    rows = Rows(torch.arange(call.num_queries), visible, call.query, key, value, call.scaling, call.num_keys - call.num_queries)

    def changed(values, level, method):
        for edit in edits:
            if edit.level == level:
                assert edit.heads is None
                new, named = getattr(edit, method)(values, rows), edit.chosen(rows)
                values = new if named is None else torch.where(named, new, values)
        return values

    seen = visible.any(dim=-1, keepdim=True)
    weights = changed(scores, "scores", "on_scores").softmax(dim=-1).masked_fill(~seen, 0.0)
    return changed(changed(weights, "weights", "on_weights") @ value, "output", "on_output")


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_equals_the_reference(pair, monkeypatch):
    """The same two recipes with every edited call worked out from whole matrices, and inside a level in the order given."""
    got, stats = together(*pair)
    assert all(stats[name] for name in pair)
    for fewer in ((), pair[:1], pair[1:]):
        assert (got - together(*fewer)[0])[:2].abs().amax(dim=(1, 2)).min() > 1e-4, "each of the two adds something"
    calls = []

    def materialised(call, edits):
        calls.append(len(edits))
        return whole_matrices(call, edits)

    monkeypatch.setattr("reattend.hooks.steering.fused_as_it_is", materialised)
    with model().use(*[(name, METHODS[name]) for name in pair], tokenizer=tokenizer()) as session:
        wanted = logits_of(model(), inputs())
        assert session.stats == stats
    assert max(calls) >= 2 or pair == ("vhr", "visual-token-exit") and calls
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-4)


def test_order_is_the_order_of_levels_first():
    """Scores come before weights, weights before outputs: for recipes of different levels that do not read each other, order is nothing."""
    for one, other in (("gift", "emphasise"), ("vhr", "visual-token-exit")):
        torch.testing.assert_close(together(one, other)[0], together(other, one)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("before", ["pai", "var"])
def test_vhr_judges_heads_by_what_the_recipes_before_it_leave(before):
    """Its first layer chooses as if alone where it comes first, and by the changed rows where it comes second."""
    table, chosen = sites(model()), {}

    def plans(*names):
        result = []
        for name in names:
            steps = recipe(name, **METHODS[name]).plan(table)
            if name == "vhr":
                steps = [spied(s, names) if isinstance(s, Edits) else s for s in steps]
            result.append(Plan(name, steps))
        return result

    def spied(act, names):
        def look(call):
            edit = act.intervention(call)
            if edit is not None and call.site.layer == 1:
                chosen[names] = edit.factor[:, :, 0] if edit.factor.dim() > 2 else edit.factor
            return edit

        return Edits(act.sites, look)

    for names in (("vhr",), ("vhr", before), (before, "vhr")):
        with attach(model(), plans(*names)), torch.no_grad():
            model()(**inputs())
    assert torch.equal(chosen["vhr", before], chosen["vhr",])
    assert not torch.equal(chosen[before, "vhr"], chosen["vhr",])


def test_emphasis_on_every_image_token_is_pai():
    """alpha = beta on all of an image: PAI's attention part, at prefill and at every step."""
    with model().use("pai", first_layer=1, alpha=0.4, gamma=1.0):
        whole = logits_of(model(), inputs())
    with model().use("selective-emphasis", first_layer=1, alpha=0.4, beta=0.4, local_share=1.0):
        emphasised = logits_of(model(), inputs())
    torch.testing.assert_close(emphasised, whole, atol=1e-6, rtol=1e-5)


# -- images that leave, and recipes that weigh them ------------------------------------------------------------------------


# how each of them is told to act at layer 1 alone
WEIGHING = {
    "var": {"last_layer": 1},
    "pai": {"last_layer": 1},
    "cmai": {"last_layer": 1},
    "selective-emphasis": {"last_layer": 1},
    "gift": {"enhance_layers": [1]},
    "opera": None,  # reads the last layer
}


@pytest.mark.parametrize("mode", ["hide", "leave"])
@pytest.mark.parametrize("method", WEIGHING)
def test_what_weighs_images_must_end_at_the_exit(method, mode):
    exit_ = ("visual-token-exit", {"exit_layer": 1, "mode": mode})
    options = METHODS.get(method, {})
    base = together()[0]
    for order in ([(method, options), exit_], [exit_, (method, options)]):
        with pytest.raises(UnsupportedError, match=rf"{method!r} weighs image tokens in layers \d to 3, .*layers end at 1"):
            model().use(*order, tokenizer=tokenizer())
    with (
        model().use(*[exit_]) as session,
        pytest.raises(UnsupportedError, match="do not see them under recipe 'visual-token-exit'"),
    ):
        logits_of(model(), inputs())
        reattend.apply(model(), method, **options, tokenizer=tokenizer())
    assert session.applied
    if WEIGHING[method] is None:
        return
    ended = (method, {**options, **WEIGHING[method]})
    with model().use(ended, exit_, tokenizer=tokenizer()) as session:
        got = logits_of(model(), inputs())
        assert len(session.stats["visual-token-exit"]) == 2 and list(session.stats[method].values()) == [4]
    with model().use(exit_):
        alone = logits_of(model(), inputs())
    assert (got - alone)[:2].abs().amax(dim=(1, 2)).min() > 1e-5 < (got - base)[:2].abs().amax()


def test_hiding_comes_after_what_happens_in_front_of_the_exit():
    """Weights read inside the model: the image is strengthened up to the exit, and gets nothing behind it."""
    choices = [
        ("selective-emphasis", {**METHODS["selective-emphasis"], "last_layer": 1}),
        ("visual-token-exit", {"exit_layer": 1}),
    ]
    one = tiny_models.llava().inputs([ONE])

    def masses():
        with capture(model(), rows="last") as recording, torch.no_grad():
            model()(**one)
        return {layer: mass["image"] for layer, mass in recording.mass_by_layer().items()}

    plain = masses()
    with model().use(choices[0]):
        emphasised = masses()
    with model().use(*choices):
        both = masses()
    assert emphasised[1] > plain[1] and both[1] == pytest.approx(emphasised[1], abs=1e-6)
    assert both[2] == both[3] == 0 < plain[2]
