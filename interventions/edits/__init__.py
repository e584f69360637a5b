"""The edit algebra: every change of attention that a recipe can ask for, each as its formula on the materialised matrix."""

from .band import Band
from .base import Edit, Rows, Shape
from .columns import AppendKV, PoolKV, Reorder, ReplaceKV
from .groups import Grouped
from .held import HeldKV
from .keep import Blocks, Chosen, Keep, Pattern
from .operands import OperandEdit, Operands, ScaleQuery
from .outputs import HeadGain, HeadMix, MixValue, OutputEdit
from .projection import ProjectKey
from .rearrange import Rearrange
from .scores import KeyBias, LowRankBias, PairBias, ScoreEdit, ScoreGain, SetScores
from .second import Extrapolate, Instead, Second, TakeOutput
from .taken import TakeWeights
from .weights import Gain, Lift, Mix, Transfer, WeightEdit, WeightMap

__all__ = [
    "AppendKV",
    "Band",
    "Blocks",
    "Chosen",
    "Edit",
    "Extrapolate",
    "Gain",
    "Grouped",
    "HeadGain",
    "HeadMix",
    "HeldKV",
    "Instead",
    "Keep",
    "KeyBias",
    "Lift",
    "LowRankBias",
    "Mix",
    "MixValue",
    "OperandEdit",
    "Operands",
    "OutputEdit",
    "PairBias",
    "Pattern",
    "PoolKV",
    "ProjectKey",
    "Rearrange",
    "ReplaceKV",
    "Reorder",
    "Rows",
    "ScaleQuery",
    "ScoreEdit",
    "ScoreGain",
    "Second",
    "SetScores",
    "Shape",
    "TakeOutput",
    "TakeWeights",
    "Transfer",
    "WeightEdit",
    "WeightMap",
]
