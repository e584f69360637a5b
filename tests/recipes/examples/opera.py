"""opera: two candidates; it changes logits, once a pass, and tries tokens in passes of its own."""

from example import Example

TAKEN_BACK = "cannot give a tried token back"
EXAMPLES = {
    "": Example(
        "lvlm",
        {"candidates": 2},
        layers=1,
        text_too=True,
        refused={
            "quantised": TAKEN_BACK,
            **{f"{model}, {cache}": TAKEN_BACK for model in ("gemma3", "mistral3") for cache in ("static", "static, longer")},
            "right padding": "padded on the left",
        },
    )
}
