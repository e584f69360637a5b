"""HeadHunter: guidance by heads that were searched for what they do to a picture (Ahn et al., NeurIPS 2025, "Where and How to Perturb").

Fixes: a whole layer's guidance changes many things at once. Single heads stand for structure, light, tone, texture or style; guidance by
a few of them, found for an objective of your own (a reward, a colour, sharpness), raises that and little else.
Acts on: what `softpag` acts on, in these heads alone: nothing new inside attention. `profile` finds the heads: each round draws pictures
with every head added to those that were found before, scores them, and keeps the best k (see `profiling.headhunter.search_heads`).
Conventions: layers are numbered in order over the self and joint attention of the denoiser, as softpag numbers them. The search is
best made at strength 1, where effects show; `strength` is lowered afterwards (0.5 in the paper; 0.25 with 24 heads for general quality).
Ours: `top` uses the first heads of a profile alone, several profiles join their heads (light of one, texture of another), and
`random_heads` treats as many other heads the same way, as a control. A profile belongs to a checkpoint, and loosely to its sampler and
size of pictures: search again, or compare with the control, where these change.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from ..hooks import SiteTable
from .kit.base import Info
from .kit.contents import Contents, Fact, Numbers
from .kit.denoisers import image_layers
from .kit.heads import Head, random_control
from .kit.profile import CACHED, Profile, cached_path, find_profile
from .softpag import SoftPAG

REMEDY = (
    "name a profile_path or heads=[[layer, head], ...], or search them for your objective: "
    "reattend.recipes.recipe_class('headhunter').profile(pipe, None, prompts=[...], objective=...)"
)


class HeadHunter(SoftPAG):
    slug = "headhunter"
    info = Info(
        does="Pushes an image away from a copy whose attention was weakened in a few heads that were searched for your own objective.",
        paper="Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion and Flow Models",
        year=2025,
        arxiv="2506.10978",
        families=("guidance", "heads"),
        kinds=("diffusion",),
        cost="forward",
        problems=("the picture ignores a word", "the picture lacks structure and detail"),
        try_first={"strength": 0.5},
        sweep={"scale": (1.0, 3.0, 8.0), "strength": (0.25, 0.5, 1.0)},
        code="cvlab-kaist/HeadHunter",
        profiling="which heads, weakened in the branch, raise an objective of yours on prompts of yours",
    )

    contents = Contents(
        {
            "selected": Numbers(("chosen", 2), whole=True, least=0),
            "scores": Numbers(("rounds", "layers", "heads", "pairs"), unknown=True, needed=False),
        },
        {"objective": Fact(str, needed=False), "perturbation": Fact(str, needed=False)},
    )

    scale: float = Field(3.0, ge=0, le=100, description="how far the image is pushed away from the weakened branch; 0 = not")
    layers: list[int] | None = Field(
        None, description="use only the heads that lie in these layers, numbered over all self-attention of the denoiser"
    )
    heads: list[tuple[int, int]] | None = Field(
        None, description="heads as [layer, head] pairs, best first, instead of a profile"
    )
    profile_path: str | list[str] | None = Field(
        None,
        description='file with the heads that a search found, or several files whose heads are joined; "cached" = the one kept for this '
        "model, which is also what counts when neither heads nor a file are given",
    )
    top: int | None = Field(
        None, ge=1, description="how many heads of each profile, in the order in which they were found; None = all"
    )
    random_heads: bool = Field(False, description="control: as many other heads, drawn at random, with the same strength")
    seed: int = Field(0, ge=0, description="which random heads")

    @model_validator(mode="after")
    def _places_named(self) -> HeadHunter:
        if self.heads is not None and self.profile_path is not None:
            raise ValueError("give heads or profile_path, not both")
        if self.layers == [] or self.heads == [] or self.profile_path == []:
            raise ValueError("layers, heads and profile_path must not be empty; leave them out instead")
        return self

    def misfit(self, sites: SiteTable) -> str:
        if image_layers(sites):
            if self.heads is None and self.profile_path is None and not cached_path(self.slug, sites).is_file():
                return f"headhunter must be told which heads those are: {REMEDY}"
            if not self.selection(sites):
                return f"no head that was found lies in layers {self.layers}: leave layers out, or name others"
        return super().misfit(sites)

    def selection(self, sites: SiteTable) -> list[tuple[int, int | None]]:
        """(layer, head) pairs in order. Raises ReattendError for a profile of another model, or for too few heads to draw a control from."""
        lists = self.found(sites)
        chosen = list(dict.fromkeys(head for found in lists for head in found[: self.top]))
        if self.random_heads:
            known = {head for found in lists for head in found}
            others = [
                (layer, head)
                for layer, table in image_layers(sites).items()
                if not table.refusal and self._within(layer)
                for head in range(min(site.num_heads or 0 for site in table))
                if (layer, head) not in known
            ]
            chosen = random_control([*chosen, *others], len(chosen), self.seed, outside=0)
        return list(sorted(chosen))

    def found(self, sites: SiteTable) -> list[list[Head]]:
        """The heads of each profile on this model, best first, of those in `layers`."""
        if self.heads is not None:
            lists: list[Any] = [self.heads]
        else:
            paths = self.profile_path if isinstance(self.profile_path, list) else [self.profile_path or CACHED]
            lists = [find_profile(self, path, sites).tensors["selected"].tolist() for path in paths]
        return [[(int(layer), int(head)) for layer, head in found if self._within(layer)] for found in lists]

    def _within(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    @classmethod
    def profile(cls, model: Any, processor: Any, **options: Any) -> Profile:
        """Searches heads for an objective; see `profiling.headhunter.search_heads` for the options. model: a diffusers pipeline."""
        from .profiling.headhunter import search_heads

        return search_heads(cls, model, processor, **options)
