"""KL divergence between the distributions of two rows of logits."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def kl_rows(teacher: Float[Tensor, "*batch V"], student: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    """KL(softmax(teacher) || softmax(student)) of every row in nats, in float32; differentiable in the student.

    Args:
        teacher, student: logits, (.., V).

    Returns:
        (..).
    """
    p, q = F.log_softmax(teacher.detach().float(), -1), F.log_softmax(student.float(), -1)
    return (p.exp() * (p - q)).sum(-1)
