"""Output-adaptive Hessians of real blocks: the gradients autograd gives, in the coordinates that are rounded."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flatquant.calibrate.capture import capture, run_block
from flatquant.calibrate.gradients import output_hessians
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.errors import SpecError
from flatquant.qtensor import QTensor
from flatquant.recipes import gptq, oac, quarot, rtn
from flatquant.spec import EndToEndSpec, Scheme, SolverSpec
from flatquant.wiring.arch import submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.fold import fold_block
from tests.laws import BASES, SHAPES, bare, calibrated, family, hidden, quick, relative, tokens_for, wrap

READERS = tuple(f"self_attn.{p}_proj" for p in "qkvo") + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))
W4 = Scheme.parse("w4", clip="none")


def summed_loss(model, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="sum")


def collected(model, plan, tokens: Tensor, index: int, per="sequence") -> dict[str, Tensor]:
    """The Hessians of one block of a folded model whose other blocks are as they are."""
    first, calls = capture(model, arch_of(model.config), tokens)
    layers = model.model.layers
    for i in range(index):
        first = run_block(layers[i], calls[i], first, 2)

    def loss(x: Tensor, window: Tensor) -> Tensor:
        for block, call in zip(layers[index + 1 :], calls[index + 1 :], strict=True):
            x = call(block, x)
        logits = model.lm_head(model.model.norm(x))
        return F.cross_entropy(logits[0, :-1], tokens[window][0, 1:], reduction="sum")

    return output_hessians(layers[index], plan.blocks[index], calls[index], loss, first, per)


def by_autograd(model, tokens: Tensor, index: int) -> dict[str, list[Tensor]]:
    """Gradients of every sequence's loss by the weights of one block."""
    weights = [submodule(model.model.layers[index], path).weight.requires_grad_() for path in READERS]
    each = [torch.autograd.grad(summed_loss(model, ids), weights) for ids in tokens.split(1)]
    return {path: [g[i] for g in each] for i, path in enumerate(READERS)}


@pytest.mark.parametrize("shape", ["mha", "gqa", "biased"])
@pytest.mark.parametrize("index", [0, 1])
def test_hessians_are_those_of_autograd(shape: str, index: int) -> None:
    model = family("llama", **SHAPES[shape])
    tokens = tokens_for(model, 3, 7)
    want = by_autograd(copy.deepcopy(model), tokens, index)
    plan, fits = wrap(model, bare({}, W4))
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    found = collected(model, plan, tokens, index)
    assert set(found) == set(READERS)
    for path in READERS:
        h = sum(g.mT @ g for g in want[path]) / 3
        assert relative(found[path], h) < 1e-5, path
    # The readers of one site have the same inputs, and yet.
    assert relative(found["self_attn.q_proj"], found["self_attn.v_proj"]) > 0.1


@pytest.mark.parametrize("name", ["inverse orthogonal", "svd hadamard"])
def test_hessians_follow_the_change_of_basis(name: str) -> None:
    """x' = x P and W' = W P^-T give G' = G P, hence H' = P^T H P (where nothing is done to the outputs)."""
    model = family("llama", **SHAPES["biased"])
    tokens = tokens_for(model, 3, 7)
    want = by_autograd(copy.deepcopy(model), tokens, 1)
    plan, fits = wrap(model, bare(BASES[name], W4), noise=0.05)
    maps = {}
    for site, reader in (("attn_in", "self_attn.q_proj"), ("mlp_in", "mlp.gate_proj"), ("mlp_mid", "mlp.down_proj")):
        transform = fits[1].sites[site].transform
        with torch.no_grad():
            maps[reader] = transform(torch.eye(want[reader][0].shape[1], dtype=torch.float64))
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    found = collected(model, plan, tokens, 1)
    for reader, p in maps.items():
        h = sum(p.mT @ g.mT @ g @ p for g in want[reader]) / 3
        assert relative(found[reader], h) < 1e-5, reader


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_gradients_pass_the_grids_of_activations_and_cache(per: str) -> None:
    model = family("llama", dtype=torch.float32)
    tokens = tokens_for(model, 3, 7)
    plan, fits = wrap(model, bare({}, Scheme.parse("w3a4kv4", clip="none")))
    for fit in fits:
        fold_block(fit)
    with torch.no_grad():
        served = model(tokens).logits
    for h in collected(model, plan, tokens, 0, per).values():
        assert torch.isfinite(h).all()
        assert (h.diagonal() > 0).float().mean() > 0.9
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, served)  # no graph, no hook, no remembered tensor is left


def test_a_site_with_a_gradient_computes_the_same_numbers() -> None:
    model = family("llama", dtype=torch.float32)
    _, fits = wrap(model, bare(BASES["svd hadamard"], Scheme.parse("w3a4kv4")))
    for fit in fits:
        fold_block(fit)
    block = fits[0].block
    site, kv = block.flatquant["mlp_mid"], block.self_attn.flatquant_kv
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    integers = site(x)
    assert isinstance(integers, QTensor)
    tracked = site(x.clone().requires_grad_())
    assert tracked.requires_grad
    assert relative(tracked, integers.dequantize()) < 1e-6
    k = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    for see in (kv.key, kv.value):
        ours = see(k.clone().requires_grad_())
        assert ours.requires_grad
        assert relative(ours, see(k)) < 1e-6


