"""Log-likelihoods of options and text: equal to one forward pass per option, whatever the batch, the padding and the recipe."""

from __future__ import annotations

import pytest
import reattend
import tiny_language
import torch
import transformers
from reattend import ReattendError
from reattend.evaluation import Subject
from reattend.evaluation.likelihood import option_scores, token_losses
from reattend.evaluation.steering import Steering
from reattend.hooks.trackers.caches import cache_name, cache_of

PROMPTS = ["The capital of France is", "Anna has a red house and Paul has a blue garden; the house of Anna is", "Answer:"]
OPTIONS = [[" Paris", " Rome", " the capital of Italy"], [" red", " blue"], [" a", " the", " garden", " one word"]]


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {"rotary": tiny_language.language_model, "absolute positions": gpt2}


def by_hand(subject: Subject, prompt: str, option: str) -> float:
    """One forward pass over prompt and option, without padding."""
    tokenizer = subject.tokenizer
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + option)["input_ids"]
    assert whole[: len(before)] == before
    with torch.no_grad():
        logprobs = subject.module(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, whole[i]]) for i in range(len(before), len(whole)))


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_gives_what_single_forward_passes_give(kind: str) -> None:
    subject = Subject(MODELS[kind](), tiny_language.tokenizer(None))
    scores = option_scores(subject, PROMPTS, OPTIONS)
    lengths = {score.tokens for row in scores for score in row}
    assert 1 in lengths and max(lengths) > 2, "options of one token and of several"
    for prompt, options, row in zip(PROMPTS, OPTIONS, scores):
        for option, score in zip(options, row):
            assert score.logprob == pytest.approx(by_hand(subject, prompt, option), abs=2e-5)
            alone = option_scores(subject, [prompt], [[option]])[0][0]
            assert (alone.tokens, alone.top) == (score.tokens, score.top)
            assert alone.logprob == pytest.approx(score.logprob, abs=2e-5)


def test_top_is_what_greedy_decoding_would_write() -> None:
    subject = Subject(tiny_language.language_model(), tiny_language.tokenizer(None))
    for prompt in PROMPTS:
        ids = subject.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            first = int(subject.module(input_ids=ids).logits[0, -1].argmax())
        option = subject.tokenizer.decode([first])
        if subject.tokenizer(prompt + option)["input_ids"][ids.shape[1] :] != [first]:
            continue  # the piece would be joined to the text before it
        best, other = option_scores(subject, [prompt], [[option, " garden"]])[0]
        assert best.top and best.tokens == 1
        assert not other.top
        return
    pytest.fail("no prompt has a first choice that is a text of its own")


def test_marked_passages_belong_to_their_prompt_whatever_the_rows() -> None:
    model = tiny_language.language_model()
    subject = Subject(model, tiny_language.tokenizer(None))
    marks = [["The capital"], ["red house", "garden"], ["Answer"]]
    plain = option_scores(subject, PROMPTS, OPTIONS)
    with Steering(subject, [("emphasise", {"alpha": 0.05})], ["highlight"]) as steering:
        steered = option_scores(subject, PROMPTS, OPTIONS, highlight=marks)
    assert steering.stats["emphasise"] and steering.applied == sum(steering.stats["emphasise"].values())
    for prompt, options, passages, row, before in zip(PROMPTS, OPTIONS, marks, steered, plain):
        with reattend.apply(model, "emphasise", alpha=0.05, text=passages, tokenizer=subject.tokenizer) as session:
            for option, score, old in zip(options, row, before):
                assert score.logprob == pytest.approx(stepwise(subject, prompt, option), abs=2e-5)
                assert score.logprob != pytest.approx(old.logprob, abs=1e-4)
        assert session.applied
    assert option_scores(subject, PROMPTS, OPTIONS) == plain


def stepwise(subject: Subject, prompt: str, option: str) -> float:
    """Prefill of the prompt, then the option's tokens one by one, as `generate` would feed them."""
    tokenizer = subject.tokenizer
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + option)["input_ids"]
    total, cache, ids = 0.0, None, before
    with torch.no_grad():
        for token in whole[len(before) :]:
            out = subject.module(input_ids=torch.tensor([ids]), **{cache_name(subject.module): cache}, use_cache=True)
            total += float(out.logits[0, -1].log_softmax(-1)[token])
            cache, ids = cache_of(out), [token]
    return total


@pytest.mark.parametrize("kind", MODELS)
def test_losses_of_text_in_a_batch_of_several_lengths(kind: str) -> None:
    subject = Subject(MODELS[kind](), tiny_language.tokenizer(None))
    rows = [subject.tokenizer(text)["input_ids"] for text in tiny_language.SENTENCES]
    last = [3, 7, 1, 5]
    for row, count, losses in zip(rows, last, token_losses(subject, rows, last)):
        with torch.no_grad():
            logits = subject.module(input_ids=torch.tensor([row])).logits[0, -count - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(row[-count:]), reduction="none")
        assert losses == pytest.approx(wanted.tolist(), abs=2e-5)


def test_bad_input_is_refused() -> None:
    subject = Subject(tiny_language.language_model(), tiny_language.tokenizer(None))
    with pytest.raises(ReattendError, match="text of their own"):
        option_scores(subject, ["The capital"], [[""]])
    with pytest.raises(ReattendError, match="at least one token before"):
        token_losses(subject, [[1, 2, 3]], [3])
    config = transformers.T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    encoder_decoder = Subject(transformers.T5ForConditionalGeneration(config), tiny_language.tokenizer(None))
    with pytest.raises(ReattendError, match="needs a decoder"):
        option_scores(encoder_decoder, ["The capital"], [[" Paris"]])
