"""spa: other passages in every row; it changes logits, once a pass."""

from example import NOT_CAUSAL, PASSAGES, WORDS_BESIDE_IMAGES, Example

PIECES = {"in pieces": "prefill_chunk_size=None"}
EXAMPLES = {
    "": Example("llm", {"strength": 3.0}, {"text": PASSAGES}, off={"strength": 1}, layers=1, refused=PIECES),
    "images": Example(
        "lvlm",
        {"strength": 3.0, "occurrence": -1},
        {"text": WORDS_BESIDE_IMAGES},
        off={"strength": 1},
        layers=1,
        text_too=True,
        refused={**NOT_CAUSAL, **PIECES},
    ),
}
EXTREME = [{"strength": -50}, {"strength": 50}]
BAD = [
    ({"text": "a", "strength": float("inf")}, "strength"),
    ({"text": "a", "hide": False}, "hide=False needs a placeholder"),
    ({"text": "a", "placeholder": []}, "at least one token id"),
    ({"text": "a", "official_mask": True}, "official_mask needs"),
    ({"text": "a", "alpha": 2}, "alpha is not a parameter"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

FLOORS = {"spa": ("every token is computed twice", "twice")}
TRIED = {"highlight": ["spa:strength=1.2", "spa", "spa:strength=1.8", "spa:strength=2.5"]}
PAPER = {"highlight": "as summarised by others, six code models, Pass@1 up to 12.9 % higher"}
