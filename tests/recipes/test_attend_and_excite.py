"""Attend-and-Excite on whole pipelines: every picture by its own words, downhill, no further than needed, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import reattend
import tiny_pipelines
import torch
from golden_files import golden_file
from reattend.interventions import ReattendError
from reattend.recipes.attend_and_excite import AttendAndExcite
from torch import Tensor

PROMPTS, WORDS = ["a b c", "d e f"], [["b"], ["e", "f"]]
STRONG = {"resolution": 4, "thresholds": {}, "scale": 50}


def attentive() -> Any:
    pipe = tiny_pipelines.stable_diffusion()
    for name, weight in pipe.unet.named_parameters():
        # random weights hardly attend to anything
        if "attn2.to_q" in name or "attn2.to_k" in name:
            weight.data *= 2
    return pipe


def euler() -> Any:
    pipe = attentive()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def draw(pipe: Any, prompts: list[str], rows: list[int], **more: Any) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))[rows]
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "latents": latents, "output_type": "latent"}
    return pipe(prompts, negative_prompt=["b"] * len(prompts), **{**call, **more}).images


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[float]]]:
    """(step, L of every picture), in the order in which they are asked for."""
    seen: list[tuple[int, list[float]]] = []
    evaluate = AttendAndExcite.evaluate

    def noting(self: AttendAndExcite, table: Any, at: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        loss, slope = evaluate(self, table, at, x)
        seen.append((at.clock.step, loss.tolist()))
        return loss, slope

    monkeypatch.setattr(AttendAndExcite, "evaluate", noting)
    return seen


def test_every_picture_goes_by_its_own_words():
    pipe = euler()
    plain = draw(pipe, PROMPTS, [0, 1])
    with reattend.apply(pipe, "attend-and-excite", words=WORDS, **STRONG) as session:
        both = draw(pipe, PROMPTS, [0, 1])
    assert session.stats == {"attend-and-excite": {"latents": 3}}
    for row in (0, 1):
        with reattend.apply(pipe, "attend-and-excite", words=WORDS[row], **STRONG):
            alone = draw(pipe, [PROMPTS[row]], [row])[0]
        torch.testing.assert_close(both[row], alone, atol=1e-4, rtol=1e-4)
        assert (both[row] - plain[row]).abs().max() > 1e-3
    with reattend.apply(pipe, "attend-and-excite", words=WORDS, **STRONG):
        assert torch.equal(draw(pipe, PROMPTS, [0, 1]), both)
    assert torch.equal(draw(pipe, PROMPTS, [0, 1]), plain)


def test_words_are_their_columns():
    """With words, with their columns, and with the prompt's own length where words are compared with words alone."""
    pipe, prompt, drawn = euler(), "the map", []
    tokens = pipe.tokenizer(prompt)["input_ids"]
    # start, "the" and "map" letter by letter, end
    assert len(tokens) == 8
    for normalised in (False, True):
        length = {"length": len(tokens)} if normalised else {}
        for given in ({"words": ["map"], "each": True}, {"columns": [[4, 5, 6]], **length}):
            with reattend.apply(pipe, "attend-and-excite", normalize_eot=normalised, **given, **STRONG):
                drawn.append(draw(pipe, [prompt], [1]))
        assert torch.equal(drawn[-1], drawn[-2])
    with reattend.apply(pipe, "attend-and-excite", words=["map"], **STRONG):
        mean = draw(pipe, [prompt], [1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(mean, drawn[0])


def test_it_goes_downhill_and_stops_where_the_least_attended_word_has_enough(losses):
    pipe = attentive()
    small = {"resolution": 4, "scale": 0.5, "tries": 4, "steps": 1}
    with reattend.apply(pipe, "attend-and-excite", words=WORDS, thresholds={0: 1.0}, **small):
        draw(pipe, PROMPTS, [0, 1])
    # never enough: as often as it may, and one more for the last move
    assert [step for step, _ in losses] == [0] * 5
    for row in (0, 1):
        fell = [loss[row] for _, loss in losses]
        assert fell == sorted(fell, reverse=True) and fell[-1] < fell[0]
    # enough for the second picture after its first move: one more, and it waits for the first
    bound = (losses[0][1][1] + losses[1][1][1]) / 2
    before = [loss for _, loss in losses]
    assert min(loss[0] for loss in before) > bound
    losses.clear()
    with reattend.apply(pipe, "attend-and-excite", words=WORDS, thresholds={0: 1 - bound}, **small):
        draw(pipe, PROMPTS, [0, 1])
    found = [loss for _, loss in losses]
    assert [loss[0] for loss in found] == pytest.approx([loss[0] for loss in before], abs=1e-6)
    assert [loss[1] for loss in found] == pytest.approx([before[n][1] for n in (0, 1, 2, 2, 2)], abs=1e-6)


class Maps:
    """Attention written out, which keeps the cross-attention maps of one size."""

    def __init__(self, places: int) -> None:
        self.places, self.kept = places, []

    def __call__(self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        read = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(part) for part in (attn.to_q(hidden), attn.to_k(read), attn.to_v(read)))
        weights = attn.get_attention_scores(q, k, None)
        if encoder_hidden_states is not None and hidden.shape[1] == self.places:
            self.kept.append(weights)
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))


