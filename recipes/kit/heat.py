"""Heat: where a denoiser looks for the words of its prompt, as one map per word, after the edits of whatever recipes are at work.

In each call a word's map is the weight that every place of the image gives to the word's columns, mean over these (as DAAM and
Attend-and-Excite take a word of several tokens). Maps add up over steps for every site and head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...hooks import Capture, SiteTable, Words
from ...hooks.plan import Step
from ...interventions import Call, Edit, ReattendError, row_weights
from ...interventions.engine.kernels import rows_per_chunk
from .denoisers import image_grid, reads_prompt


class Heat:
    """Collects the maps of a `Words` step's words at some sites, of the last run. `steps` go into a plan.

    Only the prompt's own rows count: conditional ones that no guide has added. Costs the weights of these sites, in chunks of rows.
    """

    def __init__(self, sites: SiteTable, words: Words) -> None:
        self.sites, self.words = sites, words
        # {site: {role: [rows, heads, height, width]}}, sums over steps
        self.kept: dict[str, dict[str, Tensor]] = {}

    @property
    def steps(self) -> list[Step]:
        return [self.words, Capture(self.sites, self.read)]

    def read(self, call: Call, edits: Sequence[Edit]) -> None:
        assert call.site is not None
        if self not in call.memory:
            # another run: of this one's own, there may be others in the plan
            call.memory[self], self.kept = True, {}
        rows = call.clock.rows("conditional", call.batch)
        if rows is None or not reads_prompt(call):
            return
        own = rows.nonzero()[:, 0]
        if call.clock.source is not None:
            first = torch.arange(len(call.clock.source), device=own.device)
            copied = (call.clock.source.to(own.device) != first).repeat_interleave(call.batch // len(first))
            own = own[~copied[own]]
        if not len(own):
            return
        places = image_grid(call, "heat")
        shares = {role: call.columns(role)[own] for role in self.words.roles}
        shares = {role: marked / marked.sum(dim=1, keepdim=True).clamp_min(1) for role, marked in shares.items()}
        parts: dict[str, list[Tensor]] = {role: [] for role in shares}
        chunk = rows_per_chunk(call.batch, call.num_heads, call.num_keys, call.query.device)
        for index in places.flatten().to(call.query.device).split(chunk):
            weights = row_weights(call, edits, index)[own, :, :, : call.num_keys]
            for role, share in shares.items():
                parts[role].append(torch.einsum("bhrk,bk->bhr", weights, share.to(weights.dtype)))
        before = self.kept.setdefault(call.site.name, {})
        for role, pieces in parts.items():
            found = torch.cat(pieces, dim=2).unflatten(2, tuple(places.shape)).float()
            before[role] = found + before[role] if role in before else found

    def map(self, role: str, size: tuple[int, int] | None = None) -> Tensor:
        """[rows, height, width]: a word's map, mean over heads and summed over sites and steps. role: one of the `Words` step's.

        size: default the largest grid among the sites; smaller maps are enlarged (bicubic, nothing below 0). Raises ReattendError where
        nothing was read, or for another role.
        """
        if role not in self.words.roles:
            raise ReattendError(f"{role!r} is no role of these words; they have: {', '.join(self.words.roles)}")
        if not self.kept:
            raise ReattendError("no maps were read: run the pipeline while a session with the steps of this Heat lasts")
        maps = [kept[role] for kept in self.kept.values()]
        wanted = size or max((tuple(each.shape[2:]) for each in maps), key=lambda shape: shape[0] * shape[1])
        enlarged = [torch.nn.functional.interpolate(each, size=wanted, mode="bicubic").clamp_min(0) for each in maps]
        return torch.stack([each.mean(dim=1) for each in enlarged]).sum(dim=0)
