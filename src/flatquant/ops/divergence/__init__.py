"""KL divergence between rows of logits; one kernel a direction on CUDA."""

from jaxtyping import Float
from torch import Tensor

from flatquant.ops import HAS_TRITON
from flatquant.ops.divergence import reference


def kl_rows(teacher: Float[Tensor, "*batch V"], student: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    """`reference.kl_rows`, or its kernel."""
    if student.is_cuda and teacher.is_cuda and HAS_TRITON:
        from flatquant.ops.divergence import triton

        return triton.kl_rows(teacher, student)
    return reference.kl_rows(teacher, student)
