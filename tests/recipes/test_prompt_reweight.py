"""prompt-reweight on whole pipelines: words as users give them, and editing a picture by its prompt, as in prompt-to-prompt."""

from __future__ import annotations

from typing import Any

import pytest
import reattend
import torch
from reattend.hooks.tokens.text_columns import Stream
from reattend.interventions import ReattendError
from reattend.recipes import plain_prompt
from reattend.recipes.kit.prompt_edits import Tokens, alignment, mapping, replaced
from reattend.recipes.kit.weighted_prompts import weighted
from tiny_prompts import FAMILIES
from torch import Tensor

SOURCE, EDITED, LONGER = "a red circle and the sky", "a blue circle and the sky", "a red circle and the blue sky"
# a run that is refused, or whose part of the schedule is empty, says that nothing acted
pytestmark = pytest.mark.filterwarnings("ignore:recipe .* never acted")
WHOLE = {"stop": 1.0, "self_stop": 1.0}


def draw(pipe: Any, prompts: Any, given: dict[str, Any], **more: Any) -> Tensor:
    count = len(prompts) if isinstance(prompts, list) else 1
    noise = [torch.Generator().manual_seed(3) for _ in range(count * more.get("num_images_per_prompt", 1))]
    call = {"num_inference_steps": 4, "output_type": "latent", "generator": noise, **given, **more}
    return pipe(prompt=prompts, **call).images


# -- words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "plain", "found"),
    [
        ("a (red:1.4) circle", "a red circle", [(("red", 0), 1.4)]),
        ("a red circle, (red:-1) square", "a red circle, red square", [(("red", 1), -1.0)]),
        ("(a red circle:2) and (sky:.5)", "a red circle and sky", [(("a red circle", 0), 2.0), (("sky", 0), 0.5)]),
        ("a (round) circle", "a (round) circle", []),
        (r"\(3:2\) and a (red: 3 ) \\ circle", "(3:2) and a red \\ circle", [(("red", 0), 3.0)]),
        ("reddish (red:2)", "reddish red", [(("red", 0), 2.0)]),
        (r"a (circle \(big\):2)", "a circle (big)", [(("circle (big)", 0), 2.0)]),
        ("a (circle (big):2), ((red:3))", "a circle (big), (red)", [(("circle (big)", 0), 2.0), (("red", 0), 3.0)]),
        ("at 3:20 the ratio is 2:1 :)", "at 3:20 the ratio is 2:1 :)", []),
        # counted as the words of a prompt are: passages that overlap, other blanks, scripts without blanks
        ("red (red red:2)", "red red red", [(("red red", 1), 2.0)]),
        ("red fox, (red  fox:2)", "red fox, red  fox", [(("red  fox", 1), 2.0)]),
        ("大红(红:2)", "大红红", [(("红", 1), 2.0)]),
    ],
)
def test_a_prompt_with_weights(prompt, plain, found):
    assert plain_prompt(prompt) == plain and plain_prompt([prompt, "x"]) == [plain, "x"]
    assert weighted(prompt) == found


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a (red:1,4) circle", "a weight in a prompt is a number"),
        ("a (red:) circle", "a weight in a prompt is a number"),
        ("a (red:nan) circle", "a weight in a prompt is a number"),
        ("a (red:1e9) circle", "a weight in a prompt is a number"),
        ("a (red:1.4 circle", "no closing bracket after '.red:1.4 circle'"),
        (r"a (red:1.4\) circle", "no closing bracket after"),
        ("a red:1.4) circle", "no opening bracket before 'a red:1.4.'"),
        ("re(d:2) circle", "belongs to whole words or passages; '.d:2.' stands inside a word"),
        (3, "prompt must be a text or a list of texts, got 3"),
        (["a", None], "prompt must be a text or a list of texts"),
        ("a (:2) circle", "belongs to a word or passage before its colon"),
        ("a ((red:2) circle:1.2)", "cannot stand in one another"),
    ],
)
def test_weights_that_mean_nothing(prompt, said):
    with pytest.raises(ReattendError, match=said):
        plain_prompt(prompt)


