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
BAD = [({"candidates": 0}, "candidates"), ({"scale": 0}, "scale"), ({"beta": 1}, "beta is not")]

# -- what the benchmarks ask, see benchmarks/methods.py

FLOORS = {"opera": ("five next tokens are tried before one is chosen", "five trials")}
TRIED = {"images": ["opera:penalty_weight=0.5", "opera", "opera:penalty_weight=2"]}
PAPER = {"images": "as quoted by others, LLaVA-1.5-7B with its beam search, CHAIR_i 14.3 to 13.4"}
