"""The branch door: the same tokens continue other prompts beside the real one, and the logits of all sides become one.

Gives: for each branch the logits [B, n, V] of the same model with another prompt, at every step, and a function that fuses them with the real
ones. A branch's prompt is made before the real pass; its own pass runs nested in the forward hook after it, so that the fused logits leave
the model in the place of its own, and `generate` with all of its processors, beams and drafts needs no change. While a branch runs,
the model's hooks answer with the branch's own edits alone, as for a probe.

Costs: one more pass per branch and step, and a cache per branch.

Refuses: encoder-decoder models and models without a language head, a loss from labels, prompts that come in pieces, and tokens given as
embeddings after the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...interventions import Clock, ReattendError, TokenMap
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host, TokenTracker
from ..passes import Forward, Running
from ..plan import Facts, Plan, Step
from ..prompts.prompt import Prompt
from ..prompts.text_only import PER_TOKEN
from ..protocols import Steered
from ..trackers.caches import cache_in, cache_name, cache_of
from ..trackers.positions import install_positions, last_columns, positions_misfit, shown_at, with_positions
from ..trackers.sides import Side, recording_cache, records_past, width_of
from .probe import plain_arguments

IN_PIECES = (
    "a branch starts from the whole prompt, but this prompt comes in pieces or goes on with a cache that this session has not seen "
    "grow: pass the whole text at once (prefill_chunk_size=None), without the cache of an earlier turn"
)


@dataclass
class Fusion:
    """What a branch's formula sees at one step: logits [B, n, V] of the real pass and of each branch, for the same n positions.

    n is 1 but where drafted tokens are checked (assisted decoding). clock, tokens and memory are those of the real pass.
    """

    logits: Tensor
    others: list[Tensor]
    clock: Clock
    tokens: TokenMap
    memory: dict[Any, Any]


@dataclass
class Branch(Step):
    """Decoding branches: the same model with other prompts, which go on with the same tokens; fuse(Fusion) -> logits [B, n, V].

    inputs: for each branch a function of the Prompt, before the pass that starts a sequence, to the arguments of the branch's prompt;
    None from any of them: this prompt needs no branch. An argument `position_ids` that is left as it was (also if it was absent) says
    that the branch has the columns and positions of the real pass at every step; else rows must be padded on the left and their
    positions [..., B, T] given. `later_attention_mask` [B, T]: the prompt's mask from the second pass on, if it is another.
    Each branch has a cache of its own, is edited by `steps` alone, and has gradients where the real pass has them. The logits of the
    last position of every row leave the model fused, in every pass, so samplers, beams and processors see no others. Counted as
    "logits" under `label`. A further part of the prompt that would need a branch after the first did not is refused.
    """

    inputs: Sequence[Callable[[Prompt], dict[str, Any] | None]]
    fuse: Callable[[Fusion], Tensor]
    steps: Sequence[Step] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ReattendError("a branch step needs at least one function that makes a branch's prompt")

    def check(self, facts: Facts) -> str:
        reasons = (step.check(facts) for step in self.steps)
        return (
            facts.without_tokens("its step Branch goes on with other prompts")
            or branch_misfit(facts.root)
            or next((reason for reason in reasons if reason), "")
        )

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        handles, label = session.handles(), self.label or plan.recipe
        install_positions(host, handles)
        # the steps count with the recipe's, and remember apart from it: what the real pass has learned need not hold here
        own = session.nest(handles, Plan(plan.recipe, list(self.steps)))
        pair = _Pair(self, plan, own, host.tracker)

        def after(call: RootCall) -> None:
            if pair.fuse(call):
                session.counts[label]["logits"] += 1

        session.counter(label)
        handles.act(Action(Rank.BRANCHES, pair.prepare, after))
        return handles


def branch_misfit(root: nn.Module | None) -> str:
    """Why a model's logits cannot be fused with those of branches, or ""."""
    if root is None:
        return "it reads no tokens"
    name = type(root).__name__
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        return f"{name} reads its prompt with an encoder; a branch is another prompt of a decoder"
    head = getattr(root, "get_output_embeddings", None)
    if not callable(head) or head() is None:
        return f"{name} returns no logits: attach to the model with its language head"
    return ""


