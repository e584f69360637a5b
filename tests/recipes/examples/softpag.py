"""softpag: the default layer of every denoiser."""

from example import Example

EXAMPLES = {"": Example("diffusion", {"scale": 3.0}, off={"strength": 0}, layers=1)}
BAD = [
    ({"strength": 1.5}, "strength"),
    ({"layers": [1], "heads": [(0, 1)]}, "layers or heads, not both"),
    ({"heads": []}, "must not be empty"),
    ({"scope": "masked", "perturbation": "uniform"}, "identity"),
    ({"start": 0.6, "stop": 0.5}, "start 0.6 must lie below stop 0.5"),
    ({"temperature": 0.0}, "temperature"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

# of the zoo's UNet only layers 7 (the default), 8 and 9 showed anything when each layer was tried
TRIED = {
    "pictures": [
        "softpag:scale=2.5",
        "softpag:scale=2:strength=1",
        "softpag",
        "softpag:strength=1:rescale=0.7",
        "softpag:layers=[8]:scale=2.5",
    ]
}
PAPER = {"pictures": "FID 56.15 (identity), 53.37 (uniform), 53.33 (mean query), at the best setting of each"}
GALLERY = {"parameters": {"scale": 2.5}, "look": "Whether shapes are whole; milder than pag."}
