"""What a comparison is asked for: one prompt and one text of at least a token, and a passage beside the prompt for every recipe."""

from __future__ import annotations

import numpy as np
import pytest
import reattend

PROMPT = "the red dog sat on a big house and the small cat ran in the garden"
MARKED = "small cat"
WINDOW = ("streaming", {"sinks": 1, "window": 3})
OPTIONS = dict(max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("given", [WINDOW, [WINDOW]], ids=["one", "several"])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_return_sequences": 2, "do_sample": True}, "^num_return_sequences: a comparison shows one text per run; leave"),
        ({"num_return_sequences": 3, "num_beams": 3}, "num_return_sequences: .* set it to 1"),
        ({"max_new_tokens": 0}, "^max_new_tokens must be a whole number, 1 or more, got 0"),
        ({"max_new_tokens": -3}, "max_new_tokens must be a whole number, 1 or more, got -3"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, 1 or more, got 2.5"),
        ({"prompt": [PROMPT, "a dog"]}, "^prompt: a comparison takes one prompt at a time, .*, got 2 in a list"),
        ({"text": [PROMPT]}, "^text: a comparison takes one prompt at a time"),
        ({"inputs": [PROMPT, PROMPT]}, "^inputs: a comparison takes one prompt at a time"),
    ],
)
def test_more_or_less_than_one_text_is_refused_before_anything_runs(text_pipe, monkeypatch, given, options, message):
    monkeypatch.setattr(text_pipe.model, "generate", lambda *_, **__: pytest.fail("ran"))
    asked = options if options.keys() & {"prompt", "text", "inputs"} else {"text": PROMPT, **options}
    with pytest.raises(reattend.ReattendError, match=message):
        reattend.compare(text_pipe, given, **asked)


def test_one_sequence_and_one_token_are_fine(text_pipe):
    report = reattend.compare(text_pipe, WINDOW, text=PROMPT, max_new_tokens=1, num_return_sequences=1, do_sample=False)
    assert len(report.before.tokens) == 1


def test_a_list_of_prompts_for_a_bare_model_and_for_predictions(llama, tokenizer, fill_pipe):
    with pytest.raises(reattend.ReattendError, match="^prompt: a comparison takes one prompt at a time"):
        reattend.compare(llama, WINDOW, prompt=[PROMPT, PROMPT], tokenizer=tokenizer)
    with pytest.raises(reattend.ReattendError, match="^text: a comparison takes one prompt at a time"):
        reattend.compare(fill_pipe, WINDOW, text=["the <mask>", "a <mask>"])


EMPHASIS, BOOST = ("emphasise", {"alpha": 0.2}), ("instaboost", {"text": "red dog"})


@pytest.mark.parametrize(
    "given, passages",
    [
        ([EMPHASIS], [MARKED]),
        (["emphasise", "instaboost"], [MARKED, MARKED]),
        ([EMPHASIS, WINDOW, BOOST], [MARKED, None, "red dog"]),
        ([{"name": "emphasise", "alpha": 0.2}], [MARKED]),
        (["instaboost"], [MARKED]),
    ],
)
def test_text_beside_a_prompt_goes_to_every_recipe_that_lacks_a_passage(text_pipe, given, passages):
    report = reattend.compare(text_pipe, *given, prompt=PROMPT, text=MARKED, attention=False, **OPTIONS)
    assert [recipe["parameters"].get("text") for recipe in report.recipes] == passages
    assert report.request["prompt"].endswith(PROMPT) and report.applied > 0


@pytest.mark.parametrize("given", [[BOOST], [[BOOST, WINDOW]], [WINDOW]], ids=["one", "several", "takes none"])
def test_a_text_that_no_recipe_would_take_is_refused(text_pipe, given):
    with pytest.raises(reattend.ReattendError, match="text and prompt both name the input"):
        reattend.compare(text_pipe, *given, prompt=PROMPT, text=MARKED, **OPTIONS)


def test_a_missing_passage_says_how_to_give_it(text_pipe):
    for given in (["emphasise"], [EMPHASIS], ["emphasise", "instaboost"]):
        with pytest.raises(reattend.ReattendError, match="text is required.* as text=, and then the input as prompt="):
            reattend.compare(text_pipe, *given, text=PROMPT, **OPTIONS)


# -- pictures -------------------------------------------------------------------------------------------------------------


def test_the_prompts_of_a_picture_and_its_edits_begin_with_one_noise():
    from tiny_prompts import FAMILIES

    pipe, call = FAMILIES["SD"]()
    options = {**call, "num_inference_steps": 2, "attention": False}
    for edit, alike in (({"edit": "refine"}, True), ({"words": ["red"]}, False)):
        report = reattend.compare(pipe, ("prompt-reweight", edit), prompt=["a red sky", "a red sky"], **options)
        one, other = (np.asarray(picture) for picture in report.before.pictures)
        assert np.array_equal(one, other) == alike
    with pytest.raises(
        reattend.ReattendError, match=r"draws every run from the start: give both prompts at once, prompt=\[source, edited\]"
    ):
        reattend.compare(pipe, ("prompt-reweight", {"edit": "replace", "source": "run"}), prompt="a red sky", **options)


def test_a_recipe_that_only_reads_says_where_its_result_is():
    import tiny_pipelines

    recipe = reattend.recipe("attencraft", words="a", timestep=999)
    options = {"prompt": "a fox", "num_inference_steps": 2, "attention": False}
    report = reattend.compare(tiny_pipelines.stable_diffusion(), recipe, **options)
    assert any("reads and changes nothing" in note for note in report.notes) and len(recipe.found) == 1


def test_an_empty_prompt_is_one_of_a_picture_and_none_is_an_error():
    from tiny_prompts import FAMILIES

    pipe, call = FAMILIES["SD"]()
    boxes = ("attentive-eraser", {"boxes": [[0.1, 0.1, 0.6, 0.6]]})
    report = reattend.compare(pipe, boxes, prompt="", num_inference_steps=2, attention=False, **call)
    assert len(report.after.pictures) == 1
    with pytest.raises(reattend.ReattendError, match="draws what a prompt says: give prompt"):
        reattend.compare(pipe, boxes, num_inference_steps=2, **call)
