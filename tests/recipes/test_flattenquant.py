"""FlattenQuant, reconstructed: pieces of channels, one static scale (arXiv 2402.17985)."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatquant.errors import SpecError
from flatquant.modules import trainable_parameters
from flatquant.quantizers import Dynamic, SplitGrid, WeightGrid
from flatquant.quantizers.split import thresholds
from flatquant.recipes import flatquant, flattenquant, quarot, rtn
from flatquant.solvers import RTN
from flatquant.spec import DataSpec, FitSpec, QuantSpec, Recipe, Scheme, SolverSpec
from tests.laws import SHAPES, calibrated, family, hidden, tokens_for

STATIC = QuantSpec(bits=4, scope="tensor", width=1.5)


def outliers(tokens: int = 512, n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, n, generator=g) * (0.7 * torch.randn(n, generator=g)).exp()
    x[:, :2] *= 30
    return x, torch.randn(48, n, generator=g)


def pieces(x: Tensor, grid: SplitGrid) -> tuple[Tensor, Tensor]:
    """The split tensor, by taking from every channel what a piece holds and going on with the rest; and its index."""
    t = float(grid.step) * grid.spec.high
    columns, index = [], []
    for j, k in enumerate(grid.copies.tolist()):
        rest = x[:, j].clone()
        for _ in range(k):
            piece = rest.clamp(-t, t)
            columns.append(piece)
            index.append(j)
            rest = rest - piece
    return torch.stack(columns, 1), torch.tensor(index)


# ------------------------------------------------------------------------------------------------- pieces


def test_pieces_times_repeated_columns_are_the_product() -> None:
    x, w = (t.double() for t in outliers())
    grid = SplitGrid.covering(STATIC, 1.001 * x.abs().amax(0))  # the step is kept in float32
    split, index = pieces(x, grid)
    t = float(grid.step) * grid.spec.high
    assert split.abs().max() <= t * (1 + 1e-12)
    assert len(index) <= 1.5 * 64
    torch.testing.assert_close(split @ w[:, index].mT, x @ w.mT, rtol=0, atol=1e-11)
    i = torch.cat([torch.arange(k) for k in grid.copies.tolist()]).double()
    formula = x[:, index].sign() * (x[:, index].abs() - i * t).clamp(0, t)
    torch.testing.assert_close(split, formula, rtol=0, atol=1e-12)


def test_integers_of_pieces_add_up_to_what_is_served() -> None:
    x, w = outliers()
    grid = SplitGrid.covering(STATIC, x.abs().amax(0))
    split, index = pieces(x.double(), grid.double())
    q = torch.clamp(torch.round(split / grid.step.double()), -7, 7)
    served = grid.float().quantize(x)
    total = torch.zeros(x.shape, dtype=torch.float64).index_add_(1, index, q)
    assert (served.values != total).double().mean() < 1e-4  # a tie may round to the other side
    weight = RTN().solve(w, WeightGrid(QuantSpec(bits=4, scope="tensor")), None).values.double()
    expanded = q @ weight[:, index].mT  # the paper's product, b-bit times b-bit, wider
    assert ((expanded - served.values.double() @ weight.mT).abs() > 0).double().mean() < 1e-2
    served.check_range()


def test_what_is_served_is_what_is_faked() -> None:
    x, _ = outliers()
    grid = SplitGrid.covering(STATIC, x.abs().amax(0) / 2)  # half of the range: much is cut
    torch.testing.assert_close(grid(x), grid.quantize(x).dequantize(), rtol=1e-6, atol=1e-6)
    assert grid(x.half()).dtype == torch.float16
    assert not any(trainable_parameters(grid).values())
    assert grid.half().step.dtype == torch.float32


def test_without_room_it_is_plain_rounding_with_one_scale() -> None:
    x, w = outliers()
    grid = SplitGrid.covering(QuantSpec(bits=4, scope="tensor"), x.abs().amax(0))
    assert grid.copies.tolist() == [1] * 64
    scale = np.float32(x.abs().max().item()) / np.float32(7)
    assert float(grid.step) == pytest.approx(float(scale), rel=1e-6)
    assert np.array_equal(grid.quantize(x).values.numpy(), np.clip(np.rint(x.numpy() / grid.step.numpy()), -7, 7))
    solved = RTN().solve(w, WeightGrid(QuantSpec(bits=4, scope="tensor")), None)
    assert solved.scale.unique().numel() == 1
    scale = np.float32(w.abs().max().item()) / np.float32(7)
    assert np.array_equal(solved.values.numpy(), np.rint(w.numpy() / scale))
    torch.testing.assert_close(WeightGrid(solved.spec)(w), solved.dequantize())


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 40), width=st.floats(1, 3), seed=st.integers(0, 99))
def test_copies_keep_the_budget_and_cover_what_was_seen(n: int, width: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    m = torch.rand(n, generator=g, dtype=torch.float64) * (2 * torch.randn(n, generator=g, dtype=torch.float64)).exp()
    t, k = thresholds(m, width, 16)
    assert int(k.sum()) <= int(width * n) or int(k.sum()) == n
    assert ((k >= 1) & (k <= 16)).all()
    assert (k.double() * t >= m * (1 - 1e-9)).all()
    if int(width * n) == n:
        assert t == pytest.approx(float(m.max()))


def test_silent_channels_and_silent_tensors_do_no_harm() -> None:
    assert thresholds(torch.zeros(5), 2.0, 16) == (0.0, pytest.approx(torch.ones(5)))
    grid = SplitGrid.covering(STATIC, torch.zeros(5))
    assert torch.equal(grid(torch.zeros(2, 5)), torch.zeros(2, 5))
    m = torch.tensor([0.0, 1.0, 1.0, 9.0])
    assert thresholds(m, 1.0, 16)[1].tolist() == [1, 1, 1, 1]


def test_more_room_means_less_error() -> None:
    x, w = outliers()
    want = x @ w.mT
    errors = []
    for width in (1.0, 1.1, 1.25, 1.5, 2.0):
        grid = SplitGrid.covering(dataclasses.replace(STATIC, width=width), x.abs().amax(0))
        errors.append(float((grid(x) @ w.mT - want).square().mean() / want.square().mean()))
    for less, more in zip(errors[1:], errors[:-1], strict=True):
        assert less < 1.05 * more
    assert errors[2] < 0.25 * errors[0]
    eight = Dynamic(QuantSpec(bits=8))(x) @ w.mT - want
    assert errors[-1] < 30 * float(eight.square().mean() / want.square().mean())


@pytest.mark.parametrize("bits, most", [(4, 16), (5, 8), (6, 4), (8, 1)])
def test_sums_of_pieces_stay_in_eight_bits(bits: int, most: int) -> None:
    x, _ = outliers()
    x[:, 0] *= 1000
    grid = SplitGrid.covering(dataclasses.replace(STATIC, bits=bits, width=2.0), x.abs().amax(0))
    assert int(grid.copies.max()) == most
    assert int(grid.quantize(x).values.abs().max()) == most * grid.spec.high


# ------------------------------------------------------------------------------------------------- the method


def small(scheme: str = "w4a4", **changes) -> Recipe:
    return dataclasses.replace(flattenquant(scheme), data=DataSpec(samples=16, seqlen=24), **changes)


def test_splitting_beats_one_scale_without() -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["biased"])
    unseen = tokens_for(original, 4, 16, seed=9)
    want = hidden(original, unseen)
    errors = []
    for width in (1.5, 1.0):
        recipe = dataclasses.replace(flattenquant("w16a4", width=width), data=small().data)
        model, plan, _ = calibrated(original, recipe)
        errors.append(float((hidden(model, unseen) - want).square().mean()))
        assert all(site.activations.scope == "tensor" for site in plan.blocks[0].sites.values() if site.activations)
    assert errors[0] < 0.7 * errors[1]


def test_scales_are_single_and_the_scheme_chooses_eight_bits() -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    model, _, _ = calibrated(original, small("w4a4,mlp_mid=w8a8", solver=SolverSpec()))
    block = model.model.layers[0]
    for path in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert block.get_submodule(path).scale.unique().numel() == 1
    assert block.self_attn.q_proj.scale[0] == block.self_attn.v_proj.scale[0]  # readers of one site share it
    assert block.flatquant["mlp_mid"].activations.copies.tolist() == [1] * 40
    assert int(block.flatquant["attn_in"].activations.copies.max()) > 1


def test_groups_of_weights_stay_groups() -> None:
    weights = flattenquant("w4g2a4").scheme.weights
    assert weights is not None
    assert (weights.group_size, weights.scope) == (2, "row")


# ------------------------------------------------------------------------------------------------- combinations


def test_a_static_scale_after_a_mixing_transform_is_refused() -> None:
    original = family("llama", dtype=torch.float32)
    for transforms in (quarot().transforms, flatquant().transforms):
        recipe = small(transforms=transforms)
        with pytest.raises(SpecError, match="only a diagonal"):
            calibrated(original, recipe)


def test_a_static_scale_is_not_fitted() -> None:
    with pytest.raises(SpecError, match="before a fit"):
        small(fit=FitSpec(epochs=1, batch_size=1))


def test_a_static_scale_works_without_transforms_and_reads_text() -> None:
    recipe = small(transforms={}, solver=SolverSpec())
    assert recipe.needs_data
    model, _, _ = calibrated(family("llama", dtype=torch.float32), recipe)
    assert not rtn("w4a4").needs_data
    assert torch.isfinite(model(tokens_for(model, 1, 5)).logits).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"symmetric": False, "scope": "tensor"},
        {"group_size": 4, "scope": "tensor"},
        {"clip": "learned", "scope": "tensor"},
        {"width": 1.5},
        {"width": 0.5, "scope": "tensor"},
    ],
)
def test_grids_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(SpecError):
        QuantSpec(bits=4, **bad)


def test_only_activations_are_split_and_caches_are_not_static() -> None:
    with pytest.raises(SpecError, match="weights"):
        Scheme(weights=STATIC)
    with pytest.raises(SpecError, match="keys"):
        Scheme(keys=STATIC)
