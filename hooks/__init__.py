"""WHERE: finds every attention site of a model, attaches, knows tokens and steps, restores exactly."""

from .attachment import running
from .editing import edit
from .plan import (
    Branch,
    Capture,
    Edits,
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
from .recording import Reading, Recording, capture
from .session import Session, attach
from .sites.discovery import sites
from .sites.table import SiteTable, Support
from .trackers.guidance_rows import rows

__all__ = [
    "Edits",
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
    "edit",
    "rows",
    "running",
    "sites",
]
