"""Steps install themselves: the session, `apply` and the attachment know none by name, and refuse what nobody serves."""

import ast
from pathlib import Path

import pytest
import reattend.hooks
import tiny_denoisers
import torch
from reattend.hooks import (
    Branch,
    Capture,
    Context,
    Edits,
    Evict,
    Guide,
    Inject,
    Latents,
    Lookahead,
    Merge,
    Observe,
    Plan,
    Probe,
    Projection,
    Reuse,
    Rewrite,
    Share,
    Step,
    attach,
    sites,
)
from reattend.interventions import HeadGain, ReattendError, UnsupportedError
from tiny_llama import tiny_llama

ROOT = Path(__file__).parents[2]
DOORS = {name for name, value in vars(reattend.hooks).items() if isinstance(value, type) and issubclass(value, Step)}
IDS = torch.tensor([[5, 9, 30, 31], [7, 8, 3, 2]])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.mark.parametrize("file", ["hooks/session.py", "hooks/attachment.py", "recipes/kit/apply.py", "hooks/plan.py"])
def test_no_step_is_known_by_name(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert not {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & (DOORS - {"Step"})
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert "doors" not in (node.module or "") and not {a.name for a in node.names} & (DOORS - {"Step"})


class Unknown:
    """No step at all."""

    def __init__(self, **says):
        self.__dict__.update(says)


class Silent(Step):
    """Says nothing of what it serves."""


class Idle(Step):
    """Is served everywhere and installs nothing."""

    def check(self, facts):
        return ""


@pytest.mark.parametrize("step", [Unknown(), Silent(), Idle(), Probe([Silent()]), Branch([lambda p: None], max, [Silent()])])
def test_a_step_that_nobody_serves_is_refused(model, step) -> None:
    with pytest.raises(UnsupportedError, match="'odd' does not fit this model: .*(Unknown|Silent|Idle)"):
        attach(model, [Plan("odd", [Edits(sites(model), lambda call: None), step])])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_steps_that_a_step_holds_are_checked_and_installed_with_it(model) -> None:
    ran = []

    class Holding(Observe):
        held = (Observe(sites(model)[1:2], lambda seen: ran.append("held")),)

    with attach(model, [Plan("holding", [Holding(sites(model)[:1], lambda seen: ran.append("holding"))])]):
        model(IDS)
    assert ran == ["holding", "held"]
    Holding.held = (Silent(),)
    with pytest.raises(UnsupportedError, match="'holding' does not fit this model: no door serves a step of class Silent"):
        attach(model, [Plan("holding", [Holding(sites(model)[:1], lambda seen: None)])])


def test_a_step_is_asked_before_each_prompt_and_once_while_it_is_answered(model) -> None:
    asked, refuse, ran = [], [False], []

    class Careful(Observe):
        def ready(self, call):
            asked.append((call.forward.clock.phase, tuple(call.given["input_ids"].shape)))
            return "no prompt of four tokens is served" if refuse[0] else ""

    step = Careful(sites(model)[:1], lambda seen: ran.append(1))
    with attach(model, [Plan("careful", [step])]):
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        assert asked == [("prefill", (2, 4))] and len(ran) == 3
        refuse[0] = True
        for _ in range(2):
            with pytest.raises(ReattendError, match="careful: no prompt of four tokens is served"):
                model(IDS)
        assert len(ran) == 3
        refuse[0] = False
        model(IDS)
    assert len(asked) == 4


def test_a_step_is_asked_once_in_a_denoising_run() -> None:
    asked = []

    class Careful(Guide):
        def ready(self, call):
            asked.append(call.clock.step)
            return ""

    denoiser, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    with attach(denoiser, [Plan("careful", [Careful("far", 1.0)])]), reattend.hooks.rows("conditional"), torch.no_grad():
        for step in (3.0, 2.0, 1.0):
            denoiser(**{**inputs, "timestep": torch.full_like(inputs["timestep"], step)})
    assert asked == [0]


@pytest.mark.parametrize("conditional", [True, False])
def test_rows_of_a_guide_are_conditional_unless_it_says_otherwise(conditional: bool) -> None:
    clocks = []
    denoiser, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    table = sites(denoiser).where(lambda s: s.supported)[:1]

    def watch(call):
        clocks.append(call.clock)
        return HeadGain(factor=1.0)

    batch = len(inputs["hidden_states"])
    plan = Plan("two", [Edits(table, watch), Guide("near", 0.5), Guide("far", 1.0, conditional=conditional)])
    with torch.no_grad(), reattend.hooks.rows("unconditional", "conditional"):
        doubled = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        with pytest.warns(reattend.interventions.ReattendWarning, match="never acted"), attach(denoiser, [plan]):
            denoiser(**doubled)
    (clock,) = clocks
    no, yes, own = [False] * batch, [True] * batch, [conditional] * batch
    assert clock.branches["conditional"].tolist() == [*no, *yes, *yes, *own]
    assert clock.branches["unconditional"].tolist() == [*yes, *no, *no, *no]
    assert clock.branches["far"].tolist() == [*no, *no, *no, *yes]
    second = list(range(batch, 2 * batch))
    assert clock.source.tolist() == [*range(2 * batch), *second, *second]


def test_edits_of_conditional_rows_and_a_guide_of_no_weight() -> None:
    """The guide's rows are edited like the prompt's: what it adds is about nothing, and not the edit's own effect once more."""
    denoiser, inputs = tiny_denoisers.build("SD3Transformer2DModel")
    table = sites(denoiser).where(lambda s: s.supported)
    doubled = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}

    def weaken(call):
        rows = call.clock.rows("conditional", call.batch)
        return HeadGain(factor=torch.where(rows, 0.5, 1.0)[:, None].expand(-1, call.num_heads))

    def predicted(*steps):
        with (
            attach(denoiser, [Plan("both", list(steps))]),
            reattend.hooks.rows("unconditional", "conditional"),
            torch.no_grad(),
        ):
            return denoiser(**doubled).sample

    plain, edited = predicted(Edits(table, lambda call: HeadGain(factor=1 - 1e-9))), predicted(Edits(table, weaken))
    both = predicted(Edits(table, weaken), Guide("near", 1e3))
    apart = predicted(Edits(table, weaken), Guide("near", 1e3, conditional=False))
    effect = (edited - plain).norm()
    assert effect > 1e-3 and (both - edited).norm() < 1e-2 * effect < (apart - edited).norm()


@pytest.mark.filterwarnings("ignore:recipe .* never acted")
@pytest.mark.parametrize("door", ["Edits", "Share", "Context", "Inject", "Projection"])
def test_what_a_function_returns_is_looked_at(door: str) -> None:
    unet, inputs = tiny_denoisers.build("UNet2DConditionModel")
    table, text = sites(unet), {"prompt_embeds": torch.zeros(1, 5, 8)}
    step = {
        "Edits": lambda: Edits(table, lambda call: 3),
        "Share": lambda: Share(table.kind("self"), lambda call, shared: [3]),
        "Context": lambda: Context("second", table.kind("cross"), lambda call, text: 3, tensors=text),
        "Inject": lambda: Inject(table, lambda seen: {"hidden_states": 3}),
        "Projection": lambda: Projection(table, lambda seen: 3),
    }[door]()
    with attach(unet, [Plan("x", [step])]), pytest.raises(ReattendError, match=r"returns? .*\b3\b"):
        unet(**inputs)


def test_sites_of_another_model_are_refused():
    model, other = tiny_llama(), tiny_llama()
    for step in (Edits(sites(other), lambda call: None), Observe(sites(other), lambda seen: None)):
        with pytest.raises(UnsupportedError, match="of another model: take sites from this one"):
            attach(model, [Plan("strange", [step])])


WRONG = {
    "Edits takes a function as intervention, got 3": lambda t: Edits(t, 3),
    "Observe takes a function as tap": lambda t: Observe(t, None),
    "Capture takes a function as reader": lambda t: Capture(t, reader="a"),
    "Evict takes a function as keep": lambda t: Evict(t, torch.ones(3)),
    "Inject takes a function as write": lambda t: Inject(t, 3),
    "Projection takes a function as edit": lambda t: Projection(t, edit=3),
    "Latents takes a function as before": lambda t: Latents(3),
    "Latents takes a list of steps as steps, got .3.": lambda t: Latents(steps=[3]),
    "Reuse takes a function as when, got None": lambda t: Reuse(t, None),
    "Merge takes a function as reduce": lambda t: Merge(t, "a"),
    "Rewrite takes a function as change": lambda t: Rewrite(3),
    "Rewrite takes a list of steps as look": lambda t: Rewrite(len, look=3),
    "Probe takes a list of steps as steps": lambda t: Probe([3]),
    "Branch takes a function as fuse": lambda t: Branch([len], 3),
    "Lookahead takes a function as score": lambda t: Lookahead(1, t[:1], len, 3),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_stands_where_a_function_or_steps_belong_is_refused(said):
    model = tiny_llama()
    with pytest.raises(ReattendError, match=said):
        attach(model, [Plan("wrong", [WRONG[said](sites(model))])])


def test_plans_are_a_list_of_plans():
    model = tiny_llama()
    step = Edits(sites(model), lambda call: None)
    for plans in (Plan("one", [step]), [step], step):
        with pytest.raises(ReattendError, match=r'each with its steps: .Plan."name", .step, ...'):
            attach(model, plans)
