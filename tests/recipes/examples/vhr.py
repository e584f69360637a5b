"""vhr: as published; a model of four layers is all first layer and last layers."""

from example import Example

EXAMPLES = {"": Example("lvlm", off={"alpha": 1}, skips={"near": "heads are chosen by distances that lie close together"})}
