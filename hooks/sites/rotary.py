"""The rotary door: how a site turns its queries and keys by position, so that recipes can turn them further (`call.rotary`).

Nothing is assumed about a model's RoPE. Its own embedding module gives the frequencies, and its own function `apply_rotary_pos_emb` is
tried on random vectors: turning what it returns by s positions must give what it returns s positions further on, else the site is
refused. Whether a layer uses RoPE at all is read from the attention class's source.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import ReattendError, Site, UnsupportedError
from ...interventions.rotary import Rotary
from .discovery import pretrained_root, unwrapped_model
from .source import source_of
from .table import SiteTable

FUNCTION = "apply_rotary_pos_emb"
# layers that cut off the turned dimensions themselves call the function with these
CUT_OFF = "query_rot"


@dataclass(frozen=True)
class Facts:
    """What is the same at every call of a site: the layout on a copy of its RoPE, and where the frequencies lie in the model's own."""

    layout: Rotary
    cls: type
    buffer: str
    limit: int | None


_facts: weakref.WeakKeyDictionary[nn.Module, Facts | str] = weakref.WeakKeyDictionary()


def rotary_misfit(table: SiteTable) -> str:
    """Why the rotary positions of one of these sites are not understood, or ""."""
    trials: dict[Any, Facts | str] = {}
    for site in table:
        found = _facts_of(table.module(site), site, trials)
        if isinstance(found, str):
            return f"{site.name} {found}"
    return ""


def rotary_at(
    model: Any,
    known: dict[int, nn.Module | None],
    made: dict[Any, Rotary],
    site: Site,
    module: nn.Module,
    given: dict[str, Any],
) -> Rotary:
    """The RoPE of one call; known: embedding modules that were found before. made: what was made for calls of the same pass, which layers
    share. given: what the model passed to its attention function.

    Raises UnsupportedError where it is not understood.
    """
    facts = _facts_of(module, site, {})
    if isinstance(facts, str):
        raise UnsupportedError(f"{site.name} {facts}")
    live = _live(model, known, module, facts)
    frequencies = getattr(live, facts.buffer, None)
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        positions = None
    window = given.get("sliding_window", getattr(module, "sliding_window", None))
    frequencies = frequencies if isinstance(frequencies, Tensor) else facts.layout.frequencies
    window = window if isinstance(window, int) else None
    # what is kept holds these objects, so that their ids stay theirs
    key = (id(facts), id(frequencies), id(positions), window)
    if key not in made:
        made[key] = replace(facts.layout, frequencies=frequencies, positions=positions, window=window, limit=facts.limit)
    return made[key]


def _facts_of(module: nn.Module, site: Site, trials: dict[Any, Facts | str]) -> Facts | str:
    if module not in _facts:
        key = (type(module), id(getattr(module, "config", None)), _layer_type(module), _condition(type(module), module))
        if key not in trials:
            try:
                trials[key] = _understand(module, site)
            except ReattendError as error:
                trials[key] = str(error)
        _facts[module] = trials[key]
    return _facts[module]


