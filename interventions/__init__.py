"""WHAT: the edits of attention and the engine that executes them. Pure tensors; knows no model."""

from .call import Call, Clock, Site, TokenGrid, TokenMap
from .edits import *  # noqa: F403
from .edits import __all__ as _edits
from .engine.reading import row_outputs, row_weights
from .engine.reference_executor import reference, reference_with_weights
from .engine.summaries import block_sums, column_sums, column_weights, row_maxima, weighted, weights_gradient
from .engine.ways import fused
from .errors import ReattendError, ReattendWarning, UnsupportedError
from .memory import Memory, require_whole

__all__ = [
    "Call",
    "Clock",
    "ReattendError",
    "ReattendWarning",
    "Memory",
    "Site",
    "TokenGrid",
    "TokenMap",
    "UnsupportedError",
    "block_sums",
    "column_sums",
    "column_weights",
    "fused",
    "reference",
    "reference_with_weights",
    "require_whole",
    "row_maxima",
    "row_outputs",
    "row_weights",
    "weighted",
    "weights_gradient",
    *_edits,
]
