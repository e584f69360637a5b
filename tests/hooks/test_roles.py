"""Which tokens are text, which are image and where: asked of each denoiser class itself.

One text token or one patch of the latents is changed, all attention is switched off (so that no token learns of another one), and the key
columns that change with it are compared with the roles and grids that the token map tells.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import reattend
import tiny_denoisers
import torch
from denoiser_classes import BUILDERS
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.sites.families import FAMILIES, family_of
from reattend.interventions import Call, HeadGain, MixValue, ReattendError, TokenMap, reference
from torch import Tensor, nn

# whose tokens, or the keys of whose cross-attention, cannot be told apart
UNKNOWN = {
    "Cosmos3OmniTransformer", "Flux3Transformer2DModel (edit)", "FluxControlNetModel (union)", "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel", "I2VGenXLUNet", "Ideogram4Transformer2DModel", "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel", "Krea2Transformer2DModel", "MiniMaxH3Transformer3DModel", "MiniMaxMusic3Transformer1DModel",
    "OmniGenTransformer2DModel", "PriorTransformer", "QwenImage21Transformer2DModel", "RFD4ProteinaTransformer",
    "TransformerTemporalModel",
}  # fmt: skip
# whose latents are no images, or come without the places of their tokens, so that there is no grid
GRIDLESS = {
    "AceStepTransformer1DModel", "HeliosTransformer3DModel", "LongCatAudioDiTTransformer", "SD3ControlNetModel (image only)",
    "SanaWMLTX2RefinerTransformer3DModel", "StableAudio3DiTModel", "StableAudioDiTModel", "UVit2DModel",
}  # fmt: skip
# whose streams are unknown, and whose cross-attention is not
CROSS_ONLY = {"BriaFibo2Transformer2DModel"}
# none of whose attention is intercepted, or which does not run here
REFUSED = {"CosmosControlNetModel", "Kandinsky6SRTransformer3DModel", "T5FilmDecoder", "UNet1DModel"}
# whose self-attention is not intercepted, so that it cannot be switched off here
MIXING = {"AnyFlowFARTransformer3DModel", "WanAnimate2Transformer3DModel"}
# which begin with a norm over all of the picture
NORMED = {"DreamLiteTransformer2DModel", "Transformer2DModel"}
# latents that are packed are changed at this token, others in these rows and columns
TOKEN, ROWS, COLS = 9, slice(2, 4), slice(4, 6)
# the token of a denoiser's text that is changed
WORD = 1
# diffusers' own Chroma imports the class from its old place
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:.*(FluxPosEmbed|Transformer2DModelOutput)"),
]


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if not hasattr(diffusers, name.split(" ")[0]):
        pytest.skip(f"this diffusers has no {name}")
    return tiny_denoisers.build(name, among=BUILDERS)


def calls_of(model: nn.Module, inputs: dict[str, Any]) -> list[tuple[Call, Tensor, Tensor]]:
    """(call, its keys, its queries) of every call of a pass in which no token learns of another one."""
    seen = []

    def note(call: Call) -> HeadGain:
        seen.append((call, call.key.clone(), call.query.clone()))
        return HeadGain(factor=0.0)

    table = reattend.sites(model).where(lambda s: s.supported)
    with torch.no_grad(), attach(model, [Plan("silent", [Edits(table, note)])]):
        model(**inputs)
    return seen


def changed(inputs: dict[str, Any], name: str, at: Any, sample: int) -> dict[str, Any]:
    """The inputs with one place of one sample's argument changed."""
    value = inputs[name]
    if isinstance(value, list):
        value = [part.clone() for part in value]
        one = value[sample]
    else:
        value = value.clone()
        one = value[:, sample] if name.endswith("llama3") else value[sample]  # its first axis is the layers of the text encoder
    one[at] += 1 + torch.rand_like(one[at])
    return {**inputs, name: value}


def moved(before: Tensor, after: Tensor, row: int) -> Tensor:
    """[tokens]: how far each one's key or query went."""
    return (after - before).abs().amax(dim=(1, 3))[row]


def own_row(call: Call, sample: int, batch: int) -> int:
    """The first row of a call that belongs to a sample, where frames or places are folded into the batch."""
    return sample * (call.batch // batch)


def test_every_class_with_facts_is_tried() -> None:
    assert {name.split(" ")[0] for name in BUILDERS} >= set(FAMILIES)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in REFUSED])
