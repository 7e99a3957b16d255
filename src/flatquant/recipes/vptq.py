"""VPTQ (EMNLP 2024, arXiv 2409.17066): weights as codebook entries, chosen column by column with error compensation.

Vectors along the outputs, entries by k-means weighted with the Hessian's diagonal, a second codebook above 2 bits
(section 3). Vectors of 4 and codebooks of 256 rather than the paper's 8 and 65,536: one of the paper's takes a
megabyte, more than a layer of a small model. Inputs of the solver are those of the quantised model; the authors' are
the original's. No training of the entries afterwards, which the paper's best figures include.
"""

from flatquant.errors import SpecError
from flatquant.recipes.common import of_preset, unclipped
from flatquant.spec import CodebookSpec, Recipe, Scheme, SolverSpec


def vptq(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """Vector codebooks for weights; `quick` reads less text.

    Raises:
        SpecError: an unknown preset, or a scheme with quantised activations, keys or values.
    """
    scheme = unclipped(scheme)
    if not scheme.weights_only or scheme.cache_overrides:
        raise SpecError(f"vptq quantises weights only, not {scheme}; give a scheme like w2a16")
    solver = SolverSpec(kind="codebook", codebook=CodebookSpec(length=4, main_bits=8))
    return Recipe(name="vptq", scheme=scheme, solver=solver, data=of_preset(preset))
