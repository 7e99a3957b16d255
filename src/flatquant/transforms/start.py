"""Starting matrices for factors."""

import math

import torch
from torch import Tensor

from flatquant.spec import TransformSpec
from flatquant.transforms.factor import DirectFactor, Factor, SVDFactor


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix: QR of a Gaussian, signs fixed by R's diagonal.  # float32, (n, n)"""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """diag(+-1) H of the largest power of two that divides n, times a Haar factor for the rest.  # float32, (n, n)"""
    power = n & -n
    h = torch.ones(1, 1)
    while h.shape[0] < power:  # Sylvester's doubling
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    h = h / math.sqrt(power)
    signs = torch.randint(0, 2, (power,), generator=generator).float() * 2 - 1
    rest = random_orthogonal(n // power, generator) if n > power else torch.ones(1, 1)
    return torch.kron(rest.contiguous(), h * signs[:, None])


def make_factor(spec: TransformSpec, n: int, generator: torch.Generator) -> Factor:
    """A trainable (n, n) factor as `spec` asks; random starts draw from `generator` (a CPU generator)."""
    match spec.init:
        case "orthogonal":
            start = random_orthogonal(n, generator)
        case "hadamard":
            start = random_hadamard(n, generator)
        case _:
            start = torch.eye(n)
    return DirectFactor(start) if spec.parameters == "direct" else SVDFactor(start)