def test_what_changes_with_a_word_and_with_a_patch(name: str) -> None:
    model, inputs = build(name)
    before = calls_of(model, inputs)
    texts = [arg for arg in dict.fromkeys(family_of(model).text) if inputs.get(arg) is not None]
    found: set[str] = set()
    for arg in texts:
        value = inputs[arg][1] if isinstance(inputs[arg], list) else inputs[arg]
        word = min(WORD, value.shape[-2] - 1)
        # the text of AnimateDiff comes once for each frame
        sample = len(value) // 2 if isinstance(inputs[arg], torch.Tensor) and value.dim() == 3 else 1
        found |= with_a_word(
            before, calls_of(model, changed(inputs, arg, (..., word, slice(None)), sample)), word if len(texts) == 1 else None
        )
    kinds = {site.kind for site in reattend.sites(model)} & {"cross", "joint"}
    if name in UNKNOWN:
        assert not found & kinds and any(call.tokens.unknown for call, _, _ in before)  # type: ignore[union-attr]
        return
    told = {"cross"} if name in CROSS_ONLY else kinds
    assert found & {"cross", "joint"} == (told if texts else set())
    if name in GRIDLESS:
        assert not any(grid for call, _, _ in before for grid in call.tokens.grids)  # type: ignore[union-attr]
        return
    arg = family_of(model).latents or ("hidden_states" if "hidden_states" in inputs else "sample")
    arg = "controlnet_cond" if name == "SparseControlNetModel" else arg  # its latents are no more than their shape
    one = inputs[arg][0]
    channels_last = family_of(model).axes.endswith("c")
    place = TOKEN if one.dim() == 2 else (..., ROWS, COLS, slice(None)) if channels_last else (..., ROWS, COLS)
    height = 0 if one.dim() == 2 else one.shape[-3 if channels_last else -2]
    blurred = hasattr(model, "down_blocks") or name.startswith("Sana") or name in MIXING | NORMED
    after = calls_of(model, changed(inputs, arg, place, 0))
    if name == "Kandinsky3UNet":  # what comes up from its fourth level has gone all over the picture
        before, after = ([c for c in calls if "up_blocks" not in c[0].site.name] for calls in (before, after))  # type: ignore[union-attr]
    assert with_a_patch(before, after, height, blurred)


def with_a_word(before: list[Any], after: list[Any], word: int | None) -> set[str]:
    """Kinds of the calls in which the second sample's text columns, and no others, have changed."""
    found: set[str] = set()
    for (call, key, _), (_, other, _) in zip(before, after, strict=True):
        tokens, row = call.tokens, own_row(call, 1, 2)
        role = "text" if "text" in tokens and bool(tokens.roles["text"].any()) else "reference"
        moves = moved(key, other, row) > 1e-6
        # Mochi: the other sample's call; HiDream: a layer that reads another text; HunyuanDiT: pooled text changes all of the image
        if tokens.unknown or role not in tokens or not bool(tokens.roles[role].any()) or not bool(moves.any()):
            continue
        allowed = tokens.roles[role][row] | tokens.roles["padding"][row]
        assert not (moves & ~allowed).any(), (call.site.name, moves.nonzero()[:, 0].tolist())
        assert (moves & tokens.roles[role][row]).any()
        found.add(call.site.kind)
        # a refiner that pools the text moves all of its tokens; any other moves the one in its place
        if word is not None and int(moves.sum()) == 1 and call.site.stack != "denoiser.pool":
            assert int(tokens.roles[role][row].nonzero()[word, 0]) == int(moves.nonzero()[0, 0])
    return found


def with_a_patch(before: list[Any], after: list[Any], height: int, blurred: bool) -> int:
    """The number of calls in which the first sample's patch, and nothing else, has changed at its place of the grid. height: of the latents,
    0 where these are packed. blurred: convolutions or norms over the picture spread a change, which is the largest around its place."""
    tried = 0
    for (call, key, query), (_, other_key, other_query) in zip(before, after, strict=True):
        for tokens, x, y in ((call.tokens, key, other_key), (call.query_tokens, query, other_query)):
            grids = [] if tokens is None else [grid for grid in tokens.grids if grid.row == 0 and grid.role == "image"]
            moves = moved(x, y, 0)
            moving = moves > 1e-6
            if not grids or not bool(moving.any()):
                continue
            tried += 1
            assert not moving[~tokens.roles["image"][0]].any(), call.site.name
            if "frame" in tokens:
                assert grids[0].shape == (tiny_denoisers.FRAMES, 1, 1)
                continue
            if not height:
                whole = torch.cat([grid.index.flatten() for grid in grids])
                assert moving.nonzero()[:, 0].tolist() == [int(whole[TOKEN])], call.site.name
                continue
            scale = grids[0].height / height
            rows, cols = (slice(int(s.start * scale), max(int(s.stop * scale), int(s.start * scale) + 1)) for s in (ROWS, COLS))
            if blurred and grids[0].height * grids[0].width < 16:
                continue  # too coarse to tell a place
            if blurred:
                near = grids[0].index[:, max(0, rows.start - 1) : rows.stop + 1, max(0, cols.start - 1) : cols.stop + 1]
                assert moves[near.flatten()].mean() > moves.mean(), call.site.name
            else:
                places = grids[0].index[:, rows, cols].flatten().tolist()
                assert moving.nonzero()[:, 0].tolist() == places, call.site.name
    return tried


