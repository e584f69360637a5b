"""`wrap`: a pipeline or model that is still what it was, with `use`, `compare` and `sites` on it."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from ..hooks import Session, SiteTable, sites
from ..hooks.sites.discovery import components, original_of
from ..interventions import ReattendError
from ..recipes import apply
from ..recipes.kit.apply import Choice

if TYPE_CHECKING:
    from ..recipes.kit.named import Uses  # pyright: ignore[reportMissingModuleSource]
    from .report import Report
    from .sweep import Sweep
else:
    Uses = object

METHODS = ("use", "compare", "sites")


class Wrapped(Uses):
    """What `wrap` adds. A wrapped object shares the attributes of the original one: what happens to either happens to both."""

    _reattend_original: Any

    if not TYPE_CHECKING:  # there it has a signature for each recipe

        def use(self, *recipes: Any, isolated: bool = False, **parameters: Any) -> Session:
            """Starts a session: `with pipe.use("streaming", window=512) as session: pipe(...)`. Arguments as for `reattend.apply`."""
            return apply(original_of(self), *recipes, isolated=isolated, **parameters)

    @overload
    def compare(self, variants: list[Any], /, **options: Any) -> Sweep: ...
    @overload
    def compare(self, *recipes: Choice, **options: Any) -> Report: ...
    def compare(self, *recipes: Any, **options: Any) -> Report | Sweep:
        """Runs without and with the recipes on the same input and seed and reports both. Arguments as for `reattend.compare`.

        A list of variants as the one argument: the untouched run, and a column per variant.
        """
        from .compare import compare

        return compare(original_of(self), *recipes, **options)

    def sites(self) -> SiteTable:
        """The attention sites of this model or pipeline."""
        return sites(original_of(self))

    def __copy__(self) -> Any:
        return wrap(copy.copy(original_of(self)))

    def __deepcopy__(self, memo: dict) -> Any:
        return wrap(copy.deepcopy(original_of(self), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return wrap, (original_of(self),)


if TYPE_CHECKING:
    # What `wrap` makes is an object of both classes, the user's and `Wrapped`. Python's types have no such intersection, and the
    # user's type alone would hide `use` and `compare`. So the libraries' own classes are joined with `Wrapped` here; a diffusers
    # pipeline, of which there are a hundred, keeps the signature of its call (P, R) and what all of them have, its further
    # attributes are Any; a model shows what all models have (transformers' own type of `generate` fits none of them).
    # Where diffusers is missing, its class counts as unknown: that is why its overload comes last.
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import nn
    from transformers import GenerationMixin, PreTrainedModel
    from transformers.pipelines.base import Pipeline
    from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline
    from transformers.pipelines.text_generation import TextGenerationPipeline

    W = TypeVar("W", bound=Wrapped)
    P = ParamSpec("P")
    R = TypeVar("R")

    class WrappedTextGeneration(Wrapped, TextGenerationPipeline): ...

    class WrappedImageTextToText(Wrapped, ImageTextToTextPipeline): ...

    class WrappedPipeline(Wrapped, Pipeline): ...

    class WrappedModel(Wrapped, PreTrainedModel, GenerationMixin):
        def generate(self, *args: Any, **options: Any) -> Any: ...

    class WrappedModule(Wrapped, nn.Module): ...

    class WrappedDiffusion(Wrapped, DiffusionPipeline, Generic[P, R]):
        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
        def __getattr__(self, name: str) -> Any: ...


@overload
def wrap(model: W) -> W: ...
@overload
def wrap(model: TextGenerationPipeline) -> WrappedTextGeneration: ...
@overload
def wrap(model: ImageTextToTextPipeline) -> WrappedImageTextToText: ...
@overload
def wrap(model: Pipeline) -> WrappedPipeline: ...
@overload
def wrap(model: PreTrainedModel) -> WrappedModel: ...
@overload
def wrap(model: nn.Module) -> WrappedModule: ...
@overload
def wrap(model: Callable[P, R]) -> WrappedDiffusion[P, R]: ...
@overload
def wrap(model: DiffusionPipeline) -> WrappedDiffusion[..., Any]: ...
@overload
def wrap(model: Any) -> Any: ...
def wrap(model: Any) -> Any:
    """The same pipeline or model with `.use(...)`, `.compare(...)` and `.sites()`; isinstance and every attribute hold.

    model: a transformers pipeline or model, a diffusers pipeline or denoiser, or any nn.Module. It is not changed, and nothing is set
    on it. Raises ReattendError for anything else, and where its class already has one of these three methods.
    """
    if isinstance(model, Wrapped):
        return model
    components(model)  # says what is wrong with an object that has no modules
    cls = type(model)
    taken = [name for name in METHODS if hasattr(cls, name)]
    if taken:
        raise ReattendError(
            f"{cls.__name__} has its own {' and '.join(taken)}: use reattend.apply(model, ...) and reattend.compare(model, ...)"
        )
    if not hasattr(model, "__dict__"):
        raise ReattendError(f"{cls.__name__} keeps no __dict__ to share: use reattend.apply(model, ...)")
    # the class belongs to this one object: it is the place where the original can be kept without touching shared attributes
    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_reattend_original": model,
    }
    same = types.new_class(cls.__name__, (Wrapped, cls), {}, lambda namespace: namespace.update(names))
    wrapped = object.__new__(same)
    object.__setattr__(wrapped, "__dict__", model.__dict__)
    return wrapped
