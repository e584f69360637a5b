"""The evict door: what is left of a cache gives the numbers of a mask over the whole one, wherever generation takes its rows."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from reattend.hooks import Edits, Evict, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import HeadGain, Keep, KeyBias, ReattendError, Transfer, UnsupportedError
from tiny_language import language_model
from transformers import StaticCache

IDS = torch.tensor([[0, 0, 1, 5, 9, 33, 7, 12, 4, 5, 6], [1, 8, 4, 21, 6, 17, 90, 3, 4, 5, 6]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
GREEDY = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
# of 11 tokens, which stay: other ones for each row, layer and key head; one head keeps all
STAYS = torch.rand(2, 4, 2, 11, generator=torch.Generator().manual_seed(3)) > 0.5
STAYS[..., -1] = True
STAYS[:, 2, 1] = True


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return language_model()


def rows_of(tokens, batch):
    """STAYS for the rows of a pass: prompts that became beams stand in groups."""
    return STAYS if batch == 2 else STAYS.repeat_interleave(batch // 2, dim=0)


def evicted(model, **options):
    def keep(seen):
        assert seen.key.shape == seen.value.shape == (*seen.held.shape, 8) and seen.clock.phase == "prefill"
        return rows_of(seen.tokens, len(seen.key))[:, seen.site.layer]

    return Plan("evict", [Evict(sites(model).stack("decoder"), keep, **options)])


def masked(model):
    """The same by an edit that hides what would have left, in every pass after the prompt's."""

    def hide(call):
        if call.num_keys <= 11:
            return None
        stays = rows_of(call.tokens, call.batch)[:, call.site.layer]
        more = torch.ones(*stays.shape[:2], call.num_keys - 11, dtype=torch.bool)
        seen = torch.cat([stays, more], dim=2).repeat_interleave(2, dim=1)
        causal = torch.ones(call.num_queries, call.num_keys, dtype=torch.bool).tril(call.num_keys - call.num_queries)
        return Keep(pattern=seen[:, :, None] & causal)

    return Plan("mask", [Edits(sites(model).stack("decoder"), hide)])


def logits(model, plan, **options):
    with attach(model, [plan]) as session:
        out = model.generate(**INPUTS, **{**GREEDY, **options})
    return out.sequences, torch.stack(out.logits), session


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beams", "drafts", "chunks"],
)
def test_what_is_left_gives_the_numbers_of_a_mask(model, options):
    if "prompt_lookup_num_tokens" in options:  # one row at a time
        inputs = {"input_ids": IDS[1:], "attention_mask": torch.ones_like(IDS[1:])}
        plans = [Plan("evict", [Evict(sites(model), lambda seen: STAYS[1:, seen.site.layer])]), None]

        def hide(call):
            if call.clock.phase == "prefill":
                return None
            stays = torch.cat([STAYS[1:, call.site.layer], torch.ones(1, 2, call.num_keys - 11, dtype=torch.bool)], dim=2)
            causal = torch.ones(call.num_queries, call.num_keys, dtype=torch.bool).tril(call.num_keys - call.num_queries)
            return Keep(pattern=stays.repeat_interleave(2, dim=1)[:, :, None] & causal)

        plans[1] = Plan("mask", [Edits(sites(model), hide)])
        found = []
        for plan in plans:
            with attach(model, [plan]):
                found.append(model.generate(**inputs, **{**GREEDY, **options}))
        (a, x), (b, y) = ((out.sequences, torch.stack(out.logits)) for out in found)
    else:
        (a, x, session), (b, y, _) = logits(model, evicted(model), **options), logits(model, masked(model), **options)
        assert session.stats == {"evict": {site.name: 1 for site in sites(model)}}
    assert torch.equal(a, b)
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    if not options:
        plain = torch.stack(model.generate(**INPUTS, **GREEDY).logits)
        assert torch.equal(x[0], plain[0]) and not torch.allclose(x[1], plain[1], atol=1e-2)


