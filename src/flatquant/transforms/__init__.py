"""Changes of basis x -> x P, W -> W P^-T that leave x W^T unchanged and flatten both."""

from flatquant.transforms.base import Identity, Transform
from flatquant.transforms.compose import Compose
from flatquant.transforms.diagonal import Diagonal, HeadDiagonal
from flatquant.transforms.factor import (
    BlockFactor,
    DirectFactor,
    Factor,
    FixedFactor,
    OrthogonalFactor,
    SVDFactor,
    shared_inverses,
)
from flatquant.transforms.hadamard import hadamard_split
from flatquant.transforms.kronecker import Kronecker, kronecker_split
from flatquant.transforms.masked import HeadMatrices, MaskedFactor
from flatquant.transforms.matrix import Matrix
from flatquant.transforms.shift import Shift
from flatquant.transforms.start import make_factor, make_left
from flatquant.transforms.written import MovedGain, Written

__all__ = [
    "BlockFactor",
    "Compose",
    "Diagonal",
    "DirectFactor",
    "Factor",
    "FixedFactor",
    "HeadDiagonal",
    "HeadMatrices",
    "Identity",
    "Kronecker",
    "MaskedFactor",
    "Matrix",
    "MovedGain",
    "OrthogonalFactor",
    "SVDFactor",
    "Shift",
    "Transform",
    "Written",
    "hadamard_split",
    "kronecker_split",
    "make_factor",
    "make_left",
    "shared_inverses",
]