def test_the_loop_written_out_without_end_token_and_smoothing_and_never_enough():
    """What the golden runs leave out: `normalize_eot`, no smoothing, and all tries in vain."""
    data, facts = golden_file("attend-and-excite", "run_updates")
    unet = diffusers.UNet2DConditionModel(**json.loads(facts["config"])).eval()
    unet.load_state_dict({key[2:]: value for key, value in data.items() if key.startswith("w.")})
    pipe = tiny_pipelines.stable_diffusion()
    pipe.register_modules(unet=unet, vae=tiny_pipelines.vae(3))
    columns, least, own, steps, tries = [2, 4], {0: 0.999, 1: 0.999}, unet.attn_processors, 3, 5

    def neglect(x: Tensor, t: Tensor) -> Tensor:
        maps.kept.clear()
        unet(x, t, encoder_hidden_states=data["prompt_embeds"][1:])
        shares = torch.cat([m.unflatten(1, (4, 4)) for m in maps.kept]).mean(dim=0)[..., 1:5].mul(100).softmax(-1)
        return max(torch.relu(1 - shares[..., column - 1].max()) for column in columns)

    unet.set_attn_processor(maps := Maps(16))
    pipe.scheduler.set_timesteps(steps)
    x, wanted = data["latents"], []
    for i, t in enumerate(pipe.scheduler.timesteps):
        for _ in range(tries + 1 if i in least else 0):
            x = x.detach().requires_grad_()
            loss = neglect(x, t)
            assert loss > 1 - least[i]
            x = x - 0.002 * (1 - 0.5 * i / (steps - 1)) ** 0.5 * torch.autograd.grad(loss, x)[0]
        with torch.no_grad():
            x = x.detach()
            negative, positive = unet(torch.cat([x] * 2), t, encoder_hidden_states=data["prompt_embeds"]).sample.chunk(2)
            x = pipe.scheduler.step(negative + 3 * (positive - negative), t, x).prev_sample
        wanted.append(x)
    unet.set_attn_processor(own)

    def official() -> Tensor:
        after: list[Tensor] = []
        pipe(
            prompt_embeds=data["prompt_embeds"][1:], negative_prompt_embeds=data["prompt_embeds"][:1], latents=data["latents"],
            num_inference_steps=steps, guidance_scale=3.0, output_type="latent", height=16, width=16,
            callback_on_step_end=lambda _, step, t, given: after.append(given["latents"]) or given,
        )  # fmt: skip
        return torch.stack(after)

    given = {"columns": [columns], "normalize_eot": True, "length": 6, "smooth": False, "resolution": 4, "tries": tries}
    plain = official()
    with reattend.apply(pipe, "attend-and-excite", scale=0.002, steps=2, thresholds=least, **given):
        found = official()
    largest = torch.stack(wanted).abs().max()
    assert ((found - torch.stack(wanted)) / largest).abs().max() < 1e-5 < 1e-3 < ((plain - found) / largest).abs().max()


def test_passes_with_a_gradient_end_at_the_last_map():
    pipe, ran = euler(), []
    handle = pipe.unet.up_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with reattend.apply(pipe, "attend-and-excite", words=WORDS, **STRONG):
        draw(pipe, PROMPTS, [0, 1])
    handle.remove()
    # the maps of 4 x 4 places are the middle block's; only the first pass, which looks for them, went on
    assert len(ran) == 3 + 1


