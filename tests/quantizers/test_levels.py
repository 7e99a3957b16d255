"""Learned levels: gradients by finite differences, codes that flip, activation levels that serve most channels."""

import pytest
import torch
from benchmarks.levels_digits import ChannelLevels, LearnedLevels
from torch import Tensor

from flatquant.quantizers import Dynamic
from flatquant.quantizers.levels import (
    ActivationLevels,
    WeightLevels,
    ascending,
    least_squares_levels,
)
from flatquant.spec import QuantSpec


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_row_has_the_levels_of_its_basis(bits: int) -> None:
    weight = LearnedLevels.from_weight(random(5, 200), bits)
    q = weight().detach()
    for row, v in zip(q, weight.levels.detach(), strict=True):
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * bits).view(-1, bits)
        assert (row[:, None] - signs @ v).abs().amin(1).max() < 1e-12
        assert len(torch.unique((row * 1e9).round())) <= 2**bits


def test_one_bit_starts_as_the_mean_times_the_sign() -> None:
    w = random(5, 40)
    torch.testing.assert_close(LearnedLevels.from_weight(w, 1)(), w.abs().mean(1, keepdim=True) * w.sign())


def test_more_bits_start_nearer() -> None:
    w = random(5, 200)
    errors = [float((LearnedLevels.from_weight(w, bits)() - w).detach().norm()) for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)


def test_levels_get_the_exact_gradient_times_their_scale() -> None:
    w, target = random(3, 16), random(3, 16, seed=1)
    weight = LearnedLevels.from_weight(w, 2)

    def loss() -> Tensor:
        return (weight() - target).square().sum()

    loss().backward()
    assert weight.levels.grad is not None
    for index in [(0, 0), (1, 1), (2, 0)]:
        with torch.no_grad():
            weight.levels[index] += 1e-6
            up = float(loss())
            weight.levels[index] -= 2e-6
            down = float(loss())
            weight.levels[index] += 1e-6
        slope = (up - down) / 2e-6
        assert float(weight.levels.grad[index]) == pytest.approx(slope * (16 * 2) ** -0.5, rel=1e-5)


def test_latents_get_gradients_inside_and_none_outside() -> None:
    weight = LearnedLevels.from_weight(random(3, 16), 2)
    with torch.no_grad():
        weight.latent[0] *= 10
    outside = weight.latent.abs() > 1
    g = random(3, 16, seed=1)
    weight().backward(g)
    assert weight.latent.grad is not None
    assert outside.any()
    assert (weight.latent.grad[outside] == 0).all()
    want = g[..., None] * weight.levels[:, None]
    torch.testing.assert_close(weight.latent.grad[~outside], want.detach()[~outside])
    weight.settle()
    assert weight.latent.abs().max() <= 1


def test_a_step_against_a_code_flips_it() -> None:
    """The quantised weight itself moves: no full-precision weight lies in between."""
    weight = LearnedLevels(torch.tensor([[1.0]]), torch.tensor([[[0.2], [0.9]]]))
    assert weight().tolist() == [[1.0, 1.0]]
    weight().sum().backward()
    with torch.no_grad():
        weight.latent -= 0.5 * weight.latent.grad  # type: ignore[operator]
        weight.levels[0, 0] = -3.0
    weight.settle()
    assert torch.equal(weight().sign(), torch.tensor([[-1.0, 1.0]]))
    assert weight.levels.item() > 0
    assert LearnedLevels(torch.tensor([[1.0]]), torch.zeros(1, 1, 1))().item() == 1.0


# -------------------------------------------------------------------------------------------------- activations


def channels(spread: float, seed: int = 0, c: int = 32) -> Tensor:
    """After a ReLU: (B, C, H, W) whose channels differ in size by a log-normal of this spread."""
    scale = (spread * random(c, seed=seed + 1)).exp()
    return (random(16, c, 6, 6, seed=seed).relu() * scale[:, None, None]).float()


