"""What the arguments of denoisers are called: which holds the latents, and which the timestep.

The tests go over the forward signatures of every denoiser and ControlNet of the installed diffusers (tests/hooks/test_timesteps.py): a class
that has none of these names is one of which it is not known.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

HIDDEN = ("hidden_states", "sample", "x", "controls_latents")
TIMESTEP = ("timestep", "timesteps", "timestep_ratio", "t", "vision_timesteps", "decoder_noise_time")


def name_in(given: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these names that is given; "" where none is."""
    return next((name for name in names if given.get(name) is not None), "")


def hidden_in(given: Mapping[str, Any]) -> Tensor | list[Tensor] | None:
    """The latents of a pass, rows first, from its arguments by name; None where it is not known which they are."""
    hidden = given.get(name_in(given, HIDDEN))
    if isinstance(hidden, (list, tuple)) and hidden and all(isinstance(row, Tensor) for row in hidden):
        return list(hidden)  # one tensor per sample
    return hidden if isinstance(hidden, Tensor) and hidden.dim() else None


def timestep_in(given: Mapping[str, Any]) -> float | None:
    """The timestep of a pass; None where there is none or it is not known which argument it is."""
    timestep = given.get(name_in(given, TIMESTEP))
    if isinstance(timestep, Tensor):
        # one value per sample, or per token with zeros for given frames
        return float(timestep.max()) if timestep.numel() else None
    return float(timestep) if isinstance(timestep, numbers.Real) else None
