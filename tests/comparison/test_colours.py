"""Letters of a report can be read: WCAG contrast of at least 4.5 in both modes, over the whole scale of colours."""

from __future__ import annotations

import re

import pytest
from reattend.comparison.pictures import FULL_COLOUR, GAINED, INK, LOST, PAPER, SOFT
from reattend.comparison.report import render

LEAST = 4.5
PAGE, CELL = render([], "empty"), render([], "empty", page=False)


def luminance(colour) -> float:
    parts = [v / 255 for v in colour]
    parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def colour(text: str) -> tuple[int, ...]:
    digits = text.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * d for d in digits)
    return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))


def mixed(one, other, part: float) -> list[float]:
    return [a * part + b * (1 - part) for a, b in zip(one, other, strict=True)]


def modes(source: str) -> list[dict[str, tuple[int, ...]]]:
    """Every set of colours in the style sheet, as {name: rgb}."""
    found = [dict(re.findall(r"--([a-z]+):(#[0-9a-f]{3,6})", rule)) for rule in re.findall(r"\{([^{}]*--ink:[^{}]*)\}", source)]
    return [{name: colour(value) for name, value in each.items()} for each in found]


def test_the_measure():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast(colour("#767676"), colour("#fff")) == pytest.approx(4.54, abs=0.01)


def test_a_page_has_two_modes_and_a_notebook_follows_its_theme():
    assert len(modes(PAGE)) == 2 and modes(PAGE)[0] != modes(PAGE)[1]
    assert len(modes(CELL)) == 4 and modes(CELL)[:2] == modes(CELL)[2:] == modes(PAGE)
    assert '[data-jp-theme-light="false"] .reattend' in CELL and "data-jp-theme" not in PAGE


@pytest.mark.parametrize("mode", modes(PAGE), ids=["light", "dark"])
def test_letters_on_every_ground(mode):
    for name in ("heat", "gain", "lost"):  # of a cell: ink on so much of the colour over the card
        worst = min(contrast(mode["ink"], mixed(mode[name], mode["card"], level / 100)) for level in range(101))
        assert worst >= LEAST, name
    for name in ("ink", "soft", "link"):
        assert min(contrast(mode[name], mode[ground]) for ground in ("card", "ground")) >= LEAST, name
    for name in ("yes", "no", "warm"):
        assert contrast(mode[name], mode["card"]) >= LEAST, name
    for name in ("yes", "no"):  # verdicts stand in the list of sections too
        assert contrast(mode[name], mode["ground"]) >= LEAST, name
    assert contrast(mode["ink"], mode["mark"]) >= LEAST
    for name in ("before", "after"):  # bars and lines are no letters
        assert contrast(mode[name], mode["card"]) >= 3, name


def test_cells_are_coloured_with_what_is_checked_here():
    rules = [rule for rule in re.findall(r"\.reattend [^{}]*\{[^{}]*\}", PAGE) if "--level" in rule]
    assert sorted(
        re.findall(r"color-mix\(in srgb,var\(--(\w+)\) var\(--level(?:,60%)?\),var\(--card\)\)", " ".join(rules))
    ) == [
        "gain",
        "heat",
        "lost",
    ]
    inside = re.findall(r"\.reattend \.(?:tok|kl|cell)[^{}]*\{[^{}]*", PAGE)
    assert not [rule for rule in inside if re.search(r"[{;]color:(?!var\(--ink\))", rule)], "letters on a cell are ink"


def test_letters_of_the_strip_picture():
    for shade in (GAINED, LOST):
        worst = min(contrast(INK, mixed(shade, PAPER, FULL_COLOUR * level / 100)) for level in range(101))
        assert worst >= LEAST
    assert contrast(SOFT, PAPER) >= LEAST
