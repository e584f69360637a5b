"""Words of a denoiser's prompt: their columns on pipelines of every kind, whatever they do to what their text encoders give."""

from __future__ import annotations

from typing import Any

import pytest
import reattend
import torch
from reattend.hooks import Capture, Context, Guide, Latents, Plan, Words, attach
from reattend.hooks.module_hooks import Hook
from reattend.interventions import KeyBias, ReattendError, UnsupportedError
from reattend.zoo.loading import pipeline as load_pipeline
from tiny_denoisers import build
from tiny_llama import tiny_llama
from tiny_prompts import FAMILIES, flux, sd, sd3, sdxl
from torch import Tensor, nn

PROMPT = "a red circle and the sky"
# columns of "red" and of "circle" in the text that the denoiser gets: by letters in CLIP, Gemma and Qwen, by pieces in T5
LETTERS, PIECES = ([2, 3, 4], [5, 6, 7, 8, 9, 10]), ([1], [2, 3])
COLUMNS = {
    "SD": LETTERS,
    "SDXL": LETTERS,
    # two CLIPs with 64 columns, then T5
    "SD3": ([2, 3, 4, 64 + 1], [5, 6, 7, 8, 9, 10, 64 + 2, 64 + 3]),
    "Flux": PIECES,
    "PixArt": PIECES,
    "AuraFlow": PIECES,
    # the start token and the last letter of a template are left of what comes before
    "Sana": ([4, 5, 6], list(range(8, 14))),
    # after "<bos>Be red . <Prompt Start> ", where "red" is no word of the prompt
    "Lumina2": ([27, 28, 29], list(range(31, 37))),
    # letters with spaces, the template before is cut off
    "QwenImage": ([2, 3, 4], list(range(6, 12))),
    "Wan": PIECES,
    "CogVideoX": PIECES,
}


class Seen:
    """What the token maps say at every call of attention with text among its keys: {role: [text columns]} of each row."""

    def __init__(self, pipe: Any, words: Words, *more: Any) -> None:
        self.calls: list[tuple[Any, list[dict[str, list[int]]]]] = []
        self.words, table = words, reattend.sites(pipe).stack("denoiser").kind("cross", "joint")
        self.plan = Plan("look", [words, Capture(table.where(lambda s: s.supported), self.look), *more])

    def look(self, call: Any, edits: Any) -> None:
        text, rows = call.columns("text"), []
        for row in range(call.batch):
            order = text[row].nonzero()[:, 0].tolist()
            roles = {role: call.columns(role)[row].nonzero()[:, 0].tolist() for role in self.words.roles}
            assert all(set(columns) <= set(order) for columns in roles.values())
            rows.append({role: [order.index(column) for column in columns] for role, columns in roles.items()})
        self.calls.append((call.clock, rows))

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        """Those of the last call, which all calls with as many rows share."""
        last = self.calls[-1][1]
        assert all(rows == last for clock, rows in self.calls if list(clock.branches) == list(self.calls[-1][0].branches))
        return last


def run(pipe: Any, call: dict[str, Any], words: Words, *more: Any) -> Seen:
    seen = Seen(pipe, words, *more)
    with attach(pipe, [seen.plan]):
        pipe(**{"prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent", **call})
    return seen


