"""RTN and GPTQ against the book: optimal brain surgeon written out with plain inverses, one column at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.errors import CalibrationError
from flatquant.qtensor import QTensor
from flatquant.quantizers import WeightGrid
from flatquant.solvers import GPTQ, RTN, InputGram, OutputAdaptive
from flatquant.spec import QuantSpec

W4 = WeightGrid(QuantSpec(bits=4))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, seed: int = 0, tokens: int = 200) -> Tensor:
    """The Hessian of inputs whose channels differ in size and depend on one another."""
    x = random(tokens, n, seed=seed) @ (torch.eye(n) + 0.6 * random(n, n, seed=seed + 1) / n**0.5 + 0.5)
    x = x * (0.5 * random(n, seed=seed + 2)).exp()
    return 2 / tokens * x.mT @ x


def damped(h: Tensor, damping: float = 0.01) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def proxy(w: Tensor, q: QTensor, h: Tensor) -> float:
    """tr(dW H dW^T)."""
    d = w - q.dequantize(torch.float64)
    return float((d @ h * d).sum())


def surgeon(w: Tensor, q: QTensor, h: Tensor, order: list[int]) -> tuple[Tensor, float]:
    """GPTQ by its derivation: fix one column, move all free ones by -(w_q - Q) / [H_F^-1]_qq (H_F^-1)_q.

    Takes only the scales and zero points of `q`. Returns integers and the sum of the losses the theory predicts,
    (w_q - Q)^2 / [H_F^-1]_qq.
    """
    w, spec = w.clone(), q.spec
    ints, predicted = torch.empty_like(w), 0.0
    scale = q.scale.double().repeat_interleave(q.group, 1)
    zero = torch.zeros_like(scale) if q.zero is None else q.zero.double().repeat_interleave(q.group, 1)
    for i, column in enumerate(order):
        free = order[i:]
        inverse = torch.linalg.inv(h[free][:, free])
        s, z = scale[:, column], zero[:, column]
        ints[:, column] = torch.clamp(torch.round(w[:, column] / s) + z, spec.low, spec.high)
        error = w[:, column] - s * (ints[:, column] - z)
        predicted += float((error**2 / inverse[0, 0]).sum())
        w[:, free] -= torch.outer(error / inverse[0, 0], inverse[0])
    return ints, predicted


GRIDS = {
    "symmetric": QuantSpec(bits=4),
    "asymmetric": QuantSpec(bits=3, symmetric=False),
    "groups": QuantSpec(bits=4, group_size=4),
    "signed scale": QuantSpec(bits=3, group_size=4, signed_scale=True),
    "asymmetric groups": QuantSpec(bits=2, symmetric=False, group_size=4),
}


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_gptq_is_the_optimal_brain_surgeon(spec: QuantSpec, act_order: bool, block_size: int) -> None:
    w, h = random(7, 24), correlated(24)
    q = GPTQ(block_size=block_size, act_order=act_order).solve(w, WeightGrid(spec), h)
    order = torch.argsort(h.diagonal(), descending=True).tolist() if act_order else list(range(24))
    if act_order:
        assert order != sorted(order)
    ints, predicted = surgeon(w, q, damped(h), order)
    assert torch.equal(q.values.double(), ints)
    # The theory's losses, summed, are the true loss of the result (of the damped H).
    assert predicted == pytest.approx(proxy(w, q, damped(h)), rel=1e-10)
    # Scales are fixed before the recursion: those of the weights as they came.
    scale, zero = WeightGrid(spec).grid(w)
    assert torch.equal(q.scale, scale.float())
    if zero is not None:
        assert q.zero is not None
        assert torch.equal(q.zero, zero.float())
    q.check_range()


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_isotropic_hessian_leaves_nothing_to_compensate(spec: QuantSpec, act_order: bool, dtype) -> None:
    w = random(7, 24).to(dtype)
    grid = WeightGrid(spec)
    want = RTN().solve(w, grid, None)
    got = GPTQ(act_order=act_order, block_size=5).solve(w, grid, 3.0 * torch.eye(24, dtype=dtype))
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.scale, want.scale)
    assert not GPTQ.needs_hessian or torch.equal(want.values, RTN().solve(w, grid, correlated(24)).values)


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_the_order_of_columns_is_no_matter_where_they_do_not_depend_on_one_another(damping: float) -> None:
    w, h = random(7, 24), random(24, seed=1).exp().diag()
    q = [GPTQ(act_order=order, damping=damping, block_size=5).solve(w, W4, h) for order in (False, True)]
    want = RTN().solve(w, W4, None)
    assert all(torch.equal(got.values, want.values) and torch.equal(got.scale, want.scale) for got in q)


def test_block_sizes_agree_in_float32() -> None:
    w, h = random(9, 40).float(), correlated(40).float()
    results = [GPTQ(block_size=b).solve(w, W4, h) for b in (1, 7, 40, 128)]
    for q in results[1:]:
        assert (q.values == results[0].values).float().mean() > 0.99  # a tie may fall the other way
        assert proxy(w.double(), q, h.double()) == pytest.approx(proxy(w.double(), results[0], h.double()), rel=1e-2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_on_weights_and_wins_on_outputs(bits: int) -> None:
    grid, better, farther = WeightGrid(QuantSpec(bits=bits)), 0, 0
    for seed in range(40):
        w, h = random(8, 32, seed=seed), correlated(32, seed=seed + 100)
        gptq, rtn = GPTQ().solve(w, grid, h), RTN().solve(w, grid, None)
        better += proxy(w, gptq, h) <= proxy(w, rtn, h)
        eye = torch.eye(32, dtype=torch.float64)
        farther += proxy(w, gptq, eye) >= proxy(w, rtn, eye)
    assert better >= 38
    assert farther >= 38


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_the_second_of_two_columns_is_the_best_there_is(seed: int) -> None:
    w, h = random(6, 2, seed=seed), correlated(2, seed=seed + 1, tokens=20)
    q = GPTQ().solve(w, W4, h)
    scale = q.scale.double()[:, 0]
    first = q.values[:, 0].double()
    assert torch.equal(first, torch.clamp(torch.round(w[:, 0] / scale), -8, 7))
    losses = []
    for second in range(-8, 8):
        d = torch.stack([w[:, 0] - scale * first, w[:, 1] - scale * second], 1)
        losses.append((d @ damped(h) * d).sum(1))
    best = torch.stack(losses).argmin(0) - 8
    assert torch.equal(q.values[:, 1].long(), best)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_channels_that_are_never_used_become_zero(symmetric: bool, act_order: bool) -> None:
    w, h = random(5, 12), correlated(12)
    dead = [0, 3, 7, 11]
    h[dead] = 0
    h[:, dead] = 0
    grid = WeightGrid(QuantSpec(bits=4, symmetric=symmetric))
    q = GPTQ(act_order=act_order, block_size=4).solve(w, grid, h)
    values = q.dequantize(torch.float64)
    assert (values[:, dead] == 0).all()
    alive = [i for i in range(12) if i not in dead]
    assert torch.equal(q.scale, grid.grid(w)[0].float())  # dead columns still count for the range
    # The others are solved as if the dead were not there, up to a damping that counts H's diagonal of 1 for each.
    h2 = h.clone()
    h2.diagonal()[dead] = 1.0
    w2 = w.clone()
    w2[:, dead] = 0
    order = torch.argsort(h2.diagonal(), descending=True).tolist() if act_order else list(range(12))
    ints, _ = surgeon(w2, q, damped(h2), order)
    assert torch.equal(q.values.double()[:, alive], ints[:, alive])


def test_a_hessian_that_needs_more_damping_gets_it() -> None:
    h = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)  # eigenvalues 3 and -1
    w = random(3, 2)
    q = GPTQ().solve(w, W4, h)
    ints, _ = surgeon(w, q, damped(h, 10.0), [0, 1])  # 0.01, 0.1 and 1 are not enough
    assert torch.equal(q.values.double(), ints)


@pytest.mark.parametrize(
    "h",
    [torch.tensor([[1.0, 50.0], [50.0, 1.0]]), -torch.eye(2), torch.full((2, 2), float("nan")), None],
    ids=["indefinite", "negative", "nan", "none"],
)
def test_hopeless_hessians_are_an_error_in_one_line(h: Tensor | None) -> None:
    with pytest.raises(CalibrationError) as caught:
        GPTQ().solve(torch.ones(3, 2), W4, h)
    assert "\n" not in str(caught.value)
    assert "rtn" in str(caught.value)


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
def test_solvers_leave_their_inputs_alone(spec: QuantSpec) -> None:
    w, h = random(5, 12), correlated(12)
    h[2] = h[:, 2] = 0
    w0, h0 = w.clone(), h.clone()
    for solver in (RTN(), GPTQ(), GPTQ(act_order=True)):
        solver.solve(w, WeightGrid(spec), h)
    assert torch.equal(w, w0)
    assert torch.equal(h, h0)


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("solver", [RTN(), GPTQ(), GPTQ(act_order=True)], ids=["rtn", "gptq", "act order"])
def test_groups_hold_no_more_levels_than_the_grid(spec: QuantSpec, solver) -> None:
    q = solver.solve(random(6, 24), WeightGrid(spec), correlated(24))
    q.check_range()
    groups = q.dequantize().unflatten(-1, (-1, q.group)).flatten(0, 1)
    assert all(len(torch.unique(g)) <= 2**spec.bits for g in groups)
    assert q.scale.dtype == torch.float32
    assert q.values.is_contiguous()


@pytest.mark.parametrize("group", [None, 4])
def test_rtn_is_the_nearest_point_of_the_stored_grid(group: int | None) -> None:
    w = random(6, 12).float()
    q = RTN().solve(w, WeightGrid(QuantSpec(bits=3, group_size=group)), None)
    levels = np.arange(-4, 4)
    for r in range(6):
        for j in range(12):
            s = q.scale[r, j // (group or 12)].item()
            distance = np.abs(levels * s - w[r, j].item())
            assert abs(q.values[r, j].item() * s - w[r, j].item()) <= distance.min() + 1e-6
    assert not RTN.needs_hessian


@pytest.mark.parametrize("solver", [RTN(), GPTQ()], ids=["rtn", "gptq"])
def test_ties_go_to_the_even_integer(solver) -> None:
    w = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    q = solver.solve(w, W4, torch.eye(7))
    assert q.values.tolist() == [[7, 0, 2, 2, 0, -2, -2]]


# -------------------------------------------------------------------------------------------------- Hessian


def test_gram_is_twice_the_mean_outer_product_however_the_tokens_come() -> None:
    x = random(4, 5, 6).float()
    whole, parts = InputGram(6, "cpu"), InputGram(6, "cpu")
    whole.add(x)
    for piece in (x[0], x[1:2], x[2:]):
        parts.add(piece)
    want = 2 / 20 * x.double().flatten(0, 1).mT @ x.double().flatten(0, 1)
    for gram in (whole, parts):
        torch.testing.assert_close(gram.hessian().double(), want, rtol=1e-5, atol=1e-6)
        assert gram.hessian().dtype == torch.float32
    assert InputGram(3, "cpu").hessian().tolist() == [[0.0] * 3] * 3


def test_gram_of_half_precision_inputs_does_not_overflow() -> None:
    gram = InputGram(2, "cpu")
    gram.add(torch.full((8, 2), 6e4, dtype=torch.float16))
    torch.testing.assert_close(gram.hessian(), torch.full((2, 2), 2 * 6e4**2))


def test_gram_of_transformed_inputs_is_the_transformed_gram() -> None:
    x, p = random(30, 6), torch.eye(6) + 0.3 * random(6, 6, seed=3)
    plain, moved = InputGram(6, "cpu"), InputGram(6, "cpu")
    plain.add(x)
    moved.add(x @ p)
    torch.testing.assert_close(moved.hessian().double(), p.mT @ plain.hessian().double() @ p, rtol=1e-4, atol=1e-5)


def test_output_adaptive_is_the_fisher_matrix_summed_over_rows() -> None:
    """A linear and a cross entropy: blocks of the full Fisher matrix by autograd, one sequence at a time."""
    n, o, t = 4, 3, 5
    x, w, v = random(6, t, n), random(o, n, seed=1), random(7, o, seed=2)
    ids = torch.randint(0, 7, (6, t), generator=torch.Generator().manual_seed(3))
    ours = OutputAdaptive(n, "cpu")
    fisher = torch.zeros(o * n, o * n, dtype=torch.float64)
    for xi, target in zip(x, ids, strict=True):
        w.requires_grad_()
        y = xi @ w.mT
        loss = torch.nn.functional.cross_entropy(y @ v.mT, target, reduction="sum")
        gradient, delta = torch.autograd.grad(loss, (w, y))
        fisher += torch.outer(gradient.flatten(), gradient.flatten()) / 6
        ours.add(xi[None], delta[None])
    want = sum(fisher[r * n : (r + 1) * n, r * n : (r + 1) * n] for r in range(o))
    torch.testing.assert_close(ours.hessian().double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_output_adaptive_is_symmetric_positive_and_blind_to_how_sequences_are_batched(per) -> None:
    x, delta = random(4, 7, 12), random(4, 7, 3, seed=1)
    whole, parts = OutputAdaptive(12, "cpu", per), OutputAdaptive(12, "cpu", per)
    whole.add(x, delta)
    for i in range(4):
        parts.add(x[i : i + 1], delta[i : i + 1])
    h = whole.hessian()
    assert torch.equal(h, parts.hessian())
    assert torch.equal(h, h.mT)
    assert torch.linalg.eigvalsh(h).min() > -1e-6 * h.trace() / 12
    assert OutputAdaptive(2, "cpu", per).hessian().tolist() == [[0.0] * 2] * 2


def test_a_sequence_of_one_token_has_no_cross_terms() -> None:
    x, delta = random(9, 1, 5), random(9, 1, 4, seed=1)
    sequence, token = OutputAdaptive(5, "cpu"), OutputAdaptive(5, "cpu", "token")
    sequence.add(x, delta)
    token.add(x, delta)
    torch.testing.assert_close(sequence.hessian(), token.hessian(), rtol=1e-5, atol=1e-6)
    longer = OutputAdaptive(5, "cpu")
    longer.add(x.mT.reshape(1, 9, 5), delta.mT.reshape(1, 9, 4))
    assert not torch.allclose(longer.hessian() / 9, token.hessian(), rtol=1e-2)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_the_scale_of_the_loss_does_not_matter(per) -> None:
    w, x, delta = random(6, 12).float(), random(8, 7, 12), random(8, 7, 6, seed=1)
    plain, scaled = OutputAdaptive(12, "cpu", per), OutputAdaptive(12, "cpu", per)
    plain.add(x, delta)
    scaled.add(x, 4 * delta)
    assert torch.equal(scaled.hessian(), 16 * plain.hessian())
    a, b = (GPTQ().solve(w, W4, h.hessian()) for h in (plain, scaled))
    assert torch.equal(a.values, b.values)


def test_tokens_that_matter_alike_give_the_gram_of_the_inputs() -> None:
    w, x = random(6, 12).float(), random(8, 7, 12)
    gram, token = InputGram(12, "cpu"), OutputAdaptive(12, "cpu", "token")
    gram.add(x)
    token.add(x, torch.full((8, 7, 4), 0.5))  # norm 1
    torch.testing.assert_close(token.hessian() * 2 / 7, gram.hessian(), rtol=1e-6, atol=1e-6)
    assert torch.equal(GPTQ().solve(w, W4, token.hessian()).values, GPTQ().solve(w, W4, gram.hessian()).values)
