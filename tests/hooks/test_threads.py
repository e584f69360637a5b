"""Sessions that begin or end beside running passes: a pass goes on as it began, and nothing stays when the last one is over."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from reattend.hooks import Edits, Observe, Plan, attach, sites
from reattend.hooks.attachment import _attachments
from reattend.hooks.trackers.in_flight import lifecycle
from reattend.interventions import ReattendError
from tiny_llama import IDS, drop_first, halve, logits, session_of, tiny_llama, traces
from torch import nn


@pytest.fixture
def model():
    return tiny_llama()


@contextmanager
def pass_held_in_layer(model, number: int, work=logits):
    """A pass of another thread that waits in a layer's MLP: yields (result list, go on and wait for its end)."""
    inside, go, found = threading.Event(), threading.Event(), []
    mlp = model.model.layers[number].mlp
    own = mlp.forward

    def slow(x):
        if threading.current_thread() is thread:
            inside.set()
            go.wait(60)
        return own(x)

    def run():
        try:
            found.append(work(model))
        except BaseException as error:
            found.append(error)

    def finish():
        go.set()
        thread.join()
        return found[0]

    thread = threading.Thread(target=run)
    mlp.forward = slow
    try:
        thread.start()
        assert inside.wait(60)
        yield finish
    finally:
        finish()
        del mlp.forward


def steered_logits(model, intervention):
    with session_of(model, intervention):
        return logits(model)


def test_a_pass_that_began_before_a_session_is_left_alone(model):
    before, left = logits(model), traces(model)
    with pass_held_in_layer(model, 0) as finish:
        session = session_of(model)
        steered = logits(model)
        found = finish()
    assert torch.equal(found, before) and not torch.equal(steered, before)
    session.remove()
    assert traces(model) == left and not _attachments


def test_a_pass_that_began_under_a_session_keeps_it_to_the_end(model):
    before, left = logits(model), traces(model)
    expected = steered_logits(model, halve)
    session = session_of(model)
    with pass_held_in_layer(model, 0) as finish:
        session.remove()
        assert torch.equal(logits(model), before), "what begins after the session is as without it"
        with session_of(model, drop_first):
            other = logits(model)
        assert torch.equal(other, steered_logits(model, drop_first))
        assert torch.equal(finish(), expected)
    assert session.stats["test"]["model.layers.2.self_attn"] == 1
    assert torch.equal(logits(model), before)
    assert traces(model) == left and not _attachments


def test_a_second_session_leaves_a_pass_under_the_first_as_it_is(model):
    expected = steered_logits(model, halve)
    with session_of(model), pass_held_in_layer(model, 1) as finish, session_of(model, drop_first) as second:
        assert torch.equal(finish(), expected)
        assert not second.applied


def test_taps_of_a_session_that_ends_in_mid_pass_read_to_the_end(model):
    seen = []
    plan = Plan("look", [Observe(sites(model), lambda o: seen.append(o.site.layer))])
    session = attach(model, [plan])
    with pass_held_in_layer(model, 0) as finish:
        session.remove()
        finish()
    assert seen == [0, 1, 2]
    assert not _attachments


@pytest.mark.parametrize("how", ["dies", "is interrupted"])
def test_a_thread_that_dies_or_is_interrupted_keeps_no_hooks(model, how):
    before, left = logits(model), traces(model)
    error = SystemExit if how == "dies" else KeyboardInterrupt

    def breaks(call):
        if call.site.layer == 1 and threading.current_thread() is not threading.main_thread():
            raise error
        return halve(call)

    def work():
        try:
            logits(model)
        except (KeyboardInterrupt, SystemExit):
            if how == "dies":
                return
            done.set()
            free.wait(60)

    done, free = threading.Event(), threading.Event()
    with session_of(model, breaks):
        thread = threading.Thread(target=work)
        thread.start()
        if how == "dies":
            thread.join()
        else:
            assert done.wait(60)
    assert traces(model) == left and not _attachments
    free.set()
    thread.join()
    assert torch.equal(logits(model), before)


def test_attention_outside_a_pass_does_not_belong_to_an_interrupted_one(model):
    """The clock of a decoding step that was interrupted is not that of what is called next outside of the model's root."""
    clocks, stop = [], [True]

    def watch(call):
        if stop[0] and call.site.layer == 1:
            raise KeyboardInterrupt
        clocks.append(call.clock.phase)
        return halve(call)

    with session_of(model, watch):
        with pytest.raises(KeyboardInterrupt):
            logits(model)
        stop[0] = False
        with torch.no_grad():
            model.model(IDS)
    assert clocks == ["prefill", "encode", "encode", "encode"]


def test_the_last_session_ends_beside_a_pass_and_another_pass_begins_before_that_is_over(model):
    """What waits for the first pass then waits for the second one: neither pass may be called to account for it."""
    plain, before = logits(model), traces(model)
    session = session_of(model, isolated=True)  # of this thread only: the passes are other people's
    with pass_held_in_layer(model, 1) as first:
        session.remove()
        with pass_held_in_layer(model, 2) as second:
            assert torch.equal(first(), plain)
            assert torch.equal(second(), plain)
    assert traces(model) == before and torch.equal(logits(model), plain)


