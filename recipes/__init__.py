"""WHICH: one published method per file, found by name."""

from .kit.apply import apply
from .kit.base import Info, Recipe
from .kit.language import decoder_sites
from .kit.profile import Profile
from .kit.profiling import cached_profile
from .kit.registry import list_recipes, load_recipe, recipe, recipe_class, save_recipe
from .kit.weighted_prompts import plain_prompt

__all__ = [
    "Info",
    "Profile",
    "Recipe",
    "apply",
    "cached_profile",
    "decoder_sites",
    "list_recipes",
    "load_recipe",
    "plain_prompt",
    "recipe",
    "recipe_class",
    "save_recipe",
]
