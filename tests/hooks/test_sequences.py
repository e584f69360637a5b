"""What is believed of a sequence follows from its cache's own length and the ids given; where it cannot, it is said."""

from __future__ import annotations

import copy

import pytest
import reattend
import torch
from reattend.hooks import Capture, Edits, Plan, Spans, attach, sites
from reattend.hooks.trackers.caches import cache_name, cache_of
from reattend.interventions import ReattendError
from tiny_language import CHATML, language_model, tokenizer
from transformers import DynamicCache, StaticCache

LONG = torch.randint(5, 390, (1, 40), generator=torch.Generator().manual_seed(3))
CONTEXT, FIRST, SECOND = LONG[:, :16], LONG[:, 16:24], LONG[:, 30:34]
SPAN = dict(ranges=[(3, 6)], alpha=0.05)


@pytest.fixture(scope="module")
def model():
    return language_model()


def run(model, ids, cache=None, **more):
    with torch.no_grad():
        return model(ids, **({} if cache is None else {cache_name(model): cache}), **more)


def answer(model, ids, cache=None, count=3, **more):
    """Logits [B, count, V] of greedy decoding, and the tokens."""
    given = {} if cache is None else {cache_name(model): cache}
    found = model.generate(
        ids, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True, **given, **more
    )
    return torch.stack(found.logits, 1), found.sequences


def watching(model, *steps, given=None):
    """A session that notes (phase, step, prompt's length, length) of every pass, at the first layer."""
    seen = []

    def look(call, edits):
        seen.append((call.clock.phase, call.clock.step, call.tokens.prompt_length, call.tokens.length))

    first = sites(model).where(lambda s: s.layer == 0)
    return attach(model, [Plan("watch", [*steps, Capture(first, look)])], tokenizer=given), seen


# -- caches that get shorter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [(FIRST, SECOND), (SECOND, FIRST), (FIRST, FIRST.flip(1))])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_cut_back_to_its_context_takes_the_next_question(model, questions, kind):
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    if kind == "static" and not hasattr(StaticCache, "crop"):
        pytest.skip("static caches cannot be cut before transformers 5.24")
    with reattend.apply(model, "emphasise", **SPAN):
        run(model, CONTEXT, cache)
        for question in questions:
            whole = torch.cat([CONTEXT, question], dim=1)
            got = answer(model, whole, cache)
            try:
                cache.crop(16 - int(cache.get_seq_length()))
            except (AttributeError, NotImplementedError):
                pytest.skip("these layers cannot be cut")
            torch.testing.assert_close(got[0], answer(model, whole)[0], atol=1e-4, rtol=1e-4)


def test_a_passage_of_the_question_is_found_again_in_the_next_one(model):
    chars = tokenizer(None)
    context = chars("Anna has a red house.", return_tensors="pt").input_ids
    questions = [chars(t, return_tensors="pt").input_ids for t in (" Please: Answer in French.", " Answer in one word.")]
    marked = []

    def look(call, edits):
        marked.append(call.columns("marked")[0].nonzero()[:, 0].tolist())

    steps = [Spans("marked", texts=[["Answer in"]]), Capture(sites(model).where(lambda s: s.layer == 0), look)]
    whole, kept = [], []
    cache = DynamicCache(config=model.config)
    run(model, context, cache)
    with attach(model, [Plan("probe", steps)], tokenizer=chars):
        for question in questions:
            marked.clear()
            run(model, torch.cat([context, question], dim=1))
            whole.append(marked[-1])
        cache = cache_of(run(model, torch.cat([context, questions[0]], dim=1), DynamicCache(config=model.config)))
        kept.append(marked[-1])
        cache.crop(context.shape[1] - cache.get_seq_length())
        run(model, questions[1], cache)
        kept.append(marked[-1])
    assert kept == whole and whole[0] != whole[1]


def test_tokens_taken_back_by_hand_are_no_part_of_the_prompt(model):
    session, seen = watching(model)
    cache = DynamicCache(config=model.config)
    with session:
        run(model, CONTEXT, cache)
        for token in (5, 6, 7):
            run(model, torch.tensor([[token]]), cache)
        cache.crop(-2)
        run(model, torch.tensor([[8]]), cache)
        cache.crop(-8)
        run(model, torch.tensor([[9]]), cache)
    assert seen[-2] == ("decode", 3, 16, 18) and seen[-1] == ("decode", 0, 10, 11)


# -- copies --------------------------------------------------------------------------------------------------------------


