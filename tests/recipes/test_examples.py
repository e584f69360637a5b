"""Every method of the registry has an example for each kind of model that it is for, and no example is of a method that is not there."""

from __future__ import annotations

import pytest
from example import modules
from reattend.recipes import load_recipe, recipe, recipe_class, save_recipe
from reattend.recipes.kit.registry import registry


def test_every_method_has_an_example_and_every_example_a_method():
    missing, left = set(registry()) - set(modules()), set(modules()) - set(registry())
    files = [f"tests/recipes/examples/{slug.replace('-', '_')}.py" for slug in sorted(missing)]
    assert not missing, (
        f"no example says how to run {sorted(missing)}: copy one of tests/recipes/examples to {', '.join(files)}"
    )
    assert not left, f"examples of methods that do not exist: {sorted(left)}"


@pytest.mark.parametrize("slug", registry())
def test_an_example_covers_the_kinds_of_models_that_its_method_names_and_a_file_keeps_its_parameters(slug, tmp_path):
    kinds = {example.kind for example in modules()[slug].EXAMPLES.values()}
    assert kinds == set(recipe_class(slug).info.kinds), slug
    for example in modules()[slug].EXAMPLES.values():
        made = recipe(slug, **example.given([0, 1]))
        assert load_recipe(save_recipe(made, tmp_path / "r.yaml", overwrite=True)) == made
        recipe(slug, **example.given([0], **(example.off or {})))


@pytest.mark.parametrize(
    ("slug", "parameters"),
    [
        *((slug, example.given([0])) for slug, module in modules().items() for example in module.EXAMPLES.values()),
        ("softpag", {"heads": [(3, 1), (4, 0)], "strength": 0.25}),
        ("opera", {"candidates": 3, "image_range": (2, 5)}),
        ("gift", {"saliency_layers": [1], "enhance_layers": [2, 3], "ranges": [(3, 9)], "words": "all"}),
    ],
)
def test_a_recipe_is_data(slug, parameters, tmp_path):
    made = recipe(slug, **parameters)
    assert made == load_recipe(made.as_dict()) == load_recipe(save_recipe(made, tmp_path / "mine.yaml"))
