"""AffineQuant: matrices that open band by band and stay invertible (arXiv 2403.12544)."""

import copy
import dataclasses

import pytest
import torch

from flatquant.calibrate.blockwise import BlockFit, fit_blocks
from flatquant.calibrate.capture import BlockCall
from flatquant.errors import SpecError
from flatquant.modules import Scheduled
from flatquant.recipes import affinequant, omniquant, rtn
from flatquant.spec import DataSpec, FitSpec, Recipe, Scheme, TransformSpec
from flatquant.transforms import HeadMatrices, MaskedFactor
from flatquant.transforms.masked import band
from flatquant.wiring.fold import fold_block
from tests.laws import SHAPES, calibrated, family, hidden, relative, tokens_for, wrap_all


def small(scheme: str = "w4a4kv4", *, epochs: int = 6, samples: int = 16, seqlen: int = 24) -> Recipe:
    made = affinequant(scheme)
    assert made.fit is not None
    fit = dataclasses.replace(made.fit, epochs=epochs, batch_size=2)
    return dataclasses.replace(made, fit=fit, data=DataSpec(samples=samples, seqlen=seqlen))


def moved(n: int, *, batch: tuple[int, ...] = (), stability: float = 0.1) -> MaskedFactor:
    factor = MaskedFactor(n, stability, batch=batch).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in factor.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return factor


# ------------------------------------------------------------------------------------------------- the mask


def test_bands_open_from_the_diagonal_to_all() -> None:
    assert [band(9, e, 5) for e in range(5)] == [1, 3, 5, 7, 9]
    assert band(9, 0, 1) == 9  # one epoch: nothing to open step by step
    factor = moved(9)
    full = factor.inverse_t()
    for epoch, width in enumerate([1, 3, 5, 7, 9]):
        factor.begin_epoch(epoch, 5)
        a = factor.inverse_t()
        index = torch.arange(9)
        distance = (index[:, None] - index).abs()
        assert torch.equal(a[distance < width], full[distance < width])
        assert (a[distance >= width] == 0).all()
        a.sum().backward()
        grad = factor.off.grad
        assert grad is not None
        torch.testing.assert_close(grad, 0.1 * ((distance > 0) & (distance < width)).double())
        factor.off.grad = None


