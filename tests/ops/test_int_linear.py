"""Products of integers are exact: they equal float64 arithmetic on what the integers stand for."""

import pytest
import torch

from flatquant.ops.int_linear.reference import int_linear


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_float64(groups: int, zeros: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    n, o, tokens = 24, 7, 5
    x = torch.randint(0, 16, (2, tokens, n), generator=generator, dtype=torch.uint8)
    w = torch.randint(0, 16, (o, n), generator=generator, dtype=torch.uint8)
    xs, ws = torch.rand(2, tokens, 1, generator=generator), torch.rand(o, groups, generator=generator)
    xz = torch.randint(0, 16, (2, tokens, 1), generator=generator).float() if zeros else None
    wz = torch.randint(0, 16, (o, groups), generator=generator).float() if zeros else None
    b = torch.randn(o, generator=generator) if bias else None

    def real(q: torch.Tensor, s: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        wide = q.double().unflatten(-1, (s.shape[-1], -1)) - (0 if z is None else z.double()[..., None])
        return (wide * s.double()[..., None]).flatten(-2)

    want = real(x, xs, xz) @ real(w, ws, wz).mT + (0 if b is None else b.double())
    torch.testing.assert_close(int_linear(x, xs, xz, w, ws, wz, b, torch.float64), want, rtol=1e-5, atol=1e-5)
