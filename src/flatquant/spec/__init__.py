"""What to quantise and how, as plain data.

Every object here is a frozen, keyword-only dataclass that validates itself once and converts to and from JSON-ready
dictionaries (`to_dict`, `from_dict`). Nothing here imports torch: a recipe can be written, read and compared on a
machine that has none. Three layers:

- `grids`: *what one grid looks like*, `QuantSpec`; `scheme`: *which grids a model gets*, `Scheme`;
- `parts`: *what a method is made of*, `TransformSpec`, `FitSpec`, `EndToEndSpec`, `SolverSpec`, `DataSpec`; `recipe`
  joins them in `Recipe`;
- `plans`: *what sits where in one concrete model*, `SitePlan`, `BlockPlan`, `HeadPlan`, `EmbeddingPlan`, `Plan`: all
  that serving needs besides tensors.
"""

from flatquant.spec.convert import from_dict, to_dict
from flatquant.spec.grids import (
    CLIP_STARTS,
    CUT_SITES,
    EMBEDDING,
    HEAD,
    SITES,
    CacheBits,
    Clip,
    HeadGrids,
    QuantSpec,
    SiteBits,
    plain_weights,
)
from flatquant.spec.parts import (
    BranchSpec,
    CodebookSpec,
    DataSpec,
    EndToEndSpec,
    FitMemory,
    FitSpec,
    RoundingSpec,
    SolverSpec,
    Transforms,
    TransformSpec,
)
from flatquant.spec.plans import (
    BlockPlan,
    EmbeddingPlan,
    HeadPlan,
    KeyOffset,
    LatentPlan,
    Pairing,
    Plan,
    SitePlan,
    by_expert,
    is_experts,
)
from flatquant.spec.recipe import DATA_STARTS, LARGEST_SEED, Recipe
from flatquant.spec.scheme import Scheme

__all__ = [
    "CLIP_STARTS",
    "CUT_SITES",
    "DATA_STARTS",
    "EMBEDDING",
    "HEAD",
    "LARGEST_SEED",
    "SITES",
    "BlockPlan",
    "BranchSpec",
    "CacheBits",
    "Clip",
    "CodebookSpec",
    "DataSpec",
    "EmbeddingPlan",
    "EndToEndSpec",
    "FitMemory",
    "FitSpec",
    "HeadGrids",
    "HeadPlan",
    "KeyOffset",
    "LatentPlan",
    "Pairing",
    "Plan",
    "QuantSpec",
    "Recipe",
    "RoundingSpec",
    "Scheme",
    "SiteBits",
    "SitePlan",
    "SolverSpec",
    "TransformSpec",
    "Transforms",
    "by_expert",
    "from_dict",
    "is_experts",
    "plain_weights",
    "to_dict",
]
