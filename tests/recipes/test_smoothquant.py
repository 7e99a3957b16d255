"""SmoothQuant: balanced maxima, and what an outlier channel then costs (arXiv 2211.10438)."""

import copy
import dataclasses

import pytest
import torch

from flatquant.quantizers import Dynamic, WeightGrid
from flatquant.recipes import smoothquant
from flatquant.spec import QuantSpec, Scheme
from flatquant.transforms.diagonal import absmax_scale
from flatquant.wiring.arch import submodule
from flatquant.wiring.fold import fold_block
from tests.laws import SHAPES, family, observed, wrap_all

SMOOTHED = {
    "attn_in": ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "mlp_in": ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
}


def folded(alpha: float):
    """A model, the same smoothed, and the statistics it was smoothed by."""
    model = family("llama", **SHAPES["biased"])
    smooth = copy.deepcopy(model)
    recipe = dataclasses.replace(smoothquant(alpha=alpha), scheme=Scheme())
    _, fits, _ = wrap_all(smooth, recipe, noise=0.0, force=True)
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    return model, smooth, observed(model)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_maxima_are_balanced_and_readers_share_one_scale(alpha: float) -> None:
    model, smooth, statistics = folded(alpha)
    for before, after, seen in zip(model.model.layers, smooth.model.layers, statistics, strict=True):
        for site, (norm, readers) in SMOOTHED.items():
            c = submodule(after, norm).weight / submodule(before, norm).weight
            old = torch.cat([submodule(before, path).weight for path in readers])
            new = torch.cat([submodule(after, path).weight for path in readers])
            torch.testing.assert_close(new, old / c, rtol=1e-9, atol=0)
            x, w = seen[site].absmax * c, new.abs().amax(0)
            balanced = (seen[site].absmax * old.abs().amax(0)).sqrt()
            if alpha == 0.5:
                torch.testing.assert_close(x, balanced, rtol=1e-5, atol=0)
                torch.testing.assert_close(w, balanced, rtol=1e-5, atol=0)
            if alpha == 1.0:
                torch.testing.assert_close(x, torch.ones_like(x), rtol=1e-5, atol=0)
            if alpha == 0.0:
                torch.testing.assert_close(w, torch.ones_like(w), rtol=1e-5, atol=0)
        for path in ("self_attn.o_proj", "mlp.down_proj"):  # not smoothed
            assert torch.equal(submodule(after, path).weight, submodule(before, path).weight)


def test_smoothing_what_is_smooth_changes_nothing() -> None:
    _, smooth, _ = folded(0.5)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 25)
    w = smooth.model.layers[0].self_attn.q_proj.weight.float()
    c = absmax_scale(x.abs().amax(0), w.abs().amax(0), 0.5)
    again = absmax_scale((x * c).abs().amax(0), (w / c).abs().amax(0), 0.5)
    torch.testing.assert_close(again, torch.ones(24), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits, gain", [(8, 10.0), (4, 2.0)])
def test_an_outlier_channel_costs_less(bits: int, gain: float) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 64, generator=g), torch.randn(48, 64, generator=g)
    x[:, 5] *= 100

    def error(c: torch.Tensor) -> float:
        spec = QuantSpec(bits=bits)
        return float((Dynamic(spec)(x * c) @ WeightGrid(spec)(w / c).mT - x @ w.mT).square().mean())

    assert gain * error(absmax_scale(x.abs().amax(0), w.abs().amax(0), 0.5)) < error(torch.ones(64))


def test_a_dead_channel_does_no_harm() -> None:
    c = absmax_scale(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 0.5)
    assert torch.isfinite(c).all()
    assert ((c >= 1e-3) & (c <= 1e3)).all()  # finite in half precision, and so is its inverse
