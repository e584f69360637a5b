"""What one step puts on a model and does in a session: all of it in one place, so that it goes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ..interventions import Call, Edit, Site
from .actions import Action
from .module_hooks import Hooks
from .passes import Forward
from .protocols import Steered
from .sites.table import SiteTable

Editor = Callable[[Call, Forward], Sequence[Edit]]
Reader = Callable[[Call, list[Edit], Forward], None]
# (arguments of the model, images, text) -> (other arguments, what is called with those that all steps have agreed on)
Rewriter = Callable[[dict[str, Any], Any, Any], tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]


class Handles:
    """Made by the session before anything is put on, so that an interrupt in between loses nothing. recipe: of its step's plan."""

    def __init__(self, recipe: str) -> None:
        self.hooks = Hooks(recipe)
        self.editors: list[tuple[Site, nn.Module, Editor]] = []
        self.readers: list[tuple[Site, nn.Module, Reader]] = []
        self.actions: list[Action] = []
        self.spans: list[Any] = []
        self.nested: list[Any] = []
        self.requests: list[Rewriter] = []
        self.endings: list[Callable[[], None]] = []

    def before(self, module: nn.Module, function: Callable[..., Any], *, kwargs: bool = False) -> None:
        """A hook before a module: function(module, args) or function(module, args, kwargs)."""
        self.hooks.before(module, function, kwargs=kwargs)

    def after(self, module: nn.Module, function: Callable[..., Any], *, first: bool = False, prompts: bool = False) -> None:
        """A hook after a module: function(module, args, output); after an error with output None. first: before the hooks of others.
        prompts: it has nothing to do in a step of decoding, so that steps may run compiled."""
        self.hooks.after(module, function, first=first, prompts=prompts)

    def around(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """In the place of a module's forward: function(forward before, args, kwargs) -> output."""
        self.hooks.around(module, function)

    def edit(self, site: Site, module: nn.Module, editor: Editor) -> None:
        """editor(call, forward) -> edits, none of them an identity, whenever the site's attention is computed."""
        self.editors.append((site, module, editor))

    def read(self, site: Site, module: nn.Module, reader: Reader) -> None:
        """reader(call, edits, forward), with the edits of all sessions."""
        self.readers.append((site, module, reader))

    def act(self, action: Action) -> None:
        """Something before or after every pass of the model's root."""
        self.actions.append(action)

    def mark(self, step: Any) -> None:
        """A step that marks tokens of every prompt: step.mark(tokens, ids, tokenizer, read), and step.name."""
        self.spans.append(step)

    def request(self, rewriter: Rewriter) -> None:
        """A change of requests before the model is called with them."""
        self.requests.append(rewriter)

    def at_end(self, function: Callable[[], None]) -> None:
        """Something that takes away what the step has put on: called once more where it was interrupted."""
        self.endings.append(function)

    def __bool__(self) -> bool:
        return bool(self.hooks or self.editors or self.readers or self.actions or self.spans or self.nested)


class Holder(Steered, Protocol):
    """A session, as a step that installs itself knows it. table: all sites of its model, by the names that this model gives them."""

    table: SiteTable | None

    def handles(self) -> Handles:
        """New handles, which go with the session."""
        ...

    def nest(self, handles: Handles, plan: Any) -> Steered:
        """The steps of a plan as a session of its own for passes of a door's own, never attached by itself; it counts with this one."""
        ...

    def counter(self, label: str, *, idle: str = "") -> Any:
        """The counter {site name: times} under this label in `stats`. idle: why it is known to stay empty, for the warning that says so."""
        ...

    def note(self, label: str, change: Tensor, of: str = "a prediction") -> None:
        """Notes the size of a change that this recipe made, as a part of what it changed, on the device of that. of: what that is."""
        ...
