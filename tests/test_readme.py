"""The README says what the recipes say of themselves and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import reattend
import which
from reattend.comparison import demo
from reattend.recipes.kit.base import Problem

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_what_answers_which_recipe_is_made_of_the_recorded_figures():
    found = which.figures()
    for file, text in (
        (which.README, which.readme(found)),
        (which.PAGE, which.page(found)),
        (which.METHODS, which.methods()),
        (which.SHIPPED, which.shipped(found)),
    ):
        assert file.read_text(encoding="utf-8") == text, "python benchmarks/which.py writes it"


def test_every_recipe_answers_a_problem_and_every_problem_has_one():
    problems = [problem for info in reattend.list_recipes().values() for problem in info.problems]
    assert all(info.problems for info in reattend.list_recipes().values())
    assert set(problems) == set(get_args(Problem))


def test_files_that_the_readme_names_exist():
    import re

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target


def test_the_demo_takes_as_long_everywhere():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    assert demo.MINUTES in README and demo.MINUTES in makefile
