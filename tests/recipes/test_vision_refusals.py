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
        *[
            (m, {"first_layer": 9}, "no decoder self-attention in layers 9 to last; it has layers 0 to 3")
            for m in ("var", "pai", "cmai", "selective-emphasis")
        ],
        ("var", {"first_layer": 3, "skip_last_layer": True}, "skip_last_layer leaves no layer"),
        ("var", {"sink_dims": []}, "sink_dims"),
        ("var", {"tau": 6.0}, "tau=6 can never be reached: with 32 hidden dimensions"),
        ("var", {"sink_dims": None}, "reattend profile var MODEL"),
        ("var", {"sink_dims": [32]}, "sink_dims must lie in 0..31"),
        ("cmai", {"first_layer": 0}, "no layer before it"),
        ("vhr", {"layers": [4]}, "layers names 4, but the self-attention layers of .* are 0 to 3"),
        ("vhr", {"heads": {9: [0]}}, "heads name layer 9"),
        ("vhr", {"heads": [[1, 4]]}, "heads name head 4 of layer 1, but it has heads 0 to 3"),
        ("gift", {"saliency_layers": None, "enhance_layers": None}, "not known for LlavaFor.*profile_path.*saliency_layers"),
        ("gift", {"enhance_layers": [2, 4]}, "enhance_layers: there is no layer 4; .* has 0 to 3"),
        ("gift", {"head_share": 0.2}, "less than one head"),
        ("visual-token-exit", {"exit_layer": None}, "exit layer is not known .*profile"),
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


@pytest.mark.parametrize("method", ["pai", "vhr"])
def test_a_prompt_of_images_alone_has_no_text_branch(method):
    tiny, ran = tiny_models.build("llava"), []
    tiny.model.model.language_model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with reattend.apply(tiny.model, method):
        with pytest.raises(ReattendError, match="prompt 0 holds nothing but images"):
            tiny.model(**tiny.inputs([["image"]]))
        assert not ran
        tiny.model(**tiny.inputs([[1, "image", 7]]))
