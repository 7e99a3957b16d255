"""Second-order information for solvers: the Gram matrix of a layer's inputs."""

import torch
from torch import Tensor


class InputGram:
    """H = 2/T sum x^T x over all tokens seen, accumulated in float32 (GPTQ, arXiv 2210.17323, section 3)."""

    def __init__(self, n: int, device: torch.device | str) -> None:
        self.sum = torch.zeros(n, n, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs x, (.., n), in the coordinates in which the weight will be rounded."""
        x = x.detach().flatten(0, -2).float()  # (tokens, n)
        self.sum.addmm_(x.mT, x)
        self.tokens += x.shape[0]

    def hessian(self) -> Tensor:
        """float32, (n, n)."""
        return self.sum * (2.0 / max(self.tokens, 1))
