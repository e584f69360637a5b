"""The branch door: other prompts that go on with the same tokens, whatever moves or takes back the rows of the real cache."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from reattend.hooks import Branch, Edits, Plan, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import HeadGain, ReattendError, UnsupportedError
from tiny_language import language_model
from torch.nn.functional import pad

IDS = torch.tensor([[0, 0, 1, 5, 9, 33, 7], [1, 8, 4, 21, 6, 17, 90]])
MASK = (IDS != 0).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
HIDDEN = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1, 0]]).bool()
LOGITS = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)


def hidden(prompt):
    """The same prompt with some tokens out of sight, for as many rows as the prompts were repeated."""
    mask = prompt.arguments["attention_mask"]
    return {**prompt.arguments, "attention_mask": mask * ~HIDDEN.repeat_interleave(len(mask) // 2, dim=0)}


def shorter(prompt):
    """Another prompt of another width."""
    ids = IDS[:, [2, 3, 6]].repeat_interleave(len(prompt.arguments["input_ids"]) // 2, dim=0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(3).expand_as(ids)}


def single(prompt):
    return {"input_ids": IDS[:1, 3:], "attention_mask": MASK[:1, 3:], "position_ids": torch.arange(4)[None]}


def mean(step):
    return (step.logits + sum(step.others)) / (1 + len(step.others))


def plan(*inputs, fuse=mean, **options):
    return Plan("branch", [Branch(list(inputs or (hidden,)), fuse, **options)])


@pytest.fixture(scope="module")
def model():
    return language_model()


def expected(model, sequences, inputs=("hidden", "shorter"), width=7):
    """Mean logits after each row's tokens, from whole passes of the plain model, one row at a time: [B, V]."""
    rows = []
    for row, ids in enumerate(sequences):
        tail = ids[width:]
        positions = (pad(MASK[row], (0, len(tail)), value=1).cumsum(0) - 1).clamp(min=0)
        found = []
        for seen in (MASK[row], MASK[row] * ~HIDDEN[row]) if "hidden" in inputs else (MASK[row],):
            mask = pad(seen, (0, len(tail)), value=1)[None]
            found.append(model(ids[None], attention_mask=mask, position_ids=positions[None]).logits[0, -1])
        if "shorter" in inputs:
            found.append(model(torch.cat([IDS[row, [2, 3, 6]], tail])[None]).logits[0, -1])
        rows.append(torch.stack(found).mean(dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3", "OPT"])
def test_generation_equals_whole_passes_row_by_row(kind, options):
    """Left padding, a branch in place and one of another width: every step as fresh passes over the text, also in windows of 8."""
    sliding = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = language_model(kind, **(sliding if kind == "Gemma3" else {}))
    plain = model.generate(**INPUTS, max_new_tokens=5, **LOGITS)
    with attach(model, [plan(hidden, shorter)]) as session:
        out = model.generate(**INPUTS, max_new_tokens=5, **LOGITS, **options)
        assert session.stats == {"branch": {"logits": 5}} and session.forwards == 5
    for step, logits in enumerate(out.logits):
        wanted = expected(model, out.sequences[:, : 7 + step])
        torch.testing.assert_close(logits, wanted, atol=3e-5, rtol=1e-4)
    assert (out.logits[0] - plain.logits[0]).abs().max() > 1e-2
    again = model.generate(**INPUTS, max_new_tokens=5, **LOGITS)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits))


@pytest.mark.parametrize("inputs", [(hidden,), (shorter,), (hidden, shorter)])
def test_beams_move_branches_along(model, inputs):
    """Without a cache nothing can be in the wrong order: with one, beams are the same."""
    options = dict(num_beams=4, num_return_sequences=4, max_new_tokens=8, do_sample=False)
    options |= dict(return_dict_in_generate=True, output_scores=True)
    plain = model.generate(**INPUTS, **options)
    with attach(model, [plan(*inputs)]) as session:
        cached, free = (model.generate(**INPUTS, **options, use_cache=use) for use in (True, False))
        assert session.stats == {"branch": {"logits": 16}}
    assert torch.equal(cached.sequences, free.sequences)
    torch.testing.assert_close(cached.sequences_scores, free.sequences_scores, atol=1e-4, rtol=1e-4)
    assert not torch.equal(cached.sequences, plain.sequences)
    # the order of beams did change on the way, or this test would say nothing
    assert any((row != row[0]).any() for row in cached.beam_indices[:, :8])


