"""The README says what the recipes say of themselves."""

from __future__ import annotations

from pathlib import Path

import reattend

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TABLE = README.split("<!-- recipes: checked by tests/test_readme.py -->\n")[1].split("<!-- end of recipes -->")[0]


def row(slug: str, info) -> str:
    link = f"[{info.paper}](https://arxiv.org/abs/{info.arxiv}), {info.year}"
    return f"| `{slug}` | {', '.join(info.kinds)} | {', '.join(info.families)} | {link} | {info.status} | {info.profiling or 'no'} |"


def test_table_of_recipes():
    rows = [row(slug, info) for slug, info in reattend.list_recipes().items()]
    assert TABLE.strip().splitlines()[2:] == rows, "put these rows into the README:\n" + "\n".join(rows)


def test_files_that_the_readme_names_exist():
    import re

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
