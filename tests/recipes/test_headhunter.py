"""HeadHunter: the greedy search on sets whose worth is known, pictures with heads of their own drawn together, and what a search leaves."""

from __future__ import annotations

import json
import random
import types
from typing import Any

import numpy as np
import pytest
import reattend
import tiny_pipelines
import torch
from PIL import Image
from reattend.interventions import ReattendError, UnsupportedError
from reattend.recipes import Profile, recipe_class
from reattend.recipes.kit.denoisers import image_layers
from reattend.recipes.profiling.headhunter import search
from reattend.recipes.profiling.material.head_sets import Painter
from reattend.recipes.profiling.material.objectives import BUILT_IN, clip_likeness, near_colour, objective_of, scored

HeadHunter: Any = recipe_class("headhunter")
POOL = [(layer, head) for layer in range(3) for head in range(4)]
GIVEN = {"height": 16, "width": 16, "guidance_scale": 4.0}


def known_values() -> dict[tuple[int, int], float]:
    return {head: random.Random(7 * n).random() for n, head in enumerate(POOL)}


# -- the search, of sets whose worth is known ----------------------------------------------------------------------------


class Worth:
    """The sum of what each head of a set is worth; notes what was asked."""

    def __init__(self, values: dict[tuple[int, int], float]) -> None:
        self.values, self.asked = values, []

    def __call__(self, sets: list[tuple]) -> list[float]:
        self.asked.append(sets)
        return [sum(self.values[head] for head in heads) for heads in sets]


def test_one_head_a_round_finds_the_best_heads_in_order_and_all_at_once_the_same_set():
    values = known_values()
    best = sorted(POOL, key=lambda head: -values[head])[:5]
    one = search(POOL, Worth(values), k=1, rounds=5)
    assert [head for part in one for head in part.chosen] == best
    (all_at_once,) = search(POOL, Worth(values), k=5, rounds=1)
    assert set(all_at_once.chosen) == set(best) and all_at_once.chosen == best
    assert all_at_once.scores == pytest.approx(values)


@pytest.mark.parametrize(("k", "rounds"), [(1, 1), (3, 2), (5, 2), (5, 9), (99, 1)])
def test_heads_that_were_found_are_not_tried_again_and_as_many_are_found_as_asked(k, rounds):
    worth = Worth(known_values())
    done = search(POOL, worth, k, rounds)
    found = [head for part in done for head in part.chosen]
    assert len(found) == len(set(found)) == min(k * rounds, len(POOL))
    for number, sets in enumerate(worth.asked):
        before = [head for part in done[:number] for head in part.chosen]
        assert [list(heads[:-1]) for heads in sets] == [before] * (len(POOL) - len(before))
        assert not {heads[-1] for heads in sets} & set(before)


def test_of_equal_heads_the_lower_layer_then_the_lower_head_is_taken():
    shuffled = random.Random(0).sample(POOL, len(POOL))
    done = search(shuffled, lambda sets: [1.0] * len(sets), k=2, rounds=3)
    assert [head for part in done for head in part.chosen] == POOL[:6]


def test_what_a_head_is_worth_beside_others_counts():
    """(0, 0) is best alone; after it the head that goes with it, not the second best alone."""

    def score(sets):
        values = {frozenset([(0, 0)]): 1.0, frozenset([(1, 1)]): 0.5, frozenset([(0, 0), (2, 2)]): 2.0}
        return [sum(value for part, value in values.items() if part <= set(heads)) for heads in sets]

    assert [part.chosen for part in search(POOL, score, k=1, rounds=2)] == [[(0, 0)], [(2, 2)]]
    assert search(POOL, score, k=2, rounds=1)[0].chosen == [(0, 0), (1, 1)]


def test_screening_scores_the_best_quarter_to_the_end_and_at_least_k():
    values = known_values()
    for k, tried in ((1, 3), (5, 5)):
        full, cheap = Worth(values), Worth(values)
        (done,) = search(POOL, full, k, 1, cheap, 0.25)
        assert len(cheap.asked[0]) == 12 and len(full.asked[0]) == tried
        assert done.chosen == sorted(POOL, key=lambda head: -values[head])[:k]


