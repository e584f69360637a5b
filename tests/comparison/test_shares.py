"""Shares of the attention in a report: both runs on the same text, the first token left out, each recipe's passage under its plain name."""

from __future__ import annotations

import pytest
import reattend
import torch
from reattend.comparison.shares import named, of_all, on_prompt, plain_names
from reattend.comparison.words import attention_summary
from reattend.recipes import recipe_class

PROMPT = "the red dog sat on a big house and the small cat ran in the garden"
LAYER_0 = [(0, head) for head in range(4)]


def rows_by_hand(model, ids: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """[heads, rows, keys]: layer 0 of the untouched model on the prompt and its own answer, the rows that predict the answer."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = torch.cat([ids, torch.tensor([answer[:-1]])], dim=1)
        weights = model(whole, output_attentions=True).attentions[0][0]
    model.set_attn_implementation("sdpa")
    return weights[:, ids.shape[1] - 1 :].double()


@pytest.mark.parametrize("passage, tokens", [("and the small cat", range(8, 12)), ("the red dog", range(0, 3))])
def test_the_bar_of_an_emphasised_passage_is_its_formula(text_pipe, tokenizer, passage, tokens):
    alpha, new = 0.1, 6
    recipe = ("emphasise", {"text": passage, "alpha": alpha, "heads": LAYER_0, "keep_sink": True})
    report = reattend.compare(text_pipe, recipe, text=PROMPT, max_new_tokens=new, do_sample=False)
    assert report.first_difference is not None, "the answers must differ for this to say anything"
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    size = ids.shape[1]
    answer = text_pipe.model.generate(ids, max_new_tokens=new, do_sample=False)[0, size:].tolist()
    plain = rows_by_hand(text_pipe.model, ids, answer)
    # log alpha on the scores of the rest of the prompt, and rows that sum to 1 again
    factor = torch.ones(plain.shape[2], dtype=torch.double)
    rest = [i for i in range(1, size) if i not in tokens]
    factor[rest] = alpha
    edited = plain * factor
    edited = edited / edited.sum(dim=-1, keepdim=True)
    inside = [i for i in tokens if i != 0]
    expected = [float(w[..., inside].sum() / w[..., 1:size].sum()) for w in (plain, edited)]
    found = [on_prompt(side.mass_by_layer[0])["marked passage"] for side in (report.before, report.after)]
    assert found == pytest.approx(expected, rel=1e-5) and found[1] > 2 * found[0]
    first = [side.mass_by_layer[0]["bos"] for side in (report.before, report.after)]
    assert first == pytest.approx([float(w[..., 0].mean()) for w in (plain, edited)], rel=1e-5)
    assert report.looks.answer == (new, new)


def test_both_looks_read_the_untouched_answer(text_pipe):
    calls: list[torch.Tensor] = []
    report = reattend.compare(
        text_pipe, ("streaming", {"sinks": 1, "window": 3}), text=PROMPT, max_new_tokens=5, do_sample=False
    )
    hook = text_pipe.model.register_forward_pre_hook(lambda m, a, k: calls.append(k["input_ids"][0]), with_kwargs=True)
    again = reattend.compare(
        text_pipe, ("streaming", {"sinks": 1, "window": 3}), text=PROMPT, max_new_tokens=5, do_sample=False
    )
    hook.remove()
    assert again.before.mass == report.before.mass
    runs: list[list[int]] = []
    for ids in calls:
        if len(ids) > 1:
            runs.append([])
        else:
            runs[-1].append(int(ids))
    warm, before, look, other, after = runs
    assert warm == [] and look == other == before and after != before


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"do_sample": True}])
def test_beams_drafts_and_samples_are_looked_at_as_one_text(text_pipe, options):
    options = {"do_sample": False, "max_new_tokens": 6, **options}
    report = reattend.compare(text_pipe, ("streaming", {"sinks": 1, "window": 3}), text=PROMPT, **options)
    assert report.looks.answer == (6, 6) and len(report.before.tokens) == 6


@pytest.mark.parametrize("name", ["emphasise", "instaboost", "spotlight", "spa", "seka"])
def test_every_highlighter_has_a_marked_passage(text_pipe, name, tmp_path):
    more = {}
    if name == "seka":
        asked = [("the red dog sat on a big house", "the dog sat on", "a big house", "the cat ran in")]
        profile = recipe_class(name).profile(text_pipe.model, text_pipe.tokenizer, data=asked, experts=False)
        more = {"profile_path": str(profile.save(tmp_path / "seka.safetensors"))}
    recipe = (name, {"text": "and the small cat", **more})
    report = reattend.compare(text_pipe, recipe, text=PROMPT, max_new_tokens=3, do_sample=False)
    for side in (report.before, report.after):
        assert set(side.mass) <= {"bos", "prompt", "generated", "marked passage"} and side.mass["marked passage"] > 0
        assert set(side.mass_by_layer[0]) <= set(side.mass)
    assert attention_summary(report).startswith("The marked passage ") and "marked passage" in report._repr_html_()


def test_names_of_passages():
    assert plain_names(["bos", "spotlight-12", "prompt"]) == {
        "bos": "bos",
        "spotlight-12": "marked passage",
        "prompt": "prompt",
    }
    assert plain_names(["spa-1", "emphasise-2"]) == {
        "spa-1": "marked passage (spa)",
        "emphasise-2": "marked passage (emphasise)",
    }
    two = plain_names(["emphasise-7", "emphasise-9"])
    assert list(two.values()) == ["marked passage (emphasise 1)", "marked passage (emphasise 2)"]
    assert plain_names(["emphasise-3.0", "emphasise-3.1"])["emphasise-3.1"] == "marked passage 2"
    assert plain_names(["pine-3.0", "pine-3.1"]) == {"pine-3.0": "segment 1", "pine-3.1": "segment 2"}
    assert plain_names(["selective-emphasis-4", "my role"])["selective-emphasis-4"] == "marked passage"
    assert plain_names(["my role"]) == {"my role": "my role"} and plain_names(["-5"]) == {"-5": "marked passage"}
    asked = plain_names(["question-1", "question-1-words"])
    assert asked == {"question-1": "rest of the question", "question-1-words": "words of the question"}
    assert named({"opera-3": 0.25, "image": 0.5}) == {"image": 0.75}


def test_shares():
    mass = {"bos": 0.5, "marked passage": 0.06, "user": 0.24, "generated": 0.1, "learned sink": 0.1}
    assert on_prompt(mass) == pytest.approx({"marked passage": 0.2, "user": 0.8})
    assert of_all(mass) == pytest.approx(
        {"bos": 0.5, "prompt after its first token": 0.3, "generated": 0.1, "learned sink": 0.1}
    )
    assert on_prompt({"image": 0.5, "text": 0.5}) == {} and of_all({"image": 0.5, "text": 0.5}) == {"image": 0.5, "text": 0.5}
    assert on_prompt({"bos": 1.0, "prompt": 0.0}) == {} and on_prompt({}) == {}
