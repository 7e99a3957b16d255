"""Transforms in sequence: x -> x P_1 P_2 ..."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from flatquant.transforms.base import Transform


class Compose(Transform):
    """Apply `parts` from first to last, to activations and (as inverse transposes) to weights alike."""

    def __init__(self, parts: Sequence[Transform]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        for part in self.parts:
            x = part(x)
        return x

    def inverse_t(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        # (P_1 P_2)^-T = P_1^-T P_2^-T: the same order
        for part in self.parts:
            assert isinstance(part, Transform)
            w = part.inverse_t(w)
        return w