# -- pictures ------------------------------------------------------------------------------------------------------------


def mean_red(pictures: Any, prompts: Any) -> torch.Tensor:
    return torch.tensor([float(np.asarray(picture)[..., 0].mean()) for picture in pictures])


def sd3() -> Any:
    """Two layers of two heads, with layers that do something."""
    pipe = tiny_pipelines.stable_diffusion_3()
    torch.manual_seed(1)
    pipe.transformer = type(pipe.transformer)(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    return pipe


def hunted(pipe: Any, **options: Any) -> Profile:
    given = {"prompts": ["a fox", "a map"], "objective": mean_red, "k": 1, "rounds": 2, "steps": 2, "scale": 8.0, "call": GIVEN}
    return HeadHunter.profile(pipe, None, **{**given, **options})


def drawn(pipe: Any, prompt: str = "a fox", seed: int = 0, steps: int = 2, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, num_inference_steps=steps, output_type="latent", **{**GIVEN, **more}).images


def ancestral() -> Any:
    """With a sampler that adds noise at every step."""
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = tiny_pipelines.stable_diffusion()
    pipe.scheduler = EulerAncestralDiscreteScheduler()
    return pipe


def heun() -> Any:
    """With a scheduler that calls the denoiser twice a step."""
    from diffusers import HeunDiscreteScheduler

    pipe = tiny_pipelines.stable_diffusion()
    pipe.scheduler = HeunDiscreteScheduler()
    return pipe


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (sd3, {}),
        (sd3, {"guidance_scale": 1.0}),
        (tiny_pipelines.stable_diffusion, {}),
        (ancestral, {"guidance_scale": 1.0}),
        (heun, {}),
        (sd3, {"perturbation": "mean_query", "strength": 0.6}),
        (sd3, {"scope": "masked"}),
        (sd3, {"perturbation": "temperature", "temperature": 20.0}),
        (tiny_pipelines.stable_diffusion, {"perturbation": "uniform", "rescale": 0.5}),
    ],
)
def test_pictures_with_heads_of_their_own_are_as_drawn_one_by_one(make, more):
    pipe, more = make(), {"strength": 1.0, "scale": 20.0, **more}
    given = {**GIVEN, "guidance_scale": more.pop("guidance_scale", 4.0)}
    table = reattend.sites(pipe)
    settings = HeadHunter(heads=[(0, 0)], **more)
    pairs = [("a fox", 3), ("a map", 4)]
    painter = Painter(pipe, settings, image_layers(table), pairs, given)
    sets = [((0, 0),), ((0, 1),), ((1, 0),), ((0, 0), (1, 1)), ((0, 0), (0, 1))]
    jobs = [(heads, pair) for pair in (0, 1) for heads in sets]
    together = painter.draw(jobs, 2)
    made = []
    for job, picture in zip(jobs, together, strict=True):
        heads, (prompt, seed) = job[0], pairs[job[1]]
        (alone,) = painter.draw([job], 2)
        with reattend.apply(pipe, "softpag", heads=list(heads), **more):
            wanted = pipe(prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=2, **given).images[0]
        assert np.array_equal(np.asarray(alone), np.asarray(wanted))
        made.append(np.asarray(wanted, dtype=int))
        # a batch of other size may round otherwise
        assert np.abs(np.asarray(picture, dtype=int) - made[-1]).max() <= 1
    for n, one in enumerate(made):
        assert all(np.abs(one - other).max() > 1 for other in made[:n]), "every set of heads makes another picture"


