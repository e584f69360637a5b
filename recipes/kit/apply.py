"""`apply`: recipes by name, checked against the model, turned into a session."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...hooks import Plan, Session, attach, running, sites
from ...interventions import ReattendError, UnsupportedError
from .base import Recipe
from .checks import tokenizer as checked_tokenizer
from .checks import truth
from .registry import is_file_name, made, read_choice, registry

Choice = str | Recipe | Path | dict | tuple[str, dict[str, Any]]


def resolve(choices: Sequence[Choice], parameters: dict[str, Any]) -> list[Recipe]:
    """Recipes from names, (name, parameters) pairs, YAML files, dicts or Recipe objects; keyword parameters belong to a single one."""
    if not choices:
        raise ReattendError("name at least one recipe, for example apply(model, 'emphasise', text='...')")
    if parameters and (len(choices) > 1 or not isinstance(choices[0], str) or is_file_name(choices[0])):
        read_choice(choices[0])  # says what is wrong with it, if anything is
        raise ReattendError('parameters by keyword go with one recipe name; with several, pass ("name", {parameters}) pairs')
    found = []
    for choice in choices:
        if isinstance(choice, Recipe):
            found.append(choice)
        else:
            cls, given = read_choice(choice)
            found.append(made(cls, {**given, **parameters}))
    return found


def apply(model: Any, *recipes: Choice, isolated: bool = False, tokenizer: Any = None, **parameters: Any) -> Session:
    """Starts a session: `with reattend.apply(model, "streaming", window=512) as session: model.generate(...)`.

    model: a transformers model or pipeline, or a diffusers pipeline or denoiser. Several recipes compose in the order given.
    isolated: only the current thread or task runs under the session. tokenizer: needed with a bare model where a recipe finds
    tokens by text (a pipeline brings its own). Raises ReattendError before anything runs: unknown recipe, bad parameter,
    a model that a recipe does not fit (with the site and the reason), or a recipe that another one leaves nothing to act on.
    """
    truth(isolated, "isolated")
    checked_tokenizer(tokenizer)
    again = functools.partial(plans_of, resolve(recipes, parameters))
    plans = again(model)
    if tokenizer is None:
        tokenizer = getattr(model, "processor", None) or getattr(model, "tokenizer", None)
    return attach(model, plans, isolated=isolated, tokenizer=tokenizer, again=again)


def plans_of(chosen: Sequence[Recipe], model: Any) -> list[Plan]:
    """The plans of these recipes on a model. Raises UnsupportedError where one does not fit it, or what is at work on it."""
    table = sites(model)
    plans = []
    for item in chosen:
        support = item.supports(table)
        if not support:
            raise UnsupportedError(f"recipe {item.slug!r} does not fit this model: {support.reason}")
        plans.append(Plan(item.slug, item.plan(table), idle=item.idle))
    reason = plans_misfit([*(plan for session in running(model) for plan in session.plans), *plans])
    if reason:
        raise UnsupportedError(reason)
    return plans


def plans_misfit(plans: Sequence[Plan]) -> str:
    """Why these plans make no sense together: one weighs tokens in layers where another one hides them; "" where they do."""
    for plan in plans:
        hidden = _roles(plan, "hides")
        beyond = {site.name: site.layer for step in plan.steps for site, _ in step.where} if hidden else {}
        for other in plans if beyond else ():
            shared = sorted(hidden & _roles(other, "weighs"))
            calls = [site for step in other.steps if step.at_calls for site, _ in step.where]
            blind = [site.layer for site in calls if site.name in beyond]
            if shared and blind:
                return (
                    f"recipe {other.recipe!r} weighs {' and '.join(shared)} tokens in layers {min(blind)} to {max(blind)}, which do not "
                    f"see them under recipe {plan.recipe!r}: let its layers end at {min(beyond.values()) - 1}, or use one of the two"
                )
    return ""


def _roles(plan: Plan, kind: str) -> frozenset[str]:
    known = registry().get(plan.recipe)
    return frozenset() if known is None else getattr(known, kind)