def ours(pipe: Any) -> list[Any]:
    """Our hooks on a pipeline's modules: transformers leaves some of its own on text encoders."""
    modules = [module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules()]
    hooks = [hook for module in modules for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
    return [hook for hook in hooks if isinstance(hook, Hook)]


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_on_every_kind_of_pipeline(family: str) -> None:
    pipe, call = FAMILIES[family]()
    more = {} if family in ("PixArt", "Flux", "Lumina2") else {"negative_prompt": "a square"}
    seen = run(pipe, {**call, **more}, Words("objects", [["red", "circle"]]))
    red, circle = COLUMNS[family]
    for clock, rows in seen.calls:
        conditional = clock.branches.get("conditional", torch.zeros(len(rows), dtype=torch.bool))
        assert conditional.any() or "unconditional" in clock.branches
        for yes, found in zip(conditional, rows, strict=True):
            wanted = {"objects": sorted(red + circle), "objects.0": red, "objects.1": circle} if yes else {}
            assert {role: found[role] for role in ("objects", "objects.0", "objects.1")} == {
                "objects": [], "objects.0": [], "objects.1": [], **wanted
            }  # fmt: skip
            if yes:
                assert set(found["objects"]) < set(found["words"])
    assert any(clock.branches.get("conditional", torch.zeros(1)).any() for clock, _ in seen.calls)
    assert not ours(pipe)


def test_start_and_end_of_the_prompt() -> None:
    pipe, call = sd()
    row = run(pipe, call, Words("prompt")).rows[-1]
    letters = len(PROMPT.replace(" ", ""))
    assert row == {"start": [0], "words": list(range(1, letters + 1)), "end": [letters + 1]}, "no padding"
    pipe, call = sd3()
    row = run(pipe, call, Words("prompt")).rows[-1]
    assert row["start"] == [0] and row["end"] == [letters + 1, 64 + 7]
    assert row["words"] == [*range(1, letters + 1), *range(64, 64 + 7)]


def test_every_prompt_of_a_batch_has_its_own_words_in_each_of_its_pictures() -> None:
    pipe, call = sd()
    both = {**call, "prompt": ["a red fox", "the sky"], "num_images_per_prompt": 2, "guidance_scale": 4.0}
    rows = run(pipe, both, Words("objects", [["red", "fox"], ["sky"]])).rows
    assert [row["objects.0"] for row in rows[4:]] == [[2, 3, 4]] * 2 + [[4, 5, 6]] * 2
    assert [row["objects.1"] for row in rows[4:]] == [[5, 6, 7]] * 2 + [[]] * 2
    assert not any(row["objects"] for row in rows[:4])
    with pytest.raises(ReattendError, match="3 lists of words for 4 conditional rows"):
        run(pipe, both, Words("objects", [["red"], ["sky"], ["sky"]]))
    with pytest.raises(ReattendError, match="'red' is not in prompt 1, which its text encoders read as 'the sky'$"):
        run(pipe, both, Words("objects", [["red"]]))
    rows = run(pipe, both, Words("objects", [[], ["sky"]])).rows
    assert [row["objects"] for row in rows[4:]] == [[]] * 2 + [[4, 5, 6]] * 2, "a prompt may have none"
    four = {**both, "prompt": ["a red fox", "the red sky", "the sky", "a sky"], "num_images_per_prompt": 1}
    with pytest.raises(ReattendError, match="2 lists of words for 4 rows of other prompts"):
        run(pipe, four, Words("objects", [["red"], ["sky"]]))


def test_words_that_occur_more_than_once() -> None:
    pipe, call = sd()
    twice = {**call, "prompt": "red tired reddish Red fox"}
    first, second = [1, 2, 3], [16, 17, 18]
    for occurrence, wanted in ((0, first), (1, second), (-1, second), ("all", first + second)):
        assert run(pipe, twice, Words("w", [["red"]], occurrence=occurrence)).rows[-1]["w.0"] == wanted  # type: ignore[arg-type]
    assert run(pipe, twice, Words("w", [[("red", 1), "red fox"]], occurrence=-1)).rows[-1]["w"] == [*second, 19, 20, 21]
    with pytest.raises(ReattendError, match="'red' occurs 2 times in prompt 0"):
        run(pipe, twice, Words("w", [["red"]]))
    with pytest.raises(ReattendError, match="occurrence=2, but 'red' occurs 2 times"):
        run(pipe, twice, Words("w", [["red"]], occurrence=2))


def test_two_encoders_of_other_texts() -> None:
    pipe, call = sdxl()
    shared = {**call, "prompt_2": "the red sky"}
    with pytest.raises(
        ReattendError, match=r"'red' stands in columns \[2, 3, 4\] of .* and in \[4, 5, 6\] .* share their columns"
    ):
        run(pipe, shared, Words("w", [["red"]]))
    pipe, call = sd3()
    apart = {**call, "prompt_3": "the blue, red square"}
    rows = run(pipe, apart, Words("w", [["red", "blue", "sky"]])).rows
    # one of the two CLIPs' and one of T5's, T5's alone, CLIP's alone
    assert [rows[-1][f"w.{i}"] for i in range(3)] == [[2, 3, 4, 64 + 3], [64 + 1], [17, 18, 19]]
    with pytest.raises(
        ReattendError, match="'fox' is not in prompt 0, .* as 'a red circle and the sky' and 'the blue, red square'"
    ):
        run(pipe, apart, Words("w", [["fox"]]))


@torch.no_grad()
def in_chunks(pipe: Any, *texts: str) -> Tensor:
    """A long prompt as community pipelines encode it: in pieces, each with its own start and end."""
    ids = [pipe.tokenizer(text, padding="max_length", max_length=64, return_tensors="pt").input_ids for text in texts]
    return torch.cat([pipe.text_encoder(each)[0] for each in ids], dim=1)


def test_long_prompts_in_chunks_and_weighted_words() -> None:
    pipe, call = sd()
    seen = Seen(pipe, Words("w", [["fox", ("red", 1)]]))
    with attach(pipe, [seen.plan]):
        long, negative = in_chunks(pipe, "a red circle", "a red fox"), in_chunks(pipe, "", "")
        # a weighted word: its columns hold another state
        long[:, 64 + 5 : 64 + 8] *= 1.4
        pipe(prompt_embeds=long, negative_prompt_embeds=negative, num_inference_steps=2, output_type="latent")
    assert seen.rows[-1]["w.0"] == [64 + 5, 64 + 6, 64 + 7] and seen.rows[-1]["w.1"] == [64 + 2, 64 + 3, 64 + 4]
    assert seen.rows[-1]["start"] == [0, 64] and seen.rows[-1]["end"] == [11, 64 + 8]


def test_texts_that_nobody_saw_encoded() -> None:
    pipe, call = sd()
    before, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": before, "negative_prompt_embeds": negative}
    denoised: list[int] = []
    counting = pipe.unet.register_forward_hook(lambda *_: denoised.append(1))
    with pytest.raises(
        ReattendError, match="came from no text encoder while this session looked: encode the prompt .* or give columns"
    ):
        run(pipe, given, Words("w", [["red"]]))
    assert not denoised, "before the first denoiser call"
    counting.remove()
    rows = run(pipe, given, Words("w", columns=[[[2, 3, 4], [7]]])).rows
    assert [rows[-1][role] for role in ("w", "w.0", "w.1")] == [[2, 3, 4, 7], [2, 3, 4], [7]] and not rows[0]["w"]
    with pytest.raises(ReattendError, match=r"columns \[64\] of a text that has 64 columns"):
        run(pipe, given, Words("w", columns=[[[64]]]))
    # an empty prompt that was seen shares its first column with all others
    seen = Seen(pipe, Words("w", [["red"]]))
    with attach(pipe, [seen.plan]):
        pipe.encode_prompt("", "cpu", 1, False)
        with pytest.raises(ReattendError, match="read as ''; only 1 of its 64 columns came from a text encoder"):
            pipe(num_inference_steps=2, **given)
        # encoded within, it is the same text
        pipe.encode_prompt(PROMPT, "cpu", 1, True)
        pipe(num_inference_steps=2, output_type="latent", **given)
    assert seen.rows[-1]["w"] == [2, 3, 4]


def test_texts_in_another_precision_and_from_an_earlier_layer() -> None:
    pipe, call = sd()
    seen = Seen(pipe, Words("w", [["red"]]))
    with attach(pipe, [seen.plan]), torch.no_grad():
        ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=64, return_tensors="pt").input_ids
        # as pipelines skip layers of CLIP
        early = pipe.text_encoder.final_layer_norm(pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2])
        pipe(prompt_embeds=early, guidance_scale=1.0, num_inference_steps=1, output_type="latent")
    assert seen.rows[-1]["w"] == [2, 3, 4]
    pipe.unet.bfloat16()
    seen = Seen(pipe, Words("w", [["red"]]))
    with attach(pipe, [seen.plan]), torch.no_grad():
        text = torch.cat(pipe.encode_prompt(PROMPT, "cpu", 1, True)[::-1]).bfloat16()
        with reattend.rows("unconditional", "conditional"):
            pipe.unet(torch.randn(2, 4, 8, 8, dtype=torch.bfloat16), torch.tensor(5), encoder_hidden_states=text)
    assert [row["w"] for row in seen.rows] == [[], [2, 3, 4]], "also in a loop of the user's own"


