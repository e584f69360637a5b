"""The observe and projection doors: read-only taps on layer inputs, and edits of the key projection's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..interventions import ReattendError, UnsupportedError
from .discovery import layer_module, uncompiled
from .plan import Observation, Observe, Plan, Project

if TYPE_CHECKING:
    from .session import Attachment, Session


def install_observation(attachment: Attachment, session: Session, plan: Plan, step: Observe) -> list[Any]:
    """Hooks that call step.tap with the hidden state entering the layer of each site."""
    handles = []
    for site in step.sites:
        root, path = _root_and_path(attachment, site.name)

        def tap(module: nn.Module, args: tuple, kwargs: dict, site=site) -> None:
            if session not in attachment.active():
                return
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                raise UnsupportedError(
                    f"the layer of {site.name} is called without hidden_states, so its input cannot be observed"
                )
            forward = attachment.denoiser.current() or attachment.tracker.current()
            tokens = forward.tokens_at(site)
            step.tap(Observation(hidden.detach(), site, forward.clock, tokens, forward.memory(plan.memory_key)))
            if forward.probe is not None:
                forward.probe.read(step, step.sites.module(site))

        handles.append(layer_module(root, path).register_forward_pre_hook(uncompiled(tap), with_kwargs=True))
    return handles


def install_projection(attachment: Attachment, session: Session, plan: Plan, step: Project) -> list[Any]:
    """Hooks on each site's k_proj (or k_norm, where the model normalises keys per head) that apply the plan's `ProjectKey`."""
    handles = []
    for site in step.sites:
        module = attachment.table.module(site)
        target = getattr(module, "k_norm", None) or getattr(module, "k_proj", None)
        if target is None or not site.num_kv_heads:
            raise UnsupportedError(f"{site.name} has no k_proj, so its keys cannot be edited before RoPE")
        heads = site.num_kv_heads

        def project(_: nn.Module, args: tuple, output: Tensor, site=site, heads=heads) -> Tensor | None:
            if session not in attachment.active():
                return None
            forward = attachment.denoiser.current() or attachment.tracker.current()
            edit = step.edit(forward.tokens, forward.clock)
            if edit is None or edit.is_identity:
                return None
            return _on_projection(output, edit, heads, session, step, site.name)

        handles.append(target.register_forward_hook(uncompiled(project)))
    return handles


def _on_projection(output: Tensor, edit: Any, heads: int, session: Session, step: Project, name: str) -> Tensor:
    if output.dim() == 3:  # [B, T, heads * D], straight from the projection
        key = output.unflatten(2, (heads, -1)).transpose(1, 2)
        new = edit.on_key(key).transpose(1, 2).flatten(2)
    elif output.dim() == 4 and output.shape[1] == heads:
        new = edit.on_key(output)
    elif output.dim() == 4 and output.shape[2] == heads:
        new = edit.on_key(output.transpose(1, 2)).transpose(1, 2)
    else:
        raise ReattendError(f"{name}: keys of shape {tuple(output.shape)} cannot be split into {heads} heads")
    session.counts[step.label][name] += 1
    return new


def _root_and_path(attachment: Attachment, name: str) -> tuple[nn.Module, str]:
    """The component a site lies in and the path inside it."""
    from .discovery import components

    parts = components(attachment.model)
    if "" in parts:
        return parts[""], name
    component, _, path = name.partition(".")
    return parts[component], path