def relative_errors(levels: ChannelLevels, x: Tensor) -> Tensor:
    levels.eval()
    return ((levels(x) - x).square().mean((0, 2, 3)) / x.square().mean((0, 2, 3))).sort().values


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_channels_alike_have_the_levels_of_the_total(bits: int) -> None:
    x = channels(0.0)
    ours, plain = ChannelLevels(bits), ChannelLevels(bits, by_channel=False)
    for _ in range(40):
        ours(x), plain(x)
    torch.testing.assert_close(ascending(ours.basis)[0], ascending(plain.basis)[0], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_most_channels_gain_where_few_are_large(bits: int) -> None:
    better = []
    for seed in range(3):
        x = channels(0.3, seed)
        x[:, [3, 17]] *= 100
        ours, plain = ChannelLevels(bits), ChannelLevels(bits, by_channel=False)
        for _ in range(40):
            ours(x), plain(x)
        a, b = relative_errors(ours, x), relative_errors(plain, x)
        assert a.median() < 0.5 * b.median()
        better.append(float((a < b).float().mean()))
    assert sum(better) / 3 > 0.85


def test_levels_hold_zero_ascend_and_are_met() -> None:
    x = channels(0.5)
    levels = ChannelLevels(2)
    y = levels(x)
    values, codes = ascending(levels.basis)
    assert values[0] == 0
    assert (values.diff() > 0).all()
    assert codes.shape == (4, 2)
    assert set(y.unique().tolist()) <= set(values.tolist())
    assert torch.equal(y, values[(x[..., None] - values).abs().argmin(-1)])


def test_gradients_pass_between_zero_and_the_clip() -> None:
    levels = ChannelLevels(2)
    levels(channels(0.0))
    top = ascending(levels.eval().basis)[0][-1]
    x = torch.tensor([[-0.5], [0.0], [0.3], [float(top) - 1e-3], [float(top) + 1.0]], requires_grad=True)
    levels(x).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [0, 0, 1, 1, 0]


def test_levels_rest_in_evaluation_and_survive_dead_channels() -> None:
    x = channels(0.5)
    x[:, :5] = 0
    levels = ChannelLevels(2)
    levels(x)
    assert torch.isfinite(levels.basis).all()
    before = levels.basis.clone()
    levels.eval()(10 * x)
    assert torch.equal(levels.basis, before)
    frozen = ChannelLevels(2, momentum=1.0)
    frozen(x)
    before = frozen.basis.clone()
    frozen(10 * x)
    assert torch.equal(frozen.basis, before)
    silent = ChannelLevels(2)
    assert (silent(torch.zeros(2, 3, 4, 4)) == 0).all()


# ------------------------------------------------------------------------------------------- of a language model


def spec(bits: int, group: int | None = None) -> QuantSpec:
    return QuantSpec(bits=bits, kind="levels", group_size=group)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_by_least_squares_beat_both_starts(bits: int) -> None:
    w = random(5, 300)
    w[0] = 0
    w[1, 7] = 30.0

    def error(levels: Tensor) -> Tensor:
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * bits).view(-1, bits)
        return (w[:, :, None] - (levels @ signs.mT)[:, None]).abs().amin(-1).square().sum(-1)

    ours = error(least_squares_levels(w, bits))
    greedy = error(LearnedLevels.from_weight(w, bits).levels.detach())
    uniform = error(w.abs().amax(-1, keepdim=True).clamp(min=1e-8) * 2.0 ** -torch.arange(1, bits + 1))
    assert (ours <= torch.minimum(greedy, uniform) + 1e-12).all()
    assert (ours[2:] < 0.97 * torch.minimum(greedy, uniform)[2:]).all()


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_weight_starts_on_its_nearest_level_and_is_frozen_there(bits: int, group: int | None) -> None:
    w = random(6, 40).float()
    levels = WeightLevels(spec(bits, group), w)
    frozen = levels.frozen()
    frozen.check_range()
    assert frozen.format.bits == bits
    torch.testing.assert_close(frozen.dequantize(), levels().detach(), rtol=1e-5, atol=1e-6)
    groups = w.unflatten(-1, (-1, group or 40))  # (o, g, n / g)
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * bits).view(-1, bits)
    all_sums = frozen.parts["levels"] @ signs.mT  # (o, g, 2^bits)
    nearest = (groups[..., None] - all_sums[:, :, None]).abs().amin(-1).flatten(1)
    torch.testing.assert_close((frozen.dequantize() - w).abs(), nearest, rtol=1e-4, atol=1e-5)
    assert torch.equal(frozen.format.unpack(frozen.packed(), 40), frozen.codes)


