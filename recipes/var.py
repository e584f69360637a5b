"""Visual attention redistribution (VAR, Kang et al. 2025, "See What You Are Told", ICLR 2025).

Fixes: some image tokens draw much attention although they show nothing of use. Like the first token they hold a huge value in a few
fixed hidden dimensions. VAR finds these sinks, picks the heads that look at real image content, and there moves a part of what all
sinks get to the other image tokens, in proportion to the weights these have already.
Acts on: the weights of the rows after the (last) image, from layer 2 on. Sinks are found at prefill from the state entering each
layer and stay the same for the whole answer; a layer without a sink on an image is left alone.
Conventions: `move` is the fraction moved, the official code's p is what stays (move = 1 - p). `rho` is the largest share of a row's
image weight on sinks; the paper's rho is 1 minus that. The official code also changes the last layer, the paper does not.
A prompt in pieces: rows after the last image of the part that was read so far, which is said where a further image follows.
Ours: sinks per sample of a batch, without padding; rows where nothing could receive the weight are skipped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from ..hooks import Edits, Observation, Observe, Plan, SiteTable, attach, sites
from ..hooks.plan import Step
from ..hooks.sites.discovery import unwrapped_model
from ..hooks.tokens.spans import tokenizer_of
from ..interventions import Call, ReattendError, ReattendWarning, require_whole
from ..interventions.edits.row_values import sent, values_of
from ..interventions.families.sinks import GiveBack, VisualSinks, rows_after, sink_scores
from .kit.base import Info
from .kit.contents import Contents, Numbers
from .kit.images import ImageRecipe, images_told, rows_between_images
from .kit.language import pieces_told
from .kit.profile import CACHED, KnownModel, Profile, cached_path, find_profile, fingerprint

# Sink dimensions of published language models. LLaMA-2: the official code. Qwen2-VL and InternVL2: figures of the paper as public
# notes quote them.
KNOWN = {
    KnownModel("LLaMA-2-7B (LLaVA-1.5-7B)", ("llama",), 4096, 32, 11008, range(32000, 32200)): (1415, 2533),
    KnownModel("LLaMA-2-13B (LLaVA-1.5-13B, 1.6-vicuna-13B)", ("llama",), 5120, 40, 13824, range(32000, 32200)): (2100, 4743),
    KnownModel("Qwen2-VL-7B", ("qwen2_vl", "qwen2_vl_text"), 3584, 28, 18944, range(151000, 153000)): (458, 2570),
    KnownModel("InternVL2-8B", ("internlm2",), 4096, 32, 14336, range(92000, 93000)): (3584,),
}
REMEDY = (
    "run `reattend profile var MODEL` (or recipe_class('var').profile(model, processor).save(path) and pass profile_path=...), "
    "or pass sink_dims=[...]"
)
CALIBRATION_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps under a tree until the evening comes."


class VAR(ImageRecipe):
    slug = "var"
    info = Info(
        does="Moves attention from meaningless sink tokens to the rest of the image, in the heads that look at it.",
        paper="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        year=2025,
        arxiv="2503.03321",
        families=("sinks", "reweighting"),
        kinds=("lvlm",),
        cost="decode",
        problems=("the model describes what is not there",),
        try_first={"move": 0.4},
        sweep={"move": (0.2, 0.4, 0.8)},
        code="seilk/VisAttnSink",
        licence="Apache-2.0",
        profiling="the hidden dimensions in which this model's sinks show, from one short text",
    )

    contents = Contents({"sink_dims": Numbers(("dimensions",), whole=True, least=0)})

    move: float = Field(
        0.4, ge=0, le=1, description="fraction of the sinks' weight that is moved; 0 changes nothing (code: 1 - p)"
    )
    tau: float = Field(20.0, gt=0, description="a token is a sink if a sink dimension exceeds this many times its rms value")
    rho: float = Field(0.5, ge=0, le=1, description="largest share of image weight on sinks in a row that is changed")
    summ: float = Field(0.2, ge=0, le=1, description="least weight on the whole image in a row that is changed")
    sink_dims: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="hidden dimensions in which sinks show; None: known ones of the model, or those of the profile",
    )
    skip_last_layer: bool = Field(
        False, description="leave the model's last layer alone, as the paper says (the code does not)"
    )
    profile_path: str | None = Field(
        None,
        description=f'file with the sink dimensions that a profiling run found; "{CACHED}": the profile kept for this model',
    )

    # -- what it fits ------------------------------------------------------------------------------------------------

    def misfit(self, sites: SiteTable) -> str:
        if reason := super().misfit(sites):
            return reason
        name = sites.model_name
        if not len(self.chosen(sites)):
            return f"skip_last_layer leaves no layer of {name} after first_layer={self.first_layer}"
        width = sites.config.get_text_config().hidden_size
        if self.tau >= math.sqrt(width):
            return (
                f"tau={self.tau:g} can never be reached: with {width} hidden dimensions a value is at most "
                f"{math.sqrt(width):.1f} times the rms; lower tau"
            )
        dims = self.dims(sites)
        if not dims:
            return f"the sink dimensions of {name} are not known: {REMEDY}"
        if min(dims) < 0 or max(dims) >= width:
            return f"sink_dims must lie in 0..{width - 1}, got {list(dims)}"
        return ""

    def chosen(self, sites: SiteTable) -> SiteTable:
        top = max(s.layer for s in sites.stack("decoder").kind("self"))
        chosen = super().chosen(sites)
        return chosen.where(lambda s: s.layer < top) if self.skip_last_layer else chosen

    def dims(self, table: SiteTable) -> tuple[int, ...]:
        """The sink dimensions: given, from the profile, known for a model of this shape, or from a kept profile; () where there are none."""
        if self.sink_dims is not None:
            return self.sink_dims
        if self.profile_path is None:
            for model, dims in KNOWN.items():
                if model.matches(table):
                    return dims
            if not cached_path(self.slug, table).is_file():
                return ()
        return tuple(find_profile(self, self.profile_path, table).tensors["sink_dims"].tolist())

    # -- what it does ------------------------------------------------------------------------------------------------

    def plan(self, sites: SiteTable) -> list[Step]:
        chosen = self.chosen(sites)
        finder = _Finder(torch.tensor(self.dims(sites)), self.tau, chosen.sites[-1].name)
        told = pieces_told(
            self.slug,
            "rows after an image of an earlier piece were changed as if no further image came",
            rows_between_images,
        )
        return [images_told(sites, told), Observe(chosen, finder), Edits(chosen, self.redistribute)]

    def redistribute(self, call: Call) -> GiveBack | None:
        """The edit of the rows after the image, at layers where some sample has a sink on its image."""
        if self.move == 0 or (call.tokens is not None and "image" not in call.tokens and not call.tokens.blind):
            return None
        assert call.site is not None
        known = call.memory.get(call.site.name)
        if known is None:
            call.columns("image")  # says what is missing: a token map, or ids
            require_whole(call.memory, self.slug)
            return None
        if not known.any or call.key_start >= known.end:
            return None  # no sink on an image, or the image has left the window
        rows = self._rows(call)
        if rows is not None and not bool(values_of(rows).any()):
            return None
        return GiveBack(found=known, key_start=call.key_start, move=self.move, rho=self.rho, summ=self.summ, rows=rows)

    @staticmethod
    def _rows(call: Call) -> torch.Tensor | None:
        """Rows after the image: the same at every layer of a pass, so worked out once. A single new row always is one."""
        if call.num_queries == 1:
            return None
        key = (call.total, call.num_queries)
        if call.memory.get("pass") != key:
            call.memory.update({"pass": key, "rows": sent(rows_after(call, "image"), call.query.device)})
        return call.memory["rows"].to(call.query.device)

    # -- what it has to know about a model ---------------------------------------------------------------------------

    @classmethod
    def profile(
        cls,
        model: Any,
        processor: Any,
        *,
        text: str = CALIBRATION_TEXT,
        tau: float = 20.0,
        most: int = 3,
        layers: Sequence[int] | None = None,
        **options: Any,
    ) -> Profile:
        """Finds the sink dimensions from the first token of one text: those over tau in more than half of the middle layers.

        processor: the model's processor or tokenizer. most: how many dimensions to keep at most. layers: those that are looked at,
        by default from layer 2 to the one before the last. Cost: one forward pass. Raises ReattendError where no dimension exceeds tau.
        """
        if options:
            raise ReattendError(f"profile of 'var' takes text, tau, most and layers, not {', '.join(options)}")
        table = sites(model).stack("decoder").kind("self")
        if not len(table):
            raise ReattendError(f"{table.model_name} has no decoder self-attention to look at")
        middle = table.only(layers) if layers is not None else table.layers(min(2, table.num_layers - 1), -2)
        middle = middle if len(middle) else table
        seen: dict[int, torch.Tensor] = {}

        def look(observation: Observation) -> None:
            seen[observation.site.layer] = sink_scores(observation.hidden[:1, :1])[0, 0].cpu()

        inner = unwrapped_model(model)
        inputs = tokenizer_of(processor)(text, return_tensors="pt")
        with torch.no_grad(), attach(model, [Plan(cls.slug, [Observe(middle, look)])]):
            inner(input_ids=inputs["input_ids"].to(inner.device), attention_mask=inputs["attention_mask"].to(inner.device))
        checked = sorted(seen)
        scores = torch.stack([seen[layer] for layer in checked])
        over = (scores > tau).float().mean(dim=0)
        ranked = [int(d) for d in scores.mean(dim=0).argsort(descending=True)[:most] if over[d] > 0.5]
        if not ranked:
            raise ReattendError(
                f"no hidden dimension of the first token exceeds tau={tau:g} in most layers (the largest mean is "
                f"{scores.mean(dim=0).max():.1f}): this model shows no such sinks, or tau is too high"
            )
        facts = {
            "tau": tau,
            "layers_checked": checked,
            "sink_dims": ranked,
            "bos_values": {str(n): {str(d): round(float(seen[n][d]), 3) for d in ranked} for n in checked},
            "revision": getattr(inner.config, "_commit_hash", None),
            "text": text,
        }
        return Profile(
            cls.slug, fingerprint(model), {"sink_dims": torch.tensor(ranked), "bos_values": scores[:, ranked]}, facts
        )


class _Finder:
    """The tap: learns each layer's sinks at prefill, and warns once if not even first tokens show up as sinks."""

    def __init__(self, dims: torch.Tensor, tau: float, last: str) -> None:
        self.dims, self.tau, self.last, self.warned = dims, tau, last, False

    def __call__(self, seen: Observation) -> None:
        tokens = seen.tokens
        if seen.clock.phase == "decode" or tokens is None:
            return
        # also before any image has come: a later chunk or turn may bring one, and the sinks of this part are sinks for it too
        name = seen.site.name
        found = VisualSinks.learn(seen.memory.get(name), seen.hidden, tokens, self.dims.to(seen.hidden.device), self.tau)
        seen.memory[name] = found
        seen.memory["first"] = seen.memory.get("first", False) or found.on_first
        if name == self.last and not seen.memory["first"] and not self.warned:
            self.warned = True
            warnings.warn(
                f"var: no first token is a sink in dimensions {self.dims.tolist()} at tau={self.tau:g}, so these are hardly this "
                f"model's sink dimensions: {REMEDY}",
                ReattendWarning,
                stacklevel=2,
            )