def test_samples_are_drawn_from_the_fused_logits(model):
    options = dict(max_new_tokens=6, do_sample=True, top_k=20, temperature=0.7, num_return_sequences=3)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    drawn = []
    with attach(model, [plan()]):
        for use in (True, False):
            torch.manual_seed(3)
            drawn.append(model.generate(**INPUTS, **options, use_cache=use))
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    top = torch.stack(drawn[0].logits, 1).topk(20).indices
    assert (top == drawn[0].sequences[:, 7:, None]).any(-1).all()


@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
@pytest.mark.parametrize("inputs", [(single,), (lambda p: {**p.arguments, "attention_mask": MASK[1:] * ~HIDDEN[1:]},)])
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_drafts_are_checked_with_branches(kind, inputs, how):
    """What assisted decoding writes is what decoding writes: branches read drafts and take refused ones back."""
    sliding = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = language_model(kind, **(sliding if kind == "Gemma3" else {}))
    ids = torch.tensor([[1, 8, 4, 21, 6, 17, 90]])
    options = dict(max_new_tokens=14, do_sample=False, attention_mask=torch.ones_like(ids))
    help = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": copy.deepcopy(model)}
    passes = []
    with attach(model, [plan(*inputs)]) as session:
        alone = model.generate(ids, **options)
        passes.append(session.forwards)
        helped = model.generate(ids, **options, **help)
        passes.append(session.forwards - passes[0])
        assert session.stats == {"branch": {"logits": sum(passes)}}
    assert torch.equal(alone, helped)
    # some drafts were taken, and some were not
    assert how == "lookup" or 3 < passes[1] < 14
    assert not torch.equal(alone, model.generate(ids, **options))


@pytest.mark.parametrize("keep", [0, 1, torch.tensor([4, 6])])
def test_bare_passes_step_by_step(model, keep):
    """model(...) with a cache that the caller holds; logits of other positions stay bit for bit."""
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    plain = model(**INPUTS, position_ids=positions, logits_to_keep=keep).logits
    with attach(model, [plan(hidden, shorter)]):
        out = model(**INPUTS, position_ids=positions, logits_to_keep=keep)
        first = out.logits
        text, mask, cache = IDS, MASK, cache_of(out)
        steps = []
        for token in (3, 11, 40):
            text, mask = torch.cat([text, torch.full((2, 1), token)], 1), pad(mask, (0, 1), value=1)
            out = model(
                text[:, -1:], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, **{cache_name(model): cache}
            )
            steps.append(out.logits[:, -1])
        assert any(name in vars(cache) for name in ("reorder_cache",))
    assert "reorder_cache" not in vars(cache)
    assert torch.equal(first[:, :-1], plain[:, :-1])
    torch.testing.assert_close(first[:, -1], expected(model, IDS), atol=3e-5, rtol=1e-4)
    for step, logits in enumerate(steps):
        torch.testing.assert_close(logits, expected(model, text[:, : 8 + step]), atol=3e-5, rtol=1e-4)


def test_rows_padded_on_the_right_are_fused_at_their_own_ends(model):
    ids = torch.tensor([[1, 5, 9, 33, 7, 0, 0], [1, 8, 4, 21, 6, 17, 90]])
    mask = (ids != 0).long()

    def first_hidden(prompt):
        return {**prompt.arguments, "attention_mask": mask * (torch.arange(7) != 1)}

    plain = model(ids, attention_mask=mask).logits
    with attach(model, [plan(first_hidden, fuse=lambda step: step.others[0])]):
        found = model(ids, attention_mask=mask).logits
    for row, length in enumerate((5, 7)):
        alone = model(ids[row : row + 1, :length], attention_mask=(torch.arange(length) != 1)[None].long()).logits
        torch.testing.assert_close(found[row, length - 1], alone[0, -1], atol=3e-5, rtol=1e-4)
        assert torch.equal(found[row, : length - 1], plain[row, : length - 1])


def test_only_its_own_steps_edit_a_branch(model):
    """The recipes beside it edit the real pass alone, the steps of the branch the branch alone."""
    decoder = sites(model)
    edits = {
        "real": Edits(decoder, lambda call: HeadGain(factor=0.3), "real"),
        "own": Edits(decoder, lambda call: HeadGain(factor=2.0), "own"),
    }
    inputs = [lambda prompt: prompt.arguments]

    def only(name):
        with attach(model, [Plan(name, [edits[name]])]):
            return model(**INPUTS).logits[:, -1]

    seen = {}

    def keep(step):
        seen.update(real=step.logits[:, 0], own=step.others[0][:, 0])
        return step.logits

    with attach(model, [Plan("x", [edits["real"], Branch(inputs, keep, [edits["own"]])])]) as session:
        model(**INPUTS)
        assert {k: sum(v.values()) for k, v in session.stats.items()} == {"real": 4, "own": 4, "x": 1}
    assert torch.equal(seen["real"], only("real"))
    torch.testing.assert_close(seen["own"], only("own"), atol=1e-6, rtol=1e-5)
    assert (seen["real"] - seen["own"]).abs().max() > 1e-2


