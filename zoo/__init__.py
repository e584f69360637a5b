"""Small models that are really trained and come with the package, so that everything can be tried and measured offline.

>>> import reattend
>>> model, processor = reattend.zoo.load("shapes-llava")
>>> pipe = reattend.zoo.load("shapes-sd")
"""

from .loading import MODELS, folder, load, pipeline
from .worlds.drawing import picture
from .worlds.shapes import Scene, Thing, World, sample_scene

__all__ = ["MODELS", "Scene", "Thing", "World", "folder", "load", "picture", "pipeline", "sample_scene"]
