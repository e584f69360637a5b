"""vhr: as published; a model of four layers is all first layer and last layers."""

from example import Example

EXAMPLES = {
    "": Example(
        "lvlm",
        refused={"in pieces": "prefill_chunk_size=None"},
        off={"alpha": 1},
        operations=(5, 0),
        skips={"near": "heads are chosen by distances that lie close together"},
    )
}
BAD = [
    ({"alpha": -1}, "alpha"),
    ({"alpha": 11}, "alpha"),
    ({"layers": []}, "layers"),
    ({"heads": []}, "heads"),
    ({"heads": [[1, 0]], "layers": [1]}, "heads"),
    ({"strength": 2}, "strength"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

FLOORS = {"vhr": ("the prompt's text is read once more without the image", "blind prompt")}
TRIED = {"images": ["vhr:alpha=1.5", "vhr", "vhr:alpha=3", "vhr:layers=[1,3,4,5]:alpha=1.5", "vhr:layers=[1,3,4,5]"]}
PAPER = {"images": "LLaVA-1.5-7B, CHAIR_i 14.3 to 9.7, POPE F1 85.0 to 85.5"}