def test_a_step_takes_a_weight_to_the_next_level() -> None:
    """However many bits: never to a level further away."""
    levels = WeightLevels(spec(3), random(4, 50).float())
    before = levels.frozen()
    values, _ = (levels.levels @ torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 3).mT * levels.unit).sort(-1)
    old = before.dequantize()
    levels().sum().backward()
    assert levels.position.grad is not None
    assert (levels.position.grad > 0).all()  # every weight can move
    with torch.no_grad():
        levels.position -= 1.0
    levels.settle()
    new = levels.frozen().dequantize()
    for row, was, now in zip(values, old, new, strict=True):
        at = (row - was[:, None]).abs().argmin(-1)
        torch.testing.assert_close(now, row[(at - 1).clamp(min=0)])
    with torch.no_grad():
        levels.levels.zero_()
    levels.settle()
    assert (levels.levels > 0).all()


def test_levels_of_a_weight_get_the_exact_gradient() -> None:
    levels = WeightLevels(spec(2), random(3, 20))
    target = random(3, 20, seed=1)

    def loss() -> Tensor:
        return (levels() - target).square().sum()

    loss().backward()
    assert levels.levels.grad is not None
    for index in [(0, 0), (2, 1)]:
        with torch.no_grad():
            levels.levels[index] += 1e-6
            up = float(loss())
            levels.levels[index] -= 2e-6
            down = float(loss())
            levels.levels[index] += 1e-6
        assert float(levels.levels.grad[index]) == pytest.approx((up - down) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_activations_lie_on_signed_levels_of_their_token(bits: int) -> None:
    x = random(64, 24).float() * (0.5 * random(24, seed=3)).exp().float()
    x[5] = 0
    levels = ActivationLevels.found(spec(bits), x)
    y = levels(x)
    assert torch.isfinite(y).all()
    assert (y[5] == 0).all()
    assert y.dtype == x.dtype
    relative = y / x.abs().amax(-1, keepdim=True).clamp(min=1e-8)
    assert len((relative * 1e5).round().unique()) <= 2**bits - 1
    assert levels(-x).equal(-y)
    torch.testing.assert_close(levels(4 * x), 4 * y)  # a power of two: the scale is the token's
    errors = [float((ActivationLevels.found(spec(b), x)(x) - x).square().mean()) for b in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_gradients_pass_activations_below_the_largest_level() -> None:
    x = random(8, 16).float().requires_grad_()
    levels = ActivationLevels(spec(4), torch.tensor([0.1, 0.2, 0.4]))
    levels(x).sum().backward()
    assert x.grad is not None
    u = x.detach().abs() / x.detach().abs().amax(-1, keepdim=True)
    assert (x.grad[u < 0.7] == 1).all()
    assert (x.grad[(u > 0.7) & (u < 1)] == 0).all()


def test_a_position_that_diverged_is_not_a_number_afterwards_either() -> None:
    """So that a fit ends by its loss, which has a reason, not by an index that no level has."""
    levels = WeightLevels(spec(2), random(3, 20))
    with torch.no_grad():
        levels.position[1, 2] = torch.nan
    w = levels().detach()
    assert w[1, 2].isnan()
    assert w.isnan().sum() == 1


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("power", [0.01, 1.0, 30.0])
def test_levels_of_activations_have_no_more_total_error_than_plain_rounding(bits: int, power: float) -> None:
    """Relative errors would cut off a constant channel, however much depends on it."""
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    rows[:, 9] = power
    spec = QuantSpec(bits=bits, kind="levels")
    ours, plain = ActivationLevels.found(spec, rows), Dynamic(QuantSpec(bits=bits))

    def error(grid: torch.nn.Module) -> float:
        reach = rows.abs().amax(1, keepdim=True)
        return float(((grid(rows) - rows) / reach).square().sum())

    assert error(ours) <= 1.001 * error(plain)
