"""Recipes as guiders of diffusers' modular pipelines: what `reattend.guiders` is made of.

A guider is handed the inputs of a step, says which passes of the denoiser that step takes, prepares the denoiser before each pass, and
makes one prediction of theirs. Here one of the passes runs under a recipe's edits, which end with that pass, whether it raised or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from torch import Tensor, nn

from ...hooks import Context, Guide, Plan, Predictions, Session, SiteTable, attach, sites
from ...hooks.attachment import running
from ...hooks.module_hooks import Hooks
from ...hooks.plan import Step
from ...hooks.trackers.combination import Combination
from ...hooks.trackers.part_of_schedule import holds_no_step, lies_in
from ...interventions import Clock, ReattendError, UnsupportedError
from .base import Recipe
from .guidance import BranchGuidance
from .whole_batch import WholeBatch

CONDITIONAL, UNCONDITIONAL, PERTURBED = "pred_cond", "pred_uncond", "pred_cond_perturbed"
# what modular pipelines call the text, its pooled part and its padding
TEXT = {
    "prompt_embeds": ("prompt_embeds", "encoder_hidden_states"),
    "pooled_prompt_embeds": ("text_embeds", "pooled_projections", "pooled_prompt_embeds"),
    "prompt_attention_mask": ("prompt_embeds_mask", "encoder_hidden_states_mask", "encoder_attention_mask"),
}


class RecipeGuidance(ClassifierFreeGuidance):
    """Base of guiders that are a recipe beside classifier-free guidance. A subclass says which pass of a step runs under its edits.

    The parts of the schedule are fractions of the steps as diffusers' guiders count them, every entry of the scheduler's timesteps
    one step.
    """

    recipe: Recipe

    def _set_up(
        self,
        recipe: Recipe,
        guidance_scale: float,
        guidance_rescale: float,
        use_original_formulation: bool,
        guidance_start: float,
        guidance_stop: float,
        enabled: bool,
    ) -> None:
        """Called by a subclass's constructor, whose parameters diffusers keeps as the guider's configuration.

        Raises ReattendError that names the argument.
        """
        for name, value in (("use_original_formulation", use_original_formulation), ("enabled", enabled)):
            if not isinstance(value, bool):
                raise ReattendError(f"{type(self).__name__}: {name} must be True or False, got {value!r:.60}")
        _number(self, "guidance_scale", guidance_scale, -math.inf, math.inf)
        _number(self, "guidance_rescale", guidance_rescale, 0, 1)
        _number(self, "guidance_start", guidance_start, 0, 1)
        _number(self, "guidance_stop", guidance_stop, 0, 1)
        if guidance_start >= guidance_stop:
            raise ReattendError(
                f"{type(self).__name__}: guidance_start {guidance_start} must lie below guidance_stop {guidance_stop}"
            )
        # past the constructor in between, which would keep its own start and stop as the configuration's
        BaseGuidance.__init__(self, guidance_start, guidance_stop)
        self._enabled = self._may_act = enabled
        self.recipe = recipe
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self.use_original_formulation = use_original_formulation
        self._names: list[str] = [CONDITIONAL]
        # of this step: what guides of recipes on the pipeline shift the prediction by, added up
        self._shift: Tensor | None = None
        self._session: Session | None = None
        self._end = Hooks()
        # of one run: the denoiser at work and its sites, which take as long to find as a small denoiser runs
        self._found: tuple[nn.Module, SiteTable] | None = None

    # -- what a subclass says --------------------------------------------------------------------------------------------

    @property
    def acts(self) -> bool:
        """Whether the recipe does something at some step."""
        raise NotImplementedError

    def _passes(self, batch: Callable[[int, str], Any]) -> list[str]:
        """The predictions of this step, in order. batch(0 or 1, name): the inputs of the prompt or of the negative prompt."""
        raise NotImplementedError

    def _edited(self, prediction: str) -> bool:
        """Whether the pass that makes this prediction runs under the recipe's edits."""
        raise NotImplementedError

    def _steps(self, table: SiteTable) -> list[Step]:
        """What the recipe does in that pass."""
        raise NotImplementedError

    @property
    def _part(self) -> tuple[float, float]:
        """The part of the schedule that the recipe acts in."""
        return self.recipe.start, self.recipe.stop  # type: ignore[attr-defined]

    def _own(self, conditional: Tensor, branch: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
        """The recipe's own shift of u + guidance (c - u); branch: what the perturbed pass predicted, where one is made."""
        raise NotImplementedError

    # -- what diffusers asks ---------------------------------------------------------------------------------------------

    def enable(self) -> None:
        """Undoes `disable`. SDXL's blocks call it in every run, which must not switch on what was made with enabled=False."""
        self._enabled = self._may_act

    @property
    def num_conditions(self) -> int:
        """The most passes that a step of a run takes. Pipelines ask before a run whether the negative prompt will be read."""
        plain = 0.0 if self.use_original_formulation else 1.0
        guided = self._enabled and not math.isclose(self.guidance_scale, plain)
        return 1 + guided + (self._enabled and self.acts)

    @property
    def is_conditional(self) -> bool:
        return self._names[max(self._count_prepared, 1) - 1] != UNCONDITIONAL

    def combination(self) -> Combination:
        """How the pass under way will be combined, for guides of recipes on the pipeline: their shifts are added here, so that neither half
        has them in what the recipe makes of it."""
        guided = UNCONDITIONAL in self._names
        scale = self.guidance_scale + self.use_original_formulation if guided else 1.0
        to_come = "unconditional" if UNCONDITIONAL in self._names[self._count_prepared :] else ""
        return Combination(float(scale), to_come, self._take)

    def _take(self, shift: Tensor) -> None:
        self._shift = shift if self._shift is None else self._shift + shift

    def prepare_inputs(self, data: Any) -> list[Any]:
        return self._batches(lambda at, name: self._prepare_batch(data, at, name))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return self._batches(lambda at, name: self._prepare_batch_from_block_state(input_fields, data, at, name))

    def _batches(self, batch: Callable[[int, str], Any]) -> list[Any]:
        self._let_go()
        self._shift = None
        self._names = self._passes(batch)
        return [batch(int(name == UNCONDITIONAL), name) for name in self._names]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Before each pass. Raises an error, before the first one of a run, where the recipe does not fit the denoiser."""
        super().prepare_models(denoiser)
        # an error between here and the pass leaves it there; a pass takes it away itself
        self._let_go()
        if not (self._enabled and self.acts):
            return
        if self._found is None or self._found[0] is not denoiser or (self._step == 0 and self._count_prepared == 1):
            table = sites(denoiser)
            support = self.recipe.supports(table)
            if not support:
                raise UnsupportedError(f"recipe {self.recipe.slug!r} does not fit this model: {support.reason}")
            name = self.recipe.slug
            steps = (step for session in running(denoiser) for plan in session.plans for step in plan.all)
            if any(isinstance(step, Guide) and step.name == name for step in steps):
                raise ReattendError(
                    f"{type(self).__name__}: the recipe {name!r} acts on this pipeline already: use one of the two"
                )
            start, stop = self._part
            if reason := holds_no_step(self._clock(), start, stop, type(self).__name__):
                raise ReattendError(reason)
            self._found = denoiser, table
        if self._edited(self._names[self._count_prepared - 1]):
            table = self._found[1]
            rows = WholeBatch(self.recipe.slug, self._names[self._count_prepared - 1] == PERTURBED)
            plan = Plan(self.recipe.slug, [rows, *self._steps(table)])
            self._session = attach(denoiser, [plan], isolated=True, table=table)
            self._end.after(denoiser, lambda module, args, output: self._let_go(broken=output is None))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._let_go()

    def _let_go(self, broken: bool = False) -> None:
        """Takes the edits of a pass away. broken: it raised, and there is nothing more to say of it."""
        self._end.remove()
        session, self._session = self._session, None
        if session is not None and broken:
            session.__exit__(ReattendError, None, None)
        elif session is not None:
            session.remove()

    def __call__(self, data: Sequence[Any]) -> GuiderOutput:
        clock = self._clock()
        if clock.steps is not None and clock.step + 1 >= clock.steps:
            self._found = None  # the run is over, and a guider keeps no model alive
        return self.forward(**{getattr(batch, self._identifier_key): batch.noise_pred for batch in data})

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_cond_perturbed: Tensor | None = None
    ) -> GuiderOutput:
        """The prediction of classifier-free guidance with all shifts, the recipe's and those of recipes on the pipeline, then brought back
        by guidance_rescale."""
        if pred_cond_perturbed is None and self._shift is None:
            return super().forward(pred_cond, pred_uncond)
        dtype = torch.promote_types(pred_cond.dtype, torch.float32)
        conditional, pred, unconditional, guidance = pred_cond.to(dtype), pred_cond.to(dtype), None, 1.0
        if pred_uncond is not None:
            unconditional = pred_uncond.to(dtype)
            guidance = self.guidance_scale + self.use_original_formulation
            pred = unconditional + guidance * (conditional - unconditional)
        if self._shift is not None:
            pred = pred + self._shift
        if pred_cond_perturbed is not None:
            pred = pred + self._own(conditional, pred_cond_perturbed.to(dtype), unconditional, guidance)
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, conditional, self.guidance_rescale)
        return GuiderOutput(pred=pred.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _clock(self) -> Clock:
        """Where the run stands."""
        if self._step is None or self._num_inference_steps is None:
            raise ReattendError(f"{type(self).__name__}: call set_state(step, num_inference_steps, timestep) before each step")
        timestep = None if self._timestep is None else float(self._timestep)
        return Clock("denoise", self._step, self._num_inference_steps, timestep, timestep)


class PerturbedPass(RecipeGuidance):
    """Base of guiders whose recipe has a branch (`BranchGuidance`): one more pass over the prompt, all of it the branch."""

    _input_predictions = [CONDITIONAL, UNCONDITIONAL, PERTURBED]
    recipe: BranchGuidance

    @property
    def acts(self) -> bool:
        return self.recipe.guide().acts

    def _scale(self) -> float:
        return self.recipe.guide().scale_at(self._clock()) if self._enabled and self.acts else 0.0

    def _passes(self, batch: Callable[[int, str], Any]) -> list[str]:
        guided = [UNCONDITIONAL] if self._is_cfg_enabled() else []
        return [CONDITIONAL, *guided, *([PERTURBED] if self._scale() else [])]

    def _edited(self, prediction: str) -> bool:
        return prediction == PERTURBED

    def _steps(self, table: SiteTable) -> list[Step]:
        return [step for step in self.recipe.plan(table) if not isinstance(step, Guide)]

    def _own(self, conditional: Tensor, branch: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
        guide, clock = self.recipe.guide(), self._clock()
        assert guide.formula is not None
        branches = {guide.name: branch}
        return guide.formula(Predictions(conditional, branch, branches, unconditional, guide.scale_at(clock), guidance, clock))


class SecondTextPass(RecipeGuidance):
    """Base of guiders whose recipe reads a second text (`Context`) in the prompt's pass: the negative prompt's."""

    _input_predictions = [CONDITIONAL, UNCONDITIONAL]
    # of this step: the negative text as the context door takes it; None where the recipe does not act
    _text: Mapping[str, Tensor] | None = None

    def _passes(self, batch: Callable[[int, str], Any]) -> list[str]:
        self._text = self._negative(batch(1, UNCONDITIONAL)) if self._on() else None
        return [CONDITIONAL, UNCONDITIONAL] if self._is_cfg_enabled() else [CONDITIONAL]

    def _on(self) -> bool:
        """Whether the recipe acts at this step."""
        return self._enabled and self.acts and lies_in(self._clock(), *self._part, type(self).__name__)

    def _negative(self, batch: Any) -> dict[str, Tensor]:
        found = {}
        for name, fields in TEXT.items():
            value = next((v for field in fields if (v := getattr(batch, field, None)) is not None), None)
            if isinstance(value, Tensor):
                found[name] = value
        if "prompt_embeds" not in found:
            raise ReattendError(
                f"{type(self).__name__}: the pipeline has no embeddings of a negative prompt: pass negative_prompt (or "
                "negative_prompt_embeds) to it"
            )
        return found

    def _edited(self, prediction: str) -> bool:
        return prediction == CONDITIONAL and self._text is not None

    def _steps(self, table: SiteTable) -> list[Step]:
        # which steps it acts in is said here, since a bare denoiser has no schedule
        given = {"texts": None, "tensors": self._text, "start": 0.0, "stop": 1.0}
        return [replace(step, **given) for step in self.recipe.plan(table) if isinstance(step, Context)]


def _number(guider: RecipeGuidance, name: str, value: Any, least: float, most: float) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not least <= value <= most:
        allowed = "" if math.isinf(most) else f" from {least} to {most}"
        raise ReattendError(f"{type(guider).__name__}: {name} must be a number{allowed}, got {value!r:.60}")
