"""The context door: a second text at the sites where a denoiser reads its prompt.

Gives: an intervention at each site that meets the second text there. In cross-attention it is handed the keys and values that the
site's own projections and norms make of it (LoRA included), for every row, with the text's padding; no image row is added. In joint
attention, where a text changes with every block, the second text has rows of its own, a guide's branch whose output is dropped: they hold all
its text arguments (pooled ones too), and their image tokens are those of the rows they were copied from, at every attention of
blocks that keep the two streams apart, and on entry to the first block that does not. Or the second text stands after the prompt in the
same stream (place "after"), once or several times, or several of them, without what pads it (unless asked for),
its columns named, hidden from rows that are not the prompt's.
Texts are words, encoded as the running pipeline encodes its own prompt and with its settings, or tensors under the names of the pipeline's
own arguments; one text, or one per prompt. In the first pass of a session it is measured how much attention's output to the image changes.

Costs: the text's encoding, keys and values once a run, kept until the next one (2 x tokens x width numbers a site), and what the
intervention adds: a second attention of the rows it names. In joint attention further rows as a guide's, half as many again as there
are prompts and negative prompts in one batch, twice as many without guidance in the batch.

Refuses: models without a denoiser, sites that read no text, denoisers of which it is not known what becomes of a text on its way to
cross-attention (held against the keys of the prompt, once a run and site), pipelines without text encoders (unless tensors are given), texts
of another width, without the pooled part or with too much, in joint attention longer ones where tokens are numbered, and another number
of texts than of prompts, a part of the schedule in which no step of a run lies: at `apply`, or before the first layer runs.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...interventions import Call, Clock, Edit, Grouped, KeyBias, Memory, ReattendError, Site
from ..actions import Action, Rank, RootCall
from ..handles import Handles, Holder
from ..host import Host
from ..passes import Forward
from ..plan import Facts, Plan, Step, edits_of, sites_misfit
from ..prompts.longer_text import lengthened, lengthening_misfit, level, padding_of, put, words_at
from ..prompts.second_text import MASKS, Encoded, encoded, encoder_misfit, given_as, pooled_misfit
from ..sites.families import family_of
from ..sites.table import SiteTable
from ..sites.text_keys import reading_misfit, second_keys, text_at_sites
from ..tokens.denoisers import DenoiserForward
from ..tokens.pass_text import AFTER
from ..trackers.output_change import OUTPUT, output_change
from ..trackers.part_of_schedule import holds_no_step, lies_in
from ..trackers.parts import partners, shared_out
from .guide import Guide
from .inject import Entering, Inject

# of one run: its second text, what the sites make of it, and what is the same in a pass
_Store = dict[Any, Any]
# a bias that leaves no weight, as the largest one that there is
HIDDEN = 1e4


@dataclass
class SecondText:
    """What an intervention is handed at one call of B rows.

    In cross-attention key [B or 1, Hkv, m, D] and value [B or 1, Hkv, m, Dv] of the text, mask bool [B or 1, 1, 1, m] (True = a word; None
    where all are). In joint attention rows bool [B] are those of the second text, and partner long [B] the row that each row is tied to:
    a row of the second text and the conditional row it was copied from name each other, any other row itself. After the prompt columns bool
    [B, Tk]: where its words are, of several copies those of the last; each bool [B, n, Tk]: the same for each of the n texts of a prompt,
    and stretch bool [B, Tk]: all columns that they have, also those that fill them up.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    rows: Tensor | None = None
    partner: Tensor | None = None
    columns: Tensor | None = None
    each: Tensor | None = None
    stretch: Tensor | None = None