@pytest.mark.parametrize("name", ["SD", "SD3", "Flux"])
def test_a_weighted_prompt_is_its_words_with_factors(name):
    pipe, given = FAMILIES[name]()
    prompt, drawn = "a (red:1.4) circle and a red (sky:0)", []
    plain = plain_prompt(prompt)
    ways = ([{"words": prompt}], [{"words": {"red": 1.4}, "occurrence": 0}, {"words": {"sky": 0.0}}])
    for recipes in ways:
        with reattend.apply(pipe, *[("prompt-reweight", one) for one in recipes]):
            drawn.append(draw(pipe, plain, given))
    torch.testing.assert_close(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], draw(pipe, plain, given))


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_a_pipeline_that_is_given_the_weights_as_text(name):
    pipe, given = FAMILIES[name]()
    prompt = "a (red:1.4) circle"
    with reattend.apply(pipe, "prompt-reweight", words=prompt, stop=1.0):
        with pytest.raises(ReattendError, match=r"prompt-reweight: the pipeline was given '.red:1.4.' as text.*plain_prompt"):
            draw(pipe, prompt, given)
        draw(pipe, plain_prompt(prompt), given)


@pytest.mark.parametrize("name", ["SD", "SDXL", "SD3", "Flux"])
def test_words_that_are_missing_split_repeated_or_cut_off(name):
    pipe, given = FAMILIES[name]()
    drawn = {}
    for label, recipe in {
        "plain": {"words": "circle", "factor": 1.0},
        "all": {"words": "red"},
        "first": {"words": "red", "occurrence": 0},
        "last": {"words": "red", "occurrence": 1},
        "split": {"words": "circle"},
    }.items():
        with reattend.apply(pipe, "prompt-reweight", **recipe) as session:
            drawn[label] = draw(pipe, "a red circle and a red sky", given)
        assert (session.applied > 0) == (label != "plain")
    assert all(not torch.equal(a, b) for n, a in enumerate(drawn.values()) for b in list(drawn.values())[:n])
    long = "a red circle and " * 20 + "the sky"
    for word in ("wolf", "sky"):
        said = f"'{word}' is not in prompt 0, which its text encoders read as"
        with reattend.apply(pipe, "prompt-reweight", words=word), pytest.raises(ReattendError, match=said):
            draw(pipe, "a red circle" if word == "wolf" else long, given)
    with reattend.apply(pipe, "prompt-reweight", words="red", occurrence=0) as session:
        draw(pipe, long, given)
    assert session.applied


def test_prompts_that_were_encoded_before_the_session():
    pipe, given = FAMILIES["SD"]()
    names = ("prompt_embeds", "negative_prompt_embeds")
    before = dict(zip(names, pipe.encode_prompt(SOURCE, "cpu", 1, True), strict=True))
    for recipe in ({"words": "red"}, {"edit": "replace"}):
        with reattend.apply(pipe, "prompt-reweight", **recipe), pytest.raises(ReattendError, match="encode the prompt while"):
            draw(pipe, None, {**given, **before})
    with reattend.apply(pipe, "prompt-reweight", columns=[([2, 3, 4], 2.0)]):
        by_column = draw(pipe, None, {**given, **before})
    with reattend.apply(pipe, "prompt-reweight", words="red"):
        within = dict(zip(names, pipe.encode_prompt(SOURCE, "cpu", 1, True), strict=True))
        assert torch.equal(draw(pipe, None, {**given, **within}), by_column)


# -- columns of two prompts ----------------------------------------------------------------------------------------------


def tokens(prompt: str, pieces: dict[str, int], room: int = 12) -> Tokens:
    """Words of so many tokens (one, where not said), with start and end; ids are the words' own."""
    ids, words, column = [0], [], 1
    for word in prompt.split():
        columns = list(range(column, column + pieces.get(word, 1)))
        words.append((word, columns))
        ids += [hash((word, n)) for n in range(len(columns))]
        column += len(columns)
    return Tokens([*ids, 1], list(range(column + 1)), words, frozenset(range(room)))


def test_a_swapped_word_with_more_tokens_moves_what_follows_only_if_asked_to():
    source, edited = tokens("a cat on mat", {}), tokens("a tiger on mat", {"tiger": 2})
    for aligned, wanted in ((False, {4: 4, 5: 5}), (True, {4: 3, 5: 4})):
        found, kept = replaced(source, edited, "prompt 1", aligned)
        assert found[2] == found[3] == {2: 0.5} and found[1] == {1: 1.0} and not kept
        assert {column: next(iter(found[column])) for column in wanted} == wanted
    # padding at the end has no partner where the source has fewer columns before it
    assert replaced(edited, source, "prompt 1", True)[0][11] == {}


def test_each_column_of_prompts_that_are_alike_keeps_its_own():
    both = [("clip", tokens("a cat on mat", {}))]
    for kind in ("replace", "refine"):
        transfer, own = mapping(kind, both, both, 12, False, "prompt 1")
        assert torch.equal(transfer, torch.eye(12)) and not own.any()


