"""How far a quantised model is from what it was: perplexity on a text, divergence from the original."""

from flatquant.evaluate.divergence import Divergence, divergence, divergence_from_logits, reference_logits
from flatquant.evaluate.perplexity import Perplexity, perplexity

__all__ = [
    "Divergence",
    "Perplexity",
    "divergence",
    "divergence_from_logits",
    "perplexity",
    "reference_logits",
]