def test_one_hessian_for_all_readers_through_the_same_door_is_gptq() -> None:
    model = family("llama", dtype=torch.float32, **SHAPES["biased"])
    tokens = tokens_for(model, 4, 12)
    plan, fits = wrap(model, bare({}, Scheme.parse("w3", clip="none")))
    for fit in fits:
        fold_block(fit)
    first, calls = capture(model, arch_of(model.config), tokens)
    block, spec = model.model.layers[0], SolverSpec(kind="gptq")
    grams: dict[str, Tensor] = {}
    solver = make_solver(spec)
    plain = copy.deepcopy(block)

    def remember(self, w, grid, hessian):
        grams[len(grams)] = hessian
        return type(solver).solve(solver, w, grid, hessian)

    spy = type("Spy", (type(solver),), {"solve": remember})()
    solve_block(plain, plan.blocks[0], spy, calls[0], first, 2)
    sites = plan.blocks[0].sites.values()
    given = {path: grams[i] for i, site in enumerate(sites) for path in site.readers}
    solve_block(block, plan.blocks[0], solver, calls[0], None, 2, given)
    for path in READERS:
        assert torch.equal(submodule(block, path).values, submodule(plain, path).values), path


@pytest.mark.parametrize("shape", ["mha", "biased"])
@pytest.mark.parametrize("scheme", ["w2g4", "w3a8kv4"])
@pytest.mark.parametrize("gradients", ["sequence", "token"])
def test_rounding_costs_less_loss_than_plain_rounding(shape: str, scheme: str, gradients) -> None:
    """By its own measure, the quadratic form of the original's Hessian, summed over the linears of the first block."""
    original = family("llama", dtype=torch.float32, **SHAPES[shape])
    recipe = oac(scheme)
    solver = dataclasses.replace(recipe.solver, gradients=gradients)
    recipe = dataclasses.replace(recipe, solver=solver, data=quick("w4", samples=16, seqlen=12).data)
    tokens = tokens_for(original, 16, 12, seed=1)
    plain = copy.deepcopy(original)
    plan, fits = wrap(plain, bare({}, rtn(scheme).scheme))
    for fit in fits:
        fold_block(fit)
    hessians = collected(plain, plan, tokens, 0, gradients)

    def cost(model) -> float:
        total = 0.0
        for path in READERS:
            d = (
                submodule(model.model.layers[0], path).qweight().dequantize()
                - submodule(original.model.layers[0], path).weight
            )
            total += float((d @ hessians[path] * d).sum().detach())
        return total

    solved, _, _ = calibrated(original, recipe)
    rounded, _, _ = calibrated(original, rtn(scheme))
    assert cost(solved) < 0.9 * cost(rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("end_to_end", [None, EndToEndSpec(steps=2, batch_size=2)], ids=["block-wise", "end to end"])
def test_it_combines_with_learned_transforms(end_to_end: EndToEndSpec | None, dtype: torch.dtype) -> None:
    model = family("llama", dtype=dtype, **SHAPES["biased"])
    recipe = quick("w3a4kv4", solver=SolverSpec(kind="gptq", hessian="output_adaptive"), end_to_end=end_to_end)
    ours, _, report = calibrated(model, recipe)
    other, _, _ = calibrated(model, dataclasses.replace(recipe, solver=SolverSpec(kind="gptq")))
    assert report.seconds["gradients"] > 0
    tokens = tokens_for(model, 2, 9)
    assert torch.isfinite(hidden(ours, tokens)).all()
    assert not torch.equal(hidden(ours, tokens), hidden(other, tokens))


def test_wrong_combinations_are_errors() -> None:
    with pytest.raises(SpecError, match="rtn uses no Hessian"):
        SolverSpec(kind="rtn", hessian="output_adaptive")
    with pytest.raises(SpecError, match="unknown preset 'slow'"):
        oac("w4", "slow")


def test_the_recipe_differs_from_its_host_in_the_hessian_alone() -> None:
    ours, host = oac("w2a16"), gptq("w2a16")
    assert ours.solver.hessian == "output_adaptive"
    solver = dataclasses.replace(ours.solver, hessian="input_gram", damping=host.solver.damping)
    assert dataclasses.replace(ours, name="gptq", solver=solver) == host
    assert ours.needs_data
    assert not oac("a8").needs_data


@pytest.mark.parametrize("end_to_end", [None, EndToEndSpec(steps=2, batch_size=2)], ids=["block-wise", "end to end"])
def test_gradients_pass_a_rotated_residual_stream(end_to_end: EndToEndSpec | None) -> None:
    """Blocks that are folded speak another basis than those that are not: the loss must not notice."""
    seen: list[float] = []
    real = F.cross_entropy

    def spy(logits: Tensor, ids: Tensor, **options) -> Tensor:
        loss = real(logits, ids, **options)
        if options.get("reduction") == "sum":
            seen.append(float(loss.detach()))
        return loss

    model = family("llama", dtype=torch.float32, **SHAPES["biased"])
    recipe = quick("w8a16", solver=SolverSpec(kind="gptq", hessian="output_adaptive"), end_to_end=end_to_end)
    recipe = dataclasses.replace(
        recipe, fit=None, transforms=quarot("w8a16").transforms, scheme=quarot("w8a16").scheme, data=recipe.data
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", spy)
        calibrated(model, recipe)
    tokens = tokens_for(model, recipe.data.samples, recipe.data.seqlen, seed=1)
    want = [float(summed_loss(model, ids).detach()) for ids in tokens.split(1)] * 2  # once for each block
    assert seen == pytest.approx(want, rel=0.02)
