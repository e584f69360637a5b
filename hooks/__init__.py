"""WHERE: finds every attention site of a model, attaches, knows tokens and steps, restores exactly."""

from .discovery import SiteTable, Support, sites
from .plan import Act, Guide, Observation, Observe, Plan, Project, Spans
from .session import Session, attach

__all__ = [
    "Act",
    "Guide",
    "Observation",
    "Observe",
    "Plan",
    "Project",
    "Session",
    "SiteTable",
    "Spans",
    "Support",
    "attach",
    "sites",
]
