"""The Kronecker product without forming it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flatquant.ops.kron.reference import kron_matmul

sizes = st.integers(1, 9)


@given(n1=sizes, n2=sizes, rows=st.integers(1, 4), left=st.booleans(), right=st.booleans(), seed=st.integers(0, 99))
def test_equals_the_product_itself(n1: int, n2: int, rows: int, left: bool, right: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p1, p2 = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (n1, n2))
    x = torch.randn(2, rows, n1 * n2, generator=generator, dtype=torch.float64)
    eye1, eye2 = (torch.eye(n, dtype=torch.float64) for n in (n1, n2))
    want = x @ torch.kron(p1 if left else eye1, p2 if right else eye2)
    torch.testing.assert_close(kron_matmul(x, p1 if left else None, p2 if right else None), want)
