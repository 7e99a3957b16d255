"""The transform of a site: made of a recipe's parts, and taken apart again when it is folded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatquant.spec import SitePlan, Transforms, TransformSpec
from flatquant.transforms import (
    Compose,
    Diagonal,
    HeadDiagonal,
    HeadMatrices,
    Identity,
    Kronecker,
    MaskedFactor,
    Matrix,
    MovedGain,
    Transform,
    Written,
    make_factor,
    make_left,
)
from flatquant.transforms.diagonal import absmax_scale, second_moment_scale
from flatquant.wiring.arch import Edge
from flatquant.wiring.fitted import InputStatistics


def make_transforms(
    edge: Edge,
    parts: Transforms,
    plan: SitePlan,
    linears: list[nn.Linear],
    statistics: InputStatistics | None,
    generator: torch.Generator,
    heads: int,
) -> list[Transform]:
    """The transforms of a site, in order; `heads` is the number of heads that an edge's writer writes."""
    made: list[Transform] = []
    n1, n2 = plan.shape
    for spec in parts:
        match spec.kind:
            case "diagonal" if edge.passes == "per_head":
                scale = _start_scale(spec, linears, statistics, (heads, n1 // heads, n2))
                made.append(Written(HeadDiagonal(scale, n2, n1 // heads)))
            case "diagonal":
                made.append(Diagonal(_start_scale(spec, linears, statistics, (1, 1, n1 * n2))))
            case "matrix":
                made.append(Matrix(make_factor(spec, n1 * n2, generator)))
            case "heads":
                factor = MaskedFactor(n2, spec.stability, batch=(heads,))
                made.append(Written(HeadMatrices(factor, n1 // heads)))
            case "head":
                made.append(Written(Kronecker(None, make_factor(spec, n2, generator))))
            case "kronecker" if edge.passes == "per_head":
                # P1 mixes heads, online; P2 acts inside each head, where the writer applies it.
                if plan.left:
                    made.append(Kronecker(make_left(spec, n1, generator), None))
                made.append(Written(Kronecker(None, make_factor(spec, n2, generator))))
            case "kronecker":
                made.append(Kronecker(make_left(spec, n1, generator), make_factor(spec, n2, generator)))
            case "blocks" if edge.passes == "per_head":
                made.append(Written(Kronecker(None, make_factor(spec, math.gcd(spec.size, n2), generator))))
            case "blocks":
                made.append(Kronecker(None, make_factor(spec, n2, generator)))
    return made


def composed(made: Sequence[Transform]) -> Transform:
    if not made:
        return Identity()
    return made[0] if len(made) == 1 else Compose(made)


def _start_scale(
    spec: TransformSpec,
    linears: list[nn.Linear],
    statistics: InputStatistics | None,
    shape: tuple[int, int, int],
) -> Tensor:
    """Where a diagonal starts. Of inputs in `shape` (a, b, c), the b copies share a scale.  # (a * c,)"""
    weight = torch.cat([linear.weight.detach().float() for linear in linears])  # (sum o, n)
    if spec.init == "identity":
        return torch.ones_like(weight[0, : shape[0] * shape[2]])
    assert statistics is not None, f"a {spec.init} start needs input statistics"
    if spec.init == "absmax":
        x, w = (m.float().reshape(shape).amax(1).flatten() for m in (statistics.absmax, weight.abs().amax(0)))
        return absmax_scale(x, w, spec.alpha)
    x, w = (m.float().reshape(shape).mean(1).flatten() for m in (statistics.square, weight.square().mean(0)))
    return second_moment_scale(x, w)


def parts_of(transform: Transform) -> list[Transform]:
    if not isinstance(transform, Compose):
        return [transform]
    return [part for part in transform.parts if isinstance(part, Transform)]


def written_parts(transform: Transform, *, diagonals: bool = False) -> Transform:
    """What of a site's transform its input is written in; diagonals too, once a norm has absorbed them."""
    kinds = (Written, MovedGain, Diagonal) if diagonals else (Written, MovedGain)
    return composed([part for part in parts_of(transform) if isinstance(part, kinds)])
