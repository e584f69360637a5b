"""The probe door: before a prefill, the same or changed inputs run through the model once more, without edits and without a cache.

The pass is nested in the forward pre-hook of the real one, in the same thread. While it runs, `Attachment.active` answers with the
probe's own readers alone, so that no recipe edits it and no probe starts inside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...interventions import TokenMap
from ..plan import Capture, Observe, Plan, Probe, Prompt
from ..trackers.caches import NAMES
from ..trackers.sides import width_of

if TYPE_CHECKING:
    from ..passes import Forward
    from ..session import Session
    from ..trackers.sequence import SequenceTracker

# What belongs to the real pass alone: its cache, what it returns, and positions (the model finds them again from the mask).
OF_THE_REAL_PASS = (
    *NAMES, "cache_position", "use_cache", "labels", "output_attentions", "output_hidden_states", "return_dict",
    "logits_to_keep",
)  # fmt: skip


class Enough(Exception):
    """Ends a probe pass whose last reader has read. Never leaves this module."""


class Running:
    """A probe under way in one thread: the session of its readers, and what is still to be read."""

    def __init__(self, session: Session, pending: set[tuple[int, int]] | None) -> None:
        self.session, self.pending = session, pending

    def read(self, step: Observe | Capture, module: nn.Module) -> None:
        """Notes that a reader has read a site; raises Enough after the last one."""
        if self.pending is not None:
            self.pending.discard((id(step), id(module)))
            if not self.pending:
                raise Enough


def readers_of(session: Session, plan: Plan, step: Probe) -> Session:
    """The readers of a probe as a session of its own, which shares the recipe's memory; it is never attached by itself."""
    from ..session import Session

    return Session(session.model, [Plan(plan.recipe, list(step.steps), plan.memory_key)], isolated=session.isolated)


def run_probes(tracker: SequenceTracker, forward: Forward, given: dict[str, Any], sessions: list[Session]) -> None:
    """Runs the probes of all sessions before the pass `forward`, if it starts a sequence."""
    if forward.pieces and forward.tokens is not None:
        _in_pieces(tracker, forward, given, sessions)
    if not forward.fresh or forward.tokens is None:
        return
    for session in sessions:
        for plan, step, readers in session.probes:
            _run(tracker, forward, dict(given), plan, step, readers)


def _in_pieces(tracker: SequenceTracker, forward: Forward, given: dict[str, Any], sessions: list[Session]) -> None:
    """Lets recipes say no to a prompt of which a further part comes."""
    tokens = forward.tokens
    assert tokens is not None
    for session in sessions:
        for plan, step, _ in session.probes:
            if step.in_pieces is not None:
                memory, past = forward.memory(plan.memory_key), tokens.length - width_of(given)
                arguments = plain_arguments(given, tokens)
                step.in_pieces(Prompt(arguments, tokens, getattr(tracker.root, "config", None), memory, past))


def _run(tracker: SequenceTracker, forward: Forward, given: dict[str, Any], plan: Plan, step: Probe, readers: Session) -> None:
    from ..passes import Forward

    root, tokens = tracker.root, forward.tokens
    assert root is not None and tokens is not None
    arguments = plain_arguments(given, tokens)
    if step.inputs is not None:
        prompt = Prompt(arguments, tokens, getattr(root, "config", None), forward.memory(plan.memory_key))
        changed = step.inputs(prompt)
        if changed is None:
            return
        if changed is not arguments:
            tokens = tracker._new_map(
                changed.get("input_ids"), changed.get("inputs_embeds"), changed.get("attention_mask"), changed, []
            )
            arguments = changed
    parameters = tracker.signature.parameters
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments["use_cache"] = False
    outer = tracker.local.stack
    running = Running(readers, _pending(step, root))
    tracker.local.stack = [Forward(forward.clock, tokens, forward.sequence, probe=running)]
    # multimodal RoPE keeps its offset on the module
    kept = [(m, m.rope_deltas) for m in root.modules() if hasattr(m, "rope_deltas")]
    try:
        with torch.set_grad_enabled(step.weighed and torch.is_grad_enabled()):
            root(**arguments)
    except Enough:
        pass
    finally:
        tracker.local.stack = outer
        for module, deltas in kept:
            module.rope_deltas = deltas


def plain_arguments(given: dict[str, Any], tokens: TokenMap) -> dict[str, Any]:
    """The arguments of a pass without its cache and outputs, and with the 2-d mask from which a cache's 4-d masks were made."""
    arguments = {name: value for name, value in given.items() if name not in OF_THE_REAL_PASS and value is not None}
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        source = arguments.get("input_ids", arguments.get("inputs_embeds"))
        assert isinstance(source, Tensor)
        arguments["attention_mask"] = (~tokens.positions("padding", 0, source.shape[1], source.device)).long()
    return arguments


def _pending(step: Probe, root: Any) -> set[tuple[int, int]] | None:
    """What a probe has to read before it can stop; None where it runs to the end."""
    sites = [(reader, site) for reader in step.steps for site in reader.sites]
    # encoders may call a site several times in a pass; accelerate's hooks put offloaded weights back only after a whole pass
    if not step.early_exit or any(site.stack != "decoder" for _, site in sites) or hasattr(root, "hf_device_map"):
        return None
    return {(id(reader), id(reader.sites.module(site))) for reader, site in sites}
