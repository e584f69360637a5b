"""softpag: the default layer of every denoiser."""

from example import Example

LINEAR = {"SanaTransformer2DModel": "linear attention has no softmax"}
EXAMPLES = {"": Example("diffusion", {"scale": 3.0}, off={"strength": 0}, layers=1, refused=LINEAR)}