def test_a_search_ends_and_softpag_and_headhunter_draw_what_it_found(tmp_path):
    pipe = sd3()
    profile = hunted(pipe)
    path = profile.save(tmp_path / "red.safetensors")
    read = Profile.load(path)
    assert read.facts == profile.facts and all(
        read.tensors[name].equal(t) or name == "scores" for name, t in profile.tensors.items()
    )
    torch.testing.assert_close(read.tensors["scores"], profile.tensors["scores"], equal_nan=True, rtol=0, atol=0)
    heads = [tuple(head) for head in profile.tensors["selected"].tolist()]
    scores = profile.tensors["scores"]
    assert scores.shape == (2, 2, 2, 2) and not scores[0].isnan().any()
    assert scores[1][heads[0]].isnan().all() and scores[1].isnan().any(-1).sum() == 1, "what was found is not tried again"
    means = scores.mean(-1)
    assert means[0][heads[0]] == means[0].max() and means[1][heads[1]] == means[1].nan_to_num(-1).max()
    first, second = ([item for item in part] for part in profile.facts["rounds"])
    assert [(item["layer"], item["head"]) for item in first + second] == heads
    assert first[0]["score"] == pytest.approx(float(means[0].max()), rel=1e-6) and first[0]["spread"] >= 0
    assert (
        profile.facts["score"] == second[0]["score"]
        and profile.facts["gain"] == profile.facts["score"] - profile.facts["baseline"]
    )
    assert profile.facts["pairs"] == [["a fox", 0], ["a map", 1]] and profile.facts["objective"] == "mean_red"
    with reattend.apply(pipe, "softpag", heads=heads, strength=0.7, scale=3.0):
        wanted = drawn(pipe)
    with reattend.apply(pipe, "headhunter", profile_path=str(path), strength=0.7) as session:
        assert torch.equal(drawn(pipe), wanted) and session.applied
    with reattend.apply(pipe, "headhunter", heads=heads, strength=0.7, scale=6.0):
        stronger = drawn(pipe)
    base = drawn(pipe)
    assert (stronger - base).norm() > (wanted - base).norm() > 0


@pytest.mark.filterwarnings("error:.*changed nothing visible")
def test_heads_that_do_nothing_are_no_news_in_a_search():
    assert hunted(sd3(), rounds=1, scale=1e-6).facts["gain"] == pytest.approx(0, abs=0.5)