def test_rows_of_guides_follow_the_rows_that_they_copy() -> None:
    pipe, call = sd()
    two = {**call, "prompt": ["a red fox", "the red sky"], "guidance_scale": 4.0}
    first, second = [2, 3, 4], [4, 5, 6]
    for conditional, copies in ((True, [first, second]), (False, [[], []])):
        rows = run(pipe, two, Words("w", [["red"]]), Guide("other", 2.0, conditional=conditional)).rows
        assert [row["w"] for row in rows] == [[], [], first, second, *copies]


def test_a_guide_with_a_text_of_its_own_has_its_own_words() -> None:
    pipe, call = sd()
    for text, wanted in (("the red sky", [4, 5, 6]), ("the sky", [])):
        embeds: list[Tensor] = []

        def own(call: Any, text: str = text, embeds: list[Tensor] = embeds) -> dict[str, Tensor]:
            embeds.append(pipe.encode_prompt(text, "cpu", 1, False)[0])
            return {"encoder_hidden_states": embeds[0]}

        rows = run(pipe, {**call, "guidance_scale": 4.0}, Words("w", [["red"]]), Guide("other", 2.0, arguments=own)).rows
        assert [row["w"] for row in rows] == [[], [2, 3, 4], wanted]


def test_a_second_text_after_the_prompt_has_none_of_its_words() -> None:
    pipe, call = sd()
    words, reading = Words("w", [["red"]]), reattend.sites(pipe).stack("denoiser").kind("cross")
    use: Any = lambda at, text: KeyBias(bias=text.columns * 0.1)  # noqa: E731
    second = Context("second", reading, use, texts="a red sky", place="after")
    plain, longer = run(pipe, call, words), run(pipe, call, words, second)
    assert longer.rows == plain.rows and longer.rows[-1]["words"]