def test_new_words_keep_their_own_columns():
    source, edited = [("clip", tokens("a cat on mat", {}))], [("clip", tokens("a fluffy cat on mat", {"fluffy": 2}))]
    transfer, own = mapping("refine", source, edited, 12, False, "prompt 1")
    assert own.nonzero()[:, 0].tolist() == [2, 3]
    assert transfer.argmax(dim=0)[[1, 4, 5, 6, 7]].tolist() == [1, 2, 3, 4, 5] and not transfer[:, 2:4].any()
    assert alignment([0, 5, 6, 1], [0, 5, 1]) == [0, 1, 3] and alignment([0, 1], [0, 7, 1]) == [0, None, 1]


def test_what_prompts_cannot_be_mapped():
    one, two = tokens("a cat", {}), tokens("a fluffy cat", {})
    with pytest.raises(ReattendError, match='the source has 2, prompt 1 has 3; "refine" serves others'):
        replaced(one, two, "prompt 1")
    with pytest.raises(ReattendError, match="not read into the same columns by clip"):
        mapping("refine", [("clip", one)], [("clip", tokens("a cat", {}, room=20))], 20, False, "prompt 1")
    assert Stream("clip").touched == set()


# -- edits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SD", "SDXL", "SD3", "Flux", "PixArt"])
@pytest.mark.parametrize(("kind", "edited"), [("replace", EDITED), ("refine", LONGER)])
def test_an_edit_brings_the_picture_nearer_to_its_source_which_keeps_its_bits(name, kind, edited):
    pipe, given = FAMILIES[name]()
    plain = draw(pipe, [SOURCE, edited], given)
    with reattend.apply(pipe, "prompt-reweight", edit=kind, **WHOLE) as session:
        found = draw(pipe, [SOURCE, edited], given)
        assert torch.equal(draw(pipe, [SOURCE, edited], given), found)
    assert session.applied and torch.equal(found[0], plain[0]) and not torch.equal(found[1], plain[1])
    assert torch.equal(draw(pipe, [SOURCE, edited], given), plain)


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_the_same_prompt_twice_stays_the_same_picture(name):
    pipe, given = FAMILIES[name]()
    same = draw(pipe, [SOURCE, SOURCE], given)
    with reattend.apply(pipe, "prompt-reweight", edit="refine", **WHOLE) as session:
        found = draw(pipe, [SOURCE, SOURCE], given)
    torch.testing.assert_close(found, same, atol=1e-4, rtol=1e-4)
    assert session.applied


def test_text_and_image_have_parts_of_the_schedule_of_their_own():
    """Of four steps the text's maps in one, int(0.2 * 5); the image's in three, int(0.9 * 4), or in none."""
    pipe, given = FAMILIES["SD"]()
    for stop, times in ((0.9, 3), (0.0, 0)):
        with reattend.apply(pipe, "prompt-reweight", edit="replace", stop=0.2, self_stop=stop) as session:
            draw(pipe, [SOURCE, EDITED], given)
        counts = session.stats["prompt-reweight"]
        assert {count for site, count in counts.items() if site.endswith("attn2")} == {1}
        assert {count for site, count in counts.items() if site.endswith("attn1")} == ({times} if times else set())