class _Pair:
    """A branch step at work on one model: own holds the steps that act in its passes."""

    def __init__(self, step: Branch, plan: Plan, own: Steered, tracker: TokenTracker) -> None:
        self.step, self.plan, self.own, self.tracker = step, plan, own, tracker

    def prepare(self, call: RootCall) -> None:
        """Before a pass: makes the prompts of all branches, or sees to it that this pass goes on with what they know.

        Raises ReattendError for prompts that branches cannot follow.
        """
        forward, given, recipe = call.forward, call.given, self.plan.recipe
        if forward is None or forward.tokens is None or forward.sequence is None:
            raise ReattendError(f"{recipe}: a branch needs tokens to share: call the whole model with input_ids")
        if given.get("labels") is not None:
            raise ReattendError(f"{recipe}: a loss from labels would be that of the plain model: take it from the logits")
        if given.get("return_dict") is False:
            raise ReattendError(f"{recipe}: logits are fused in the model's output: leave return_dict as it is (True)")
        store = forward.memory(self.own)
        if forward.fresh:
            store.update(sides=self._sides(forward, given), length=0)
            return
        if "sides" in store and store["sides"] is None:
            if forward.clock.phase == "prefill" and self._wanted(forward, given):
                raise ReattendError(f"{recipe}: {IN_PIECES}")
            return
        past = forward.tokens.length - width_of(given)
        if "sides" not in store or forward.clock.phase == "prefill" or store["length"] < past:
            raise ReattendError(f"{recipe}: {IN_PIECES}")
        if given.get("input_ids") is None:
            raise ReattendError(f"{recipe}: a branch goes on with the same tokens: pass input_ids, not inputs_embeds")

    def _wanted(self, forward: Forward, given: dict[str, Any]) -> bool:
        """Whether a prompt that had no need of branches so far has one now: with another chunk, or with the next turn."""
        tokens, sequence, ids = forward.tokens, forward.sequence, given.get("input_ids")
        assert tokens is not None and sequence is not None
        arguments = plain_arguments(given, tokens)
        if isinstance(ids, Tensor):
            known = sequence.ids(tokens.prompt_length, ids.device)
            arguments["input_ids"] = known  # the whole of it, not this part alone
            arguments["attention_mask"] = (~tokens.positions("padding", 0, known.shape[1], known.device)).long()
        prompt = Prompt(arguments, tokens, getattr(self.tracker.root, "config", None), {})
        return all(inputs(prompt) is not None for inputs in self.step.inputs)

    def _sides(self, forward: Forward, given: dict[str, Any]) -> list[Side] | None:
        """The branches of a prompt; None where the recipe wants none."""
        tokens, root, plan = forward.tokens, self.tracker.root, self.plan
        assert tokens is not None
        arguments = plain_arguments(given, tokens)
        width = tokens.prompt_length
        for name in ("input_ids", "attention_mask", "position_ids", *PER_TOKEN):
            value = arguments.get(name)
            if isinstance(value, Tensor) and value.shape[-1] > width:
                arguments[name] = value[..., :width]  # drafts after the prompt
        sides = []
        for inputs in self.step.inputs:
            prompt = Prompt(dict(arguments), tokens, getattr(root, "config", None), forward.memory(plan.memory_key))
            changed = inputs(prompt)
            if changed is None:
                return None
            mirrored = changed.get("position_ids") is arguments.get("position_ids")
            shared = changed.get("input_ids") is arguments.get("input_ids") and "inputs_embeds" not in changed
            if mirrored and width_of(changed) != width:
                raise ReattendError("a branch whose prompt has another length needs position_ids of its own")
            misfit = positions_misfit(prompt.config) if mirrored else ""
            if misfit and changed.get("attention_mask") is not arguments.get("attention_mask"):
                raise ReattendError(f"{plan.recipe}: {type(root).__name__} cannot leave other tokens in their places: {misfit}")
            seen = tokens
            if not shared:
                embeds, mask = changed.get("inputs_embeds"), changed.get("attention_mask")
                seen = self.tracker.new_map(changed.get("input_ids"), embeds, mask, changed)
            sides.append(Side(changed, mirrored, seen, shared))
        return sides

    def fuse(self, call: RootCall) -> bool:
        """After a pass: runs the branches on its tokens and puts the fused logits into its output; False where there are none.

        Raises ReattendError where the output has no logits to be replaced.
        """
        forward, output, plan = call.forward, call.output, self.plan
        assert forward is not None and forward.tokens is not None and forward.sequence is not None
        store, tokens = forward.memory(self.own), forward.tokens
        if store.get("sides") is None:
            return False
        logits = getattr(output, "logits", None)
        given = with_positions(call.given, forward.positions)
        if not isinstance(logits, Tensor):
            raise ReattendError(f"{plan.recipe}: {type(output).__name__} holds no logits to fuse; pass return_dict=True")
        width = width_of(given)
        count = 1 + tokens.length - tokens.prompt_length if forward.fresh else width
        if not forward.fresh and cache_of(output) is None:
            count = 1  # without a cache every pass holds the whole text again
        columns = last_columns(forward, width, count)
        others = [_advance(self.tracker, forward, given, output, store, side, self.own, columns) for side in store["sides"]]
        store["length"] = tokens.length
        place = shown_at(logits, given, width, columns)
        real = logits if place is None else logits.gather(1, place[..., None].expand(-1, -1, logits.shape[2]))
        step = Fusion(real, others, forward.clock, tokens, forward.memory(plan.memory_key))
        fused = self.step.fuse(step).to(logits.dtype)
        if place is not None:
            fused = logits.scatter(1, place[..., None].expand(-1, -1, logits.shape[2]), fused)
        output.logits = fused
        return True