def test_further_passes_of_a_step_know_the_words() -> None:
    pipe, call = sd()
    seen: list[Any] = []
    look = Capture(reattend.sites(pipe).stack("denoiser").kind("cross"), lambda at, edits: seen.append(at.columns("w.0")))

    def before(step: Any) -> None:
        step.look(step.latents, text="conditional")

    with attach(pipe, [Plan("look", [Latents(before=before, steps=[Words("w", [["sky"]]), look])])]):
        pipe(prompt=[PROMPT, "the sky"], num_inference_steps=1, output_type="latent", **call)
    assert seen and all([row.nonzero()[:, 0].tolist() for row in at] == [[17, 18, 19], [4, 5, 6]] for at in seen)


def test_models_without_a_prompt_that_could_be_read() -> None:
    unet = build("UNet2DConditionModel")[0]
    with pytest.raises(
        UnsupportedError, match="text encoders and their tokenizers, and UNet2DConditionModel has none: give columns"
    ):
        attach(unet, [Plan("look", [Words("w", [["red"]])])])
    with pytest.raises(UnsupportedError, match="this model has no denoiser: Spans serves"):
        attach(tiny_llama(), [Plan("look", [Words("w", [["red"]])])])
    pipe, _ = flux()
    assert list(pipe.components)  # its CLIP gives one vector, no columns
    model, inputs = build("FluxTransformer2DModel")
    seen = Seen(model, Words("w", columns=[[[1, 2]], [[4]]]))
    with attach(model, [seen.plan]), torch.no_grad():
        model(**inputs)
    assert [row["w.0"] for row in seen.rows] == [[1, 2], [4]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "image"}, "words need a name of their own, other than start, words, .* got 'image'"),
        ({"name": "words"}, "words need a name of their own, other than start, words, .* got 'words'"),
        ({"words": [["red"]], "columns": [[[1]]]}, "words or columns, not both"),
        ({"words": []}, "words must hold a list for every prompt, .* that names something"),
        ({"words": [[]]}, "words must hold a list for every prompt, .* that names something"),
        ({"words": "red"}, "words must hold a list for every prompt"),
        ({"words": ["red"]}, "words must hold a list for every prompt"),
        ({"columns": [[1, 2]]}, "columns of a word must be numbers"),
        ({"words": [[" "]]}, "a word to find .* got ' '"),
        ({"columns": [[[]]]}, "columns of a word must be numbers"),
        ({"columns": [[[-1]]]}, "columns of a word must be numbers"),
        ({"words": [["red"]], "occurrence": "last"}, 'occurrence must be a number, "all" or None'),
    ],
)
def test_bad_arguments(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ReattendError, match=said):
        Words(**{"name": "w", **given})


