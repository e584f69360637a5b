"""Spans and chat roles: which tokens of a prompt a passage or a speaker has."""

from __future__ import annotations

import ast

import pytest
import torch
from golden_files import golden_file
from reattend.hooks import Capture, Plan, Spans, attach, sites
from reattend.hooks.tokens.chat import learn, turns
from reattend.hooks.tokens.spans import official_range
from reattend.hooks.tokens.transcript import read, transcripts
from reattend.hooks.trackers.caches import cache_name
from reattend.interventions import ReattendError, UnsupportedError
from tiny_language import CHATML, language_model, tokenizer
from tokenizers.pre_tokenizers import ByteLevel

PROMPTS = ["The capital of France is Paris. Answer in French.", "Anna has a red house. Please: Answer in one word."]
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]{% elif m['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set sys = false %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "<s>[INST] {% if loop.index0 == 0 and sys %}<<SYS>>\n{{ sys }}\n<</SYS>>\n\n{% endif %}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
GEMMA = (
    "<s>{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<turn>{{ m['role'] }}\n"
    "{% if loop.first %}{{ first }}{% endif %}{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return language_model()


def roles(model, inputs, *steps, given=None):
    """The token map that one forward pass under these steps makes."""
    seen = []
    with attach(model, [Plan("probe", list(steps))], tokenizer=given) as session:
        tracker = session.attachment.tracker
        handle = model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(tracker.current().tokens))
        try:
            with torch.no_grad():
                model(**inputs)
        finally:
            handle.remove()
        assert session.active
    return seen[0]


def texts(tokens, ids, role):
    """What the tokens of a role spell, row by row."""
    chars = tokenizer()
    chosen = tokens.positions(role, 0, ids.shape[1])
    return [chars.decode(row[mask]) for row, mask in zip(ids, chosen)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_passages_are_found_in_every_row_whatever_the_padding(model, side):
    chars = tokenizer(side=side)
    x = chars(PROMPTS, return_tensors="pt", padding=True)
    tokens = roles(model, x, Spans("same", texts=[["Answer in"]]), Spans("own", texts=[["Paris"], ["house"]]), given=chars)
    assert (x["attention_mask"] == 0).any()
    for row, (passage, own) in enumerate(zip(["Answer in"] * 2, ["Paris", "house"])):
        assert texts(tokens, x["input_ids"], "same")[row].strip() == passage
        assert own in texts(tokens, x["input_ids"], "own")[row]
    assert not (tokens.roles["same"] & tokens.roles["padding"]).any()


def test_a_token_that_reaches_into_the_passage_belongs_to_it():
    ids = torch.tensor([tokenizer()("The capital of France")["input_ids"]])
    (row,) = transcripts(ids, torch.zeros_like(ids, dtype=torch.bool), tokenizer())
    start = row.text.index("apita")
    covered = row.overlapping(start, start + 5)
    pieces = [row.text[a:b] for a, b in row.offsets]
    assert row.text == "The capital of France" and "".join(pieces[i] for i in covered).strip() == "capital"
    # a neighbour that only touches the passage stays out
    word = row.text.index("capital")
    assert row.overlapping(word, word + 7) == covered


def test_golden_ranges_of_the_official_rule():
    data, facts = golden_file("pasta", "token_range")
    for i, (text, passage, *_) in enumerate(ast.literal_eval(facts["strings"])):
        offsets = [tuple(pair) for pair in data[f"offsets_{i}"].tolist()]
        start, length = data[f"chars_{i}"].tolist()
        assert text[start : start + length] == passage
        assert official_range(offsets, start, length) == tuple(data[f"range_{i}"].tolist())


def test_official_rule_takes_the_token_that_ends_where_the_passage_begins(model):
    chars = tokenizer()
    x = chars(["house red"], return_tensors="pt")
    _, offsets = read(x["input_ids"][0].tolist(), chars)
    inner = next(a for a, _ in offsets[1:])  # where the second token begins
    passage = "house red"[inner:]
    strict, official = (
        roles(model, x, Spans("s", texts=[[passage]], official=o), given=chars).roles["s"][0].tolist() for o in (False, True)
    )
    assert not strict[0] and official[0] and strict[1:] == official[1:]


@pytest.mark.parametrize("text", ["naïve café — 東京 🗼 ok", "  two  spaces\n\nand lines of France "])
def test_offsets_without_a_round_trip_cover_the_text(text):
    """Ids that the tokenizer would never choose (single bytes) are read by decoding longer and longer pieces."""
    chars = tokenizer()
    pieces = "".join(piece for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text))
    ids = [chars.convert_tokens_to_ids(c) for c in pieces]
    assert len(ids) == len(text.encode()) and ids != chars(text)["input_ids"]
    found, offsets = read(ids, chars)
    assert found == text and len(offsets) == len(ids)
    at = 0
    for c in range(len(text)):
        size = len(text[c].encode())
        assert offsets[at : at + size] == [(c, c + 1)] * size
        at += size


def test_slow_tokenizers_and_unknown_tokens():
    fast = tokenizer()

    class Slow:
        is_fast = False

        def decode(self, ids, **options):
            return fast.decode(ids, **options)

    ids = fast("The café is in Paris.")["input_ids"]
    assert read(ids, Slow()) == read(ids, fast)
    text, offsets = read([*ids, -1, -1, *ids], fast)
    assert text == "The café is in Paris.\ufffd\ufffdThe café is in Paris." and len(offsets) == 2 * len(ids) + 2


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        (dict(texts=[["Berlin"]]), "'Berlin' is not in prompt 0, which begins 'The capital of France"),
        (dict(texts=[["Paris"]]), "not in prompt 1.*one list per prompt"),
        (dict(texts=[["a"]]), r"occurs \d+ times in prompt 0: give occurrence=0"),
        (dict(texts=[["Answer"]], occurrence=1), "occurrence=1, but 'Answer' occurs 1 times"),
        (dict(texts=[["Paris"], ["house"], ["x"]]), "3 lists of texts for 2 prompts"),
        (dict(ranges=[[(0, 1)], [(0, 1)], [(0, 1)]]), "3 lists of ranges for 2 prompts"),
        (dict(ranges=[[(3, 300)]]), "ends beyond prompt 0, which has"),
    ],
)
def test_bad_spans_are_refused_before_anything_runs(model, steps, problem):
    chars = tokenizer()
    x = chars(PROMPTS, return_tensors="pt", padding=True)
    before = model(**x).logits
    ran = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    with attach(model, [Plan("probe", [Spans("s", **steps)])], tokenizer=chars) as session:
        with pytest.raises(ReattendError, match=problem):
            model(**x)
        with pytest.raises(ReattendError, match=problem):
            model.generate(**x, max_new_tokens=2)
        assert not ran
        tracker = session.attachment.tracker
        assert not tracker.local.stack and not tracker.in_flight and not len(tracker.by_cache)
    handle.remove()
    assert torch.equal(model(**x).logits, before)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_tokenizer_or_ids_that_are_missing_are_named(model):
    x = tokenizer()(PROMPTS[:1], return_tensors="pt")
    with (
        attach(model, [Plan("probe", [Spans("s", texts=[["Paris"]])])]),
        pytest.raises(ReattendError, match="tokenizer=tokenizer"),
    ):
        model(**x)
    with (
        attach(model, [Plan("probe", [Spans("s", texts=[["Paris"]])])], tokenizer=tokenizer()),
        pytest.raises(ReattendError, match="inputs_embeds"),
    ):
        model(inputs_embeds=model.model.embed_tokens(x["input_ids"]))


