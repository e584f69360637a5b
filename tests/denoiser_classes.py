"""The matrix of denoisers: every class of diffusers that attends and builds from a small configuration, checked the same way.

    python tests/denoiser_classes.py                         # runs all and writes docs/denoisers.json and docs/support.md
    python tests/denoiser_classes.py FluxTransformer2DModel  # runs these anew and keeps the others' rows

`check` lists the sites, attaches, passes through bit-identically, applies one edit at every site that can be edited and compares the
output with the reference executor's, says which tokens each kind of site attends to, and detaches. A class that does not build or run
from small settings is listed as not built, with the reason: nothing is said about it.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import support_page
import torch
from reattend.hooks import Edits, Plan, attach, sites, steering
from reattend.interventions import Call, HeadGain, ReattendWarning, reference
from tiny_controlnets import CONTROLNETS
from tiny_denoisers import DENOISERS, build
from tiny_families import FURTHER
from tiny_further import PACKED
from tiny_parts import PARTS
from tiny_streams import STREAMS
from tiny_videos import VIDEOS
from torch import Tensor, nn

BUILDERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    **DENOISERS, **STREAMS, **FURTHER, **PACKED, **VIDEOS, **CONTROLNETS, **PARTS,
}  # fmt: skip
HOMES = ("diffusers.models.transformers.", "diffusers.models.unets.", "diffusers.models.controlnets.")
# several ControlNets in one, which are checked alone
SEVERAL = "Multi"
OTHER = {
    "ControlNetXSAdapter": "a part of UNetControlNetXSModel that does not run alone",
    "MiniMaxMusic3RVQDepthDecoder": "a language model over codes of sound, no denoiser",
    "MotionAdapter": "a part of UNetMotionModel that does not run alone",
}


def classes() -> list[str]:
    """Names of all denoisers and ControlNets that diffusers exports, and of further ways to call them that are built here."""
    found = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__.startswith(HOMES) and SEVERAL not in name:
            found.append(name)
    return sorted({*found, *BUILDERS})


def output(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """All tensors that the model returns."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**inputs)
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (tuple, list)) else (found,)
    flat = [x for value in values for x in (value if isinstance(value, (tuple, list)) else (value,))]
    return [x for x in flat if isinstance(x, Tensor)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def ran(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules of the model that run inside the block."""
    seen: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: seen.add(module)) for m in model.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def told(call: Call) -> str:
    """What is known of the tokens that a call attends to."""
    tokens = call.tokens
    if tokens is None:
        return "nothing"
    if tokens.unknown:
        return "unknown"
    roles = [role for role in ("image", "frame", "text", "reference") if role in tokens and bool(tokens.roles[role].any())]
    grids = sorted(
        {f"{g.frames} x {g.height} x {g.width}" if g.frames > 1 else f"{g.height} x {g.width}" for g in tokens.grids}
    )
    return " and ".join(roles) + (f" ({', '.join(grids)})" if grids else "")


def check(model: nn.Module, inputs: dict[str, Any]) -> dict:
    """What was found and verified on one model; raises AssertionError where a promise is broken."""
    table = sites(model)
    usable = table.where(lambda s: s.problem is None)
    kinds = Counter(site.kind for site in usable)
    result: dict[str, Any] = {
        "sites": len(table), "edited": len(usable), "kinds": dict(sorted(kinds.items())),
        "problems": sorted({s.problem for s in table.problems}), "tokens": {},
    }  # fmt: skip
    if not len(usable):
        return result
    with ran(model) as seen:
        before = output(model, inputs)
    usable = usable.where(lambda s: any(part in seen for part in usable.module(s).modules()))
    result["idle"] = result["edited"] - len(usable)
    assert same(output(model, inputs), before), "the model itself is not deterministic"
    tokens: dict[str, set[str]] = {}

    def look(call: Call) -> None:
        assert call.site is not None
        tokens.setdefault(call.site.kind, set()).add(told(call))

    def halve(call: Call) -> HeadGain:
        return HeadGain(heads=[0], factor=0.5)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReattendWarning)
        with attach(model, [Plan("look", [Edits(usable, look)])]):
            assert same(output(model, inputs), before), "pass-through is not bit-identical"
    with attach(model, [Plan("edit", [Edits(usable, halve)])]) as session:
        edited = output(model, inputs)
    missed = {s.name for s in usable} - set(session.stats["edit"])
    assert not missed, f"the edit did not act at {sorted(missed)[:3]}"
    assert not same(edited, before), "the edit changed nothing"
    fused = steering.fused_as_it_is
    try:
        steering.fused_as_it_is = reference
        with attach(model, [Plan("edit", [Edits(usable, halve)])]):
            expected = output(model, inputs)
    finally:
        steering.fused_as_it_is = fused
    for found, wanted in zip(edited, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)
    assert same(output(model, inputs), before), "detaching did not restore the model"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "hooks are left"
    result["tokens"] = {kind: sorted(found) for kind, found in sorted(tokens.items())}
    return result


def row(name: str) -> dict:
    """One class's row of the record."""
    if name not in BUILDERS:
        return {"status": "not built", "reason": OTHER.get(name, "no small settings are written for it")}
    try:
        model, inputs = build(name, among=BUILDERS)
        output(model, inputs)
    except Exception as error:
        return {"status": "not built", "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
    try:
        found = check(model, inputs)
        return {"status": "verified" if found["edited"] else "refused", **found}
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"}


def versions() -> dict[str, str]:
    return {"diffusers": diffusers.__version__, "torch": torch.__version__.split("+")[0]}


def main(chosen: list[str]) -> None:
    kept: dict[str, dict] = {}
    if chosen:
        before = json.loads(support_page.DENOISERS.read_text(encoding="utf-8"))
        if {name: before[name] for name in versions()} != versions():
            raise SystemExit("the record is of other versions: run all")
        kept = before["classes"]
    rows = dict(kept)
    for name in chosen or classes():
        rows[name] = row(name)
        print(name, rows[name]["status"], rows[name].get("reason", ""), file=sys.stderr, flush=True)
    record = {**versions(), "classes": dict(sorted(rows.items()))}
    support_page.DENOISERS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    support_page.write()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
