"""softpag: the default layer of every denoiser."""

from example import Example

LINEAR = {"SanaTransformer2DModel": "linear attention has no softmax"}
EXAMPLES = {"": Example("diffusion", {"scale": 3.0}, off={"strength": 0}, layers=1, refused=LINEAR)}
BAD = [
    ({"strength": 1.5}, "strength"),
    ({"layers": [1], "heads": [(0, 1)]}, "layers or heads, not both"),
    ({"heads": []}, "must not be empty"),
    ({"scope": "masked", "perturbation": "uniform"}, "identity"),
    ({"start": 0.6, "stop": 0.5}, "start 0.6 must lie below stop 0.5"),
    ({"temperature": 0.0}, "temperature"),
]

# -- what the benchmarks ask, see benchmarks/methods.py

# every other layer of the zoo's UNet; 3 is the mid block, the published choice for larger pictures
OTHER_LAYERS = [f"softpag:layers=[{n}]{more}" for n in (0, 2, 3, 4, 5, 6, 8, 9) for more in (":scale=2.5", "")]
TRIED = {"pictures": ["softpag:scale=2.5", "softpag", "softpag:strength=1", *OTHER_LAYERS]}
PAPER = {"pictures": "FID 56.15 (identity), 53.37 (uniform), 53.33 (mean query), at the best setting of each"}