@dataclass
class Context(Step):
    """use(call, SecondText) -> edits, at every call of `sites` that reads the prompt: cross-attention, or joint attention (all sites then).

    texts: one, or one per prompt; or tensors: {"prompt_embeds": [P, T, C], "pooled_prompt_embeds": [P, C'], "prompt_attention_mask": [P, T]},
    those that the model has. name: of the second text's rows in `call.clock.branches`, and of its edits in the session's counters.
    place: "beside" the prompt, with keys and values or rows of its own, or "after" it, in the same stream (the pooled text stays the prompt's):
    copies of it, each of as many tokens as the longest text has; an empty text has none there.
    each: how many texts every prompt has after it, one after the other: the first `each` texts are those of the first prompt, and so on.
    packed: whether texts after the prompt are without what pads them; else they have what the pipeline's own prompts have.
    start, stop: the part of the schedule it acts in, start <= step / steps < stop. called: what users have given one of, or one per prompt.
    Raises ReattendError for both or neither, for tensors that are no texts, and for a part that is empty.
    """

    name: str
    sites: SiteTable
    use: Callable[[Call, SecondText], Edit | Sequence[Edit] | None]
    texts: str | Sequence[str] | None = None
    tensors: Mapping[str, Tensor] | None = None
    place: Literal["beside", "after"] = "beside"
    copies: int = 1
    each: int = 1
    packed: bool = True
    start: float = 0.0
    stop: float = 1.0
    called: str = "second texts"
    _held: list[Step] = field(default_factory=list, init=False, repr=False)
    _given: Encoded | None = field(default=None, init=False, repr=False)

    at_calls = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ReattendError(
                f"second text {self.name!r}: 0 <= start < stop <= 1 must hold, got {self.start} and {self.stop}"
            )
        if (self.texts is None) == (self.tensors is None):
            raise ReattendError("a second text is given either as texts or as tensors")
        if self.tensors is not None:
            self._given = given_as(self.tensors)
        texts = [self.texts] if isinstance(self.texts, str) else self.texts
        if texts is not None and (not texts or not all(isinstance(text, str) for text in texts)):
            raise ReattendError(f"texts must be a text or a list of texts, got {self.texts!r:.80}")
        if self.place not in ("beside", "after"):
            raise ReattendError(f'place must be "beside" or "after", got {self.place!r}')
        if self.copies < 1 or (self.copies > 1 and self.place == "beside"):
            raise ReattendError(f'copies must be 1, or more with place "after", got {self.copies}')
        if self.each < 1 or (self.each > 1 and self.place == "beside"):
            raise ReattendError(f'each must be 1, or more with place "after", got {self.each}')
        joint = self.sites.kind("joint")
        if len(joint) and self.place == "beside":
            double, single = (joint.where(lambda s, one=one: s.stack.endswith(".single") is one) for one in (False, True))
            rows = Guide(
                self.name, start=self.start, stop=self.stop, formula=None, arguments=self._arguments, conditional=False
            )
            self._held = [rows]
            if len(double):
                self._held.append(Inject(double, _as_partner, rows=self.name, at="attention", label=None))
            if len(double) and len(single):
                self._held.append(Inject(single[:1], _image_as_partner, rows=self.name, label=None))

    @property
    def held(self) -> Sequence[Step]:
        """In joint attention: the rows of the second text, and what ties their image tokens to those of their partners."""
        return self._held

    def _on(self, clock: Clock) -> bool:
        return lies_in(clock, self.start, self.stop, f"second text {self.name!r}")

    # -- before anything runs ------------------------------------------------------------------------------------------

    def check(self, facts: Facts) -> str:
        if not facts.denoisers:
            return f"its step Context brings a second text to a denoiser, and {type(facts.model).__name__} has none"
        if isinstance(facts.model, nn.Module) and (self.start, self.stop) != (0, 1):
            return (
                f"the second text {self.name!r} is read from {self.start} to {self.stop} of the schedule, but a bare denoiser has none: "
                "apply the recipe to the pipeline, or leave start at 0 and stop at 1"
            )
        reason = sites_misfit(self.sites) or (encoder_misfit(facts.model) if self._given is None else "")
        if reason:
            return reason
        # a pipeline's table and its denoiser's give the same sites other names
        own = {id(module) for _, module in self.where}
        joint = facts.table.stack("denoiser").kind("joint") if self._held else ()
        left = [site.name for site in joint if id(facts.table.module(site)) not in own]
        if left:
            return f"in joint attention a text changes with every block, so a second one needs all of them: {left[0]} is not among its sites"
        owners = {id(module): denoiser for denoiser in facts.denoisers for module in denoiser.modules()}
        reasons = (self._site_misfit(site, owners.get(id(self.sites.module(site)))) for site in self.sites)
        return next(filter(None, reasons), "")

    def _site_misfit(self, site: Site, denoiser: nn.Module | None) -> str:
        if denoiser is None or site.kind not in ("cross", "joint"):
            return f"its step Context acts where a denoiser reads its prompt, and {site.name} ({site.kind}) does not"
        name, family = type(denoiser).__name__, family_of(denoiser)
        given = inspect.signature(type(denoiser).forward).parameters
        if "encoder_hidden_states" not in family.text or family.context != "text" or "encoder_hidden_states" not in given:
            return f"{name} takes no text as encoder_hidden_states, and another one cannot be given to it"
        if self.place == "after":
            return lengthening_misfit(denoiser)
        if site.kind == "cross":
            return reading_misfit(denoiser, site, self.sites.module(site))
        if family.per_sample:
            return f"{name} attends for each sample alone, so a row of a second text cannot be tied to another"
        return "" if self._given is None else pooled_misfit(denoiser, self._given)

    def ready(self, call: RootCall) -> str:
        return holds_no_step(call.clock, self.start, self.stop, f"the second text {self.name!r}")

    def install(self, host: Host, session: Holder, plan: Plan) -> Handles:
        counter, handles = session.counter(self.name), session.handles()
        measured: set[str] = set()
        key, kept = (plan.memory_key, self.name), weakref.WeakKeyDictionary[_Run, _Store]()

        def store_of(memory: dict[Any, Any]) -> _Store:
            """What is kept for a run: it goes with the run, or with the session."""
            return kept.setdefault(memory.setdefault(_Run, _Run()), {})

        def edit(call: Call, forward: Forward) -> Sequence[Edit]:
            if not _reads_prompt(call, forward):
                return ()
            store = store_of(forward.memory(key))
            text = self._at(call, forward, store)
            if text is None:
                return ()
            call.memory = forward.memory(plan.memory_key)
            edits = edits_of(self.use(call, text))
            found = [*self._hidden(call, store, edits), *edits]
            if edits:
                assert call.site is not None
                counter[call.site.name] += 1
                if call.site.name not in measured:
                    measured.add(call.site.name)
                    session.note(plan.recipe, output_change(call, found, self._without(call, store, found, edits)), OUTPUT)
            return found

        def encode(call: RootCall) -> None:
            try:
                store = call.kept[self.name] = store_of(call.run.memory.setdefault(key, Memory()))
                self._encode(call, store, session.model if call.pipeline is None else call.pipeline)
            except ReattendError as error:
                raise ReattendError(f"{plan.recipe}: {error}") from None

        rank = Rank.LENGTHS if self.place == "after" else Rank.ARGUMENTS
        handles.act(Action(rank, encode, certain=f"{plan.recipe}: its second text"))
        for site in self.sites:
            handles.edit(site, self.sites.module(site), edit)
        return handles

    # -- before a pass -------------------------------------------------------------------------------------------------

    def _encode(self, call: RootCall, store: _Store, pipeline: Any) -> None:
        """Sees to it that this run has its second text, and that it fits this call."""
        rows = call.clock.branches.get("conditional")
        if not call.clock.branches:
            raise ReattendError(
                "which rows of this batch are conditional is not known: say it around the call: with reattend.rows(...)"
            )
        store["prompt"] = call.given.get("encoder_hidden_states")
        if rows is None or not self._on(call.clock):
            return
        if "text" not in store:
            texts = [self.texts] if isinstance(self.texts, str) else list(self.texts or ())
            text = self._given or encoded(pipeline, texts)
            if text.count % self.each:
                raise ReattendError(
                    f"every prompt has {self.each} second texts, so there are {self.each} or several times that, got {text.count}"
                )
            if self.place == "after":
                text = (text.packed() if self.packed else text).joined(self.each)
            store["text"] = text
        text, count, store["rows"] = store["text"], int(rows.sum()), len(rows)
        if count % text.count:
            raise ReattendError(
                f"{text.count} {self.called} cannot be shared out to {count} rows of the prompt: give one, or one per prompt"
            )
        if self.place == "after":
            number = shared_out(call.clock, len(rows), text.count, alone=True)
            after = call.kept.setdefault(AFTER, [])
            for _ in range(self.copies):
                after.append(text.embeds.shape[1])
                put(call, lengthened(call.given, text, number))
            store["after"] = after, len(after)
            return
        if self._held:
            text = store["level"] = level(call, text, store)
            prompt, second = store.get("lengths", (0, 0))
            call.kept.setdefault(AFTER, []).append(max(0, second - prompt))
        # looked at once a run
        if "fits" not in store:
            text.arguments(call.given, pooled=bool(self._held))
            store["fits"] = True
            store["masked"] = any(isinstance(call.given.get(name), Tensor) for name in MASKS)

    def _arguments(self, call: RootCall) -> Mapping[str, Any]:
        """The text arguments of the second text's rows."""
        return call.kept[self.name]["level"].arguments(call.given)

    # -- at a call -----------------------------------------------------------------------------------------------------

    def _at(self, call: Call, forward: Forward, store: _Store) -> SecondText | None:
        assert call.site is not None
        if not self._on(call.clock):
            return None
        if self.place == "after":
            if "text" not in store or "conditional" not in call.clock.branches:
                return None
            size = "columns", call.site.kind, call.batch, call.num_keys
            return _once(store, size, call.clock, lambda: _columns(call, store, self.each))
        if call.site.kind == "joint":
            rows = call.clock.rows(self.name, call.batch)
            if rows is None:
                return None
            return SecondText(rows=rows, partner=_once(store, "partner", call.clock, lambda: partners(call.clock, self.name)))
        if "text" not in store or not isinstance(forward, DenoiserForward) or forward.denoiser is None:
            return None
        key, value = self._keys(call, forward, store)
        text: Encoded = store["text"]
        # a model that is given no mask of its prompt reads the padding of both
        mask = text.mask[:, None, None].to(call.query.device) if text.mask is not None and store["masked"] else None
        if text.count == 1:
            return SecondText(key, value, mask)
        device = call.query.device
        number = _once(store, call.batch, call.clock, lambda: shared_out(call.clock, call.batch, text.count).to(device))
        return SecondText(key[number], value[number], None if mask is None else mask[number])

    def _hidden(self, call: Call, store: _Store, edits: Sequence[Edit]) -> list[Edit]:
        """After the prompt: rows that are not the prompt's see nothing of the second text. Both places: nobody sees what fills up a text.

        Rows of the prompt whose columns an edit names (`Grouped`) need nothing hidden.
        """
        rows = call.clock.rows(self.name if self._held else "conditional", call.batch)
        if rows is None or not (self.place == "after" or store.get("filled")):
            return []

        def columns() -> Tensor | None:
            if self._held:
                prompt, second = store["lengths"]
                return padding_of(call, torch.where(rows, second, prompt))
            words = _words(call, store["text"])
            return None if bool(words.all()) else words_at(call, ~words.repeat(1, self.copies), _later(store))

        size = "hidden", call.site and call.site.kind, call.batch, call.num_keys
        hidden = _once(store, size, call.clock, columns)
        if hidden is None:
            return []
        if self.place == "beside" or not any(isinstance(edit, Grouped) for edit in edits):
            return [KeyBias(bias=hidden * -HIDDEN)]

        def others() -> list[Edit]:
            left = hidden & ~rows[:, None].to(hidden.device)
            return [KeyBias(bias=left * -HIDDEN)] if bool(left.any()) else []

        return _once(store, ("others", *size), call.clock, others)

    def _without(self, call: Call, store: _Store, found: Sequence[Edit], edits: Sequence[Edit]) -> Sequence[Edit]:
        """What of a call's edits acts without the intervention; after the prompt, nobody sees any of the second text then."""
        if self.place == "beside":
            return found[: len(found) - len(edits)]
        length = self.copies * store["text"].embeds.shape[1]
        return [KeyBias(bias=words_at(call, torch.ones(call.batch, length, dtype=torch.bool), _later(store)) * -HIDDEN)]

    @torch.no_grad()
    def _keys(self, call: Call, forward: DenoiserForward, store: _Store) -> tuple[Tensor, Tensor]:
        """The text's keys and values at a site, made at its first call in a run."""
        assert call.site is not None and forward.denoiser is not None
        name, denoiser = call.site.name, forward.denoiser
        if name not in store:
            with torch.inference_mode(False):
                # later steps may take gradients
                text, prompt = (t.clone() if t.is_inference() else t for t in (store["text"].embeds, store["prompt"]))
                place = "at sites", id(denoiser)
                if place not in store:
                    store[place] = tuple(text_at_sites(denoiser, t.to(prompt)) for t in (text, prompt))
                second, own = store[place]
                # some models repeat their text for each frame
                fold = call.batch // forward.batch if len(own) == store["rows"] else 1
                store[name] = second_keys(call, self.sites.module(call.site), second, own.repeat_interleave(fold, dim=0))
        return store[name]