def test_a_stream_of_another_length_is_unknown_and_a_recipe_is_refused_with_the_numbers() -> None:
    """What the latents and the text do not make is not guessed: here a text that the class's facts do not know of."""
    model, inputs = build("CogView4Transformer2DModel")
    table = reattend.sites(model)
    model.patch_embed.register_forward_hook(lambda module, args, out: (out[0], torch.cat([out[1], out[1][:, :1]], dim=1)))

    def weaken(call: Call) -> HeadGain:
        return HeadGain(factor=0.5, rows=call.query_rows("image"))

    with (
        pytest.raises(ReattendError, match=r"2 rows of 30 tokens are not the 5 of the text and its latents of 1 x 4 x 6"),
        torch.no_grad(),
        attach(model, [Plan("image", [Edits(table, weaken)])]),
    ):
        model(**inputs)


def test_a_class_without_facts_is_not_taken_for_an_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "CogView4Transformer2DModel")
    model, inputs = build("CogView4Transformer2DModel")
    call = calls_of(model, inputs)[0][0]
    assert call.site is not None and call.site.kind == "self" and call.tokens is not None
    with pytest.raises(ReattendError, match="29 tokens are not its latents of 1 x 4 x 6"):
        call.columns("image")
    with (
        pytest.raises(ReattendError, match="29 tokens are not its latents of 1 x 4 x 6"),
        torch.no_grad(),
        reattend.apply(model, "softpag", scale=2.0),
        reattend.rows("unconditional", "conditional"),
    ):
        model(**inputs)


def test_the_prior_s_tokens_are_unknown() -> None:
    model, inputs = build("PriorTransformer")
    call = calls_of(model, inputs)[0][0]
    with pytest.raises(ReattendError, match="9 tokens"):
        call.columns("text")


def test_queries_that_see_a_text_and_themselves_move_towards_their_own_values() -> None:
    """Kandinsky 2.2: the last keys are the queries' own."""
    model, inputs = build("UNet2DConditionModel (Kandinsky)")
    call = calls_of(model, inputs)[0][0]
    assert call.num_keys == call.num_queries + 32 and call.columns("text")[:, :32].all() and call.columns("image")[:, 32:].all()
    out = reference(call, [MixValue(strength=1.0)])
    torch.testing.assert_close(out, call.value[:, :, 32:])
    with torch.no_grad(), reattend.apply(model, "softpag", scale=2.0) as session, reattend.rows("conditional"):
        model(**inputs)
    assert session.stats


def test_layers_over_frames_are_temporal() -> None:
    for name in ("UNet3DConditionModel", "UNetSpatioTemporalConditionModel"):
        model, inputs = build(name)
        over_frames = [s for s in reattend.sites(model) if s.stack.endswith("motion")]
        assert over_frames and {s.kind for s in over_frames} <= {"temporal", "cross"}
        for call, _, _ in calls_of(model, inputs):
            tokens: TokenMap | None = call.tokens if call.query_tokens is None else call.query_tokens
            assert tokens is not None and call.site is not None
            assert ("frame" in tokens) == (call.site in over_frames)
            if "frame" in tokens:
                assert tokens.roles["frame"].all() and tokens.grids[0].shape == (tiny_denoisers.FRAMES, 1, 1)


def test_a_reference_as_large_as_the_image_is_not_taken_for_it() -> None:
    """Flux 3 lets image, text and reference each attend to their own before all three attend together."""
    model, inputs = build("Flux3Transformer2DModel (edit)")
    seen = {call.site.name: call.tokens for call, _, _ in calls_of(model, inputs)}  # type: ignore[union-attr]
    for name, role in (("image.0", "image"), ("image_cond.0", "reference")):
        tokens = seen[f"mode_blocks.{name}.attn"]
        assert tokens is not None and bool(tokens.roles[role].all())
        assert [r for r, marked in tokens.roles.items() if bool(marked.any())] == [role]


def test_sound_as_long_as_the_latents_is_not_taken_for_an_image() -> None:
    model, inputs = build("LTX2VideoTransformer3DModel")
    inputs |= {"audio_hidden_states": torch.randn(2, 72, 4), "audio_num_frames": 72}
    for call, _, _ in calls_of(model, inputs):
        assert call.site is not None and call.tokens is not None
        assert bool(call.tokens.unknown) == ("audio" in call.site.name)
    model, inputs = build("LongCatAudioDiTTransformer")
    unknown = [call.tokens.unknown for call, _, _ in calls_of(model, inputs) if call.tokens and call.site.kind == "self"]  # type: ignore
    assert len(unknown) == 2 and all("are sound" in reason for reason in unknown)
