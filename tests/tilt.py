"""A recipe for the tests: it fits every kind of model and always acts."""

from __future__ import annotations

import torch
from reattend.hooks import Edits, Support
from reattend.interventions import KeyBias
from reattend.recipes import Info, Recipe


class Tilt(Recipe):
    """A recipe for sites of every kind: a bias on column 0."""

    slug = "tilt"
    info = Info("Tilts.", "None", 2026, "0000.00000", ("calibration",), ("llm",), "free")
    strength: float = 3.0

    def supports(self, sites):
        return Support(True)

    def plan(self, sites):
        def bias(call):
            row = torch.zeros(call.num_keys)
            row[0] = self.strength
            return KeyBias(bias=row)

        return [Edits(sites.where(lambda s: s.supported and s.stack not in ("vae", "text_encoder")), bias, "tilt")]
