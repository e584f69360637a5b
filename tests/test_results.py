"""The pages of docs that scripts write are what the recorded figures say, and the figures are what their counts say."""

from __future__ import annotations

from dataclasses import replace

import claims
import costs as costs_page
import edits_page
import effects
import effects_page
import gallery
import head_search
import methods
import pytest
import summary
from PIL import Image
from reattend import interventions
from reattend.evaluation.metrics.intervals import Resamples
from reattend.evaluation.suites.binding import Binding
from reattend.evaluation.suites.registry import suite
from reattend.evaluation.variants import suites_of
from reattend.interventions import Edit
from reattend.zoo.worlds.drawing import BACKGROUND, picture
from reattend.zoo.worlds.language import listing
from reattend.zoo.worlds.shapes import CLEAR, Scene
from sections import SECTIONS


def test_summary_is_made_of_the_recorded_figures():
    page = (summary.DOCS / "results.md").read_text(encoding="utf-8")
    assert summary.rewritten(page) == page, "run python benchmarks/summary.py"


def test_effects_page_is_made_of_the_recorded_figures():
    found = summary.effects()
    assert list(found) == list(SECTIONS), "every section was measured"
    assert (summary.DOCS / "effects.md").read_text(encoding="utf-8") == effects_page.page(found)


def test_recorded_counts_give_the_recorded_intervals_and_changes():
    for name, found in summary.effects().items():
        (asked,) = suites_of([f"{SECTIONS[name].suite}:{SECTIONS[name].confirming}".rstrip(":")])
        confirmed = found["confirming"]
        counts = claims.restored(confirmed)
        groups = [str(place) for place in range(confirmed["groups"])]
        draws, plain = Resamples(groups, count=claims.RESAMPLES), counts[confirmed["rows"][0]["label"]]
        for row in confirmed["rows"]:
            mine = counts[row["label"]]
            intervals = draws.intervals(mine, asked.metrics)
            for metric, value in row["metrics"].items():
                assert intervals[metric].as_dict() == pytest.approx(value, abs=2e-3), (name, row["label"], metric)
            if "changes" in row:
                changes = draws.changes(plain, mine, asked.metrics)
                for metric, value in row["changes"].items():
                    assert changes[metric].value == pytest.approx(value["value"], abs=2e-3), (name, row["label"], metric)


def test_settings_are_confirmed_on_other_items_than_they_were_chosen_on():
    for name, found in summary.effects().items():
        assert found["confirming"]["seed"] == 1
        assert "choosing" not in found or found["choosing"]["seed"] == 0
        labels = [row["label"] for row in found["confirming"]["rows"]]
        assert {*found["chosen"].values(), *found.get("further", ())} <= set(labels), name
        roles = [row["role"] for row in found["confirming"]["rows"]]
        assert roles[0] == "plain" and "baseline" in roles, f"{name}: what a user would try without a recipe"


def test_costs_page_is_made_of_the_recorded_figures():
    assert (summary.DOCS / "costs.md").read_text(encoding="utf-8") == costs_page.page(costs_page.recorded())


def test_every_method_for_pictures_has_its_grid():
    assert gallery.PAGE.read_text(encoding="utf-8") == gallery.page(gallery.drawn()), "run python benchmarks/gallery.py"
    files = {file.stem: file.stat().st_size for file in gallery.FOLDER.iterdir()}
    assert set(files) == set(gallery.drawn()) and max(files.values()) <= gallery.LARGEST


def test_false_discoveries_are_counted_over_the_whole_table():
    def row(label, values):
        return claims.Row(label, "tried", label, [str(i) for i in range(30)], [{"x": float(v), "n": 1.0} for v in values])

    import numpy as np

    rng = np.random.default_rng(3)
    plain = rng.normal(0, 1, 30)
    rows = [row("none", plain), row("better", plain + 1), *(row(f"r{i}", plain + rng.normal(0, 1, 30)) for i in range(20))]
    found = claims.table(rows, lambda s: {"mean": np.asarray(s["x"]) / s["n"], "other": s["n"]}, ["mean"], 0)
    changes = {line["label"]: line["changes"]["mean"] for line in found["rows"][1:]}
    assert claims.believed(changes["better"]) and changes["better"]["value"] == pytest.approx(1, abs=1e-4)
    assert all(change["q"] >= change["p"] for change in changes.values())
    assert sum(claims.believed(change) for change in changes.values()) <= 3
    assert claims.restored(found)["better"][4]["x"] == pytest.approx(plain[4] + 1, abs=1e-3)
    with pytest.raises(ValueError, match="other scenes"):
        claims.table([rows[0], claims.Row("x", "tried", "x", ["a"], [{}])], lambda s: {}, [], 0)


