"""Shares of the attention as a report speaks of them: on the prompt after its first token, and of all attention.

Models park attention on the first token of a prompt. Counted in, it hides what moves between the other tokens: a passage may get less of
all attention and yet more of what reads the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FIRST, MARKED = "bos", "marked passage"
# Roles of columns that are no tokens of the prompt.
OUTSIDE = ("generated", "padding", "other", "appended", "learned sink")
# A role of a recipe's own: its name, the number of the recipe object, and the part where it has several (see recipes/kit/passages.py).
OWN = re.compile(r"(?P<slug>.*)-(?P<serial>\d+)(\.(?P<part>\d+)|(?P<words>-words))?")
# What the passages of these are; those of all other recipes are marked by the user. A question is gift's, and its words are told apart.
NAMED = {"pine": "segment", "opera": "image", "question": "rest of the question"}
WORDS = "words of the question"


def plain_names(roles: Iterable[str]) -> dict[str, str]:
    """{role: name}: what a recipe calls its passages, as a reader knows them. Other roles keep their names.

    One recipe's passage is the "marked passage"; those of several tell whose they are.
    """
    own = {role: match for role in roles if (match := OWN.fullmatch(role))}
    owners = list(dict.fromkeys((m["slug"], m["serial"]) for m in own.values() if m["slug"] not in NAMED))
    slugs = [slug for slug, _ in owners]
    names = {role: role for role in roles}
    for role, match in own.items():
        slug, part = match["slug"], match["part"]
        name = WORDS if match["words"] else NAMED.get(slug, MARKED)
        if part is not None:
            name += f" {int(part) + 1}"
        if slug not in NAMED and len(owners) > 1:
            alike = [owner for owner in owners if owner[0] == slug]
            which = f" {alike.index((slug, match['serial'])) + 1}" if slugs.count(slug) > 1 else ""
            name += f" ({slug or 'recipe'}{which})"
        names[role] = name
    return names


def named(mass: dict[str, float]) -> dict[str, float]:
    """A mass per role under plain names."""
    found: dict[str, float] = {}
    for role, name in plain_names(mass).items():
        found[name] = found.get(name, 0.0) + mass[role]
    return found


def on_prompt(mass: dict[str, float]) -> dict[str, float]:
    """{role: share} of the attention on the prompt after its first token; adds up to 1. {} where there is none, or no prompt is known."""
    if FIRST not in mass:
        return {}
    own = {role: value for role, value in mass.items() if role != FIRST and role not in OUTSIDE}
    total = sum(own.values())
    return {role: value / total for role, value in own.items()} if total > 0 else {}


def of_all(mass: dict[str, float]) -> dict[str, float]:
    """{part: share} of all attention: the first token, the prompt after it, the answer so far, and what else there is."""
    if FIRST not in mass:
        return dict(mass)
    prompt = sum(value for role, value in mass.items() if role != FIRST and role not in OUTSIDE)
    return {FIRST: mass[FIRST], "prompt after its first token": prompt, **{r: v for r, v in mass.items() if r in OUTSIDE}}


def marked(shares: dict[str, float]) -> list[str]:
    """The roles that are passages marked by the user."""
    return [role for role in shares if role.startswith(MARKED)]