@pytest.mark.parametrize("name", ["SD", "SDXL", "SD3", "Flux"])
def test_the_first_run_of_a_session_as_the_source(name):
    """The same picture as in one batch, for later runs too; the source's own run is as without the recipe."""
    pipe, given = FAMILIES[name]()
    with reattend.apply(pipe, "prompt-reweight", edit="replace", words=[{}, {"sky": 3.0}], **WHOLE):
        together = draw(pipe, [SOURCE, EDITED], given)
    plain = draw(pipe, SOURCE, given)
    with reattend.apply(pipe, "prompt-reweight", edit="replace", words={"sky": 3.0}, source="run", **WHOLE):
        assert torch.equal(draw(pipe, SOURCE, given), plain)
        apart = draw(pipe, EDITED, given)
        assert torch.equal(draw(pipe, EDITED, given), apart)
        other = draw(pipe, SOURCE, given)
    scale = together.abs().max()
    torch.testing.assert_close(apart[0] / scale, together[1] / scale, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(other, plain, atol=1e-4)  # the source's prompt too has its factors in a later run


def test_a_session_that_begins_again_has_a_new_source():
    pipe, given = FAMILIES["SD"]()
    plain = draw(pipe, EDITED, given)
    session = reattend.apply(pipe, "prompt-reweight", edit="refine", words={"sky": 3.0}, source="run", **WHOLE)
    draw(pipe, SOURCE, given)
    assert not torch.equal(draw(pipe, EDITED, given), plain)
    session.remove()
    with session:
        assert torch.equal(draw(pipe, EDITED, given), plain)
        found = draw(pipe, LONGER, given)
    with reattend.apply(pipe, "prompt-reweight", edit="refine", words=[{}, {"sky": 3.0}], **WHOLE):
        wanted = draw(pipe, [EDITED, LONGER], given)
    torch.testing.assert_close(found[0], wanted[1], atol=1e-3, rtol=1e-3)


def test_several_pictures_of_each_prompt():
    pipe, given = FAMILIES["SD"]()
    prompts, noise = [SOURCE, EDITED, SOURCE], [torch.Generator().manual_seed(n) for n in (1, 2) * 3]
    with reattend.apply(pipe, "prompt-reweight", edit="replace", pictures=2, **WHOLE):
        found = draw(pipe, prompts, {**given, "num_images_per_prompt": 2, "generator": noise})
    for n in (0, 1):
        with reattend.apply(pipe, "prompt-reweight", edit="replace", **WHOLE):
            noise = [torch.Generator().manual_seed(n + 1) for _ in range(2)]
            alone = draw(pipe, prompts[:2], {**given, "generator": noise})
        torch.testing.assert_close(found[[n, 2 + n]], alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[4 + n], found[n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_beside_a_guide_its_branch_is_edited_alike(guidance):
    """A guide of hardly any weight: the same picture. Factors leave the source's copies alone too."""
    pipe, given = FAMILIES["SD"]()
    more = {**given, "guidance_scale": guidance}
    edit = ("prompt-reweight", {"edit": "replace", "words": [{}, {"sky": 3.0}], **WHOLE})
    with reattend.apply(pipe, edit):
        wanted = draw(pipe, [SOURCE, EDITED], more)
    with reattend.apply(pipe, edit, ("pag", {"scale": 1e-6})):
        found = draw(pipe, [SOURCE, EDITED], more)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    with reattend.apply(pipe, ("pag", {"scale": 2.0})):
        source = draw(pipe, [SOURCE, EDITED], more)[0]
    with reattend.apply(pipe, edit, ("pag", {"scale": 2.0})):
        assert torch.equal(draw(pipe, [SOURCE, EDITED], more)[0], source)


class Controlled:
    """Attention written out, in which the second prompt's maps are the first one's, times a factor at some columns."""

    def __init__(self, step: list[int], across: int, within: int, factors: Tensor) -> None:
        self.step, self.across, self.within, self.factors = step, across, within, factors

    def __call__(self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        read = hidden if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(part) for part in (attn.to_q(hidden), attn.to_k(read), attn.to_v(read)))
        weights = attn.get_attention_scores(q, k, None).unflatten(0, (4, -1))
        if encoder_hidden_states is not None and self.step[0] < self.across:
            weights = torch.cat([weights[:3], weights[2:3] * self.factors])
        elif encoder_hidden_states is None and weights.shape[3] <= 16 and self.step[0] < self.within:
            weights = torch.cat([weights[:3], weights[2:3]])
        out = weights.flatten(0, 1) @ v
        return attn.to_out[0](attn.batch_to_head_dim(out))


def test_a_whole_run_is_that_of_processors_written_out():
    """Words of as many letters: the mapping is the identity. Four steps: the text's maps in two of them (2 = int(0.5 * 5)), the image's in
    two (int(0.5 * 4)), where they have 16 places."""
    pipe, given = FAMILIES["SD"]()
    prompts = ["a red sky", "a sad sky"]
    recipe = {"edit": "replace", "words": [{}, {"sky": 3.0}], "stop": 0.5, "self_stop": 0.5, "self_places": 16}
    with reattend.apply(pipe, "prompt-reweight", **recipe):
        found = draw(pipe, prompts, given)
    plain, step, factors = draw(pipe, prompts, given), [0], torch.ones(pipe.tokenizer.model_max_length)
    factors[5:8] = 3.0
    own = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Controlled(step, 2, 2, factors))

    def count(_: Any, number: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        step[0] = number + 1
        return kept

    wanted = draw(pipe, prompts, given, callback_on_step_end=count)
    pipe.unet.set_attn_processor(own)
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=1e-4)
    assert (found[1] - plain[1]).abs().max() > 1e-3 * scale


@pytest.mark.parametrize(
    ("recipe", "prompts", "said"),
    [
        (
            {"edit": "replace"},
            [SOURCE, LONGER],
            'prompts of as many words: the source has 6, prompt .* has 7; "refine" serves others',
        ),
        ({"edit": "refine"}, SOURCE, "first of several prompts, each with 1 picture.*this batch has 1"),
        ({"edit": "refine", "pictures": 2}, [SOURCE, EDITED, EDITED], "each with 2 picture.*this batch has 3"),
        ({"edit": "refine", "words": {"blue": 2.0}}, [SOURCE, LONGER], "'blue' is not in prompt 0"),
    ],
)
def test_refusals_before_the_first_step(recipe, prompts, said):
    pipe, given = FAMILIES["SD"]()
    with reattend.apply(pipe, "prompt-reweight", **recipe), pytest.raises(ReattendError, match=said):
        draw(pipe, prompts, given)


def test_a_source_run_needs_as_many_steps_and_a_text_without_hidden_padding():
    pipe, given = FAMILIES["SD"]()
    with reattend.apply(pipe, "prompt-reweight", edit="refine", source="run"):
        draw(pipe, SOURCE, given)
        with pytest.raises(ReattendError, match="the reference run had 4 steps, this one has 3"):
            draw(pipe, LONGER, given, num_inference_steps=3)
    pipe, given = FAMILIES["PixArt"]()
    with reattend.apply(pipe, "prompt-reweight", edit="refine", source="run"):
        draw(pipe, SOURCE, given)
        with pytest.raises(ReattendError, match="give both prompts in one batch"):
            draw(pipe, LONGER, given)


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_a_source_run_of_another_size_and_without_guidance(name):
    pipe, given = FAMILIES[name]()
    with reattend.apply(pipe, "prompt-reweight", edit="replace", source="run", **WHOLE):
        draw(pipe, SOURCE, given, guidance_scale=1.0)
        edited = draw(pipe, EDITED, given, guidance_scale=4.0)
        with pytest.raises(ReattendError, match="prompt-reweight: the source run had pictures or a text of another size"):
            draw(pipe, EDITED, {**given, "height": 16, "width": 32})
    assert not torch.equal(edited, draw(pipe, EDITED, given, guidance_scale=4.0))


@pytest.mark.parametrize("other", [("vsf", {"negative": "the sky"}), ("regional", {"regions": {"the sky": [0, 0, 1, 0.5]}})])
def test_an_edit_takes_no_weights_of_a_text_that_others_made_longer(other):
    pipe, _ = FAMILIES["SD"]()
    edit = ("prompt-reweight", {"edit": "replace"})
    for recipes in ((edit, other), (other, edit)):
        with pytest.raises(
            ReattendError, match=f"'prompt-reweight' takes weights over the whole text at .*{other[0]}.*use one of the two"
        ):
            reattend.apply(pipe, *recipes)
    with reattend.apply(pipe, edit), pytest.raises(ReattendError, match="use one of the two"):
        reattend.apply(pipe, other)


@pytest.mark.parametrize(
    ("given", "prompt", "said"),
    [
        (
            {"words": "a (red:1.4) sky"},
            "a sky",
            r"'red' is not in prompt 0, .*: a prompt with weights .*plain_prompt\(prompt\)",
        ),
        (
            {"words": {"square": 2.0}, "edit": "replace"},
            ["a red sky", "a red square"],
            r"'square' is not in prompt 0, .*\[{}, {word: factor}\]",
        ),
    ],
)
def test_what_may_be_wrong_where_a_word_is_not_in_its_prompt(given, prompt, said):
    pipe, call = FAMILIES["SD"]()
    with reattend.apply(pipe, "prompt-reweight", **given), pytest.raises(ReattendError, match=said):
        pipe(prompt, num_inference_steps=1, output_type="latent", **call)


def test_one_word_by_itself_is_named_as_in_a_list():
    for slug in ("attend-and-excite", "attencraft"):
        assert reattend.recipe(slug, words="red").words == reattend.recipe(slug, words=["red"]).words == ["red"]


def test_videos_and_bare_denoisers_are_not_edited():
    from tiny_denoisers import build

    with pytest.raises(ReattendError, match="edits pictures; UNetMotionModel draws videos"):
        reattend.apply(build("UNetMotionModel")[0], "prompt-reweight", edit="refine")
    with pytest.raises(ReattendError, match="reads the prompt with text encoders"):
        reattend.apply(build("UNet2DConditionModel")[0], "prompt-reweight", edit="refine")
