"""The product that uses its memory again is the reference, bit for bit, in any thread."""

from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.ops.int_linear import int_linear, reference


def make(tokens: int, o: int, n: int, groups: int, symmetric: bool, seed: int):
    g = torch.Generator().manual_seed(seed)
    low, kind = (-8, torch.int8) if symmetric else (0, torch.uint8)
    x, w = (torch.randint(low, low + 16, (rows, n), generator=g).to(kind) for rows in (tokens, o))
    scales = (torch.rand(tokens, 1, generator=g), torch.rand(o, groups, generator=g))
    zeros = (None, None) if symmetric else (torch.full((tokens, 1), 7.0), torch.full((o, groups), 8.0))
    return x, scales[0], zeros[0], w, scales[1], zeros[1], torch.randn(o, generator=g), torch.float32


@settings(deadline=None)
@given(
    tokens=st.integers(1, 5),
    o=st.integers(1, 40),
    n=st.sampled_from((4, 24, 64)),
    groups=st.sampled_from((1, 2)),
    symmetric=st.booleans(),
    seed=st.integers(0, 9),
)
def test_it_is_the_reference(tokens: int, o: int, n: int, groups: int, symmetric: bool, seed: int) -> None:
    arguments = make(tokens, o, n, groups, symmetric, seed)
    kept = arguments[3].clone()
    assert torch.equal(int_linear(*arguments), reference.int_linear(*arguments))
    assert torch.equal(arguments[3], kept)


def test_threads_do_not_share_memory() -> None:
    jobs = [make(3, 64, 256, 1, True, seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda job: int_linear(*job), jobs))
    assert all(torch.equal(y, reference.int_linear(*job)) for y, job in zip(got, jobs, strict=True))


def test_memory_of_inference_mode_serves_outside_of_it() -> None:
    """What a thread computes first may be in inference mode, and the next not."""
    x, w = torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 3, dtype=torch.int8)
    arguments = (x, torch.ones(2, 1), None, w, torch.ones(4, 1), None, None, torch.float32)

    def work() -> list[Tensor]:
        with torch.inference_mode():
            first = int_linear(*arguments)
        return [first, int_linear(*arguments)]

    with ThreadPoolExecutor(1) as pool:  # a thread that has no memory yet
        assert all(bool((y == 3).all()) for y in pool.submit(work).result())
