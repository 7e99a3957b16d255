"""Grids against the formulas of the paper, written again in numpy."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.errors import SpecError
from flatquant.modules import trainable_parameters
from flatquant.quantizers import Dynamic, FixedClip, LearnedClip, NoClip, WeightGrid
from flatquant.solvers import RTN
from flatquant.spec import QuantSpec, Scheme

SIGMA4 = 1 / (1 + np.exp(-4.0))
BITS = st.integers(2, 8)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[..., 0] *= 9
    return x.to(dtype)


def clip_of(low: float, high: float, shape: tuple[int, ...] = (1,)) -> LearnedClip:
    """A clip whose sigmoids are `low` and `high`."""
    clip = LearnedClip(shape).double()
    with torch.no_grad():
        clip.low_logit.fill_(torch.logit(torch.tensor(low, dtype=torch.float64)))
        clip.high_logit.fill_(torch.logit(torch.tensor(high, dtype=torch.float64)))
    return clip


# ----------------------------------------------------------------------------------------------- dynamic


def dynamic_by_hand(x: np.ndarray, bits: int, symmetric: bool, low: float, high: float):
    """flatquant.md section 4: xmax = max(0, amax) sigma(a_max), xmin = min(0, amin) sigma(a_min), per row."""
    xmax = np.maximum(0, x.max(-1, keepdims=True)) * high
    xmin = np.minimum(0, x.min(-1, keepdims=True)) * low
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = np.maximum(np.abs(xmin), xmax) / top
        scale[scale == 0] = 1
        q = np.clip(np.rint(x / scale), -top - 1, top)
        return q, scale, np.zeros_like(scale)
    empty = xmin == xmax
    xmin, xmax = np.where(empty, -1, xmin), np.where(empty, 1, xmax)
    scale = (xmax - xmin) / (2**bits - 1)
    zero = np.rint(-xmin / scale)
    return np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1), scale, zero


@settings(deadline=None, max_examples=60)
@given(
    bits=BITS,
    symmetric=st.booleans(),
    low=st.floats(0.3, 0.99),
    high=st.floats(0.3, 0.99),
    sign=st.sampled_from(["both", "positive", "negative"]),
    seed=st.integers(0, 99),
)
def test_dynamic_equals_the_formula(bits: int, symmetric: bool, low: float, high: float, sign: str, seed: int) -> None:
    x = random(2, 3, 2, 8, seed=seed)
    x = {"both": x, "positive": x.abs(), "negative": -x.abs()}[sign]
    grid = Dynamic(QuantSpec(bits=bits, symmetric=symmetric), clip_of(low, high))
    with torch.no_grad():
        q, scale, zero = dynamic_by_hand(x.numpy(), bits, symmetric, *(float(r) for r in grid.clip.ratios()))
        got = grid.quantize(x)
        assert np.array_equal(got.values.numpy(), q)
        np.testing.assert_allclose(got.scale.numpy(), scale, rtol=1e-12)
        assert (got.zero is None) == symmetric
        if got.zero is not None:
            assert np.array_equal(got.zero.numpy(), zero)
        got.check_range()
        np.testing.assert_allclose(grid(x).numpy(), scale * (q - zero), rtol=1e-12)
        assert torch.equal(got.dequantize(torch.float64), grid(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_have_a_grid_and_stay_zero(symmetric: bool) -> None:
    x = random(3, 6)
    x[1] = 0
    for clip in (NoClip(), clip_of(0.5, 0.5)):
        grid = Dynamic(QuantSpec(bits=4, symmetric=symmetric), clip)
        scale, zero = grid.grid(x)
        if symmetric:
            assert scale[1].item() == 1.0
        else:  # [-1, 1]
            assert zero is not None
            assert scale[1].item() == pytest.approx(2 / 15)
            assert zero[1].item() == 8  # half to even
        assert (grid(x)[1] == 0).all()
        grid.quantize(x).check_range()


def test_constant_rows_have_a_grid() -> None:
    for value in (3.0, -3.0):
        x = torch.full((2, 5), value)
        for symmetric in (True, False):
            grid = Dynamic(QuantSpec(bits=4, symmetric=symmetric))
            torch.testing.assert_close(grid(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_float32_and_outputs_keep_their_dtype(dtype: torch.dtype) -> None:
    x = random(3, 6, dtype=dtype)
    grid = Dynamic(QuantSpec(bits=4, symmetric=False, clip="learned"))
    assert grid(x).dtype == dtype
    q = grid.quantize(x)
    assert q.scale.dtype == torch.float32
    assert torch.equal(q.dequantize(dtype), grid(x))


def test_every_row_has_its_own_grid() -> None:
    x = random(2, 3, 4, 8)
    grid = Dynamic(QuantSpec(bits=4))
    together = grid(x)
    x2 = x.clone()
    x2[0, 0, 0] *= 100
    assert torch.equal(grid(x2)[1], together[1])
    assert torch.equal(grid(x2)[0, 0, 1:], together[0, 0, 1:])


def test_dynamic_learns_its_clip_only_if_asked() -> None:
    assert trainable_parameters(Dynamic(QuantSpec(bits=4)))["clip"] == []
    learned = trainable_parameters(Dynamic(QuantSpec(bits=4, clip="learned")))["clip"]
    assert [p.shape for p in learned] == [(1,), (1,)]  # two scalars


# ----------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("group", [None, 4])
@settings(deadline=None, max_examples=40)
@given(bits=BITS, symmetric=st.booleans(), low=st.floats(0.3, 0.99), high=st.floats(0.3, 0.99), seed=st.integers(0, 99))
def test_weight_grid_equals_the_formula(
    group: int | None, bits: int, symmetric: bool, low: float, high: float, seed: int
) -> None:
    w = random(5, 12, seed=seed)
    spec = QuantSpec(bits=bits, symmetric=symmetric, group_size=group)
    grid = WeightGrid(spec, clip_of(low, high, (5, 12 // (group or 12))))
    with torch.no_grad():
        low, high = (float(r.flatten()[0]) for r in grid.clip.ratios())
        a = w.numpy().reshape(5, -1, group or 12)
        cut = np.clip(a, low * a.min(-1, keepdims=True), high * a.max(-1, keepdims=True))
        clamped = grid.clamp(w)
        np.testing.assert_allclose(clamped.numpy(), cut.reshape(5, 12), rtol=1e-12)
        assert not torch.equal(clamped, w)
        scale, zero = grid.grid(clamped)
        if symmetric:
            top = 2 ** (bits - 1) - 1
            want_s = np.maximum(np.maximum(cut.max(-1), -cut.min(-1)), 1e-5) / top
            want_z = np.zeros_like(want_s)
            q = np.clip(np.rint(cut / want_s[..., None]), -top - 1, top)
            assert zero is None
        else:
            lo, hi = np.minimum(cut.min(-1), 0), np.maximum(cut.max(-1), 0)
            want_s = (hi - lo) / (2**bits - 1)
            want_z = np.rint(-lo / want_s)
            q = np.clip(np.rint(cut / want_s[..., None]) + want_z[..., None], 0, 2**bits - 1)
            assert zero is not None
            assert np.array_equal(zero.numpy(), want_z)
        np.testing.assert_allclose(scale.numpy(), want_s, rtol=1e-12)
        want = ((q - want_z[..., None]) * want_s[..., None]).reshape(5, 12)
        np.testing.assert_allclose(grid(clamped).numpy(), want, rtol=1e-12)


def test_weights_are_clipped_row_by_row_with_each_row_s_own_factor() -> None:
    w = random(3, 6)
    grid = WeightGrid.for_weight(QuantSpec(bits=4, clip="learned"), (3, 6))
    with torch.no_grad():
        grid.clip.high_logit[1] = 0.0  # sigma = 1/2
        cut = grid.clamp(w)
        assert cut[1].max().item() == pytest.approx(w[1].max().item() / 2)
        assert cut[0].max().item() == pytest.approx(w[0].max().item() * SIGMA4)
        assert cut[1].min().item() == pytest.approx(w[1].min().item() * SIGMA4)


def test_without_a_clip_clamping_changes_nothing() -> None:
    w = random(3, 6)
    assert WeightGrid(QuantSpec(bits=4)).clamp(w) is w
    infinite = WeightGrid.for_weight(QuantSpec(bits=4, clip="learned"), (3, 6))
    with torch.no_grad():
        infinite.clip.low_logit.fill_(float("inf"))
        infinite.clip.high_logit.fill_(float("inf"))
        assert torch.equal(infinite.clamp(w), w)


def test_one_clip_per_scale() -> None:
    assert isinstance(WeightGrid.for_weight(QuantSpec(bits=4), (3, 12)).clip, NoClip)
    for group, shape in ((None, (3, 1)), (4, (3, 3))):
        grid = WeightGrid.for_weight(QuantSpec(bits=4, group_size=group, clip="learned"), (3, 12))
        assert [p.shape for p in trainable_parameters(grid)["clip"]] == [shape, shape]


def test_ties_go_to_the_even_integer() -> None:
    row = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])  # the scale is 1
    even = torch.tensor([[7.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0]])
    spec = QuantSpec(bits=4)
    assert torch.equal(WeightGrid(spec)(row), even)
    assert torch.equal(Dynamic(spec)(row), even)
    assert torch.equal(Dynamic(spec).quantize(row).values.float(), even)
    shifted = torch.tensor([[12.0, 0.5, 1.5, 2.5, -0.5, -1.5, -3.0]])  # scale 1, zero point 3: round, then shift
    unsigned = Dynamic(QuantSpec(bits=4, symmetric=False)).quantize(shifted)
    assert unsigned.values.tolist() == [[15, 3, 5, 5, 3, 1, 0]]


def ste(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("what", ["activations", "weights", "weights in groups"])
def test_gradients_equal_those_of_the_formula_left_to_autograd(symmetric: bool, bits: int, what: str) -> None:
    """Rounding passes gradients on; range, clip and scale are all inside the graph."""
    spec = QuantSpec(bits=bits, symmetric=symmetric, group_size=4 if "groups" in what else None, clip="learned")
    x = random(5, 12, seed=bits).requires_grad_()
    out = random(5, 12, seed=20)
    if what == "activations":
        grid = Dynamic(spec, clip_of(0.8, 0.6))
        y, groups = grid(x), x
    else:
        grid = WeightGrid(spec, clip_of(0.8, 0.6, (5, 12 // (spec.group_size or 12))))
        y, groups = grid.clamp_and_round(x), x.unflatten(-1, (-1, spec.group_size or 12))
        with torch.no_grad():
            assert torch.equal(y, grid(grid.clamp(x)))
    parameters = [x, grid.clip.low_logit, grid.clip.high_logit]
    ours = torch.autograd.grad((y * out).sum(), parameters)

    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    low_ratio, high_ratio = (r if what == "activations" else r[..., None] for r in grid.clip.ratios())
    if what == "activations":
        low, high = low.clamp(max=0) * low_ratio, high.clamp(min=0) * high_ratio
    else:
        groups = torch.minimum(torch.maximum(groups, low * low_ratio), high * high_ratio)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if symmetric:
        scale, zero = torch.maximum(high, -low) / spec.high, torch.zeros(())
    else:
        scale = (high.clamp(min=0) - low.clamp(max=0)) / spec.high
        zero = ste(-low.clamp(max=0) / scale)
    q = torch.clamp(ste(groups / scale) + zero, spec.low, spec.high)
    want = ((q - zero) * scale).reshape(5, 12)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(ours, torch.autograd.grad((want * out).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_rows_of_zeros_keep_a_positive_scale() -> None:
    w = torch.zeros(2, 4)
    scale, _ = WeightGrid(QuantSpec(bits=4)).grid(w)
    torch.testing.assert_close(scale, torch.full((2, 1), 1e-5 / 7))
    assert torch.equal(WeightGrid(QuantSpec(bits=4))(w), w)


def test_gradients_reach_weights_through_the_scale() -> None:
    """The row's largest weight sets the scale, so that it feels every other weight's rounding."""
    w = random(1, 6).requires_grad_()
    loss = (WeightGrid(QuantSpec(bits=3))(w) * random(1, 6, seed=1)).sum()
    (g,) = torch.autograd.grad(loss, w)
    detached = random(1, 6, seed=1)  # straight through alone
    largest = int(w.abs().argmax())
    assert not torch.isclose(g[0, largest], detached[0, largest])
    others = [i for i in range(6) if i != largest]
    torch.testing.assert_close(g[0, others], detached[0, others])


# -------------------------------------------------------------------------------------------------- clips


def test_clips_start_at_sigma_of_four() -> None:
    low, high = LearnedClip((3, 1))(torch.full((3, 1), -2.0), torch.full((3, 1), 5.0))
    torch.testing.assert_close(low, torch.full((3, 1), -2.0 * float(SIGMA4)))
    torch.testing.assert_close(high, torch.full((3, 1), 5.0 * float(SIGMA4)))


def test_a_fixed_clip_is_the_learned_one_frozen() -> None:
    learned = clip_of(0.25, 0.75).float()
    ratios = learned.ratios()
    fixed = FixedClip(torch.cat(ratios))
    low, high = torch.tensor([-3.0]), torch.tensor([2.0])
    assert all(torch.equal(a, b) for a, b in zip(fixed(low, high), learned(low, high), strict=True))
    assert not list(fixed.parameters())
    assert fixed.state_dict().keys() == {"ratio"}
    with torch.no_grad():
        learned.low_logit.zero_()
    assert fixed.ratio[0].item() == pytest.approx(0.25)  # a copy


def test_a_clip_starts_where_its_spec_says() -> None:
    spec = QuantSpec(bits=4, clip="learned", clip_start=0.0)  # sigmoid(0) = 1/2
    low, high = Dynamic(spec).clip(torch.tensor([-2.0]), torch.tensor([6.0]))
    assert (low.item(), high.item()) == (-1.0, 3.0)
    w = WeightGrid.for_weight(spec, (2, 4)).clamp(torch.tensor([[-4.0, 0, 1, 2], [-2.0, 0, 1, 8]]))
    assert w.tolist() == [[-2.0, 0, 1, 1], [-1.0, 0, 1, 4]]


# ------------------------------------------------------------------------------------------- fixed and searched


def test_a_fixed_clip_scales_the_range_and_is_not_trained() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        plain = Dynamic(QuantSpec(bits=4, symmetric=symmetric))
        cut = Dynamic(QuantSpec(bits=4, symmetric=symmetric, clip="fixed", clip_ratio=0.9))
        torch.testing.assert_close(cut.grid(x)[0], 0.9 * plain.grid(x)[0])
        assert not any(trainable_parameters(cut).values())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
def test_a_searched_clip_errs_less(symmetric: bool, group: int | None) -> None:
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    w[0, 3] = 12.0
    spec = QuantSpec(bits=3, symmetric=symmetric, group_size=group)
    plain, searched = WeightGrid(spec), WeightGrid(dataclasses.replace(spec, clip="search"))

    def error(grid: WeightGrid) -> torch.Tensor:
        rounded = RTN().solve(w, grid, None).dequantize()
        return (rounded - w).abs().pow(2.4).unflatten(-1, (-1, group or 32)).sum(-1)

    assert (error(searched) <= error(plain) + 1e-5).all()
    assert error(searched).sum() < 0.97 * error(plain).sum()
    ratio = searched.grid(w)[0] / plain.grid(w)[0]
    assert ((ratio > 0.2) & (ratio <= 1.0)).all()
    torch.testing.assert_close(ratio * 100, (ratio * 100).round(), rtol=0, atol=1e-3)
    assert torch.equal(searched(w), plain(w))  # in a fit


@pytest.mark.parametrize("where, clip", [("weights", "fixed"), ("activations", "search"), ("keys", "search")])
def test_clips_are_refused_where_they_make_no_sense(where: str, clip: str) -> None:
    with pytest.raises(SpecError, match=where):
        Scheme(**{where: QuantSpec(bits=4, clip=clip)})  # type: ignore[arg-type]


def test_clips_of_a_scheme() -> None:
    scheme = Scheme.parse("w4a4k4v8", clip="none").with_clips(weights="search", activations=0.9, cache=0.95, up_to=4)
    assert scheme.weights == QuantSpec(bits=4, clip="search")
    assert scheme.activations == QuantSpec(bits=4, clip="fixed", clip_ratio=0.9)
    assert scheme.keys == QuantSpec(bits=4, symmetric=False, clip="fixed", clip_ratio=0.95)
    assert scheme.values == QuantSpec(bits=8, symmetric=False)
    assert Scheme.parse("w16", clip="none").with_clips(weights="search") == Scheme()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", ["none", "search"])
def test_a_signed_scale_puts_the_largest_weight_on_the_far_end(bits: int, clip) -> None:
    w = torch.randn(16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w[0] = 0
    w[1].abs_()
    w[2].abs_().neg_()
    grid = WeightGrid(QuantSpec(bits=bits, group_size=8, clip=clip, signed_scale=True))
    scale, zero = grid.grid(w)
    assert zero is None
    groups = w.unflatten(-1, (-1, 8))
    q = (groups / scale[..., None]).round().clamp(grid.spec.low, grid.spec.high)
    far = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # (o, g, 1)
    assert bool((q.amin(-1)[1:] == grid.spec.low).all())
    if clip == "none":
        torch.testing.assert_close(far[..., 0][1:], scale[1:] * grid.spec.low)
        assert bool((scale[0] == 1).all())
        torch.testing.assert_close(grid(w), grid.clamp_and_round(w), rtol=0, atol=0)
        plain = WeightGrid(QuantSpec(bits=bits, group_size=8)).grid(w)[0]
        torch.testing.assert_close(scale[1:].abs(), plain[1:] * (1 - 0.5 ** (bits - 1)))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_signed_scale_covers_what_a_learned_clip_leaves(bits: int) -> None:
    w = torch.randn(16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spec = QuantSpec(bits=bits, group_size=8, clip="learned", signed_scale=True)
    clipped = WeightGrid.for_weight(spec, (16, 24))
    whole = WeightGrid(QuantSpec(bits=bits, group_size=8, signed_scale=True))
    assert isinstance(clipped.clip, LearnedClip)
    clipped.clip.high_logit.data.fill_(0.5)
    inside = clipped.clamp(w)
    assert bool((inside != w).any())
    torch.testing.assert_close(clipped.clamp_and_round(w), whole(inside), rtol=0, atol=0)
    torch.testing.assert_close(clipped.nearest(inside).dequantize(w.dtype), whole(inside), rtol=1e-6, atol=1e-6)
    clipped.clamp_and_round(w).square().sum().backward()
    assert clipped.clip.high_logit.grad is not None
    assert bool((clipped.clip.high_logit.grad != 0).any())
