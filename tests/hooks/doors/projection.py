"""Style from one picture to the next: queries and keys of image tokens take the first row's mean and spread, before RoPE."""

import tiny_denoisers
import torch
from reattend.hooks import Plan, Projected, Projection, attach, sites


def use() -> None:
    model, inputs = tiny_denoisers.build("FluxTransformer2DModel")

    def like_the_first(seen: Projected) -> torch.Tensor | None:
        if seen.added:
            return None  # the text's own projection
        mean, spread = seen.states.mean(dim=2, keepdim=True), seen.states.std(dim=2, keepdim=True) + 1e-5
        moved = (seen.states - mean) / spread * spread[:1] + mean[:1]
        return torch.where(seen.places("image")[:, None, :, None], moved, seen.states)

    plain = model(**inputs).sample
    with attach(model, [Plan("one style", [Projection(sites(model), like_the_first, of=("query", "key"))])]) as session:
        styled = model(**inputs).sample
    assert torch.allclose(styled[0], plain[0], atol=1e-5) and not torch.allclose(styled[1], plain[1], atol=1e-3)
    assert session.stats["one style"] == {site.name: 2 for site in sites(model)}
