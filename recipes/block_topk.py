"""Block top-k reading of the cache (Kinetics, Sadhukhan et al. 2025, arXiv 2506.05333).

Fixes: over long answers reading the cache costs more than the model's parameters. Each written token reads the best blocks of it only,
besides the first tokens and the recent ones.
Acts on: the columns that decode steps read, in all decoder layers but `dense_layers`; the prompt is read whole. A block is judged by its
mean key against the mean query of the heads that share a key head; the last, incomplete block counts as recent. Where rows are padded or
a window has left tokens behind, blocks are counted among what is left; their means are then worked out anew at every step.
"""

from __future__ import annotations

from pydantic import Field

from ..interventions import Call, Keep
from ..interventions.families.sparsity import BlockMeans, Budget, best_blocks
from .kit.base import Info
from .kit.sparse import BlockSparse


class BlockTopK(BlockSparse):
    slug = "block-topk"
    info = Info(
        does="Each written token reads only the best blocks of a long context, its first tokens and the recent ones.",
        paper="Kinetics: Rethinking Test-Time Scaling Laws",
        year=2025,
        arxiv="2506.05333",
        families=("sparsity",),
        kinds=("llm",),
        cost="free",
        problems=("the prompt is too long",),
        try_first={"blocks": 64},
        sweep={"blocks": (16, 32, 64)},
        code="Infini-AI-Lab/Kinetics",
    )

    reads = "answer"

    blocks: int = Field(64, ge=1, description="how many blocks each step reads besides the first and the recent tokens")
    block_size: int = Field(16, ge=1, le=1024, description="tokens per block")
    local: int = Field(64, ge=1, description="how many recent tokens are read, the current one included")
    sinks: int = Field(4, ge=0, le=4096, description="how many first tokens are read")
    dense_layers: tuple[int, ...] = Field((0,), description="layers that read everything, counted from 0")

    def keep(self, call: Call, written: int) -> Keep | None:
        """The columns of the rows that read generated tokens; other rows read everything."""
        budget = Budget(self.sinks, self.local, self.blocks, self.block_size)
        where = ("means", "" if call.site is None else call.site.name)
        return best_blocks(call, budget, written, call.memory.setdefault(where, BlockMeans(self.sinks, self.block_size)))
