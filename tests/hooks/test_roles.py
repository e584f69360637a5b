"""Which tokens are text, which are image and where: asked of each denoiser class itself.

One text token or one patch of the latents is changed, all attention is switched off (so that no token learns of another one), and the key
columns that change with it are compared with the roles and grids that the token map tells.
"""

from __future__ import annotations

from typing import Any

import pytest
import reattend
import tiny_denoisers
import tiny_streams
import torch
from reattend.hooks import Edits, Plan, attach
from reattend.hooks.sites.families import FAMILIES, family_of
from reattend.interventions import Call, HeadGain, MixValue, ReattendError, TokenMap, reference
from torch import Tensor, nn

BUILDERS = {**tiny_denoisers.DENOISERS, **tiny_streams.STREAMS}
# latents that are packed are changed at this token, others in these rows and columns
TOKEN, ROWS, COLS = 9, slice(2, 4), slice(4, 6)
# the token of a denoiser's text that is changed
WORD = 1
# diffusers' own Chroma imports the class from its old place
pytestmark = [pytest.mark.filterwarnings("ignore:In CPU autocast"), pytest.mark.filterwarnings("ignore:.*FluxPosEmbed")]


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return (tiny_streams if name in tiny_streams.STREAMS else tiny_denoisers).build(name)


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
        one = value[:, sample].transpose(0, 1) if value.dim() == 4 and name.startswith("encoder") else value[sample]
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


@pytest.mark.parametrize("name", BUILDERS)
def test_a_changed_word_changes_text_columns_alone(name: str) -> None:
    model, inputs = build(name)
    before = calls_of(model, inputs)
    names = [arg for arg in dict.fromkeys(family_of(model).text) if inputs.get(arg) is not None]
    found: set[str] = set()
    for arg in names:
        for sample in (0, 1):
            length = inputs[arg][sample].shape[-2] if isinstance(inputs[arg], list) else inputs[arg].shape[-2]
            word = min(WORD, length - 1)
            again = calls_of(model, changed(inputs, arg, word, sample))
            for (call, key, _), (_, other, _) in zip(before, again, strict=True):
                tokens = call.tokens
                assert tokens is not None and call.site is not None
                role = "text" if "text" in tokens and bool(tokens.roles["text"].any()) else "reference"
                if tokens.unknown or role not in tokens:
                    continue
                row = own_row(call, sample, 2)
                moves = moved(key, other, row) > 1e-6
                if not bool(moves.any()):
                    continue  # Mochi: the other sample's call; HiDream: a layer that reads another text
                allowed = tokens.roles[role][row] | tokens.roles["padding"][row]
                assert not (moves & ~allowed).any(), (call.site.name, arg, moves.nonzero()[:, 0].tolist())
                assert (moves & tokens.roles[role][row]).any()
                found.add(call.site.kind)
                # a refiner that pools the text moves all of its tokens; any other moves the one in its place
                if int(moves.sum()) == 1 and len(names) == 1 and call.site.stack != "denoiser.pool":
                    assert int(tokens.roles[role][row].nonzero()[word, 0]) == int(moves.nonzero()[0, 0])
    kinds = {site.kind for site in reattend.sites(model)} & {"cross", "joint"}
    assert found & {"cross", "joint"} == (kinds if names and name != "PriorTransformer" else set())


@pytest.mark.parametrize("name", BUILDERS)
def test_a_changed_patch_changes_its_place_of_the_grid(name: str) -> None:
    model, inputs = build(name)
    arg = family_of(model).latents or ("hidden_states" if "hidden_states" in inputs else "sample")
    latents = inputs[arg]
    one = latents[0]
    packed = one.dim() == 2
    if one.dim() == 1:
        return  # PriorTransformer: an embedding
    before, after = (
        calls_of(model, given) for given in (inputs, changed(inputs, arg, TOKEN if packed else (..., ROWS, COLS), 0))
    )
    blurred = hasattr(model, "down_blocks") or name.startswith("Sana")
    height = one.shape[-2]
    tried = 0
    for (call, key, query), (_, other_key, other_query) in zip(before, after, strict=True):
        for tokens, x, y in ((call.tokens, key, other_key), (call.query_tokens, query, other_query)):
            if tokens is None or not any(grid.role == "image" for grid in tokens.grids):
                continue
            assert call.site is not None
            moves = moved(x, y, 0)
            if not bool((moves > 1e-6).any()):
                continue  # Mochi: a call for each sample
            tried += 1
            assert not (moves > 1e-6)[~tokens.roles["image"][0]].any(), call.site.name
            grids = [grid for grid in tokens.grids if grid.row == 0 and grid.role == "image"]
            if "frame" in tokens:
                assert grids[0].shape == (tiny_denoisers.FRAMES, 1, 1)
            elif packed:
                whole = torch.cat([grid.index.flatten() for grid in grids])
                assert (moves > 1e-6).nonzero()[:, 0].tolist() == [int(whole[TOKEN])], call.site.name
            else:
                # the patch in tokens, at the size that this layer sees
                scale = grids[0].height / height
                rows, cols = (
                    slice(int(s.start * scale), max(int(s.stop * scale), int(s.start * scale) + 1)) for s in (ROWS, COLS)
                )
                places = grids[0].index[:, rows, cols].flatten().tolist()
                if blurred:  # convolutions and norms over the picture spread a change, but it is the largest around its place
                    near = grids[0].index[:, max(0, rows.start - 1) : rows.stop + 1, max(0, cols.start - 1) : cols.stop + 1]
                    assert moves[near.flatten()].mean() > moves.mean(), call.site.name
                else:
                    assert (moves > 1e-6).nonzero()[:, 0].tolist() == places, call.site.name
    assert tried


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