def test_copies_of_a_cache_go_on_apart_with_what_was_read(model):
    chars = tokenizer(None)
    text = "Anna has a red house. "
    context = chars(text, return_tensors="pt").input_ids
    questions = [chars(t, return_tensors="pt").input_ids for t in ("Please?", "The capital of France?")]
    with reattend.apply(model, "emphasise", text="red", alpha=0.05, tokenizer=chars):
        prefix = DynamicCache(config=model.config)
        run(model, context, prefix)
        got = [answer(model, torch.cat([context, q], 1), copy.deepcopy(prefix))[0] for q in questions]
        # a copy of the beginning of a longer cache, and one for several rows
        longer = copy.deepcopy(prefix)
        answer(model, torch.cat([context, questions[1]], 1), longer)
        cut = copy.deepcopy(longer)
        cut.crop(context.shape[1] - cut.get_seq_length())
        rows = copy.deepcopy(prefix)
        rows.batch_repeat_interleave(2)
        got += [answer(model, torch.cat([context, questions[0]], 1), cut)[0]]
        got += [answer(model, torch.cat([context, questions[0]], 1).repeat(2, 1), rows)[0][1:]]
        want = [answer(model, torch.cat([context, q], 1))[0] for q in (*questions, questions[0], questions[0])]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_copies_of_a_cache_whose_windows_have_moved_on_are_known():
    """All layers have dropped the first tokens; what they hold tells the copy apart."""
    model = language_model("Mistral", sliding_window=6)
    with reattend.apply(model, "act", heads="all", threshold=0.02) as session:
        cache = DynamicCache(config=model.config)
        run(model, CONTEXT, cache)
        run(model, FIRST[:, :1], cache)
        twin = copy.deepcopy(cache)
        acted = session.applied
        mine = run(model, FIRST[:, 1:2], twin).logits
        theirs = run(model, FIRST[:, 1:2], cache).logits
        assert torch.equal(mine, theirs) and acted


def test_a_cache_of_other_tokens_is_no_copy(model):
    other = DynamicCache(config=model.config)
    run(model, LONG[:, 20:36], other)
    with attach(model, [Plan("probe", [Spans("s", texts=[["red"]])])], tokenizer=tokenizer(None)):
        known = tokenizer(None)("Anna has a red house. Anna", return_tensors="pt").input_ids[:, :16]
        run(model, known, DynamicCache(config=model.config))
        with pytest.raises(ReattendError, match="16 tokens of it stand in a cache that was filled .* begin the session"):
            run(model, FIRST, other)


def test_rows_taken_from_a_cache_ask_for_a_reset(model):
    session, seen = watching(model)
    ids = torch.cat([CONTEXT, LONG[:, 20:36]])
    cache = DynamicCache(config=model.config)
    with session:
        run(model, ids, cache)
        cache.batch_select_indices(torch.tensor([1]))
        with pytest.raises(ReattendError, match=r"had 2 rows .* has 1 now.* session.reset\(\)"):
            run(model, ids[:1, :1], cache)
        session.reset()
        run(model, ids[:1, :1], cache)
        # rows that were repeated are told
        cache.batch_repeat_interleave(3)
        run(model, ids[:1, :1].repeat(3, 1), cache)
    assert [s[0] for s in seen] == ["prefill", "prefill", "decode"]


def test_reset_forgets_and_the_next_pass_starts_anew(model):
    chars = tokenizer(None)
    ids = chars("Anna has a red house.", return_tensors="pt").input_ids
    session, seen = watching(model, Spans("s", texts=[["red"]]), given=chars)
    with session:
        cache = DynamicCache(config=model.config)
        run(model, ids, cache)
        run(model, ids[:, :1], cache)
        session.reset()
        with pytest.raises(ReattendError, match="begin the session before the prompt is read"):
            run(model, ids[:, :1], cache)
        run(model, ids, DynamicCache(config=model.config))
    assert [s[0] for s in seen] == ["prefill", "decode", "prefill"]
    session.reset()  # after its end too


def test_branches_of_a_copied_cache_go_on_with_the_copy(model):
    from reattend.hooks import Branch

    def branch():
        return Branch([lambda prompt: prompt.arguments], fuse=lambda fusion: 2 * fusion.logits - fusion.others[0])

    with attach(model, [Plan("same", [branch()])]):
        prefix = cache_of(run(model, CONTEXT, use_cache=True))
        want = run(model, FIRST[:, :1], copy.deepcopy(prefix)).logits
        again = run(model, FIRST[:, :1], prefix).logits
    torch.testing.assert_close(want, again)
    torch.testing.assert_close(
        want[:, -1], run(model, torch.cat([CONTEXT, FIRST[:, :1]], 1)).logits[:, -1], atol=1e-4, rtol=1e-4
    )


# -- passes without a cache, drafts, chunks ------------------------------------------------------------------------------


