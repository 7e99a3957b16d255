"""Gradient descent on the orthogonal matrices, by the Cayley transform (SpinQuant, section 3.2).

J. Li, L. Fuxin, S. Todorovic: Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform, ICLR
2020, arXiv 2002.01113. A step turns X by the Cayley transform of a skew W; here W's linear system is solved, which for
the square matrices of this field costs less than the paper's five fixed-point iterations and leaves no drift: no row
normalisation, no random QR retraction, no momentum (the method's is 0).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flatquant.transforms.factor import polish


def cayley_step(x: Tensor, grad: Tensor, lr: float | Tensor) -> Tensor:
    """One step from the orthogonal X against its gradient.  # (n, n)

    W = A - A^T with A = -X^T G / 2, and X (I + a/2 W)(I - a/2 W)^-1 with a = min(lr, 1 / ||W||_1): the rate bounds the
    step where gradients are small, ||W||_1 (the largest column sum) where they are large.
    """
    a = -(x.mT @ grad) / 2
    w = a - a.mT
    step = (1 / (w.abs().sum(0).max() + 1e-8)).clamp(max=lr)
    half = step / 2 * w
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    # (I + H) and (I - H)^-1 commute; solve_ex: no host sync, so a CUDA graph can hold it
    turn = torch.linalg.solve_ex(eye - half, eye + half).result
    return polish(x @ turn)


class CayleySGD(torch.optim.Optimizer):
    """`cayley_step` for every parameter; each is an orthogonal matrix and stays one. `lr` may be a tensor.

    As in torch's fused optimisers, nothing moves where `found_inf`, a scalar on the device, is 1.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict], lr: float = 1.5) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    turned = cayley_step(p, p.grad, group["lr"])
                    p.copy_(turned if self.found_inf is None else torch.where(self.found_inf > 0, p, turned))
