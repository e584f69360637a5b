"""recipes/kit/named.pyi, from which editors know the recipes' names and parameters, is what the recipes say."""

from __future__ import annotations

import stubs


def test_the_stub_is_what_the_recipes_say():
    assert stubs.FILE.read_text(encoding="utf-8") == stubs.formatted(stubs.stub()), "python benchmarks/stubs.py writes it"