def test_every_uncached_pass_outside_generate_is_a_prompt_of_its_own(model):
    session, seen = watching(model)
    with session:
        run(model, LONG[:, :12], use_cache=False)
        run(model, LONG[:, :13], use_cache=False)
        run(model, LONG[:, :1])
        assert [s[:3] for s in seen] == [("prefill", 0, 12), ("prefill", 0, 13), ("prefill", 0, 1)]
        seen.clear()
        for _ in range(2):  # calls at one place in a row, the second one token longer
            for width in (12, 13):
                model.generate(LONG[:, :width], max_new_tokens=2, do_sample=False, use_cache=False)
    assert [s[0] for s in seen] == ["prefill", "decode"] * 4 and [s[2] for s in seen] == [12, 12, 13, 13] * 2


def test_a_second_prompt_for_guidance_is_followed_beside_the_first(model):
    session, seen = watching(model)
    with session:
        model.generate(LONG[:, :12], max_new_tokens=3, do_sample=False, use_cache=False, guidance_scale=1.5)
    own = [s for s in seen if s[2] == 12]
    assert [s[0] for s in own] == ["prefill", "decode", "decode"]


@pytest.mark.parametrize("keep", [1, 2, 6])
def test_scoring_the_last_tokens_is_no_assisted_decoding(model, keep):
    for span in ((3, 6), (13, 16)):
        with reattend.apply(model, "emphasise", ranges=[span], alpha=0.05):
            whole = run(model, LONG[:, :18]).logits[:, -keep:]
            torch.testing.assert_close(run(model, LONG[:, :18], logits_to_keep=keep).logits, whole)


@pytest.mark.parametrize("how", ["assistant", "lookup", "early exit"])
def test_drafts_are_told_from_the_prompt(model, how):
    options = {
        "assistant": dict(assistant_model=language_model(num_hidden_layers=1)),
        "lookup": dict(prompt_lookup_num_tokens=3),
        "early exit": dict(assistant_early_exit=2),
    }[how]
    ids = LONG[:, :9].repeat(1, 2)
    session, seen = watching(model)
    with reattend.apply(model, "emphasise", **SPAN), session:
        expected = answer(model, ids, count=6)[1]
        seen.clear()
        assert torch.equal(answer(model, ids, count=6, **options)[1], expected)
    assert {s[2] for s in seen} == {18} and "decode" in {s[0] for s in seen}


@pytest.mark.parametrize("size", [4, 6, 17])
@pytest.mark.parametrize("mark", [dict(ranges=[(12, 15)]), dict(ranges=[(4, 8)]), dict(text="red house")])
def test_a_passage_in_a_later_chunk_is_known_from_the_first(model, size, mark):
    chars = tokenizer(None)
    ids = chars("Quick: the dog sat. Anna has a red house, the capital", return_tensors="pt").input_ids[:, :18]
    for slug, more in (("emphasise", dict(alpha=0.05)), ("instaboost", dict(multiplier=9.0))):
        with reattend.apply(model, slug, tokenizer=chars, **mark, **more) as session:
            whole = answer(model, ids)[0]
            acted = session.applied
            torch.testing.assert_close(answer(model, ids, prefill_chunk_size=size)[0], whole, atol=1e-4, rtol=1e-4)
            assert session.applied > acted


def test_a_range_beyond_the_whole_prompt_is_refused_at_its_first_chunk(model):
    with (
        attach(model, [Plan("probe", [Spans("s", ranges=[[(16, 20)]])])]) as session,
        pytest.raises(ReattendError, match=r"range \(16, 20\) ends beyond prompt 0, which has 18 tokens"),
    ):
        answer(model, LONG[:, :18], prefill_chunk_size=6)
    assert session.forwards == 0


def test_the_last_chunk_of_one_token_is_prompt(model):
    session, seen = watching(model)
    with session:
        answer(model, LONG[:, :13], prefill_chunk_size=6, count=2)
        assert seen == [("prefill", 0, 6, 6), ("prefill", 0, 12, 12), ("prefill", 0, 13, 13), ("decode", 0, 13, 14)]
        seen.clear()
        answer(model, LONG[:, :4], prefill_chunk_size=1, count=2)
    assert seen == [("prefill", 0, n, n) for n in range(1, 5)] + [("decode", 0, 4, 5)]


# -- sessions that begin late --------------------------------------------------------------------------------------------


def test_a_session_begun_on_a_sequence_that_another_one_reads_knows_its_tokens(model):
    with reattend.apply(model, "streaming", sinks=1, window=4):
        cache = cache_of(run(model, CONTEXT, use_cache=True))
        with reattend.apply(model, "instaboost", ranges=[(2, 5)]) as late:
            run(model, FIRST[:, :1], cache)
        assert late.applied


@pytest.mark.filterwarnings("ignore:recipe .act. never acted")
def test_a_recipe_that_learns_from_the_prompt_says_that_it_came_too_late(model):
    cache = cache_of(run(model, CONTEXT, use_cache=True))
    with (
        reattend.apply(model, "act", heads="all"),
        pytest.raises(ReattendError, match="act learns from the prompt .* first 16 tokens .* begin the session before"),
    ):
        run(model, FIRST[:, :1], cache)


