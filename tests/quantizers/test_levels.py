"""Learned levels: gradients by finite differences, codes that flip, activation levels that serve most channels."""

import pytest
import torch
from torch import Tensor

from flatquant.quantizers.levels import ChannelLevels, LearnedLevels


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
    torch.testing.assert_close(ours.values()[0], plain.values()[0], rtol=0.05, atol=0.01)


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
    values, codes = levels.values()
    assert values[0] == 0
    assert (values.diff() > 0).all()
    assert codes.shape == (4, 2)
    assert set(y.unique().tolist()) <= set(values.tolist())
    assert torch.equal(y, values[(x[..., None] - values).abs().argmin(-1)])


def test_gradients_pass_between_zero_and_the_clip() -> None:
    levels = ChannelLevels(2)
    levels(channels(0.0))
    top = levels.eval().values()[0][-1]
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