def test_steps_that_mark_different_words_by_one_name() -> None:
    pipe, _ = sd()
    red, sky = Plan("a", [Words("w", [["red"]])]), Plan("b", [Words("w", [["sky"]])])
    with attach(pipe, [red]), pytest.raises(UnsupportedError, match="two steps mark different words of the prompt as 'w'"):
        attach(pipe, [sky])
    with pytest.raises(UnsupportedError, match="different words of the prompt as 'w.0'"):
        attach(pipe, [Plan("both", [Words("w", [["red"]]), Words("w.0", columns=[[[1]]])])])
    with attach(pipe, [red]), attach(pipe, [Plan("other", [Words("w", [["red"]]), Words("v", [["sky"]])])]):
        pass


@pytest.mark.parametrize("name", ["shapes-sd", "shapes-sd3"])
def test_words_of_the_zoo(name: str) -> None:
    """Trained models with tokenizers that know whole words: each map's columns are the words' places among the tokens."""
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    text = "a red circle and a blue square"
    rows = run(pipe, {"prompt": text, "num_inference_steps": 1}, Words("w", [["red", "Blue square"]])).rows
    words = ["", *text.split()]
    assert rows[-1]["w.0"] == [words.index("red")] and rows[-1]["w.1"] == [words.index("blue"), words.index("square")]
    assert rows[-1]["end"] == [len(words)] and not rows[0]["w"]


@pytest.mark.parametrize("name", ["SD", "SD3", "Flux"])
def test_what_each_encoder_wrote_is_there_for_the_plan(name):
    """For every conditional row, with the ids of the tokens and the columns in which they stand."""
    pipe, given = FAMILIES[name]()
    words, seen = Words("w", [["red"]]), []
    table = reattend.sites(pipe).stack("denoiser").kind("cross", "joint")
    look = Capture(table[:1], lambda call, edits: seen.append((call.memory[words], call.clock)))
    with attach(pipe, [Plan("look", [words, look])]):
        pipe(prompt=["a red sky", PROMPT], num_inference_steps=1, output_type="latent", **given)
    texts, clock = seen[0]
    assert list(texts) == clock.branches["conditional"].nonzero()[:, 0].tolist()
    for row, prompt in zip(texts, ("a red sky", PROMPT), strict=True):
        for text in texts[row]:
            assert prompt in text.transcript.text
            assert len(text.stream.ids) == len(text.stream.columns) and set(text.stream.columns) <= text.stream.touched
