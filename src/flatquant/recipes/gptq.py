"""GPTQ (ICLR 2023, arXiv 2210.17323) on the original coordinates: error-compensated rounding, nothing else."""

from flatquant.errors import SpecError
from flatquant.spec import DataSpec, Recipe, Scheme, SolverSpec

DATA = {"reference": DataSpec(samples=128, seqlen=2048), "quick": DataSpec(samples=16, seqlen=512)}
DATA["best"] = DATA["reference"]


def gptq(scheme: str | Scheme, preset: str = "reference") -> Recipe:
    """GPTQ with full ranges; `quick` reads less text."""
    if preset not in DATA:
        raise SpecError(f"unknown preset {preset!r}; known: {', '.join(DATA)}")
    scheme = Scheme.parse(scheme, clip="none") if isinstance(scheme, str) else scheme
    return Recipe(name="gptq", scheme=scheme, solver=SolverSpec(kind="gptq"), data=DATA[preset])
