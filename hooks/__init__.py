"""WHERE: finds every attention site of a model, attaches, knows tokens and steps, restores exactly."""

from .attachment import running
from .capture import Reading, Recording, capture
from .discovery import sites
from .guidance_rows import rows
from .plan import (
    Act,
    Branch,
    Capture,
    Exit,
    Fusion,
    Guide,
    Lookahead,
    Observation,
    Observe,
    Plan,
    Probe,
    Project,
    Projection,
    Prompt,
    ReadProjection,
    Spans,
    Trials,
)
from .session import Session, attach
from .site_table import SiteTable, Support

__all__ = [
    "Act",
    "Branch",
    "Capture",
    "Exit",
    "Fusion",
    "Guide",
    "Lookahead",
    "Observation",
    "Observe",
    "Plan",
    "Probe",
    "Project",
    "Projection",
    "Prompt",
    "ReadProjection",
    "Reading",
    "Recording",
    "Session",
    "SiteTable",
    "Spans",
    "Support",
    "Trials",
    "attach",
    "capture",
    "rows",
    "running",
    "sites",
]
