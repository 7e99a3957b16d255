"""SpinQuant: rotations that are learned and stay rotations (arXiv 2405.16406)."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from flatquant.calibrate.cayley import CayleySGD, cayley_step
from flatquant.calibrate.optimise import Optimiser
from flatquant.calibrate.pipeline import calibrate
from flatquant.calibrate.rates import cosine
from flatquant.calibrate.state import RunState
from flatquant.errors import SpecError
from flatquant.modules import GROUPS
from flatquant.recipes import quarot, spinquant
from flatquant.spec import DataSpec, FitSpec, Scheme, SolverSpec, TransformSpec
from flatquant.transforms import OrthogonalFactor
from flatquant.transforms.start import random_orthogonal
from flatquant.wiring.fitted import unrounded_weights
from flatquant.wiring.fold import fold_block
from tests.laws import SHAPES, calibrated, family, relative, same_bytes, tokens_for, varied, wrap_all


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(scheme: str = "w4a4kv4", *, solver: str = "rtn", steps: int = 4, samples: int = 4, seqlen: int = 12):
    made = spinquant(scheme, solver=solver)  # type: ignore[arg-type]
    assert made.end_to_end is not None
    return dataclasses.replace(
        made,
        data=DataSpec(samples=samples, seqlen=seqlen),
        end_to_end=dataclasses.replace(made.end_to_end, steps=steps, batch_size=2, checkpoint=False),
    )


# --------------------------------------------------------------------------------------------- Cayley SGD


def test_a_step_is_the_papers_fixed_point() -> None:
    """Algorithm 1 of Li et al. on rows, with its five iterations written out; ours solves the system."""
    x = random_orthogonal(24, generator()).double()
    grad = torch.randn(24, 24, generator=generator(1), dtype=torch.float64)
    v = -grad.mT  # momentum 0
    a = v @ x - 0.5 * x.mT @ (x @ (v @ x))
    w = a - a.mT
    alpha = min(1.5, 1 / float(w.abs().sum(0).max() + 1e-8))
    y = x.mT + alpha * v
    for _ in range(12):
        y = x.mT + alpha / 2 * w @ (x.mT + y)
    # The paper's A for an orthogonal X is V X / 2, as is ours.
    torch.testing.assert_close(cayley_step(x, grad, 1.5), y.mT, rtol=0, atol=1e-6)


def test_a_small_step_goes_downhill() -> None:
    x = random_orthogonal(8, generator()).double().requires_grad_()
    target = random_orthogonal(8, generator(1)).double()
    loss = (x - target).square().sum()
    (grad,) = torch.autograd.grad(loss, x)
    for lr in (1e-4, 1e-3, 1e-2):
        assert (cayley_step(x.detach(), grad, lr) - target).square().sum() < loss


def test_the_nearest_rotation_is_found_in_a_hundred_steps() -> None:
    """min |X - A|^2 over the orthogonal matrices, from about 128 to nothing."""
    target = random_orthogonal(64, generator(1))
    x = random_orthogonal(64, generator(0))
    if torch.linalg.det(x) * torch.linalg.det(target) < 0:
        x[0] *= -1  # rotations do not reach reflections
    factor = OrthogonalFactor(x)
    optimiser = Optimiser(
        {**{g: [] for g in GROUPS}, "rotation": [factor.q]},
        dict.fromkeys(GROUPS, 1.5),
        floors=dict.fromkeys(GROUPS, 0.0),
        steps=100,
        loss_fn=lambda y: 2 * ((factor.matrix() - y).square().sum(),),
        graph=False,
    )
    losses = [float(optimiser.step(target)) for _ in range(100)]
    assert losses[0] > 100
    assert losses[-1] < 0.2
    q = factor.q.detach().double()
    assert float((q @ q.mT - torch.eye(64)).abs().max()) < 1e-5
    exact = factor.double().matrix().detach()
    assert float((exact @ exact.mT - torch.eye(64)).abs().max()) < 1e-10


def test_the_rate_is_a_cosine_of_the_recipe_s() -> None:
    assert cosine(0, 100, 0, 1.5, 0.0) == 1.5
    q = torch.nn.Parameter(torch.eye(3))
    q.grad = torch.tensor([[0.0, 1e-3, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    optimiser = CayleySGD([q], lr=0.5)
    optimiser.step()  # far below 1 / |W|_1: the rate decides
    torch.testing.assert_close(q[0, 1].item(), -0.5 * 1e-3 / 2, rtol=1e-3, atol=0.0)


# --------------------------------------------------------------------------------------------- the method


def test_what_is_trained_is_one_matrix_for_the_model_and_one_per_block() -> None:
    model = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    _, fits, residual = wrap_all(model, spinquant("w4a4kv4"), noise=0.0)
    assert residual is not None
    for fit in fits:
        groups = fit.parameters()
        assert [len(groups[g]) for g in ("transform", "scale", "clip", "weight")] == [0, 0, 0, 0]
        assert {p.shape[0] for p in groups["rotation"]} == {24, 6}
        assert any(p is residual.q for p in groups["rotation"])
    model(tokens_for(model, 2, 12)).logits.square().mean().backward()
    for fit in fits:
        for p in fit.parameters()["rotation"]:
            assert p.grad is not None
            assert p.grad.abs().max() > 0


@pytest.mark.parametrize(("solver", "models"), [("rtn", 12), ("gptq", 1)])
def test_training_lowers_the_cross_entropy_and_beats_its_start(solver: str, models: int) -> None:
    """Rounded to nearest, on average over models, at a rate for their size, and in one of the passes over the text."""
    recipe = small(solver=solver, steps=40, samples=16, seqlen=24)
    assert recipe.end_to_end is not None
    fit = recipe.end_to_end if models == 1 else dataclasses.replace(recipe.end_to_end, rotation_lr=0.1)
    first = end = 0.0
    errors = {40: 0.0, 0: 0.0}
    for seed in range(models):
        original = family("llama", dtype=torch.float32, **SHAPES["biased"])
        original = original if models == 1 else varied(original, seed)
        with torch.no_grad():  # text that the model finds likely, or there is nothing to learn
            tokens = original.generate(tokens_for(original, 16, 1), max_new_tokens=23, do_sample=False)
        for steps in errors:
            model = copy.deepcopy(original)
            used = dataclasses.replace(recipe, end_to_end=dataclasses.replace(fit, steps=steps))
            _, report = calibrate(model, used, tokens, device=torch.device("cpu"), dtype=torch.float32)
            if steps:
                losses = report.end_to_end.losses
                assert len(losses) == 40
                passes = [sum(losses[i : i + 8]) for i in range(0, 40, 8)]
                first, end = first + passes[0], end + (passes[-1] if models == 1 else min(passes[1:]))
            with torch.no_grad():
                want, got = original(tokens).logits, model(tokens).logits
            errors[steps] += float((got - want).square().mean() / want.square().mean())
    assert end < first
    assert solver == "gptq" or errors[40] < errors[0]


def test_the_learned_model_has_the_function_of_its_training_graph() -> None:
    """Without grids: the graph with unrotated weights and rotations on the fly, against the folded model."""
    model = family("llama", **SHAPES["biased"])
    tokens = tokens_for(model, 2, 9)
    bare = dataclasses.replace(small(), scheme=Scheme())
    with torch.no_grad():
        want = model(tokens).logits
        _, fits, _ = wrap_all(model, bare, force=True)
        graph = model(tokens).logits
        for fit in fits:
            fold_block(fit, dtype=torch.float64)
        folded = model(tokens).logits
    assert relative(graph, want) < 1e-5
    assert relative(folded, graph) < 1e-5  # transformers' norms compute in float32


def test_weights_stay_off_their_grids_only_while_asked_to() -> None:
    model = family("llama", dtype=torch.float32)
    tokens = tokens_for(model, 2, 9)
    _, fits, _ = wrap_all(model, small("w4a16"), noise=0.0)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(tokens).logits

    want, rounded = family("llama", dtype=torch.float32)(tokens).logits, logits()
    with unrounded_weights(fits):
        free = logits()
    assert torch.equal(logits(), rounded)
    assert relative(free, want) < 1e-4 < relative(rounded, want)


def test_the_recipe_trains_against_the_solver_it_has() -> None:
    def rounds(scheme: str, **options: str) -> bool:
        end_to_end = spinquant(scheme, **options).end_to_end  # type: ignore[arg-type]
        assert end_to_end is not None
        return end_to_end.round_weights

    assert not rounds("w4a4kv4")
    assert rounds("w4a4kv4", solver="rtn")
    assert rounds("w4a16")  # else there would be nothing to learn from
    assert spinquant("w4", solver="rtn").solver == SolverSpec(kind="rtn")


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    recipe = small(steps=16)
    whole, _, _ = calibrated(original, recipe)

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "end to end" and done == 11:
            raise Killed

    with pytest.raises(Killed):
        calibrated(original, recipe, state=RunState(tmp_path, {"run": 1}, resume=False), progress=kill)
    resumed, _, report = calibrated(original, recipe, state=RunState(tmp_path, {"run": 1}, resume=True))
    assert same_bytes(resumed, whole)
    assert len(report.end_to_end.losses) == 16


# --------------------------------------------------------------------------------------------- combinations


def test_rotations_inside_heads_can_be_fitted_block_by_block() -> None:
    head = TransformSpec(kind="head", parameters="rotation", init="hadamard")
    transforms = {**quarot().transforms, "attn_out": (head,)}
    recipe = dataclasses.replace(
        quarot("v2"),
        transforms=transforms,
        fit=FitSpec(epochs=12, batch_size=4, rotation_lr=1e-4),
        solver=SolverSpec(),
        data=DataSpec(samples=4, seqlen=12),
    )
    _, _, report = calibrated(family("llama", dtype=torch.float32, **SHAPES["gqa"]), recipe)
    for block in report.blocks:
        assert len(block["losses"]) == 12
        assert block["losses"][-1] < block["losses"][0]


def test_unrounded_weights_have_no_clip_to_learn() -> None:
    with pytest.raises(SpecError, match="no clip to learn"):
        dataclasses.replace(small(solver="gptq"), scheme=Scheme.parse("w4a4", clip="learned"))