def test_two_sessions_fuse_one_after_the_other(model):
    double = plan(fuse=lambda step: 2 * step.logits)
    add = plan(fuse=lambda step: step.logits + 1)
    plain = model.generate(**INPUTS, max_new_tokens=3, **LOGITS).logits
    with attach(model, [double]), attach(model, [add]):
        out = model.generate(**INPUTS, max_new_tokens=3, **LOGITS).logits
    for a, b in zip(out, plain):
        torch.testing.assert_close(a, 2 * b + 1, atol=1e-5, rtol=1e-5)


def test_a_prompt_may_need_no_branch(model):
    with attach(model, [plan(lambda prompt: None)]) as session:
        assert torch.equal(model(**INPUTS).logits, model(**INPUTS).logits)
        session.counts.clear()
    ids = IDS[1:]
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    with attach(model, [plan(lambda prompt: None)]) as session:
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)
        assert session.stats == {"branch": {}}
        session.counts.clear()


def test_threads_have_branches_of_their_own(model):
    found, wanted = {}, {}
    texts = [IDS[1:, :n] for n in (4, 5, 6, 7)]

    def inputs(prompt):
        return {**prompt.arguments, "input_ids": prompt.arguments["input_ids"].flip(1)}

    with attach(model, [plan(inputs)]):
        for n, ids in enumerate(texts):
            wanted[n] = model.generate(ids, max_new_tokens=6, do_sample=False)
        run = [
            threading.Thread(target=lambda n=n, i=i: found.update({n: model.generate(i, max_new_tokens=6, do_sample=False)}))
            for n, i in enumerate(texts)
        ]
        [t.start() for t in run]
        [t.join() for t in run]
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_leave_nothing(model, error):
    base = model(**INPUTS).logits

    def raises(step):
        raise error("stop")

    with attach(model, [plan(fuse=raises)]) as session:
        with pytest.raises(error):
            model(**INPUTS)
        session.actions.clear()
        assert torch.equal(model(**INPUTS).logits, base)
        session.counts.clear()
    assert torch.equal(model(**INPUTS).logits, base)
    assert not model._forward_pre_hooks and not model._forward_hooks


@torch.no_grad()
def test_caches_are_not_kept_alive_and_copies_are_their_own(model):
    import weakref

    with attach(model, [plan()]):
        cache = cache_of(model(**INPUTS))
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(twin.layers[0].keys, cache.layers[0].keys.flip(0))
        gone = weakref.ref(cache)
        del cache, twin
        gc.collect()
        assert gone() is None


def test_what_branches_cannot_follow_is_refused_before_any_layer_runs(model):
    ran = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UnsupportedError, match="language head"):
        attach(model.model, [plan()])
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    with pytest.raises(UnsupportedError, match="encoder"):
        attach(T5ForConditionalGeneration(t5), [plan()])
    with pytest.raises(ReattendError, match="at least one function"):
        Branch([], mean)
    old = cache_of(model(**INPUTS))
    with attach(model, [plan()]) as session:
        ran.clear()
        with pytest.raises(ReattendError, match="cache that this session has not seen"):
            model(IDS[:, :1], **{cache_name(model): old})
        assert not ran
        caches = [cache_of(model(**INPUTS)) for _ in range(2)]
        ran.clear()
        with pytest.raises(ReattendError, match="in pieces"):
            model(IDS[:, :3], **{cache_name(model): caches[0]})
        with pytest.raises(ReattendError, match="not inputs_embeds"):
            model(inputs_embeds=torch.zeros(2, 1, 32), **{cache_name(model): caches[1]})
        with pytest.raises(ReattendError, match="loss from labels"):
            model(**INPUTS, labels=IDS)
        with pytest.raises(ReattendError, match="return_dict"):
            model(**INPUTS, return_dict=False)
        with pytest.raises(ReattendError, match="position_ids of its own"):
            session.plans[0].steps[0].inputs = [lambda prompt: {"input_ids": IDS[:, :3]}]
            model(**INPUTS)
        assert not ran
        session.plans[0].steps[0].inputs = [shorter]
        with pytest.raises(ReattendError, match="prefill_chunk_size"):
            model.generate(**INPUTS, max_new_tokens=2, prefill_chunk_size=3)
        with pytest.raises(ReattendError, match="keep column 6"):
            model(**INPUTS, logits_to_keep=torch.tensor([2, 3]))
    handle.remove()
    assert not model._forward_pre_hooks and not model._forward_hooks