def test_equal_seeds_give_equal_scores_and_a_constant_objective_the_order_of_the_heads():
    pipe = sd3()
    base = drawn(pipe)
    one, other = hunted(pipe), hunted(pipe, batch_size=3)
    assert torch.equal(one.tensors["selected"], other.tensors["selected"])
    torch.testing.assert_close(one.tensors["scores"], other.tensors["scores"], equal_nan=True, rtol=1e-3, atol=0.1)
    again = hunted(pipe)
    torch.testing.assert_close(one.tensors["scores"], again.tensors["scores"], equal_nan=True, rtol=0, atol=0)
    same = hunted(pipe, objective=lambda pictures, prompts: [0.5] * len(pictures), k=3)
    assert same.tensors["selected"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and same.facts["gain"] == 0
    assert torch.equal(drawn(pipe), base), "the pipeline is as it was"


def test_a_search_that_was_cut_off_goes_on(tmp_path):
    pipe, path, calls = sd3(), tmp_path / "new" / "scores.jsonl", []

    def counting(pictures, prompts):
        calls.append(len(pictures))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return mean_red(pictures, prompts)

    stop = 4
    with pytest.raises(KeyboardInterrupt):
        hunted(pipe, objective=counting, batch_size=2, resume=str(path))
    with path.open("a") as file:
        file.write('{"steps": 2, "hea')  # cut off while it was written
    noted, calls[:], stop = len(path.read_text().splitlines()) - 2, [], -1
    assert noted == 6
    profile = hunted(pipe, objective=counting, batch_size=2, resume=str(path))
    # 2 without guidance, 8 and 6 with a head; the set of all heads found was drawn in the last round
    assert sum(calls) == 16 - noted
    assert torch.equal(profile.tensors["selected"], hunted(pipe, batch_size=2).tensors["selected"])
    calls.clear()
    hunted(pipe, objective=counting, batch_size=2, resume=str(path), rounds=3)
    assert sum(calls) == 4, "two heads are left in the third round"
    calls.clear()
    with pytest.raises(ReattendError, match="belongs to another search: its steps is 2, not 3"):
        hunted(pipe, objective=counting, resume=str(path), steps=3)
    for text, words in (("x\n", "is not valid JSON"), ("[]\n", "holds no search of heads"), ("", "holds no search of heads")):
        path.write_text(text)
        with pytest.raises(ReattendError, match=words):
            hunted(pipe, objective=counting, resume=str(path))
    assert not calls


def test_a_search_of_some_layers_with_screening():
    profile = hunted(sd3(), layers=[1], rounds=1, screen_steps=1, keep=0.5)
    scores = profile.tensors["scores"]
    assert profile.tensors["selected"][:, 0].tolist() == [1] and profile.facts["layers"] == [1]
    assert (~scores.isnan().any(-1)).sum() == 1 and scores[0, 0].isnan().all()


def test_recipe_fields_top_layers_several_profiles_and_the_control(tmp_path):
    pipe = tiny_pipelines.stable_diffusion_3()
    table = reattend.sites(pipe)
    from reattend.recipes.kit.profile import fingerprint

    def saved(name, heads):
        return str(
            Profile("headhunter", fingerprint(pipe.transformer), {"selected": torch.tensor(heads)}).save(tmp_path / name)
        )

    one, other = saved("a.safetensors", [[2, 1], [0, 3], [1, 0]]), saved("b.safetensors", [[0, 3], [2, 2]])

    def selected(**more):
        return HeadHunter(**more).selection(table)

    assert selected(profile_path=one) == [(0, 3), (1, 0), (2, 1)]
    assert selected(profile_path=one, top=1) == [(2, 1)]
    assert selected(profile_path=one, layers=[0, 1], top=1) == [(0, 3)]
    assert selected(profile_path=[one, other]) == [(0, 3), (1, 0), (2, 1), (2, 2)]
    assert selected(profile_path=[one, other], top=1) == [(0, 3), (2, 1)]
    control = selected(profile_path=one, random_heads=True, top=2)
    assert len(control) == 2 and not set(control) & {(2, 1), (0, 3), (1, 0)}
    assert selected(profile_path=one, random_heads=True, top=2, seed=1) != control
    with pytest.raises(UnsupportedError, match=r"no head that was found lies in layers \[7\]"):
        reattend.apply(pipe, "headhunter", profile_path=one, layers=[7])
    with pytest.raises(ReattendError, match="made for another model"):
        reattend.apply(tiny_pipelines.stable_diffusion(), "headhunter", profile_path=one)
    with pytest.raises(UnsupportedError, match="head 9 does not exist: layer 2 has heads 0 to 3"):
        reattend.apply(pipe, "headhunter", profile_path=saved("c.safetensors", [[2, 9]]))
    with pytest.raises(UnsupportedError, match="layer 5 does not exist"):
        reattend.apply(pipe.transformer, "headhunter", profile_path=saved("d.safetensors", [[5, 0]]))
    with pytest.raises(ReattendError, match="'selected' of shape"):
        reattend.apply(pipe, "headhunter", profile_path=saved("e.safetensors", [2, 9]))


def test_a_profile_is_kept_for_its_weights_and_serves_the_bare_denoiser(tmp_path, monkeypatch):
    monkeypatch.setattr("reattend.recipes.kit.profile.cache_folder", lambda: tmp_path)
    pipe = sd3()
    with pytest.raises(UnsupportedError, match="headhunter must be told which heads"):
        reattend.apply(pipe, "headhunter")
    options = {"prompts": ["a fox"], "objective": "saturation", "k": 1, "rounds": 1, "steps": 1, "call": GIVEN}
    made = reattend.recipes.cached_profile("headhunter", pipe, **options)
    assert reattend.recipes.cached_profile("headhunter", pipe, **options).facts == made.facts
    for target in (pipe, pipe.transformer):
        with reattend.apply(target, "headhunter"):
            pass
    # a function of a module has the same name in another process, where its address is another
    options["objective"] = mean_red
    made = reattend.recipes.cached_profile("headhunter", pipe, **options)
    copy = types.FunctionType(mean_red.__code__, mean_red.__globals__, mean_red.__name__)
    copy.__qualname__, copy.__module__ = mean_red.__qualname__, mean_red.__module__
    calls = []
    monkeypatch.setattr(HeadHunter, "profile", lambda *_, **__: calls.append(1))
    assert reattend.recipes.cached_profile("headhunter", pipe, **{**options, "objective": copy}).facts == made.facts
    with pytest.raises(AttributeError):
        reattend.recipes.cached_profile("headhunter", pipe, **{**options, "objective": lambda *given: mean_red(*given)})
    assert calls == [1]
    for parameter in pipe.transformer.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(UnsupportedError, match="headhunter must be told which heads"):
        reattend.apply(pipe, "headhunter")


# -- bad input -----------------------------------------------------------------------------------------------------------


def never(*_: Any) -> Any:
    raise AssertionError("drawn before the input was checked")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": []}, r"prompts must be a list of at least one text.*got \[\]"),
        ({"prompts": None}, "prompts must be a list"),
        ({"prompts": "nowhere.json"}, "no prompts file at 'nowhere.json'"),
        ({"prompts": [3]}, r"prompts\[0\] must be a text, got 3"),
        ({"seeds": [1]}, "there are 2 prompts and 1 seeds"),
        ({"seeds": [1, -1]}, "seeds must be a whole number of at least 0"),
        ({"seeds": 3}, "seeds must be a list of whole numbers"),
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        ({"steps": 0}, "steps must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"objective": "beauty"}, "objective must be a callable.*one of sharpness, contrast.*got 'beauty'"),
        ({"objective": None}, "objective must be a callable"),
        (
            {"objective": lambda picture: 1.0},
            r"objective is called as objective\(images, prompts\), and <lambda> does not take that: too many positional",
        ),
        (
            {"objective": lambda pictures, prompts, weight: [1.0]},
            r"objective\(images, prompts\).*missing a required argument: 'weight'",
        ),
        ({"strength": 0.0}, "strength and scale must be above 0"),
        ({"scale": 0.0}, "strength and scale must be above 0"),
        ({"strength": 2.0}, "strength: .*less than or equal to 1"),
        ({"perturbation": "noise"}, "perturbation"),
        ({"bogus": 1}, "bogus is no option of this search; of the recipe's parameters it takes strength, "),
        ({"heads": [[0, 0]]}, "heads is no option of this search"),
        ({"layers": [5]}, "layers: layer 5 does not exist: StableDiffusion3Pipeline has layers 0 to 1"),
        ({"layers": []}, "layers is empty"),
        ({"screen_steps": 2}, "screen_steps must lie between 1 and 1"),
        ({"keep": 0.0}, "keep must lie above 0"),
        ({"call": [1]}, "call must be the pipeline's further arguments"),
        ({"call": {"generator": 1}}, "call must not hold generator"),
        ({"call": {"bogus": 1}}, "call: StableDiffusion3Pipeline takes no argument 'bogus'; it takes prompt, "),
        ({"resume": "."}, "is a folder; name a file"),
    ],
)
def test_bad_options_are_one_error_before_any_picture(options, words, monkeypatch):
    pipe = sd3()
    monkeypatch.setattr(type(pipe), "encode_prompt", never)
    with pytest.raises(ReattendError, match=words):
        hunted(pipe, **options)


