"""KL divergence between rows of logits; one kernel a direction on CUDA."""

from flatquant.ops import dispatched
from flatquant.ops.divergence import reference

kl_rows = dispatched(reference.kl_rows, lambda teacher, student: student.is_cuda and teacher.is_cuda)
