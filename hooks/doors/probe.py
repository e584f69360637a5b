"""The probe door: before a prefill, the same or changed inputs run through the model once more, without edits and without a cache.

Gives: readers of what the plain model does with a prompt (or with another one made from it), before the real pass runs; what they keep in
`memory`, the recipe's other steps find there. The pass is nested in the forward pre-hook of the real one, in the same thread; while it runs,
the model's hooks answer with the probe's own readers alone, so that no recipe edits it and no probe starts inside it.

Costs: one more pass over the prompt, which stops after the last decoder site that is read; nothing at decode. With `grad`, also what a
backward pass needs.

Refuses: denoisers and pipelines of several models, a probe without readers, a gradient through quantised parameters, and (if the recipe says
so) prompts that come in pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...interventions import ReattendError, TokenMap
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host, TokenTracker
from ..passes import Enough, Forward, Running
from ..plan import Facts, Plan, Step
from ..prompts.prompt import Prompt, without_inference
from ..protocols import Steered
from ..sites.quantised import without_gradient
from ..trackers.caches import NAMES
from ..trackers.sides import width_of

# What belongs to the real pass alone: its cache, what it returns, and positions (the model finds them again from the mask).
OF_THE_REAL_PASS = (
    *NAMES, "cache_position", "use_cache", "labels", "output_attentions", "output_hidden_states", "return_dict",
    "logits_to_keep",
)  # fmt: skip
# what a model may be given its tokens as
TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass
class Probe(Step):
    """Before a pass that starts a sequence: one more pass, without any edit and without a cache, that `steps` read.

    inputs(Prompt) -> the arguments of that pass, or None where no pass is needed; no function: the arguments of the real pass. Roles
    of changed prompts are those that follow from ids and mask ("image", "bos", "padding"); an unchanged prompt has all of its roles.
    Readers find `call.memory` or `observation.memory` shared with the recipe's other steps, so what they store there the real pass
    can use. early_exit: the pass stops after the last decoder site has been read. Passes that go on with a cache (a chunk of a
    prompt, the next turn, decode steps) have no probe. weighed: the real pass is changed by how much was read, not only by what was
    found, so the probe has gradients where the real pass has them. in_pieces(Prompt): called before a pass that reads a further part of a
    prompt with no generated token before it (chunked prefill, or a beginning that was cached), to refuse it or to say what happens to it.
    grad: the pass has a gradient, also where the real one has none (under inference mode its arguments are cloned); `inputs` may ask for
    that of an input (`requires_grad_`), and what is captured at the end of the pass has it (see Capture).
    """

    steps: Sequence[Step]
    inputs: Callable[[Prompt], dict[str, Any] | None] | None = None
    early_exit: bool = True
    in_pieces: Callable[[Prompt], None] | None = None
    weighed: bool = False
    grad: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise ReattendError("a probe needs at least one reader (Observe or Capture)")

    def check(self, facts: Facts) -> str:
        reasons = (step.check(facts) for step in self.steps)
        if self.grad and facts.root is not None and (reason := without_gradient([facts.root])):
            return reason
        return facts.without_tokens("its step Probe runs a prompt beforehand") or next((r for r in reasons if r), "")

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles = session.handles()
        # the readers share the recipe's memory
        readers = session.nest(handles, Plan(plan.recipe, list(self.steps), plan.memory_key))
        handles.act(Action(Rank.PROBES, before=lambda call: self._before(call, host, readers, plan)))
        return handles

    def _before(self, call: RootCall, host: Host, readers: Steered, plan: Plan) -> None:
        forward = call.forward
        if forward is None or forward.tokens is None:
            return
        if forward.pieces and self.in_pieces is not None:
            # lets the recipe say no to a prompt of which a further part comes
            memory, past = forward.memory(plan.memory_key), forward.tokens.length - width_of(call.given)
            arguments = plain_arguments(call.given, forward.tokens)
            self.in_pieces(Prompt(arguments, forward.tokens, getattr(call.root, "config", None), memory, past))
        if forward.fresh:
            grad = self.grad or (self.weighed and torch.is_grad_enabled())
            with torch.inference_mode(torch.is_inference_mode_enabled() and not self.grad), torch.set_grad_enabled(grad):
                self._run(call, host.tracker, forward, forward.tokens, readers, plan)

    def _run(
        self, call: RootCall, tracker: TokenTracker, forward: Forward, tokens: TokenMap, readers: Steered, plan: Plan
    ) -> None:
        root = call.root
        arguments = plain_arguments(call.given, tokens)
        if self.grad:
            arguments = without_inference(arguments)
        if self.inputs is not None:
            prompt = Prompt(arguments, tokens, getattr(root, "config", None), forward.memory(plan.memory_key))
            before = dict(arguments)
            changed = self.inputs(prompt)
            if changed is None:
                return
            if not isinstance(changed, Mapping) or not any(_tokens(changed.get(name)) for name in TEXT):
                raise ReattendError(
                    f"{plan.recipe}: what a probe reads is a mapping of all arguments of its pass, with input_ids or inputs_embeds, or None; "
                    f"got {changed!r:.80}"
                )
            if changed is not arguments or any(
                changed.get(name) is not before.get(name) for name in before.keys() | changed.keys()
            ):
                ids, embeds, mask = (changed.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
                arguments = dict(changed)
                tokens = tracker.new_map(ids, embeds, mask, arguments)
        parameters = tracker.signature.parameters
        if "logits_to_keep" in parameters:
            arguments["logits_to_keep"] = 1
        if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            arguments["use_cache"] = False
        running = Running(readers, to_read(self.steps, root, self.early_exit))
        facts, output = Forward(forward.clock, tokens, forward.sequence, probe=running), None
        with tracker.aside(facts):
            with contextlib.suppress(Enough):
                output = root(**arguments)
            running.ended(output)
            facts.end(output)


def _tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and value.numel() > 0


def plain_arguments(given: dict[str, Any], tokens: TokenMap) -> dict[str, Any]:
    """The arguments of a pass without its cache and outputs, and with the 2-d mask from which a cache's 4-d masks were made."""
    arguments = {name: value for name, value in given.items() if name not in OF_THE_REAL_PASS and value is not None}
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        source = arguments.get("input_ids", arguments.get("inputs_embeds"))
        assert isinstance(source, Tensor)
        arguments["attention_mask"] = (~tokens.positions("padding", 0, source.shape[1], source.device)).long()
    return arguments


def to_read(steps: Sequence[Step], root: Any, early_exit: bool = True) -> set[tuple[int, int]] | None:
    """What these readers have to read of a pass before it can stop; None where it runs to the end."""
    sites = [(reader, site, module) for reader in steps for site, module in reader.where]
    # encoders may call a site several times in a pass; accelerate's hooks put offloaded weights back only after a whole pass
    if not early_exit or any(site.stack != "decoder" for _, site, _ in sites) or hasattr(root, "hf_device_map"):
        return None
    return {(id(reader), id(module)) for reader, _, module in sites}