def test_a_removed_session_is_not_begun_again_while_a_pass_under_it_goes_on(model):
    session = session_of(model)
    steered = logits(model)
    with pass_held_in_layer(model, 1) as finish:
        session.remove()
        with pytest.raises(ReattendError, match="removed, but a forward pass that began under it is still under way"):
            session.attach()
        assert torch.equal(finish(), steered)


def test_torch_calls_a_removed_hook_without_its_keyword_arguments(model):
    """A session ends while another thread stands in a hook of somebody else's before ours: that thread's pass goes on untouched."""
    before = logits(model)
    for where in (model, model.model.layers[1]):
        here, go, found = threading.Event(), threading.Event(), []

        def slow(*_, here=here, go=go):
            here.set()
            go.wait(60)

        handle = where.register_forward_pre_hook(slow)
        session = attach(model, [Plan("look", [Observe(sites(model), lambda o: None)])], isolated=True)
        thread = threading.Thread(target=lambda found=found: found.append(logits(model)))
        thread.start()
        assert here.wait(60)
        session.remove()
        go.set()
        thread.join()
        handle.remove()
        assert torch.equal(found[0], before)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 2

    def forward(self, x):
        x = x.unflatten(2, (2, -1)).transpose(1, 2)
        if self.gate is not None:
            self.gate()
        return nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)

    gate = None


def test_modules_that_call_sdpa_themselves_go_on_as_they_began():
    root = nn.Sequential(Attention(), Attention())
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    plain, inside, go, found = root(x), threading.Event(), threading.Event(), []
    session = session_of(root)
    expected = root(x)

    def gate():
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(60)

    root[0].gate = gate
    for ends in (True, False):
        inside.clear(), go.clear()
        thread = threading.Thread(target=lambda: found.append(root(x)))
        thread.start()
        assert inside.wait(60)
        if ends:
            session.remove()
        else:
            session = session_of(root)
        go.set()
        thread.join()
    session.remove()
    assert torch.equal(found[0], expected) and torch.equal(found[1], plain)
    assert torch.equal(root(x), plain) and not root._forward_hooks and not root[0]._forward_hooks and not _attachments


@pytest.mark.parametrize("isolated", [False, True])
def test_an_ended_session_keeps_no_model_alive(isolated):
    model = tiny_llama()
    gone = weakref.ref(model)
    session = session_of(model, isolated=isolated)
    logits(model)
    if isolated:  # ended elsewhere: it still stands in this thread's context
        thread = threading.Thread(target=session.remove)
        thread.start()
        thread.join()
    else:
        session.remove()
    assert session.model is model
    del model
    gc.collect()
    assert gone() is None and session.model is None
    assert session.stats["test"]["model.layers.0.self_attn"] == 1
    with pytest.raises(ReattendError, match="has ended"):
        session.attach()


FILES = (
    "attachment.py",
    "session.py",
    "routes/interface.py",
    "routes/names.py",
    "routes/sdpa.py",
    "routes/marking.py",
    "module_hooks.py",
    "trackers/in_flight.py",
    "trackers/denoise.py",
    "doors/edits.py",
    "doors/observe.py",
    "handles.py",
)


def interrupted_at(number: int, what):
    """Runs what() with a KeyboardInterrupt at its number-th line in the files of a session's life. False if it has fewer lines."""
    count = 0

    def line(frame, event, arg):
        nonlocal count
        if event == "line":
            count += 1
            if count == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return line

    def call(frame, event, arg):
        name = frame.f_code.co_filename
        return line if "hooks" in name and name.endswith(FILES) and frame.f_code.co_name != "_prepare" else None

    sys.settrace(call)
    try:
        what()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        # a trace also raises where a lock is just being given back, as no real interrupt does
        while lifecycle._is_owned():
            lifecycle.release()
    return False


def plan_of(model):
    table = sites(model).layers(0, 0)
    return Plan("both", [Edits(table, halve), Observe(table, lambda o: None)])


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_attach_leaves_nothing(model):
    before, left = logits(model), traces(model)
    plan, number = plan_of(model), 0
    while True:
        number += 1
        sessions = []
        if not interrupted_at(number, lambda: sessions.append(attach(model, [plan], isolated=True))):  # noqa: B023
            break
        assert not sessions and traces(model) == left and not _attachments, f"line {number}"
    assert number > 40
    assert not torch.equal(logits(model), before)
    sessions[0].remove()
    assert torch.equal(logits(model), before)


@pytest.mark.slow
def test_a_second_remove_finishes_an_interrupted_one(model):
    before, left = logits(model), traces(model)
    plan, number = plan_of(model), 0
    while True:
        number += 1
        session = attach(model, [plan], isolated=True)
        interrupted = interrupted_at(number, session.remove)
        session.remove()
        assert traces(model) == left and not _attachments, f"line {number}"
        if not interrupted:
            break
    assert number > 30
    assert torch.equal(logits(model), before)
