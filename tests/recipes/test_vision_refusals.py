"""Parameters with which a vision-language recipe could never act are refused before anything runs."""

from __future__ import annotations

import pytest
import reattend
import tiny_models
from asked_images import tokenizer
from example import examples
from reattend.interventions import ReattendError

METHODS = {slug: example for slug, example in reversed(examples("lvlm").values())}


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        *[
            (m, {"last_layer": n}, f"last_layer: there is no layer {n}; LlavaForConditionalGeneration has 0 to 3")
            for m in ("var", "pai", "cmai", "selective-emphasis")
            for n in (4, -5)
        ],
        *[
            (m, {"first_layer": 3, "last_layer": 0}, "no decoder self-attention in layers 3 to 0; it has layers 0 to 3")
            for m in ("var", "pai", "cmai", "selective-emphasis")
        ],
        ("var", {"first_layer": 3, "skip_last_layer": True}, "skip_last_layer leaves no layer"),
        ("var", {"sink_dims": []}, "sink_dims"),
        ("var", {"tau": 6.0}, "can never be reached"),
        ("vhr", {"heads": [[1, 4]]}, "head 4 of layer 1, but it has heads 0 to 3"),
        ("gift", {"enhance_layers": [-1]}, "there is no layer -1"),
        ("visual-token-exit", {"exit_layer": 4}, "there is no layer 4"),
        *[(m, {k: float("nan")}, k) for m, k in [("var", "summ"), ("vhr", "alpha"), ("gift", "alpha"), ("cmai", "gamma"),
                                                ("selective-emphasis", "local_share"), ("opera", "scale")]],
    ],
)  # fmt: skip
def test_what_can_never_act_is_refused(method, wrong, message):
    with pytest.raises(ReattendError, match=message):
        reattend.apply(
            tiny_models.build("llava").model, method, **{**METHODS[method].parameters, **wrong}, tokenizer=tokenizer()
        )