def test_it_holds_less_and_keeps_its_length(model):
    plain = cache_of(model(**INPUTS, use_cache=True))
    with attach(model, [evicted(model)]):
        cache = cache_of(model(**INPUTS, use_cache=True))
        own = STAYS & (IDS != 0)[:, None, None]
        for number, layer in enumerate(cache.layers):
            widths = own[:, number].sum(dim=2).amax(dim=0)  # the longest row of each head
            assert layer.held == 2 * 2 * 8 * int(widths.sum()) < plain.layers[number].keys.numel() * 2
            key, value, held = layer.whole()
            assert torch.equal(held, own[:, number]) and cache.get_seq_length() == 11
            assert torch.equal(key[held], plain.layers[number].keys[held]) and not key[~held].any()
            assert torch.equal(value[held], plain.layers[number].values[held])


def test_a_further_turn_and_copies_go_on(model):
    more = torch.tensor([[40, 41, 42], [50, 51, 52]])
    turn = {"input_ids": more, "attention_mask": torch.cat([INPUTS["attention_mask"], torch.ones_like(more)], dim=1)}
    found = []
    for plan in (evicted(model), masked(model)):
        with attach(model, [plan]):
            cache = cache_of(model(**INPUTS, use_cache=True))
            if plan.recipe == "evict":
                plan.steps[0].keep = lambda seen: None
            twin = copy.deepcopy(cache)
            found += [model(**turn, **{cache_name(model): one}).logits for one in (cache, twin)]
    assert all(torch.allclose(found[0], other, atol=1e-5) for other in found[1:])


def test_copies_of_what_is_left_are_the_same_sequence(model):
    """Each goes on as a step of decoding with what its recipe remembers, and is asked nothing anew; rows may be repeated."""
    asked, token = [], IDS[:, 5:6]
    mask = torch.cat([INPUTS["attention_mask"], torch.ones_like(token)], dim=1)

    def window(seen):
        asked.append((seen.site.layer, seen.clock.phase, seen.memory.get("asked"), int(seen.tokens.unread)))
        seen.memory["asked"] = True
        stays = torch.zeros_like(seen.held)
        stays[..., -3:] = True
        return stays

    plan = Plan("window", [Evict(sites(model), window, later=True)])
    with attach(model, [plan]):
        cache = cache_of(model(**INPUTS, use_cache=True))
        twins = [copy.deepcopy(cache) for _ in range(2)]
        found = [model(token, attention_mask=mask, **{cache_name(model): one}).logits for one in (cache, *twins)]
        assert {line[1:] for line in asked[4:]} == {("decode", True, 0)}
        twin = copy.deepcopy(twins[0])
        twin.batch_repeat_interleave(2)
        more = [x.repeat_interleave(2, dim=0) for x in (token, torch.cat([mask, torch.ones_like(token)], dim=1))]
        wide = model(more[0], attention_mask=more[1], **{cache_name(model): twin}).logits
        alone = model(token, attention_mask=more[1][::2], **{cache_name(model): twins[1]}).logits
    assert all(torch.equal(found[0], one) for one in found) and torch.allclose(wide[::2], alone, atol=1e-5)


def test_asked_after_every_pass(model):
    """The first token and a window of four."""

    def window(seen):
        stays = torch.zeros_like(seen.held)
        stays[..., :1], stays[..., -4:] = True, True
        return stays

    ids = IDS[1:]
    with attach(model, [Plan("window", [Evict(sites(model), window, later=True)])]) as session:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)

    def hide(call):
        near = torch.zeros(call.num_keys, dtype=torch.bool)
        near[:1], near[-5:] = True, True
        return Keep(pattern=near[None]) if call.num_queries == 1 else None

    with attach(model, [Plan("mask", [Edits(sites(model), hide)])]):
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(wanted.logits), atol=1e-5, rtol=1e-5)
    assert set(session.stats["window"].values()) == {6}
    assert [part.key.shape[2] for part in cache_of(out).layers[1].parts] == [5]


