"""How far a quantised model is from what it was: perplexity, divergence from the original, zero-shot tasks."""

from flatquant.evaluate.divergence import Divergence, divergence, divergence_from_logits, reference_logits
from flatquant.evaluate.perplexity import Perplexity, perplexity
from flatquant.evaluate.zeroshot import TASKS, zero_shot

__all__ = [
    "TASKS",
    "Divergence",
    "Perplexity",
    "divergence",
    "divergence_from_logits",
    "perplexity",
    "reference_logits",
    "zero_shot",
]
