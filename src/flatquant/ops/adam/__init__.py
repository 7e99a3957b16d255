"""A step of Adam in 5 bytes a weight: the weight in 3, of which bfloat16 has 2, both moments in 2; one CUDA kernel."""

from jaxtyping import BFloat16, Float, Shaped
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.adam import reference
from flatquant.ops.adam.reference import BLOCK, fresh_state

__all__ = ["BLOCK", "adam_step", "fresh_state"]


def adam_step(
    p: BFloat16[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    state: dict[str, Tensor],
    *,
    lr: Float[Tensor, ""],
    hold: Shaped[Tensor, ""],
    eps: float,
    key: int,
) -> None:
    """`reference.adam_step`, or its kernel."""
    if p.is_cuda and HAS_TRITON:
        from flatquant.ops.adam import triton

        triton.adam_step(p, grad, state, lr=lr, hold=hold, eps=eps, key=key)
    else:
        reference.adam_step(p, grad, state, lr=lr, hold=hold, eps=eps, key=key)
