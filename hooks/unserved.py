"""Steps that no part of a model can serve: refused when a session begins, never accepted and left unread."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

from .plan import Branch, Exit, Lookahead, Plan, Probe, Spans

# what each of these asks of a model: a prompt of tokens, read by the pass that the sequence tracker follows
NEED_TOKENS = {
    Spans: "finds passages of a prompt",
    Exit: "lets tokens of a prompt leave",
    Probe: "runs a prompt beforehand",
    Branch: "goes on with other prompts",
    Lookahead: "tries the next token of a prompt",
}


def unserved(plans: Sequence[Plan], root: nn.Module | None) -> str:
    """Why a step of these plans would never be read, or "". root: the model that reads tokens; None for a denoiser or a pipeline."""
    steps = [(plan, step) for plan in plans for step in plan.steps if isinstance(step, tuple(NEED_TOKENS))]
    if not steps or _reads_tokens(root):
        return ""
    plan, step = steps[0]
    need = next(need for kind, need in NEED_TOKENS.items() if isinstance(step, kind))
    model = "a denoiser or a pipeline of several models" if root is None else type(root).__name__
    return (
        f"recipe {plan.recipe!r} does not fit this model: its step {type(step).__name__} {need}, and {model} reads no tokens that "
        "could be followed: apply it to a language or vision-language model"
    )


def _reads_tokens(root: nn.Module | None) -> bool:
    if root is None:
        return False
    parameters = inspect.signature(type(root).forward).parameters
    named = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # a wrapper that takes anything (the first name is self) may pass tokens on
    return len(named) <= 1 or any(name in named for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))