def test_opening_a_band_does_not_change_the_function_at_once() -> None:
    """Entries outside the open bands have had no gradient: they are 0 when they open."""
    factor = MaskedFactor(6, 0.1)
    factor.begin_epoch(0, 3)
    optimiser = torch.optim.AdamW(factor.parameters(), lr=0.1, weight_decay=0.0)
    (factor.inverse_t() - torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimiser.step()
    before = factor.inverse_t().detach().clone()
    factor.begin_epoch(1, 3)
    assert torch.equal(factor.inverse_t(), before)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_inverse_is_one_and_dominance_is_measured(batch: tuple) -> None:
    factor = moved(7, batch=batch)
    eye = torch.eye(7, dtype=torch.float64).expand(*batch, 7, 7)
    torch.testing.assert_close(factor.matrix().mT @ factor.inverse_t(), eye, rtol=0, atol=1e-10)
    a = factor.inverse_t().detach().reshape(-1, 7, 7)
    want = min(float(m[i, i] - (m[i].abs().sum() - m[i, i])) for m in a for i in range(7))
    assert factor.dominance() == pytest.approx(want)
    assert MaskedFactor(7, 0.1).dominance() == 1.0


def test_gradients_match_finite_differences() -> None:
    factor = moved(4)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(*_: torch.Tensor) -> torch.Tensor:
        return ((x @ factor.matrix()).tanh() * (x @ factor.inverse_t()).tanh()).sum()

    assert torch.autograd.gradcheck(loss, tuple(factor.parameters()))


def test_every_value_head_has_its_own_matrix() -> None:
    heads = HeadMatrices(moved(3, batch=(2,)), readers=2)
    g = torch.Generator().manual_seed(1)
    v, w = torch.randn(5, 6, generator=g, dtype=torch.float64), torch.randn(4, 12, generator=g, dtype=torch.float64)
    copies = v.unflatten(-1, (2, 3)).repeat_interleave(2, -2).flatten(-2)  # as query heads read them
    written = heads.write(v).unflatten(-1, (2, 3)).repeat_interleave(2, -2).flatten(-2)
    torch.testing.assert_close(written, heads(copies))
    torch.testing.assert_close(written @ heads.inverse_t(w).mT, copies @ w.mT)


# ------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("shape", ["mha", "odd"])
def test_weight_only_models_get_whole_matrices_online(shape: str) -> None:
    model = family("llama", **SHAPES[shape])
    tokens = tokens_for(model, 2, 9)
    want = hidden(model, tokens)
    wrapped = copy.deepcopy(model)
    bare = dataclasses.replace(small("w3a16"), scheme=Scheme())
    plan, fits, _ = wrap_all(wrapped, bare, force=True)
    assert relative(hidden(wrapped, tokens), want) < 1e-9
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    assert relative(hidden(wrapped, tokens), want) < 1e-9
    sites = plan.blocks[0].sites
    assert [(sites[s].left, sites[s].right) for s in sites] == [(False, right) for right in (True, False, True, False)]


def test_with_activations_nothing_runs_online() -> None:
    model = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    _, plan, _ = calibrated(model, small(epochs=1, samples=2, seqlen=8))
    assert not any(site.left or site.right for block in plan.blocks for site in block.sites.values())
    assert not plan.blocks[0].qk


def test_with_only_the_diagonal_open_it_is_learned_scales() -> None:
    """Before the first band opens, the two methods take the same step but for the matrix's own diagonal."""
    original = family("llama", **SHAPES["gqa"])
    tokens = tokens_for(original, 2, 9)
    outputs = []
    for recipe in (affinequant("w4a4kv4"), omniquant("w4a4kv4")):
        model = copy.deepcopy(original)
        _, fits, _ = wrap_all(model, recipe, noise=0.0)
        for fit in fits:
            for root in fit.roots():
                for module in root.modules():
                    if isinstance(module, Scheduled):
                        module.begin_epoch(0, 20)
        outputs.append(hidden(model, tokens))
    assert relative(outputs[0], outputs[1]) < 1e-12


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4kv4"])
def test_the_loss_falls_and_the_result_beats_rounding(scheme: str) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    fitted, _, report = calibrated(original, small(scheme, epochs=20, samples=32))
    rounded, _, _ = calibrated(original, rtn(scheme))
    assert report.blocks[0]["losses"][-1] < report.blocks[0]["losses"][0]
    unseen = tokens_for(original, 4, 16, seed=9)
    want = hidden(original, unseen)
    assert (hidden(fitted, unseen) - want).square().mean() < (hidden(rounded, unseen) - want).square().mean()


def test_a_fitted_matrix_is_dominant_well_conditioned_and_wholly_open() -> None:
    model = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    with torch.no_grad():
        x = torch.randn(4, 12, 24, generator=torch.Generator().manual_seed(0))
        position = model.model.rotary_emb(x, torch.arange(12)[None])
        targets = model.model.layers[0](x, position_embeddings=position)
    _, fits, _ = wrap_all(model, small("w3a16"), noise=0.0)
    call = BlockCall(args=(), kwargs={"position_embeddings": position})
    block = BlockFit(index=0, fit=fits[0], call=call, inputs=x, targets=targets)
    fit_blocks([block], FitSpec(epochs=4, batch_size=2, schedule="constant"), dtype=torch.float32)
    factors = {m for root in fits[0].roots() for m in root.modules() if isinstance(m, MaskedFactor)}
    assert len(factors) == 3
    for factor in factors:
        assert factor.dominance() > 0
        assert float(torch.linalg.cond(factor.matrix().detach()).max()) < 1e3
        assert (factor.mask > 0).sum() == factor.size * (factor.size - 1)
        assert (factor.off != 0).any()


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "kronecker", "parameters": "masked"},
        {"kind": "heads"},
        {"kind": "matrix", "parameters": "masked", "init": "hadamard"},
        {"kind": "diagonal", "parameters": "masked"},
        {"kind": "matrix", "parameters": "masked", "stability": 0.0},
    ],
)
def test_masks_are_refused_where_they_make_no_sense(spec: dict) -> None:
    with pytest.raises(SpecError):
        TransformSpec(**spec)
