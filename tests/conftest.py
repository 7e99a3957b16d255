"""Settings that must hold before anything else is imported."""

import gc
import os

import jaxtyping
import pytest
import torch

import tests.shapes  # noqa: F401  # jaxtyping looks it up by its name

# Signatures that name shapes and dtypes are checked at every call in the tests.
jaxtyping.install_import_hook(
    [
        "flatquant.transforms",
        "flatquant.formats.minifloat",
        "flatquant.quantizers.levels",
        "flatquant.quantizers.split",
        "flatquant.quantizers.uniform",
        "flatquant.solvers",
        "flatquant.qtensor",
        "flatquant.rotary",
    ],
    "tests.shapes.checked",
)

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Triton reads this when it is first imported, by whomever.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Collections of garbage pass over what imports have made, hundreds of thousands of objects."""
    gc.collect()
    gc.freeze()
