"""The runner: batches, resuming, composition, paired changes, the form of its results. The suite is made up; models are tiny."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import reattend
import torch
from pydantic import Field
from reattend import ReattendError
from reattend.evaluation import Item, Subject, Suite, evaluate
from reattend.evaluation.suites import Sums, ratio
from text_pipelines import image_pipe, llama, text_pipe, tokenizer, word_tokenizer  # noqa: F401

WORDS = ["red", "blue", "dog", "cat", "house", "garden", "big", "small", "key", "french", "answer"]


class Echo(Suite):
    """Asks for one word after a few others; right if it is in the first half of the alphabet. Nothing a model could know."""

    name = "echo-test"
    kind = "llm"
    does = "made up"
    shown = ("accuracy",)
    lower = ("odd",)
    batch = 4

    words: int = Field(6, ge=1, description="words of a prompt")

    def items(self, count: int, seed: int) -> list[Item]:
        found = []
        for scene in range(count):
            generator = torch.Generator().manual_seed(1000 * seed + scene)
            picks = torch.randint(len(WORDS), (2, self.words), generator=generator).tolist()
            found += [
                Item(f"{scene}-{i}", {"prompt": " ".join(WORDS[p] for p in pick)}, str(scene)) for i, pick in enumerate(picks)
            ]
        return found

    def answer(self, subject: Subject, items: Sequence[Item]) -> list[dict[str, Any]]:
        ASKED.extend(item.id for item in items)
        said = subject.generate([item.data["prompt"] for item in items], max_new_tokens=3)
        return [{"said": text, "noise": torch.rand(()).item()} for text in said]

    def counts(self, record: Mapping[str, Any]) -> dict[str, float]:
        return {"asked": 1, "right": float(record["said"][:1] < "h"), "odd": len(record["said"]) % 2}

    def metrics(self, sums: Sums) -> dict[str, Any]:
        return {"accuracy": ratio(sums["right"], sums["asked"]), "odd": ratio(sums["odd"], sums["asked"])}


ASKED: list[str] = []
WINDOW = ("streaming", {"sinks": 0, "window": 2})


@pytest.fixture(autouse=True)
def nothing_asked():
    ASKED.clear()


def numbers(result) -> list:
    return [
        [c["suite"], c["recipe"], c["metrics"], c["changes"], c["items"], c["groups"], c["edits_applied"]]
        for c in result.as_dict()["cells"]
    ]


def test_the_plain_model_and_a_recipe(text_pipe):  # noqa: F811
    before = text_pipe.model(torch.tensor([[5, 6, 7]])).logits
    result = evaluate(text_pipe, Echo(), ["none", WINDOW], count=9)
    plain, steered = result.cells
    assert (plain.recipe, steered.recipe) == ("none", "streaming(sinks=0, window=2)")
    assert plain.changes is None and plain.applied == 0 and plain.time_ratio is None
    # every item twice, once for warming up: 18 items in batches of 4
    assert len(ASKED) == 2 * 18 + 1
    assert [r["id"] for r in plain.records] == [f"{s}-{i}" for s in range(9) for i in (0, 1)]
    assert plain.groups == 9 and [r["group"] for r in plain.records[:3]] == ["0", "0", "1"]
    # the recipe did act, and what it did is what it does outside
    assert steered.applied > 0 and result.notes == []
    assert [r["said"] for r in plain.records] != [r["said"] for r in steered.records]
    subject = Subject(text_pipe)
    prompts = [item.data["prompt"] for item in Echo().items(9, 0)[:4]]
    with reattend.apply(text_pipe, "streaming", sinks=0, window=2):
        assert subject.generate(prompts, max_new_tokens=3) == [r["said"] for r in steered.records[:4]]
    # both sides of a pair drew the same noise
    assert [r["noise"] for r in plain.records] == [r["noise"] for r in steered.records]
    change = steered.changes["accuracy"]
    assert change.value == pytest.approx(steered.metrics["accuracy"].value - plain.metrics["accuracy"].value)
    assert change.low <= change.value <= change.high and steered.time_ratio > 0
    assert plain.metrics["accuracy"].value == Echo().score(plain.records)["accuracy"]
    assert torch.equal(before, text_pipe.model(torch.tensor([[5, 6, 7]])).logits)


def test_few_batches_say_nothing_about_time(text_pipe):  # noqa: F811
    assert evaluate(text_pipe, Echo(), ["none", WINDOW], count=4).cells[1].time_ratio is None
    assert evaluate(text_pipe, Echo(), ["none", WINDOW], count=5).cells[1].time_ratio > 0


def test_twice_the_same_numbers_and_other_ones_for_another_seed(text_pipe):  # noqa: F811
    one, same, other = (evaluate(text_pipe, Echo(), ["none", WINDOW], count=5, seed=s) for s in (1, 1, 2))
    assert numbers(one) == numbers(same) != numbers(other)


def test_a_second_run_answers_nothing_twice(text_pipe, tmp_path):  # noqa: F811
    first = evaluate(text_pipe, Echo(), ["none", WINDOW], count=5, out=tmp_path)
    asked = len(ASKED)
    again = evaluate(text_pipe, Echo(), ["none", WINDOW], count=5, out=tmp_path)
    assert len(ASKED) == asked and numbers(again) == numbers(first)
    assert json.loads((tmp_path / "results.json").read_text())["cells"][0]["metrics"] == first.as_dict()["cells"][0]["metrics"]
    # more scenes go on from there: of 20 items in batches of 4, the first two full ones are known, the third was cut short
    ASKED.clear()
    more = evaluate(text_pipe, Echo(), ["none"], count=10, out=tmp_path)
    assert len(more.cells[0].records) == 20 and ASKED[1:] == [f"{n // 2}-{n % 2}" for n in range(8, 20)]
    # another parameter, seed or model knows nothing
    ASKED.clear()
    evaluate(text_pipe, Echo(words=7), ["none"], count=5, out=tmp_path)
    evaluate(text_pipe, Echo(), ["none"], count=5, seed=1, out=tmp_path)
    evaluate(text_pipe, Echo(), [("streaming", {"sinks": 0, "window": 3})], count=5, out=tmp_path)
    with torch.no_grad():
        text_pipe.model.lm_head.weight *= 2
    evaluate(text_pipe, Echo(), ["none"], count=5, out=tmp_path)
    assert len(ASKED) == 4 * 11


def test_a_stopped_run_goes_on(text_pipe, tmp_path, monkeypatch):  # noqa: F811
    whole = evaluate(text_pipe, Echo(), ["none", WINDOW], count=8)
    real = Echo.answer

    def stops(self, subject, items):
        if "5-0" in [item.id for item in items]:
            raise KeyboardInterrupt
        return real(self, subject, items)

    monkeypatch.setattr(Echo, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(text_pipe, Echo(), ["none", WINDOW], count=8, out=tmp_path)
    monkeypatch.setattr(Echo, "answer", real)
    assert not (tmp_path / "results.json").exists()
    (file,) = (tmp_path / "answers").glob("*.jsonl")
    # and it died in the middle of a line
    file.write_bytes(file.read_bytes()[:-7])
    ASKED.clear()
    rest = evaluate(text_pipe, Echo(), ["none", WINDOW], count=8, out=tmp_path)
    assert ASKED[1:13] == [f"{n // 2}-{n % 2}" for n in range(4, 16)], "the line that was cut is answered again"
    assert numbers(rest)[0] == numbers(whole)[0] and numbers(rest)[1] == numbers(whole)[1]
    ASKED.clear()
    evaluate(text_pipe, Echo(), ["none", WINDOW], count=8, out=tmp_path)
    assert not ASKED
    for line in file.read_text().splitlines():
        held = json.loads(line) if line.endswith("}") else None
        assert held is None or "key" in held or len(held["records"]) == 4


def test_recipes_compose_and_doubles_are_left_out(text_pipe):  # noqa: F811
    same = ["streaming:sinks=0:window=2", WINDOW, ["none", "streaming:window=2:sinks=0"]]
    result = evaluate(text_pipe, Echo(), ["none", *same, [WINDOW, ("streaming", {"window": 3})]], count=2)
    both = "streaming(sinks=0, window=2) + streaming(window=3)"
    assert [c.recipe for c in result.cells] == ["none", "streaming(sinks=0, window=2)", both]
    assert [len(c.recipes) for c in result.cells] == [0, 1, 2]


def test_without_the_plain_model_there_are_no_changes(text_pipe):  # noqa: F811
    (cell,) = evaluate(text_pipe, Echo(), WINDOW, count=2).cells
    assert cell.changes is None and cell.time_ratio is None


def test_training_mode_is_off_and_comes_back(text_pipe):  # noqa: F811
    text_pipe.model.train()
    text_pipe.model.model.layers[0].eval()
    modes = [module.training for module in text_pipe.model.modules()]
    seen = []
    text_pipe.model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    evaluate(text_pipe, Echo(), count=1)
    assert seen and not any(seen)
    assert [module.training for module in text_pipe.model.modules()] == modes


def test_a_recipe_that_never_acts_is_said(text_pipe):  # noqa: F811
    with pytest.warns(reattend.ReattendWarning, match="never acted"):
        result = evaluate(text_pipe, Echo(), ["none", "streaming"], count=2)
    assert "never acted" in result.notes[0]
    change = result.cells[1].changes["accuracy"]
    assert (change.value, change.low, change.high) == (0, 0, 0)


def test_a_bare_model_with_its_tokenizer(llama, tokenizer, text_pipe):  # noqa: F811
    assert numbers(evaluate(llama, Echo(), count=3, tokenizer=tokenizer)) == numbers(evaluate(text_pipe, Echo(), count=3))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"suites": ["nowhere"]}, "unknown suite"),
        ({"recipes": "none,streeming"}, "did you mean 'streaming'"),
        ({"recipes": "streaming:window=0"}, "window"),
        ({"recipes": "var:sink_dims=[1]"}, "does not fit"),
        ({"recipes": "none:a=1"}, "takes no parameters"),
        ({"recipes": ""}, "name what to compare"),
        ({"count": 0}, "count must be"),
        ({"batch": 0}, "batch must be"),
        ({"resamples": "many"}, "resamples must be"),
    ],
)
def test_bad_input_stops_before_anything_runs(text_pipe, changes, words):  # noqa: F811
    text_pipe.model.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass ran"))
    with pytest.raises(ReattendError, match=words):
        evaluate(text_pipe, **{"suites": Echo(), **changes})


def test_models_that_do_not_fit(text_pipe, image_pipe, llama):  # noqa: F811
    with pytest.raises(ReattendError, match="needs a language model"):
        evaluate(image_pipe, Echo())
    with pytest.raises(ReattendError, match="tokenizer="):
        evaluate(llama, Echo())
    with pytest.raises(ReattendError, match="suite 'echo-test': words"):
        Echo(words=0)


def test_batches_are_padded_on_the_left_and_the_tokenizer_is_left_alone(llama):  # noqa: F811
    words = word_tokenizer()
    words.padding_side, words.pad_token = "right", None
    subject = Subject(llama, words)
    prompts = ["the red dog", "a cat sat on the big house and then it ran"]
    together = subject.generate(prompts, max_new_tokens=5)
    assert together == [subject.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert words.padding_side == "right" and words.pad_token is None


def test_results_as_a_table_and_as_json(text_pipe):  # noqa: F811
    from rich.console import Console

    result = evaluate(text_pipe, Echo(), ["none", WINDOW], count=6, name="tiny")
    data = json.loads(result.json())
    assert data["model"]["name"] == "tiny" and data["suites"] == [{"name": "echo-test", "version": 1, "words": 6}]
    assert data["cells"][1]["cost"]["indicative"] is True and "records" not in data["cells"][1]
    assert data["cells"][1]["recipes"][0]["given"] == {"sinks": 0, "window": 2}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(result)
    text = console.export_text()
    value = result.cells[0].metrics["accuracy"]
    assert f"{value.value:.3f}  [{value.low:.3f}, {value.high:.3f}]" in text and "streaming(sinks=0, window=2)" in text
    change = result.cells[1].changes["accuracy"]
    assert f"{change.value:+.3f}  [{change.low:+.3f}, {change.high:+.3f}]" in text
    assert "odd" not in text, "only what is shown" and "95 %" in text
    assert result.cell("echo-test", "none") is result.cells[0]
    with pytest.raises(KeyError, match="echo-test / none"):
        result.cell("echo-test", "nowhere")