@pytest.mark.parametrize(
    "bad", [dict(texts=[[""]]), dict(), dict(ranges=[[(2, 2)]]), dict(ranges=[[(-1, 2)]]), dict(texts=[[3]])]
)
def test_spans_that_can_mean_nothing_are_refused_when_made(bad):
    with pytest.raises(ReattendError):
        Spans("s", **bad)


def test_ranges_count_from_the_first_real_token_and_need_no_tokenizer(model):
    x = tokenizer()(PROMPTS, return_tensors="pt", padding=True)
    found = roles(model, x, Spans("s", ranges=[[(1, 3)]])).roles["s"]
    for row in range(2):
        first = int(x["attention_mask"][row].argmax())
        assert found[row].nonzero()[:, 0].tolist() == [first + 1, first + 2]


def test_repeated_rows_share_their_prompts_passages(model):
    chars = tokenizer()
    x = chars(PROMPTS, return_tensors="pt", padding=True)
    wide = {k: v.repeat_interleave(3, dim=0) for k, v in x.items()}
    one = roles(model, x, Spans("s", texts=[["Paris"], ["house"]]), given=chars).roles["s"]
    many = roles(model, wide, Spans("s", texts=[["Paris"], ["house"]]), given=chars).roles["s"]
    assert torch.equal(many, one.repeat_interleave(3, dim=0))
    mixed = {k: v[[0, 1, 0, 1]] for k, v in x.items()}
    with pytest.raises(ReattendError, match="2 lists of texts for 4 prompts"):
        roles(model, mixed, Spans("s", texts=[["Paris"], ["house"]]), given=chars)


# -- chat roles ------------------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Answer in French."},
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]


