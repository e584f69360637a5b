"""INSIDE: what a model's attention and hidden states look like: sinks, massive activations, rhythm. Measures only, nothing is changed."""

from .analyse import analyse
from .findings import Rhythm
from .measures import Massive
from .result import Analysis

__all__ = ["Analysis", "Massive", "Rhythm", "analyse"]