def test_models_that_cannot_be_searched(monkeypatch):
    from test_matrix_denoisers import build
    from tiny_language import language_model

    pipe = sd3()
    for model, words in (
        (language_model(), "headhunter needs a diffusion model with self-attention"),
        (pipe.transformer, "give the pipeline, not its SD3Transformer2DModel alone"),
        (pipe.vae, "needs a diffusion model with self-attention"),
    ):
        with pytest.raises(ReattendError, match=words):
            hunted(model)
    with reattend.apply(pipe, "softpag"), pytest.raises(ReattendError, match="end the session that is active"):
        hunted(pipe)
    pipe.transformer = build("SanaTransformer2DModel")[0]
    monkeypatch.setattr(type(pipe), "encode_prompt", never)
    with pytest.raises(ReattendError, match="no head is there to be searched: .*linear attention has no softmax"):
        hunted(pipe)


def test_a_pipeline_that_draws_its_prompts_one_after_the_other_is_told_so():
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput

    class OneByOne(StableDiffusionPipeline):
        def __call__(self, prompt=None, generator=None, output_type="pil", num_inference_steps=9, **more):
            more |= {"num_inference_steps": num_inference_steps, "output_type": output_type}
            made = [super(OneByOne, self).__call__(p, generator=g, **more).images[0] for p, g in zip(prompt, generator)]
            return StableDiffusionPipelineOutput(images=made, nsfw_content_detected=None)

    pipe = OneByOne(**tiny_pipelines.stable_diffusion().components, requires_safety_checker=False)
    with pytest.raises(ReattendError, match="does not draw its 8 pictures in one batch.*batch_size=1"):
        hunted(pipe, rounds=1, call={})
    assert len(hunted(pipe, rounds=1, call={}, batch_size=1).tensors["selected"]) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1.0], "one number for each of 2 pictures, got 1 scores"),
        (torch.ones(2, 2), "one number for each of 2 pictures, got"),
        ([1.0, float("nan")], "objective gave nan for a picture"),
        (np.array([np.inf, 0]), "objective gave inf"),
        (None, "got None"),
        (["a", "b"], "one number for each"),
    ],
)
def test_what_an_objective_must_not_give(given, words):
    with pytest.raises(ReattendError, match=words):
        hunted(sd3(), objective=lambda pictures, prompts: given, steps=1)