def test_chat_roles_of_an_answer_that_stands_in_the_cache(model):
    chars = tokenizer(CHATML)
    talk = [
        {"role": "user", "content": "Anna?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Rome?"},
    ]
    ids = chars(chars.apply_chat_template(talk, tokenize=False), return_tensors="pt").input_ids
    spoken = []

    def look(call, edits):
        spoken.append({role: call.columns(role)[0].tolist() for role in ("user", "assistant") if role in call.tokens})

    steps = [Capture(sites(model).where(lambda s: s.layer == 0), look)]
    with attach(model, [Plan("probe", steps)], tokenizer=chars):
        run(model, ids)
        cache = DynamicCache(config=model.config)
        run(model, ids[:, :12], cache)
        for at in range(12, 20):
            run(model, ids[:, at : at + 1], cache)
        run(model, ids[:, 20:], cache)
    assert spoken[-1] == spoken[0] and any(spoken[0]["assistant"])


# -- counters that cannot be right ---------------------------------------------------------------------------------------


def renamed(model, given=True):
    """The model under a class that takes its cache as `memory_cache`, or returns it by that name alone."""
    original = type(model)

    class Given(original):
        def forward(self, input_ids, memory_cache=None, attention_mask=None):
            out = original.forward(self, input_ids, **{cache_name(model): memory_cache}, attention_mask=attention_mask)
            return {"logits": out.logits, "memory_cache": cache_of(out)}

    class Returned(original):
        def forward(self, input_ids, kept=None, attention_mask=None):
            return Given.forward(self, input_ids, kept and kept[0], attention_mask)

    other = copy.copy(model)
    other.__class__ = Given if given else Returned
    return other


def test_a_cache_under_a_name_that_is_not_known_is_an_error(model):
    other = renamed(language_model())
    session, seen = watching(other)
    with session, torch.no_grad():
        cache = other(CONTEXT)["memory_cache"]
        with pytest.raises(ReattendError, match=r"memory_cache.*torch \d.*transformers \d"):
            other(FIRST[:, :1], memory_cache=cache)
    hidden = renamed(language_model(), given=False)
    session, seen = watching(hidden)
    with session, torch.no_grad():
        cache = hidden(CONTEXT)["memory_cache"]
        with pytest.raises(ReattendError, match="has returned a cache by the name 'memory_cache'"):
            hidden(FIRST[:, :1], kept=(cache,) * 2)


def test_a_mask_longer_than_the_tokens_without_a_cache_is_an_error(model):
    session, _ = watching(model)
    with session, pytest.raises(ReattendError, match="mask has 17 columns for 1 tokens, and no cache"):
        run(model, FIRST[:, :1], attention_mask=torch.ones(1, 17, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:recipe .none. never acted")
def test_single_tokens_and_encoders_raise_no_alarm(model):
    from transformers import BertConfig, BertModel

    session, seen = watching(model)
    with session:
        for width in (1, 5, 1, 1):
            run(model, LONG[:, :width])
            run(model, LONG[:, :width], use_cache=False)
        model.generate(LONG[:, :1], max_new_tokens=3, do_sample=False)
    bert = BertModel(
        BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    )
    with attach(bert.eval(), [Plan("none", [Edits(sites(bert), lambda call: None)])]), torch.no_grad():
        for width in (6, 1):
            bert(LONG[:, :width] % 99, attention_mask=torch.ones(1, width))


# -- virtual tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("inner", [False, True], ids=["on the PEFT model", "on the model inside"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_ranges_are_counted_from_the_users_first_token(kind, inner):
    peft = pytest.importorskip("peft")
    more = dict(encoder_hidden_size=32) if kind == "PromptEncoderConfig" else {}
    tuned = peft.get_peft_model(
        language_model(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5, **more)
    ).eval()
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), LONG[:, :9]], dim=1)
    ids = torch.cat([LONG[:, 20:32], ids])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = []

    def look(call, edits):
        found.append([row.nonzero()[:, 0].tolist() for row in call.columns("s")])

    target = tuned.get_base_model() if inner else tuned
    steps = [Spans("s", ranges=[[(1, 3)], [(0, 2)]]), Capture(sites(target).where(lambda s: s.layer == 0), look)]
    with attach(target, [Plan("probe", steps)]):
        try:
            tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
        except ReattendError as error:
            # a PEFT that knows caches by a name which transformers no longer reads
            prefix = kind == "PrefixTuningConfig"
            assert ("mask has 17 columns for 12 tokens" if prefix else "virtual tokens before every token") in str(error)
            assert cache_name(target) == "cache" and found == ([] if prefix else [[[6, 7], [8, 9]]])
            return
    assert found == [[[6, 7], [8, 9]]] * 2
