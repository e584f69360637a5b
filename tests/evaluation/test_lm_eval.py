"""lm-eval: a task of one's own, without a hub, gives lm-eval's own numbers, and recipes act on it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import tiny_language
import torch
from reattend import ReattendError
from reattend.evaluation import Subject, evaluate, suite

MULTIPLE_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: options
doc_to_target: right
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATION = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{options[right]}}"
generation_kwargs: {max_gen_toks: 4, until: ["\\n"], do_sample: false}
metric_list:
  - metric: exact_match
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install "lm-eval>=0.4.13"')
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [
        {"question": f"The capital of country {i} is", "options": ["Paris", "Rome", "a red house"], "right": i % 3}
        for i in range(9)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    head = f"dataset_path: json\ndataset_kwargs:\n  data_files: {data}\ntest_split: train\n"
    for name, body in (("mine", MULTIPLE_CHOICE), ("written", GENERATION), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(f"task: reattend_{name}\n{head}{body}")
    return tmp_path


def subject() -> Subject:
    return Subject(tiny_language.language_model(), tiny_language.tokenizer(None))


def test_numbers_are_those_of_lm_eval(folder: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for task, metrics in (
        ("mine", ("acc", "acc_norm")),
        ("written", ("exact_match",)),
        ("rolling", ("word_perplexity", "bits_per_byte")),
    ):
        asked, view = suite(f"lm-eval:reattend_{task}", include_path=str(folder)), subject()
        items = asked.items(9, 0)
        records = asked.answer(view, items[:4]) + asked.answer(view, items[4:])
        scores = asked.score(json.loads(json.dumps(records)))
        lm = HFLM(pretrained=view.module, tokenizer=tiny_language.tokenizer(None), backend="causal", batch_size=1)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        theirs = simple_evaluate(model=lm, tasks=[f"reattend_{task}"], task_manager=manager, bootstrap_iters=0)
        results = theirs["results"][f"reattend_{task}"]
        for metric in metrics:
            assert scores[metric] == pytest.approx(results[f"{metric},none"], rel=1e-5), metric
    assert list(asked.lower) == ["word_perplexity", "bits_per_byte"]


def test_likelihoods_are_those_of_the_model_and_recipes_change_them(folder: Path) -> None:
    result = evaluate(
        subject().module, [f"lm-eval:reattend_mine:include_path={folder}"], ["none", ("streaming", {"window": 3, "sinks": 1})],
        count=6, tokenizer=tiny_language.tokenizer(None), progress=False,
    )  # fmt: skip
    plain, steered = (cell for cell in result.cells if cell.suite.name == "lm-eval:reattend_mine")
    assert plain.groups == 6 and not plain.applied and steered.applied > 0
    said = [[record["said"] for record in cell.records] for cell in (plain, steered)]
    assert said[0] != said[1]
    view, record = subject(), plain.records[0]
    assert record["wanted"] in ("0", "1", "2")
    text = f"The capital of country {record['document']} is"
    ids, whole = (view.tokenizer(t)["input_ids"] for t in (text, text + " Rome"))
    with torch.no_grad():
        logprobs = view.module(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    wanted = sum(float(logprobs[i - 1, whole[i]]) for i in range(len(ids), len(whole)))
    said = [float(number) for number in re.findall(r"-\d+\.\d+", record["said"])]
    assert len(said) == 3 and said[1] == pytest.approx(wanted, abs=1e-4)


def test_the_model_and_tokenizer_stay_as_they_were(folder: Path) -> None:
    view = subject()
    before = (view.tokenizer.padding_side, view.tokenizer.pad_token, set(vars(view.module)), view.module.training)
    asked = suite("lm-eval:reattend_mine", include_path=str(folder))
    asked.answer(view, asked.items(2, 0))
    assert (view.tokenizer.padding_side, view.tokenizer.pad_token, set(vars(view.module)), view.module.training) == before


@pytest.mark.slow
def test_unknown_tasks_and_data_out_of_reach_are_named(folder: Path) -> None:
    """Reads lm-eval's own thousands of task files."""
    with pytest.raises(ReattendError, match="did you mean reattend_mine"):
        suite("lm-eval:reattend_mime", include_path=str(folder)).items(2, 0)
    with pytest.raises(ReattendError, match="cannot load task 'arc_easy'"):
        suite("lm-eval:arc_easy").items(2, 0)


def test_what_cannot_be_asked_is_refused(folder: Path) -> None:
    with pytest.raises(ReattendError, match="no folder"):
        suite("lm-eval:reattend_mine", include_path=str(folder / "elsewhere")).items(2, 0)
    with pytest.raises(ReattendError, match="takes nothing after a colon"):
        suite("choices:mine")
    with pytest.raises(ReattendError, match="task is required"):
        suite("lm-eval")
    with pytest.raises(ReattendError, match="passage"):
        evaluate(
            subject().module,
            [f"lm-eval:reattend_mine:include_path={folder}"],
            ["emphasise"],
            tokenizer=tiny_language.tokenizer(None),
        )


def test_without_lm_eval_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from reattend.evaluation.lm_eval import _manager

    _manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ReattendError, match="pip install .lm-eval"):
        suite("lm-eval:not_loaded_before").items(1, 0)
