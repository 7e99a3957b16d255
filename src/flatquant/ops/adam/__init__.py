"""A step of Adam in 4 bytes a weight: the weight in bfloat16, both moments in 8 bits; one kernel on CUDA."""

from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.adam import reference
from flatquant.ops.adam.reference import BLOCK, moments

__all__ = ["BLOCK", "adam_step", "moments"]


def adam_step(
    p: Tensor, grad: Tensor, state: dict[str, Tensor], *, lr: Tensor, hold: Tensor, eps: float, key: int
) -> None:
    """`reference.adam_step`, or its kernel."""
    if p.is_cuda and HAS_TRITON:
        from flatquant.ops.adam import triton

        triton.adam_step(p, grad, state, lr=lr, hold=hold, eps=eps, key=key)
    else:
        reference.adam_step(p, grad, state, lr=lr, hold=hold, eps=eps, key=key)