def _advance(
    tracker: TokenTracker, forward: Forward, given: dict[str, Any], output: Any, store: dict, side: Side, own: Steered, columns: Tensor
) -> Tensor:  # fmt: skip
    """The branch's logits [B, count, V] for the same new tokens."""
    tokens, cache = forward.tokens, cache_of(output)
    assert tokens is not None and forward.sequence is not None
    ids, width = given.get("input_ids"), width_of(given)
    count = columns.shape[1]
    after = max(0, tokens.length - tokens.prompt_length)
    new = torch.empty(tokens.batch, 0, dtype=torch.long) if ids is None else ids[:, width - min(after, width) :]
    if forward.fresh or cache is None:
        arguments = side.grown(new, given)
        if cache is not None and records_past(cache):
            side.cache = arguments[cache_name(tracker.root)] = recording_cache(tracker.root)
        if cache is None and side.later is not None:
            raise ReattendError("a mask that changes after the prompt needs a cache: generate with use_cache=True")
    else:
        back = store["length"] - (tokens.length - width)
        side.crop(back)
        arguments = side.step(ids if ids is not None else new, plain_arguments(given, tokens), cache_name(tracker.root))
    arguments["use_cache"] = cache is not None
    at = columns - width + width_of(arguments) if side.mirrored else None
    if side.mirrored and bool((columns != columns[:1]).any() | (columns[:, -1] != width - 1).any()):
        keep: int | None = None  # rows that are padded on the right end in different columns
    else:
        keep, at = count, None
    found = _run(tracker, forward, side, own, arguments, keep)
    if cache is not None:
        side.cache = cache_of(found)
        if side.cache is None:
            raise ReattendError(f"{type(tracker.root).__name__} keeps no cache that a branch could go on with")
        side.read(new.shape[1] if forward.fresh else width)
        side.arguments = {}  # pictures and all: its cache holds what matters of them
    logits = found.logits
    return (
        logits[:, -count:] if at is None else logits.gather(1, at.to(logits.device)[..., None].expand(-1, -1, logits.shape[2]))
    )


def _run(tracker: TokenTracker, forward: Forward, side: Side, own: Steered, arguments: dict[str, Any], keep: int | None) -> Any:
    """A nested pass of the model, edited by the branch's own steps alone."""
    root = tracker.root
    assert root is not None and forward.tokens is not None
    parameters = tracker.signature.parameters
    if keep is not None and "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = keep
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = {k: v for k, v in arguments.items() if v is not None and (k in parameters or open_ended)}
    if not side.shared:
        side.tokens.length = side.prompt + forward.tokens.length - forward.tokens.prompt_length
    running, cache = Running(own), cache_in(arguments)
    facts = Forward(forward.clock, side.tokens, forward.sequence, fresh=forward.fresh, probe=running, cache=cache)
    with tracker.aside(facts), _own_offsets(tracker, side):  # with gradients where the real pass has them
        return root(**arguments)


@contextlib.contextmanager
def _own_offsets(tracker: TokenTracker, side: Side) -> Iterator[None]:
    """Multimodal RoPE keeps its offset on a module, which `aside` puts back: inside, that of the branch stands there."""
    for module, value in zip(tracker.offset_modules, side.offsets or ()):
        module.rope_deltas = value
    yield
    side.offsets = [module.rope_deltas for module in tracker.offset_modules]
