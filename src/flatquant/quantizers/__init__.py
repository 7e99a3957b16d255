"""Grids with (learned) clipping, for weights, activations, keys and values."""

from flatquant.quantizers.blocks import BlockRows, BlockWeights, FrozenBlocks, LiveBlocks
from flatquant.quantizers.clip import FixedClip, LearnedClip, NoClip, Range
from flatquant.quantizers.codebook import VectorGrid
from flatquant.quantizers.levels import ActivationLevels, WeightLevels
from flatquant.quantizers.split import SplitGrid
from flatquant.quantizers.uniform import Dynamic, WeightGrid

__all__ = [
    "ActivationLevels",
    "BlockRows",
    "BlockWeights",
    "Dynamic",
    "FixedClip",
    "FrozenBlocks",
    "LearnedClip",
    "LiveBlocks",
    "NoClip",
    "Range",
    "SplitGrid",
    "VectorGrid",
    "WeightGrid",
    "WeightLevels",
]