def test_nothing_moves_where_every_word_shows_or_after_the_first_steps():
    pipe = euler()
    plain = draw(pipe, PROMPTS, [0, 1])
    for off in ({"scale": 0}, {"steps": 0}):
        with reattend.apply(pipe, "attend-and-excite", words=WORDS, **{**STRONG, **off}):
            assert torch.equal(draw(pipe, PROMPTS, [0, 1]), plain)
    with reattend.apply(pipe, "attend-and-excite", words=WORDS, steps=2, **STRONG) as session:
        draw(pipe, PROMPTS, [0, 1])
    assert session.stats == {"attend-and-excite": {"latents": 2}}


def test_by_default_it_reads_what_a_small_unet_has():
    pipe = euler()
    drawn = []
    for resolution in (None, 8, 4):
        with reattend.apply(pipe, "attend-and-excite", words=WORDS, **{**STRONG, "resolution": resolution}):
            drawn.append(draw(pipe, PROMPTS, [0, 1]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_word_that_occurs_twice_and_prompts_that_are_too_long():
    """All occurrences of a word have one map, or one of them is named; of a text that was cut off nothing is found."""
    pipe, drawn = euler(), []
    for given in ({"words": ["b"]}, {"words": ["b"], "occurrence": 1}, {"words": ["b"], "occurrence": -1}):
        with reattend.apply(pipe, "attend-and-excite", **given, **STRONG):
            drawn.append(draw(pipe, ["a b c b"], [0]))
    assert torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    long = "a b " * pipe.tokenizer.model_max_length + "wolf"
    said = "'wolf' is not in prompt 0, which its text encoders read as"
    with reattend.apply(pipe, "attend-and-excite", words=["wolf"], **STRONG), pytest.raises(ReattendError, match=said):
        draw(pipe, [long], [0])
    with reattend.apply(pipe, "attend-and-excite", words=["b"], **STRONG) as session:
        draw(pipe, [long], [0])
    assert session.applied


def test_prompts_that_were_encoded_before_the_session_need_columns():
    pipe = euler()
    encoded = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("a b", "cpu", 1, True), strict=True))
    call = {"num_inference_steps": 2, "output_type": "latent", "latents": torch.randn(1, 4, 8, 8), **encoded}
    with (
        reattend.apply(pipe, "attend-and-excite", words=["b"], **STRONG),
        pytest.raises(ReattendError, match="or give columns"),
    ):
        pipe(**call)
    with reattend.apply(pipe, "attend-and-excite", columns=[[2]], **STRONG) as session:
        pipe(**call)
    assert session.applied
    with reattend.apply(pipe, "attend-and-excite", words=["b"], **STRONG) as session:
        within = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt("a b", "cpu", 1, True), strict=True))
        pipe(**{**call, **within})
    assert session.applied


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"words": ["wolf"]}, "wolf"),
        ({"words": [["b"], ["e"], ["a"]]}, "3 lists of words for 2"),
        ({"columns": [[700]]}, "700.* of a text that has"),
        ({"columns": [[2, 63]]}, r"columns \[\[2, 63\]\] of a text that has 64 columns, of which 1 to 62 can be compared"),
        ({"columns": [[2]], "normalize_eot": True, "length": 65}, "length 65 of a text that has 64 columns"),
        (
            {"words": WORDS, "resolution": 5},
            "no cross-attention sees 5 places along the shorter side: choose another resolution",
        ),
    ],
)
def test_refusals_before_anything_is_drawn(given, said):
    pipe = euler()
    with pytest.raises(ReattendError, match=said), reattend.apply(pipe, "attend-and-excite", **{**STRONG, **given}):
        draw(pipe, PROMPTS, [0, 1])
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize(
    "recipe",
    [("attend-and-excite", {"words": ["b"], **STRONG}), ("csg", {"boxes": {"b": [0, 0, 0.5, 1]}, "scale": 2.0, "tries": 2})],
)
def test_gradient_checkpointing_changes_nothing(recipe):
    pipe, found = euler(), []
    for _ in range(2):
        with reattend.apply(pipe, recipe):
            found.append(draw(pipe, [PROMPTS[0]], [0]))
        pipe.unet.enable_gradient_checkpointing()
    assert torch.equal(*found) and not torch.equal(found[0], draw(pipe, [PROMPTS[0]], [0]))
