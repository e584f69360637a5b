"""Every method of the registry has an example for each kind of model that it is for, and no example is of a method that is not there."""

from __future__ import annotations

import pytest
from example import modules
from reattend.recipes import recipe, recipe_class
from reattend.recipes.kit.registry import registry


def test_every_method_has_an_example_and_every_example_a_method():
    missing, left = set(registry()) - set(modules()), set(modules()) - set(registry())
    files = [f"tests/recipes/examples/{slug.replace('-', '_')}.py" for slug in sorted(missing)]
    assert not missing, (
        f"no example says how to run {sorted(missing)}: copy one of tests/recipes/examples to {', '.join(files)}"
    )
    assert not left, f"examples of methods that do not exist: {sorted(left)}"


@pytest.mark.parametrize("slug", registry())
def test_an_example_covers_the_kinds_of_models_that_its_method_names(slug):
    kinds = {example.kind for example in modules()[slug].EXAMPLES.values()}
    assert kinds == set(recipe_class(slug).info.kinds), slug
    for example in modules()[slug].EXAMPLES.values():
        recipe(slug, **example.given([0]))
        recipe(slug, **example.given([0], **(example.off or {})))
