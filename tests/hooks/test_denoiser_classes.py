"""The matrix of denoisers, against its record: what docs/denoisers.json calls verified must verify here."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import reattend
import torch
from denoiser_classes import BUILDERS, check, output
from reattend import ReattendError, UnsupportedError
from reattend.hooks.prompts.copied_rows import Copies, grown
from tiny_denoisers import build

RECORD = json.loads((Path(__file__).resolve().parents[2] / "docs" / "denoisers.json").read_text(encoding="utf-8"))["classes"]
# an older diffusers has fewer classes than the record
KNOWN = [name for name in RECORD if hasattr(diffusers, name.split(" ")[0])]
VERIFIED = [name for name in KNOWN if RECORD[name]["status"] == "verified"]
REFUSED = [name for name in KNOWN if RECORD[name]["status"] == "refused"]
pytestmark = [pytest.mark.filterwarnings("ignore:In CPU autocast"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.mark.slow
@pytest.mark.parametrize("name", VERIFIED)
def test_verified(name: str) -> None:
    found = check(*build(name, among=BUILDERS))
    assert found["edited"] > 0
    assert (found["kinds"], found["tokens"]) == (RECORD[name]["kinds"], RECORD[name]["tokens"])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    model, inputs = build(name, among=BUILDERS)
    found = check(model, inputs)
    assert found["edited"] == 0 and found["problems"] == RECORD[name]["problems"] != []
    with pytest.raises(UnsupportedError, match="softpag"):
        reattend.apply(model, "softpag", scale=2.0)
    assert str(reattend.sites(model).refusal).endswith(found["problems"][0])


# an argument of which it is not known whether it has an entry for each row, or one sample alone, or one row for each frame
ROWS_UNKNOWN = {
    "Cosmos3OmniTransformer", "MiniMaxH3Transformer3DModel", "OmniGenTransformer2DModel", "RFD4ProteinaTransformer",
    "SanaWMLTX2RefinerTransformer3DModel", "TransformerTemporalModel", "WanAnimate2Transformer3DModel", "ZImageControlNetModel",
    "ZImageTransformer2DModel",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VERIFIED)
def test_a_copied_row_gives_what_the_row_gives(name: str) -> None:
    """What hooks/sites/arguments.py says of the arguments of each class, which guides copy rows of."""
    model, inputs = build(name, among=BUILDERS)

    def copied() -> dict:
        return grown(type(model).__name__, (), inputs, (), 2, [Copies("copy", [1])])[1]

    if name in ROWS_UNKNOWN:
        with pytest.raises(ReattendError, match="argument"):
            copied()
        return
    found = output(model, copied())
    for part in found:
        one = part.shape[0] // 3
        torch.testing.assert_close(part[2 * one :], part[one : 2 * one], atol=1e-4, rtol=1e-3)
    assert found and all(
        torch.allclose(part[: len(whole)], whole, atol=1e-4) for part, whole in zip(found, output(model, inputs), strict=True)
    )


def test_the_record_holds_what_users_run() -> None:
    assert len(VERIFIED) >= 95 and not [name for name, row in RECORD.items() if row["status"] == "failed"]
    assert all(row["reason"] for row in RECORD.values() if row["status"] == "not built")


def test_attention_that_calls_flex_attention_by_itself_is_listed_with_that_reason() -> None:
    """Kandinsky 6's super-resolution never comes to SDPA; AnyFlow's self-attention does not either, its cross-attention does."""
    model, _ = build("Kandinsky6SRTransformer3DModel", among=BUILDERS)
    assert all("calls flex attention" in str(site.problem) for site in reattend.sites(model))
    model, _ = build("AnyFlowFARTransformer3DModel", among=BUILDERS)
    table = reattend.sites(model)
    assert all("needs the backend 'flex'" in str(site.problem) for site in table.kind("self"))
    assert not table.kind("cross").problems and len(table.kind("cross")) == 2


def test_kinds_that_the_modules_do_not_say() -> None:
    found = {}
    for name in ("LTX2VideoTransformer3DModel", "Kandinsky3UNet", "SparseControlNetModel", "OmniGenTransformer2DModel"):
        found[name] = {site.name: site.kind for site in reattend.sites(build(name, among=BUILDERS)[0])}
    sound = found["LTX2VideoTransformer3DModel"]
    assert {sound[f"transformer_blocks.0.{n}"] for n in ("attn1", "audio_attn1")} == {"self"}
    assert {sound[f"transformer_blocks.0.{n}"] for n in ("attn2", "audio_attn2", "audio_to_video_attn")} == {"cross"}
    levels = found["Kandinsky3UNet"]
    assert {kind for name, kind in levels.items() if ".attentions.0." in name} == {"self"}
    assert {kind for name, kind in levels.items() if ".attentions.0." not in name} == {"cross"}
    over_frames = {kind for name, kind in found["SparseControlNetModel"].items() if "motion_modules" in name}
    assert over_frames == {"temporal"} and set(found["OmniGenTransformer2DModel"].values()) == {"joint"}


def test_attention_in_parts_of_a_block_is_of_that_block_s_layer() -> None:
    """Kandinsky 6: video and sound in one block. What a text goes through before the blocks does not count among them."""
    table = reattend.sites(build("Kandinsky6Transformer3DModel", among=BUILDERS)[0]).stack("denoiser")
    table = table.where(lambda site: site.stack == "denoiser")
    assert all(site.layer == int(site.name.split(".")[1]) for site in table) and len(table.layers(0, 0)) == 6
    for name in ("Krea2Transformer2DModel", "BriaFibo2Transformer2DModel"):
        table = reattend.sites(build(name, among=BUILDERS)[0]).where(lambda site: site.stack == "denoiser")
        assert all(site.layer == int(site.name.split(".")[1]) for site in table) and len(table) >= 2


def test_blocks_that_see_latents_twice_are_not_taken_for_a_text_as_long_as_the_latents() -> None:
    model, inputs = build("MotifVideoTransformer3DModel", among=BUILDERS)
    inputs |= {"encoder_hidden_states": torch.randn(2, 72, 8), "encoder_attention_mask": None}
    table = reattend.sites(model)
    assert [site.kind for site in table if site.name.endswith(".attn")] == ["joint", "joint", "self"]
    assert check(model, inputs)["tokens"] == {"cross": ["text"], "joint": ["image and text (3 x 4 x 6)"], "self": ["unknown"]}
