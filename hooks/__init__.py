"""WHERE: finds every attention site of a model, attaches, knows tokens and steps, restores exactly."""

from .attachment import running
from .doors.branch import Branch, Fusion
from .doors.capture import Capture, Kept
from .doors.context import Context, SecondText
from .doors.edits import Edits
from .doors.evict import Evict, Held
from .doors.exit import Exit
from .doors.guide import Guide, Predictions
from .doors.inject import Entering, Inject
from .doors.latents import AtStep, Latents
from .doors.lookahead import Lookahead, Trials
from .doors.merge import Merge
from .doors.observe import Observation, Observe
from .doors.probe import Probe
from .doors.projection import Projected, Projection
from .doors.reuse import Moment, Reuse
from .doors.rewrite import Rewrite
from .doors.rotary import Rotary
from .doors.share import Share, Shared
from .doors.spans import Question, Segments, Spans
from .doors.words import Words
from .editing import edit
from .plan import Plan, Step
from .prompts.prompt import Prompt
from .prompts.request import Request
from .recording import Reading, Recording, capture
from .session import Session, attach
from .sites.discovery import sites
from .sites.table import SiteTable, Support
from .tokens.merging import Passing
from .trackers.guidance_rows import rows

__all__ = [
    "AtStep",
    "Branch",
    "Capture",
    "Context",
    "Edits",
    "Entering",
    "Evict",
    "Exit",
    "Fusion",
    "Guide",
    "Held",
    "Inject",
    "Kept",
    "Latents",
    "Lookahead",
    "Merge",
    "Moment",
    "Observation",
    "Observe",
    "Passing",
    "Plan",
    "Predictions",
    "Probe",
    "Projected",
    "Projection",
    "Prompt",
    "Question",
    "Reading",
    "Recording",
    "Request",
    "Rewrite",
    "Reuse",
    "Rotary",
    "Segments",
    "Session",
    "Share",
    "Shared",
    "SecondText",
    "SiteTable",
    "Spans",
    "Step",
    "Support",
    "Trials",
    "Words",
    "attach",
    "capture",
    "edit",
    "rows",
    "running",
    "sites",
]
