"""Static exit of image tokens: the training-free part of Dynamic Visual-Token Exit (DyVTE, arXiv 2411.19628, NeurIPS 2025).

Fixes: most tokens of a vision-language prompt are image tokens, and after some layer the text has taken from them what it needs; the
layers after it could do without. DyVTE trains small routers that choose that layer for every prompt; here it is one fixed layer.
Acts on: all decoder layers after `exit_layer`, prefill and decode: no row sees image or video tokens any more (mode="hide", a key bias
on any model), or they leave the sequence there, as in the official code, and later layers run on fewer tokens and cache fewer keys
(mode="leave", the tokens door, on the families that it was tested with). Both give the same answers. All other tokens keep their
positions. Separators and wrapper tokens that processors write around images are text, as in the official code.
Conventions: layers count from 0, and `exit_layer` is the last one that sees the image, so the last layer of a model changes nothing. No
table of layers is published: a profiling run takes the smallest one with which answers stay the same, by the rule that labels the
official routers' training data. Between 0.5 and 0.6 of the layers is where to begin by hand.
The rows of image tokens are read by nobody after the exit: hidden, they go on without seeing each other; those that left come back
after the last layer as they entered the exit, so that outputs keep their length. Batches need no sorting: rows may hold different
numbers of images. A cache that was filled under mode="leave" is of no use outside of its session.
Recipes that change or read the weights of image columns (var, gift, pai, selective-emphasis, cmai, opera) find none after the exit:
together with this one they are refused unless their layers end at it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ..hooks import Edits, Exit, SiteTable
from ..hooks.doors.exit import token_exit_misfit
from ..hooks.plan import Step
from ..interventions import Call, KeyBias
from ..interventions.engine.bands import hide_columns
from ..interventions.families.reweighting import OverPrompt, of_call, shared_by_layers
from .kit.base import Info, Recipe
from .kit.contents import Contents, Numbers
from .kit.images import image_misfit, images_told
from .kit.profile import CACHED, find_profile

VISUAL = ("image", "video")
REMEDY = (
    "pass exit_layer (0.5 to 0.6 of the layers is where to begin), or run recipe_class('visual-token-exit').profile(model, processor, "
    "samples=[(image, question), ...]).save(path) and pass profile_path=..."
)


class VisualTokenExit(Recipe):
    slug = "visual-token-exit"
    hides = frozenset(VISUAL)
    info = Info(
        does="Image tokens take no part in the layers after an exit layer, where the text has already absorbed them.",
        paper="Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
        year=2025,
        arxiv="2411.19628",
        families=("sparsity",),
        kinds=("lvlm",),
        cost="free",
        problems=("an image's tokens cost too much",),
        sweep={"exit_layer": (8, 12, 16)},
        code="DoubtedSteam/DyVTE",
        profiling="the exit layer, from image-question pairs; or choose one by hand",
    )

    contents = Contents({"exit_layer": Numbers((), whole=True, least=0)})

    exit_layer: int | None = Field(
        None, ge=0, description="the last layer that sees the image, from 0; smaller saves more and changes more"
    )
    profile_path: str | None = Field(
        None, description=f'file with the exit layer that a profiling run chose; "{CACHED}": the profile kept for this model'
    )
    mode: Literal["hide", "leave"] = Field(
        "hide",
        description='"hide": no row sees the image after the exit, with any model, cache and other recipe, and at full cost; "leave": '
        "image tokens (and padding) leave the sequence there, for the same answers with less work and shorter caches",
    )

    @model_validator(mode="after")
    def _consistent(self) -> VisualTokenExit:
        if self.exit_layer is not None and self.profile_path is not None:
            raise ValueError("exit_layer and profile_path both name the layer: give one of them")
        return self

    def misfit(self, sites: SiteTable) -> str:
        reason = image_misfit(sites, self.slug)
        if reason:
            return reason
        if self.exit_layer is None and self.profile_path is None:
            return f"the exit layer is not known for {sites.model_name}: {REMEDY}"
        misfit = exit_misfit(sites, self.layer(sites))
        if misfit or self.mode == "hide":
            return misfit
        misfit = token_exit_misfit(sites)
        return f'{misfit}; pass mode="hide"' if misfit else ""

    def layer(self, table: SiteTable) -> int:
        """The exit layer: given, or of the profile."""
        if self.exit_layer is not None:
            return self.exit_layer
        return int(find_profile(self, self.profile_path, table).tensors["exit_layer"])

    def plan(self, sites: SiteTable) -> list[Step]:
        after = sites.stack("decoder").kind("self").layers(self.layer(sites) + 1)
        if not len(after):
            return []
        return [images_told(sites), Edits(after, self.hide) if self.mode == "hide" else Exit(after, VISUAL)]

    def hide(self, call: Call) -> KeyBias | None:
        """No row sees a visual token; one edit per pass for all layers that hold the same keys."""
        tokens = call.tokens
        if tokens is None:
            call.columns("image")  # says what is missing
        assert tokens is not None
        key = (tokens.prompt_length, call.query.device)
        if call.memory.get("prompt") != key:
            known = not tokens.blind and not tokens.unknown
            # where roles cannot be told, asking for one says why
            roles = [role for role in VISUAL if role in tokens] if known else ["image"]
            found = hide_columns([tokens.positions(role, 0, tokens.prompt_length) for role in roles])
            bias = None if found is None else found.bias[:, 0]
            call.memory.update(prompt=key, hidden=None if bias is None else OverPrompt(bias, bias.to(call.query.device)))
        hidden: OverPrompt | None = call.memory["hidden"]
        if hidden is None:
            return None
        return shared_by_layers(
            call, "hide", lambda: KeyBias(bias=of_call(call, hidden.there)) if bool(hidden.seen(call).any()) else None
        )

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Any:
        """Finds the exit layer from image-question pairs; see `profiling.visual_token_exit.find_exit_layer` for the options."""
        from .profiling.visual_token_exit import find_exit_layer

        return find_exit_layer(cls, model, processor, **options)


def exit_misfit(table: SiteTable, layer: int) -> str:
    """Why image tokens cannot leave the view of the layers after this one; "" where they can."""
    decoder = table.stack("decoder").kind("self")
    total = table.config.get_text_config().num_hidden_layers
    if layer >= total:
        return f"exit_layer: there is no layer {layer}; {table.model_name} has 0 to {total - 1}"
    late = len(getattr(getattr(table.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if layer < late:
        return (
            f"{table.model_name} adds image features to its image tokens up to layer {late - 1}'s output, which no later layer would "
            f"see: exit_layer must be {late} or more"
        )
    after = decoder.layers(layer + 1)
    missing = set(range(layer + 1, total)) - {site.layer for site in after}
    if missing:
        return f"layer {min(missing)} of {table.model_name} is no softmax attention: what it carries on from image tokens cannot be hidden"
    return after.refusal