# -- objectives ----------------------------------------------------------------------------------------------------------


def flat(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (red, green, blue))


def test_statistics_of_pictures():
    stripes = Image.fromarray((np.indices((8, 8))[1] % 2 * 255).astype(np.uint8)).convert("RGB")
    pictures = [flat(0, 0, 0), flat(255, 0, 0), flat(255, 255, 255), stripes]
    found = {name: scored(objective_of(name)[1], pictures, [""] * 4) for name in BUILT_IN}
    assert found["sharpness"] == [0, 0, 0, pytest.approx(1)] and found["contrast"] == [0, 0, 0, pytest.approx(0.5)]
    assert found["brightness"] == pytest.approx([0, 1 / 3, 1, 0.5]) and found["saturation"] == [0, 1, 0, 0]
    assert found["warmth"] == [0, 1, 0, 0]
    assert scored(near_colour(1, 0, 0), pictures, [""] * 4) == pytest.approx([-1, 0, -(2**0.5), -(0.75**0.5)])


def test_the_likeness_of_a_clip_that_a_user_brings():
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    text = tiny_pipelines.text_config().to_dict()
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = CLIPProcessor(images, tiny_pipelines.tokenizer())
    objective = clip_likeness(model, processor)
    both = scored(objective, [flat(255, 0, 0), flat(0, 0, 255)], ["a fox", "a map"])
    alone = [*scored(objective, [flat(255, 0, 0)], ["a fox"]), *scored(objective, [flat(0, 0, 255)], ["a map"])]
    assert both == pytest.approx(alone, abs=1e-5) and all(-1 <= value <= 1 for value in both)
    assert objective_of(objective)[0].startswith("clip_likeness(")


def test_the_command_line_searches(tmp_path):
    from reattend.__main__ import app
    from typer.testing import CliRunner

    tiny_pipelines.stable_diffusion().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.json").write_text(json.dumps(["a fox"]))
    settings = {
        "prompts": tmp_path / "prompts.json",
        "objective": "warmth",
        "k": 1,
        "rounds": 1,
        "steps": 1,
        "call": json.dumps(GIVEN),
    }
    given = [part for name, value in settings.items() for part in ("--set", f"headhunter.{name}={value}")]
    out = tmp_path / "warm.safetensors"
    told = CliRunner().invoke(app, ["profile", "headhunter", str(tmp_path / "model"), "-o", str(out), *given])
    assert told.exit_code == 0, told.output
    assert Profile.load(out).facts["objective"] == "warmth"