def _understand(module: nn.Module, site: Site) -> Facts:
    """Raises ReattendError with the end of a sentence that begins with the site's name."""
    config, home = getattr(module, "config", None), sys.modules[type(module).__module__]
    call = _rope_call(type(module))
    if call is None or not hasattr(home, FUNCTION):
        raise ReattendError("has no rotary positions of the usual kind (ALiBi, learned positions, or a RoPE of its own)")
    obstacle = _condition(type(module), module) or _changed_after(type(module), call)
    if obstacle:
        raise ReattendError(obstacle)
    embedding = _embedding_class(type(module), home)
    if config is None or embedding is None:
        raise ReattendError("has no rotary embedding module beside it, from which its frequencies could be read")
    layer_type = _layer_type(module)
    by_type = "layer_type" in inspect.signature(embedding.forward).parameters
    settings = getattr(config, "rope_parameters", None) or {}
    if by_type and isinstance(settings, dict):
        settings = settings.get(layer_type) or {}
    if any("mrope" in str(name) for name in settings):
        raise ReattendError("uses multimodal RoPE, where a token has several positions at once")
    kind = str(settings.get("rope_type", "default"))
    if "dynamic" in kind:
        raise ReattendError(
            "uses dynamic RoPE, whose frequencies change with the length: keys in the cache keep their old ones"
        )
    limit = (
        int(settings.get("original_max_position_embeddings") or config.max_position_embeddings) if kind == "longrope" else None
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        copy = embedding(config).to(torch.float32)
        buffer = f"{layer_type}_inv_freq" if by_type else "inv_freq"
        frequencies = getattr(copy, buffer, None)
        if not isinstance(frequencies, Tensor) or frequencies.dim() != 1:
            raise ReattendError("has a rotary embedding module that shows no inverse frequencies")
        scaling = getattr(copy, f"{layer_type}_attention_scaling" if by_type else "attention_scaling", 1.0)
        more = (layer_type,) if by_type else ()
        layout = _fitting_layout(copy, getattr(home, FUNCTION), frequencies, float(scaling), _width(module, site, call), more)
    return Facts(layout, embedding, buffer, limit)


def _fitting_layout(embedding: Any, function: Any, frequencies: Tensor, scaling: float, width: int, more: tuple) -> Rotary:
    """The layout under which turning a turned vector further gives what the model's function gives further on."""
    query = torch.randn(1, 1, 3, width)
    here, steps = torch.tensor([[0, 3, 7]]), torch.tensor([[5, 2, 11]])

    def at(positions: Tensor) -> Tensor:
        cos, sin = embedding(query, positions, *more)
        return function(query, query, cos, sin)[0]

    try:
        before, after = at(here), at(here + steps)
    except Exception as error:
        raise ReattendError(f"has rotary positions that could not be tried out ({type(error).__name__}: {error})") from None
    for start in {0, width - 2 * frequencies.shape[0]}:
        for interleaved in (False, True):
            layout = Rotary(frequencies, interleaved, start, scaling)
            if start >= 0 and torch.allclose(layout.turn(before, steps[:, None]), after, atol=1e-4 * max(1.0, scaling)):
                return layout
    raise ReattendError(
        "has rotary positions of a kind that is not known here: turning its keys further does not give later positions"
    )


def _width(module: nn.Module, site: Site, call: ast.Call) -> int:
    """How many dimensions the model hands to its rotary function: all of a head, or those that the layer has cut off the front."""
    if isinstance(call.args[0], ast.Name) and call.args[0].id == CUT_OFF:
        cut = getattr(module, "rotary_ndims", None)
        if not isinstance(cut, int):
            raise ReattendError("turns only a part of each head's dimensions, and does not tell which")
        return cut
    if not site.head_dim:
        raise ReattendError("does not tell its head dimension")
    return site.head_dim


@functools.lru_cache(maxsize=1024)
def _rope_calls(cls: type) -> tuple[tuple[ast.Call, tuple[str, ...]], ...]:
    """Calls of the rotary function in a class's forward, with the conditions that they stand under."""
    found: list[tuple[ast.Call, tuple[str, ...]]] = []

    def walk(node: ast.AST, conditions: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = (*conditions, ast.unparse(child.test)) if isinstance(child, (ast.If, ast.IfExp)) else conditions
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id.startswith("apply_rotary"):
                found.append((child, conditions))
            walk(child, inner)

    walk(source_of(cls.forward).tree, ())  # type: ignore[attr-defined]
    return tuple(found)


def _rope_call(cls: type) -> ast.Call | None:
    """The one call of the usual form, `apply_rotary_pos_emb(query, key, cos, sin)`."""
    calls = _rope_calls(cls)
    if len(calls) != 1:
        return None
    call = calls[0][0]
    names = [a.id if isinstance(a, ast.Name) else "" for a in call.args]
    usual = len(names) == 4 and names[0] in ("query_states", CUT_OFF) and names[2:] == ["cos", "sin"] and not call.keywords
    return call if usual and isinstance(call.func, ast.Name) and call.func.id == FUNCTION else None


def _condition(cls: type, module: nn.Module) -> str:
    """Why a layer may leave its queries and keys without positions, or ""."""
    for _, conditions in _rope_calls(cls):
        for condition in conditions:
            name = condition.removeprefix("self.")
            if condition.startswith("self.") and name.isidentifier():
                if not getattr(module, name, False):
                    return "is a layer without rotary positions"
            else:
                return f"applies its rotary positions only where `{condition}`"
    return ""


# what may happen to turned queries and keys before attention: the cache, other dtypes, and the dimensions that were cut off
HARMLESS = ("update", "cat", "to", "contiguous")


def _changed_after(cls: type, call: ast.Call) -> str:
    """What a class does to its queries and keys after they were turned (a norm there would not commute with turning), or ""."""
    for node in ast.walk(source_of(cls.forward).tree):  # type: ignore[attr-defined]
        if not isinstance(node, ast.Assign) or node.lineno <= call.lineno:
            continue
        names = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        value = node.value
        if not names & {"query_states", "key_states"} or isinstance(value, ast.Name):
            continue
        if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in HARMLESS):
            return f"changes its queries or keys after they were turned: `{ast.unparse(node)}`"
    return ""


def _embedding_class(cls: type, home: Any) -> Any:
    """The class of the rotary embedding in the file of an attention class: of the same name, else the only one."""
    found = {
        name: value
        for name, value in vars(home).items()
        if inspect.isclass(value)
        and name.endswith("RotaryEmbedding")
        and value.__module__ == home.__name__
        and "Vision" not in name
    }
    stem = cls.__name__.removesuffix("Attention")
    named = found.get(f"{stem}RotaryEmbedding")
    return named or (next(iter(found.values())) if len(found) == 1 else None)


def _layer_type(module: nn.Module) -> str | None:
    own = getattr(module, "layer_type", None)
    types, index = getattr(getattr(module, "config", None), "layer_types", None), getattr(module, "layer_idx", None)
    if own is None and types and isinstance(index, int) and index < len(types):
        own = types[index]
    return own if isinstance(own, str) else None


def _live(model: Any, known: dict[int, nn.Module | None], module: nn.Module, facts: Facts) -> nn.Module | None:
    """The model's own embedding module: the nearest one above the site. Its frequencies may have been cast with the model."""
    if id(module) not in known:
        inner = unwrapped_model(model)
        root = pretrained_root(inner) if isinstance(inner, nn.Module) else None
        known[id(module)] = _nearest(root, module, facts.cls)
    return known[id(module)]


def _nearest(root: nn.Module | None, attention: nn.Module, cls: type) -> nn.Module | None:
    if root is None:
        return None
    path = next((name for name, module in root.named_modules() if module is attention), None)
    while path is not None:
        holder = root.get_submodule(path)
        for child in holder.children():
            if type(child) is cls:
                return child
        path = path.rpartition(".")[0] if path else None
    return None
