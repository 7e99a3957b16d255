"""Learning rates: by group of parameters, and from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from flatquant import distributed
from flatquant.calibrate.sharding import is_shard, own
from flatquant.modules import Group
from flatquant.spec import EndToEndSpec, FitSpec


def cosine(step: int, steps: int, warmup: int, lr: float, floor: float) -> float:
    """Learning rate of `step` (0-based): linear warm-up, then a half cosine from lr to floor over all steps."""
    ramp = min(1.0, 0.01 + 0.99 * step / warmup) if warmup else 1.0
    return ramp * (floor + (lr - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def linear(step: int, steps: int, warmup: int, lr: float, floor: float) -> float:
    """Learning rate of `step` (0-based): from lr in even steps to floor, which is one step after the last."""
    assert not warmup
    return floor + (lr - floor) * (1 - step / steps)


def rates_of(spec: FitSpec | EndToEndSpec, summed: float = 1.0) -> tuple[dict[Group, float], dict[Group, float]]:
    """Learning rates by group, at the start and at the end.

    Args:
        summed: what gradients are multiplied by. A rotation's step depends on their size: its rate undoes that.
    """
    rates: dict[Group, float] = {
        "transform": spec.lr, "scale": spec.lr, "clip": spec.clip_lr, "rotation": spec.rotation_lr / summed,
        "code": spec.code_lr, "weight": spec.weight_lr,
    }  # fmt: skip
    return rates, {g: spec.final_lr * (spec.lr if g == "clip" else rate) for g, rate in rates.items()}


def in_units(
    parameters: Mapping[Group, list[nn.Parameter]],
) -> Iterator[tuple[Group, float, list[nn.Parameter]]]:
    """Parameters by group and by what one of their learning rate means.

    AdamW moves all parameters by their rate, whatever their size. Weights of models differ tenfold in theirs.
    """
    for name, ps in parameters.items():
        if name == "weight":
            for p in ps:
                size = torch.linalg.vector_norm(own(p), dtype=torch.promote_types(p.dtype, torch.float32))
                if is_shard(p):
                    size = distributed.summed(size.square()).sqrt()
                yield name, float(size) / math.sqrt(p.numel()), [p]
        else:
            yield name, 1.0, ps