def _reads_prompt(call: Call, forward: Forward) -> bool:
    """Whether a site's call is to the prompt: a further one, to the image prompts of IP-Adapters, is not."""
    if not isinstance(forward, DenoiserForward) or call.tokens is None:
        return True
    if call.tokens.unknown:
        return call.site is None or call.site.kind != "cross" or forward.text_length in (None, call.num_keys)
    # of other tokens than the queries, and of images
    return call.query_tokens is None or "reference" not in call.tokens or forward.family.context == "reference"


def _words(call: Call, text: Encoded) -> Tensor:
    """Bool [B, n]: which tokens of the second text that stands after each row's prompt are its words."""
    number = shared_out(call.clock, call.batch, text.count, alone=True)
    words = torch.ones(text.embeds.shape[:2], dtype=torch.bool) if text.mask is None else text.mask.cpu()
    return words[number.clamp_min(0)] & (number >= 0)[:, None]


def _later(store: _Store) -> int:
    """How many tokens of other texts come after those of a second text that stands after the prompt."""
    after, place = store["after"]
    return sum(after[place:])


def _columns(call: Call, store: _Store, each: int) -> SecondText:
    words, own, later = _words(call, store["text"]), call.columns("text"), _later(store)
    parts = torch.arange(words.shape[1]) // (words.shape[1] // each) if words.shape[1] else torch.zeros(0)
    found = torch.stack([words_at(call, words & (parts == part), later) & own for part in range(each)], dim=1)
    return SecondText(columns=found.any(dim=1), each=found, stretch=words_at(call, torch.ones_like(words), later))


class _Run:
    """Stands for one denoising run in what is kept of it."""


def _once(store: _Store, name: Any, clock: Clock, make: Callable[[], Any]) -> Any:
    """What is the same at all sites of a pass, which have one clock."""
    if store.get(name, (None,))[0] is not clock:
        store[name] = clock, make()
    return store[name][1]


def _as_partner(seen: Entering) -> Tensor | None:
    """The image stream of a block that has its text beside it."""
    return None if seen.text is None or seen.clock.source is None else seen.hidden[seen.clock.source]


def _image_as_partner(seen: Entering) -> Tensor:
    """The image tokens, and those of images beside it, of the first block in which they are one stream with the text."""
    assert seen.clock.source is not None
    image = seen.places("image")
    if seen.tokens is not None and "reference" in seen.tokens:
        image = image | seen.places("reference")
    return torch.where(image[..., None], seen.hidden[seen.clock.source], seen.hidden)