@pytest.mark.parametrize(
    ("template", "system", "default"),
    [(CHATML, True, "Be kind."), (LLAMA2, True, None), (MISTRAL, False, None), (GEMMA, False, None), (THINKING, True, None)],
    ids=["chatml", "llama2", "mistral", "gemma", "thinking"],
)
def test_turns_of_a_conversation_are_its_contents(template, system, default):
    chars = tokenizer(template)
    markers = learn(chars, chars.bos_token)
    for start in (0, 1) if system else (1,):
        for stop in (2, 4):
            talk = TALK[start:stop]
            text = chars.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            # where the first token opens every turn it is one of the markers
            bare = text if template == LLAMA2 else text.removeprefix("<s>")
            for shown in (text, bare, "<s>" + text):
                want = [(m["role"], m["content"]) for m in talk]
                if start and default:
                    want.insert(0, ("system", default))
                assert [(role, shown[a:b].strip()) for role, a, b in turns(shown, markers)] == want
    assert turns("The system said: user and assistant.\n\n[not a marker]", markers) == []
    assert system == any("system" in key for key in markers)


def test_a_system_text_inside_the_users_turn_is_the_users():
    chars = tokenizer(GEMMA)
    text = chars.apply_chat_template(TALK[:2], tokenize=False)
    assert [(r, text[a:b]) for r, a, b in turns(text, learn(chars, "<s>"))] == [
        ("user", "Answer in French.\n\nThe capital of France?")
    ]


def test_chat_roles_of_a_padded_batch(model):
    chars = tokenizer()
    talks = [TALK, [{"role": "user", "content": "Anna?"}]]
    prompts = [chars.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in talks]
    x = chars([*prompts, "no markers here"], return_tensors="pt", padding=True)
    tokens = roles(model, x, given=chars)
    assert texts(tokens, x["input_ids"], "system") == ["Answer in French.", "Be kind.", ""]
    assert texts(tokens, x["input_ids"], "user") == ["The capital of France?And of Italy?", "Anna?", ""]
    assert texts(tokens, x["input_ids"], "assistant") == ["Paris.", "", ""]
    plain = chars(["no markers here"], return_tensors="pt")
    assert "user" not in roles(model, plain, given=chars)
    assert "user" not in roles(model, {"input_ids": x["input_ids"][:1]}, given=None)
    assert "user" not in roles(model, plain, given=tokenizer(None))


def test_a_processors_tokenizer_and_list_contents_are_understood(model):
    chars = tokenizer(None)

    class Processor:
        tokenizer = chars
        chat_template = "made by hand"

        def apply_chat_template(self, conversation, tokenize, add_generation_prompt):
            lines = [f"<{m['role']}>{m['content'][0]['text']}</{m['role']}>" for m in conversation]
            return "".join(lines) + ("<assistant>" if add_generation_prompt else "")

    x = chars(["<user>Anna?</user><assistant>"], return_tensors="pt")
    assert "Anna?" in texts(roles(model, x, given=Processor()), x["input_ids"], "user")[0]


def test_a_template_that_only_fails_gives_no_roles(model):
    chars = tokenizer("{{ raise_exception('never') }}")
    x = chars(["hello"], return_tensors="pt")
    assert set(roles(model, x, given=chars).roles) == {"padding", "bos"}


def test_a_cache_filled_before_the_session_keeps_its_places(model):
    """Passages of the next turn lie behind tokens that nobody has read."""
    from transformers import DynamicCache

    words = tokenizer()
    before = words("Anna has a red house.", return_tensors="pt").input_ids
    after = words(" Please: Answer in French.", return_tensors="pt").input_ids
    cache, found = DynamicCache(), []

    def look(call):
        found.append((call.columns("marked")[0].tolist(), call.columns("prompt").shape[1], call.clock.phase))

    with torch.no_grad():
        model(before, **{cache_name(model): cache})
        steps = [Spans("marked", texts=[["in French"]]), Capture(sites(model), lambda call, edits: look(call))]
        with attach(model, [Plan("probe", steps)], tokenizer=words):
            model(after, **{cache_name(model): cache})
            model(after[:, :1], **{cache_name(model): cache})
    own = words("in French", return_tensors="pt").input_ids.shape[1]
    marked, width, phase = found[0]
    assert phase == "prefill" and width == before.shape[1] + after.shape[1] == len(marked)
    assert not any(marked[: before.shape[1]]) and 1 <= sum(marked) <= own + 1
    assert found[-1][0][: len(marked)] == marked and found[-1][2] == "decode"


def test_steps_that_mark_different_passages_by_one_name(model):
    one = Plan("a", [Spans("s", texts=[["Paris"]])])
    with (
        attach(model, [one], tokenizer=tokenizer()),
        pytest.raises(UnsupportedError, match="different passages of the prompt as 's'"),
    ):
        attach(model, [Plan("b", [Spans("s", texts=[["house"]])])], tokenizer=tokenizer())
