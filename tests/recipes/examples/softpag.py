"""softpag: the default layer of every denoiser, and single heads of one."""

from example import Example

EXAMPLES = {
    "": Example(
        "diffusion",
        {"scale": 3.0},
        off={"strength": 0},
        layers=1,
        refused={"SanaTransformer2DModel": "linear attention has no softmax"},
    )
}
