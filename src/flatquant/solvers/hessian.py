"""Second-order information for solvers: what an error of a weight matrix costs, as one matrix shared by its rows.

Two sources, one entry point: solvers see a matrix H in the coordinates in which they round, and minimise
tr(dW H dW^T) whatever H came from.
"""

from typing import Literal

import torch
from jaxtyping import Float32
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


class OutputAdaptive:
    """H = 1/N sum_i G_i^T G_i, with G_i = dL_i/dW the gradient of sequence i's loss (arXiv 2405.15025).

    The loss' curvature by Fisher's identity, blocks of different rows taken as independent and then summed into one
    matrix. A reconstruction from the abstract and from first principles: no code of the authors was found.

    - `sequence`: as above. G_i = sum_t delta_t^T x_t is formed for each sequence alone: the outer product of a sum over
      sequences is not the sum of outer products.
    - `token`: the terms between different tokens dropped, H = 1/N sum_t |delta_t|^2 x_t^T x_t; the input Gram matrix
      with each token weighted by how much the loss depends on it.
    """

    def __init__(self, n: int, device: torch.device | str, per: Literal["sequence", "token"] = "sequence") -> None:
        self.sum = torch.zeros(n, n, device=device)
        self.per = per
        self.sequences = self.tokens = 0

    def add(self, x: Tensor, delta: Tensor) -> None:
        """Add whole sequences.

        Args:
            x: inputs, (B, T, n), in the coordinates in which the weight will be rounded.
            delta: gradients of each sequence's loss by the layer's outputs, (B, T, o).
        """
        for xi, di in zip(x.detach().float(), delta.detach().float(), strict=True):  # (T, n), (T, o)
            g = di.mT @ xi if self.per == "sequence" else xi * di.norm(dim=-1, keepdim=True)
            self.sum.addmm_(g.mT, g)
        self.sequences += x.shape[0]
        self.tokens += x.shape[:2].numel()

    def hessian(self) -> Tensor:
        """float32, (n, n)."""
        h = self.sum / max(self.sequences, 1)
        return (h + h.mT) / 2


def blended(own: InputGram | OutputAdaptive, mean: Float32[Tensor, "n n"]) -> Float32[Tensor, "n n"]:
    """The Hessian of one expert of a mixture: as if it had seen n more tokens, of the kind that all experts see.

    H = (S + n M) / (T + n), with S the expert's sum over T tokens and M the mean over those of all experts. Fewer
    tokens than channels leave S singular: error compensation would move errors to whatever these few happen not to
    contain ("insufficient and biased calibration for less frequently utilized experts", MoEQuant, arXiv 2505.03804).
    Shrinking second moments of few samples towards a common target is Ledoit and Wolf's remedy (J. Multivariate
    Analysis 88, 2004); its weight here is a rule of thumb, not their estimate: halves at T = n, the expert's own for
    T >> n, and the common one for an expert that no token reached.

    Args:
        mean: float32, (n, n).

    Returns:
        float32, (n, n).
    """
    n = mean.shape[0]
    h = (own.sum + n * mean) / (own.tokens + n)
    return h + h.mT  # with the factor 2 of a Gram matrix