def test_the_best_settings_of_each_recipe_are_confirmed():
    section = replace(
        SECTIONS["pictures"],
        recipes={"seg": ["seg:sigma=1", "seg", "seg:scale=2"], "tpg": ["tpg"], "pag": ["pag", "pag:scale=2"]},
    )
    asked = object.__new__(effects.Measurement)
    asked.section, asked.suite, asked.specs = section, suite("binding"), section.recipes
    values = {"none": 0.4, "seg(sigma=1)": 0.5, "seg": 0.6, "seg(scale=2)": 0.5, "tpg": 0.4, "pag": 0.3, "pag(scale=2)": 0.41}
    found = {"rows": [{"label": label, "metrics": {"binding": {"value": value}}} for label, value in values.items()]}
    assert asked.best(found) == {"seg": ["seg", "seg(sigma=1)"], "pag": ["pag(scale=2)"]}, "of equals the weakest"
    asked.section = replace(section, best=1)
    assert asked.best(found) == {"seg": ["seg"], "pag": ["pag(scale=2)"]}
    chosen = {"chosen": {"seg": "seg", "pag": "pag(scale=2)"}, "further": ["seg(sigma=1)"]}
    # a method of which nothing was better is measured as it comes
    assert asked.confirmed(chosen) == ["seg:sigma=1", "seg", "tpg", "pag:scale=2"]
    asked.section = replace(section, defaults=True)
    assert asked.confirmed(chosen) == ["seg:sigma=1", "seg", "tpg", "pag", "pag:scale=2"]
    asked.section = replace(section, choose=0)
    assert asked.confirmed({"chosen": {}, "further": []}) == [spec for specs in section.recipes.values() for spec in specs]


def test_what_a_search_of_heads_is_told():
    told = head_search.drawn_scenes(3)
    scenes = [Binding.asked(item) for item in Binding().items(3, head_search.PROFILED_ON)]
    assert told["prompts"] == [listing(things) for things in scenes] and len(set(told["seeds"])) == 3
    blank = Image.new("RGB", (64, 64), BACKGROUND)
    drawn = [picture(Scene(tuple(replace(t, x=0.2 + 0.3 * i, size=0.13) for i, t in enumerate(scenes[0]))), 64, CLEAR), blank]
    assert head_search.drawn_scenes(3, ["binding"])["objective"](drawn, told["prompts"][:2]) == [1.0, 0.0]
    good, bad = told["objective"](drawn, told["prompts"][:2])
    assert told["objective"].__name__ == "binding+fit" and 0.8 < good < 1 and bad == 0


def test_every_recipe_has_a_section():
    from reattend.recipes import list_recipes

    asked = {slug for section in SECTIONS.values() for slug in section.recipes}
    # TRIED = {} in a method's example: no suite asks what it is for yet
    unasked = {slug for slug in list_recipes() if getattr(methods.modules()[slug], "TRIED", None) == {}}
    assert asked | unasked == set(list_recipes()) and not asked & unasked
    assert all(suite(section.suite.partition(":")[0]) for section in SECTIONS.values())


def test_edits_page_is_made_of_the_code():
    assert edits_page.PAGE.read_text(encoding="utf-8") == edits_page.page(), "run python benchmarks/edits_page.py"
    level_classes = {"Edit", "OperandEdit", "ScoreEdit", "WeightEdit", "OutputEdit"}
    exported = {
        name
        for name in interventions.__all__
        if isinstance(cls := getattr(interventions, name), type) and issubclass(cls, Edit)
    }
    assert {cls.__name__ for cls in edits_page.edits()} == exported - level_classes
