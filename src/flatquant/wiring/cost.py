"""What a plan costs while serving: arithmetic that the original model does not do, for one token."""

from __future__ import annotations

from flatquant.spec import Plan
from flatquant.wiring.arch import Geometry


def online_flops(plan: Plan, geometry: Geometry) -> int:
    """Floating-point operations of all online factors for one token, two for a multiplication and its addition.

    A site of n1 x n2 channels takes 2 n (n1 + n2) for P1^T X P2; every head of queries and keys 2 head_dim^2. Rounding
    to grids, which is one pass over what is there anyway, is not counted.
    """
    total = 0
    for block in plan.blocks:
        for site in block.sites.values():
            n1, n2 = site.shape
            total += 2 * n1 * n2 * (n1 * site.left + n2 * site.right)
        if block.qk:
            total += 2 * block.head_dim**2 * (geometry.heads + geometry.kv_heads)
    return total
