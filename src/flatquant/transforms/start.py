"""Starting matrices for factors."""

import dataclasses
import math

import torch
from jaxtyping import Float32
from torch import Tensor

from flatquant.spec import TransformSpec
from flatquant.transforms.factor import (
    BlockFactor,
    DirectFactor,
    Factor,
    FixedFactor,
    OrthogonalFactor,
    ProductFactor,
    SVDFactor,
)
from flatquant.transforms.hadamard import hadamard, largest_hadamard_divisor
from flatquant.transforms.kronecker import kronecker_split
from flatquant.transforms.masked import MaskedFactor


def random_orthogonal(n: int, generator: torch.Generator) -> Float32[Tensor, "{n} {n}"]:
    """A Haar-distributed orthogonal matrix: QR of a Gaussian, signs fixed by R's diagonal.  # float32, (n, n)"""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def random_hadamard(n: int, generator: torch.Generator) -> Float32[Tensor, "{n} {n}"]:
    """diag(+-1) H / sqrt(d), d the largest divisor of n with a Hadamard matrix, times a Haar factor for the rest.

    576 is all Hadamard, 9 is all Haar, 90 is 45 (Haar) x 2.  # float32, (n, n)
    """
    d = largest_hadamard_divisor(n)
    signs = torch.randint(0, 2, (d,), generator=generator).float() * 2 - 1
    h = hadamard(d) / math.sqrt(d) * signs[:, None]
    return torch.kron(random_orthogonal(n // d, generator).contiguous(), h) if n > d else h


FACTORS = {"inverse": DirectFactor, "svd": SVDFactor, "fixed": FixedFactor, "rotation": OrthogonalFactor}


def make_left(spec: TransformSpec, n: int, generator: torch.Generator) -> Factor:
    """An (n, n) factor as `make_factor` makes it; for several ranks, one for each of them on the diagonal."""
    if spec.ranks == 1:
        return make_factor(spec, n, generator)
    return BlockFactor(make_factor(spec, n // spec.ranks, generator) for _ in range(spec.ranks))


def make_factor(spec: TransformSpec, n: int, generator: torch.Generator) -> Factor:
    """An (n, n) factor as `spec` asks; random starts draw from `generator` (a CPU generator)."""
    if spec.parameters == "masked":
        return MaskedFactor(n, spec.stability)
    if spec.parameters == "product":
        each = dataclasses.replace(spec, parameters="inverse")
        left, right = (make_factor(each, size, generator) for size in kronecker_split(n))
        return ProductFactor(left, right)
    match spec.init:
        case "orthogonal":
            start = random_orthogonal(n, generator)
        case "hadamard":
            start = random_hadamard(n, generator)
        case _:
            start = torch.eye(n)
    return FACTORS[spec.parameters](start)
