"""The rewrite door: run, look, change the request, and only then generate.

A request is what a model is called with, before it is: `inputs = session.rewrite(inputs, images=..., text=...)`, then
`model.generate(**inputs)` inside the session. What the readers of a look kept, the recipe's other steps find in their memory when the
changed prompt is read.

Gives: a function of the request (arguments, token map, the images and texts that it was made of) that may run the plain model over it, or
over any other arguments, with readers; it answers with other arguments - a crop added, an image masked, words appended, fewer image
tokens - or None: the request stays as it is.

Costs: one pass per look, as far as its last reader; nothing in the passes of the changed request.

Refuses: models that read no tokens or read them in an encoder, a look without readers, and (before the first layer) a prompt that does not
begin with one that has been through `session.rewrite`. Images tell requests of the same tokens from one another: in a forward pass always;
in `generate`, where it computes features beforehand, as soon as a pass has begun with them. Where they do not, it is refused to guess.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...interventions import Clock, Memory, ReattendError
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Enough, Running
from ..plan import Facts, Plan, Step
from ..prompts.request import Request, changed_arguments
from ..prompts.rewritten import Rewritten, begun_with
from ..protocols import Steered
from .probe import to_read

# requests that a session knows again; older ones have to be rewritten once more
KNOWN = 64
KEYS = ("input_ids", "inputs_embeds")


@dataclass
class Rewrite(Step):
    """change(Request) -> the arguments of another request, or None where it stays; `look` reads the passes that it asks for.

    look: readers (Observe, Capture) of the plain model's passes over a request; they stop after the last decoder site has been read.
    Several recipes change a request in their order. Counted as "requests" under `label`. Raises ReattendError for a function that
    answers with something else than arguments.
    """

    change: Callable[[Request], Mapping[str, Any] | None]
    look: Sequence[Step] = ()
    label: str = ""

    def check(self, facts: Facts) -> str:
        reasons = (step.check(facts) for step in self.look)
        if getattr(getattr(facts.root, "config", None), "is_encoder_decoder", False):
            return f"its step Rewrite follows a prompt to the decoder that reads it, and {type(facts.root).__name__} reads it in an encoder"
        return facts.without_tokens("its step Rewrite changes prompts") or next((r for r in reasons if r), "")

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles, label = session.handles(), self.label or plan.recipe
        counter = session.counter(label)
        readers = session.nest(handles, Plan(plan.recipe, list(self.look), plan.memory_key))
        known: deque[Rewritten] = deque(maxlen=KNOWN)

        def rewrite(
            arguments: dict[str, Any], images: Any, text: Any
        ) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
            request = _request(self, host, readers, plan, session.tokenizer, arguments, images, text)
            said = self.change(request)
            if said is not None:
                counter["requests"] += 1
                arguments = changed_arguments(said, KEYS)

            def remember(final: dict[str, Any]) -> None:
                one = Rewritten.of(final, request.memory)
                if one is not None:
                    known.append(one)

            return arguments, remember

        def before(call: RootCall) -> None:
            forward = call.forward
            if forward is None or not forward.fresh:
                return
            found = begun_with(tuple(known), call.given, 0 if forward.sequence is None else forward.sequence.planned)
            if found is None:
                raise ReattendError(
                    f"{plan.recipe}: it changes requests before they are read, and this prompt has not been through it: "
                    "inputs = session.rewrite(inputs), with images= and text= where the recipe needs them, then pass these inputs"
                )
            forward.memory(plan.memory_key).update(found)

        handles.request(rewrite)
        handles.act(Action(Rank.TRIALS, before))
        return handles


def _request(
    step: Rewrite, host: Host, readers: Steered, plan: Plan, processor: Any, arguments: dict[str, Any], images: Any, text: Any
) -> Request:
    tracker = host.tracker
    root = tracker.root
    assert root is not None
    ids, embeds, mask = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    if not any(isinstance(one, Tensor) and one.dim() > 1 and one.numel() for one in (ids, embeds)):
        raise ReattendError(
            f"{plan.recipe}: a request is the arguments of the model, with {' or '.join(KEYS)} [batch, tokens, ...]; got {list(arguments)}"
        )
    tokens = tracker.new_map(ids, embeds, mask, arguments)

    def look(other: Mapping[str, Any] | None = None) -> Memory:
        if not step.look:
            raise ReattendError(f"{plan.recipe}: a look at a request needs readers: Rewrite(change, look=[Capture(...)])")
        given = arguments if other is None else changed_arguments(other, KEYS)
        given = {
            **given,
            "use_cache": False,
            **({"logits_to_keep": 1} if "logits_to_keep" in tracker.signature.parameters else {}),
        }
        memory = Memory()
        running = Running(readers, to_read(step.look, root))
        output = None
        with tracker.looking(running, Clock("prefill"), {plan.memory_key: memory}) as facts, torch.no_grad():
            with contextlib.suppress(Enough):
                output = root(**given)
            facts.end(output)
        return memory

    return Request(dict(arguments), tokens, getattr(root, "config", None), look, processor, images, text)
