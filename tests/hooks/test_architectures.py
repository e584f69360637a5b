"""The architecture matrix, against its record: what docs/support.json calls verified must verify here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
spec = importlib.util.spec_from_file_location("architectures", HERE.parents[1] / "architectures.py")
assert spec is not None and spec.loader is not None
architectures = importlib.util.module_from_spec(spec)
sys.modules["architectures"] = architectures
spec.loader.exec_module(architectures)

RECORD = json.loads((HERE.parents[2] / "docs" / "support.json").read_text())["models"]
# an older transformers knows fewer types than the record
VERIFIED = [name for name, row in RECORD.items() if row["status"] == "verified" and name in architectures.model_types()]
REFUSED = [name for name, row in RECORD.items() if row["status"] == "refused"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", VERIFIED)
def test_verified(model_type):
    found = architectures.check(architectures.build(model_type))
    assert found["edited"] == RECORD[model_type]["edited"] > 0


@pytest.mark.parametrize("model_type", [name for name in ("bloom", "megatron-bert", "mpt") if name in REFUSED])
def test_refused_with_a_reason(model_type):
    from reattend import UnsupportedError, apply

    model = architectures.build(model_type)
    with pytest.raises(UnsupportedError, match="does not fit this model"):
        apply(model, "streaming")
    assert architectures.check(model)["problems"]


@pytest.mark.skipif("inkling2_text" not in VERIFIED, reason="this transformers has no Inkling 2")
def test_attention_over_the_states_of_earlier_layers_is_no_site_of_tokens():
    """Inkling 2's residuals call the attention interface with one column per layer: columns of tokens mean nothing there."""
    from reattend.hooks import sites

    table = sites(architectures.build("inkling2_text"))
    assert [site.name.rsplit(".", 1)[-1] for site in table.stack("decoder")] == ["self_attn"] * 2
    assert len(table.stack("depth")) == 4 and all("earlier layers" in str(site.problem) for site in table.stack("depth"))


def test_the_record_is_of_these_model_types():
    assert len(VERIFIED) >= 120
    assert not [name for name, row in RECORD.items() if row["status"] == "failed"]
