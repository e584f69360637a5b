"""opera: two candidates; it changes logits, once a pass, and tries tokens in passes of its own."""

from example import IN_THE_SEQUENCE, Example

TAKEN_BACK = "cannot give a tried token back"
EXAMPLES = {
    "": Example(
        "lvlm",
        {"candidates": 2},
        layers=1,
        skips={"no cache": "it tries tokens that a cache gives back"},
        refused={
            **IN_THE_SEQUENCE,
            "quantised": TAKEN_BACK,
            **{
                f"{model}, {cache}": TAKEN_BACK
                for model in ("gemma3", "windowed mistral3")
                for cache in ("static", "static, longer")
            },
            "right padding": "padded on the left",
            "drafts": "one step at a time, not in drafts",
        },
    )
}