@pytest.mark.parametrize(
    "edit",
    [
        lambda call: KeyBias(bias=torch.ones(call.num_keys)),
        lambda call: Transfer(source=[3], strength=0.5),
        lambda call: Keep(pattern=torch.ones(call.num_queries, call.num_keys, dtype=torch.bool)),
    ],
    ids=["bias", "transfer", "keep"],
)
def test_columns_cannot_be_named_once_tokens_have_left(model, edit):
    """By the recipe itself: other recipes are refused when they begin."""
    late = Edits(sites(model)[:1], lambda call: edit(call) if call.clock.phase == "decode" else None)
    plan = evicted(model)
    with (
        pytest.raises(ReattendError, match="names columns of a sequence of which tokens have left the cache"),
        attach(model, [Plan("evict", [*plan.steps, late])]),
    ):
        model.generate(**INPUTS, **GREEDY)
    gain = Edits(sites(model)[:1], lambda call: HeadGain(factor=0.5) if call.clock.phase == "decode" else None)
    with attach(model, [Plan("evict", [*plan.steps, gain])]):
        model.generate(**INPUTS, **GREEDY)


def test_without_its_session_it_refuses(model):
    before = model(**INPUTS).logits
    session = attach(model, [evicted(model)])
    cache = cache_of(model(**INPUTS, use_cache=True))
    session.remove()
    assert torch.equal(model(**INPUTS).logits, before)
    with pytest.raises(ReattendError, match="that session is not at work here"):
        model(IDS[:, :1], **{cache_name(model): cache})
    with pytest.raises(ReattendError, match="that session is not at work here"), attach(model, [masked(model)]):
        model(IDS[:, :1], **{cache_name(model): copy.deepcopy(cache)})
    with pytest.raises(ReattendError, match="cannot be cut to 9"):
        cache.crop(-2)


def test_refused_by_whatever_name_its_sites_go(model):
    """In a wrapper of PEFT's or one's own, the model inside has other names."""
    around = torch.nn.Sequential(model)
    other = Plan("gain", [Edits(sites(around)[:1], lambda call: HeadGain(factor=0.5))])
    with attach(model, [evicted(model)]), pytest.raises(UnsupportedError, match="'gain' acts or looks at 0.model.layers.0"):
        attach(around, [other])
    with attach(around, [other]), pytest.raises(UnsupportedError, match="goes together with other recipes"):
        attach(model, [evicted(model)])


def test_refused(model):
    other = Plan("gain", [Edits(sites(model)[:1], lambda call: HeadGain(factor=0.5))])
    with attach(model, [evicted(model)]), pytest.raises(UnsupportedError, match="'gain' acts or looks at .*layers.0"):
        attach(model, [other])
    with attach(model, [other]), pytest.raises(UnsupportedError, match="goes together with other recipes"):
        attach(model, [evicted(model)])
    with pytest.raises(UnsupportedError, match="a window or a state"):
        attach(
            language_model("Mistral", sliding_window=4),
            [Plan("e", [Evict(sites(language_model("Mistral", sliding_window=4)), len)])],
        )
    mllama = tiny_models.mllama().model  # its layers of cross-attention keep images in the cache of the text
    with pytest.raises(UnsupportedError, match="cross_attn keeps what it looks at in the same cache"):
        attach(mllama, [evicted(mllama)])
    ran = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with attach(model, [evicted(model)]):
        with pytest.raises(ReattendError, match="fixed, quantised or windowed layers"):
            model(**INPUTS, **{cache_name(model): StaticCache(config=model.config, max_cache_len=32)})
        with pytest.raises(ReattendError, match="leave use_cache as it is"):
            model(**INPUTS, use_cache=False)
    handle.remove()
    assert not ran
    for answer, said in (
        (lambda seen: torch.ones(3, 3, dtype=torch.bool), r"answered \[3, 3\]"),
        (lambda seen: torch.ones(11), "answered torch.float32"),
        (lambda seen: [True] * 11, r"answered \[True, .*wanted is bool \[2, 2, 11\] or None"),
        (lambda seen: torch.zeros(11, dtype=torch.bool), "without any token"),
    ):
        with pytest.raises(ReattendError, match=said), attach(model, [Plan("wrong", [Evict(sites(model), answer)])]):
            model(**INPUTS, use_cache=True)
    with pytest.raises(UnsupportedError, match="reads no tokens"):
        import tiny_denoisers

        net, _ = tiny_denoisers.build("SD3Transformer2DModel")
        attach(net, [Plan("e", [Evict(sites(net), len)])])
