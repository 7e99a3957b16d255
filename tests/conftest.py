"""Settings that must hold before anything else is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Triton reads this when it is first imported, by whomever.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)
