"""The laws for every method whose parts are changes of basis: without grids the function is unchanged.

A rotated residual stream reaches every norm in another basis, and transformers' RMSNorm computes in float32: here it
computes in the model's own precision, so that equality can be asked for to 1e-9.
"""

import copy
import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from flatquant.calibrate.capture import BlockCall
from flatquant.calibrate.solve import make_solver, solve_block
from flatquant.errors import SpecError
from flatquant.recipes import RECIPES, recipe
from flatquant.runtime import artifact
from flatquant.spec import DataSpec, Recipe, Scheme, SolverSpec, from_dict, to_dict
from flatquant.wiring.fold import fold_block
from tests.laws import SHAPES, calibrated, decoded, family, hidden, relative, tokens_for, wrap_all

PRESERVED = 1e-9
METHODS = ("affinequant", "direct", "flatquant", "flattenquant", "omniquant", "quarot", "smoothquant", "spinquant")

# Weights on learned levels are chosen by the fit: nothing is left for a solver.
SOLVED = [
    (method, solver) for method in METHODS for solver in ("rtn", "gptq") if (method, solver) != ("direct", "gptq")
]

CASES = [(method, "llama", shape) for method in METHODS for shape in SHAPES]
CASES += [(method, kind, "odd") for method in METHODS for kind in ("mistral", "qwen2")]


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return original[type(self)](self, x)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    original = {kind: kind.forward for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm)}
    for kind in original:
        monkeypatch.setattr(kind, "forward", forward)


def small(method: str, scheme: str, *, solver: str | None = None, samples: int = 4, seqlen: int = 12) -> Recipe:
    """A method on little text."""
    made = recipe(method, scheme)
    changes: dict = {"data": DataSpec(samples=samples, seqlen=seqlen)}
    if made.fit is not None:
        changes["fit"] = dataclasses.replace(made.fit, epochs=2, batch_size=min(2, made.fit.batch_size))
    if made.end_to_end is not None:
        changes["end_to_end"] = dataclasses.replace(made.end_to_end, steps=4, batch_size=2)
    if solver is not None:
        changes["solver"] = SolverSpec(kind=solver)  # type: ignore[arg-type]
    return dataclasses.replace(made, **changes)


def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


# ------------------------------------------------------------------------------- the function is unchanged


@pytest.mark.parametrize("method, kind, shape", CASES)
def test_without_grids_a_method_leaves_the_function(method: str, kind: str, shape: str, tmp_path: Path) -> None:
    model = family(kind, **SHAPES[shape])
    tokens = tokens_for(model, 2, 9)
    want, want_logits = hidden(model, tokens), logits(model, tokens)
    bare = dataclasses.replace(small(method, "w4a4kv4"), scheme=Scheme())

    wrapped = copy.deepcopy(model)
    plan, fits, residual = wrap_all(wrapped, bare, force=True)
    back = torch.eye(want.shape[-1], dtype=torch.float64) if residual is None else residual.inverse_t().double().mT
    if residual is not None:
        back = copy.deepcopy(residual).double().inverse_t().mT
    assert relative(hidden(wrapped, tokens) @ back, want) < PRESERVED
    assert relative(logits(wrapped, tokens), want_logits) < PRESERVED

    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    folded = logits(wrapped, tokens)
    assert relative(hidden(wrapped, tokens) @ back, want) < PRESERVED
    assert relative(folded, want_logits) < PRESERVED

    artifact.save(wrapped, plan, tmp_path / "out", recipe=to_dict(bare), report={})
    loaded = artifact.load(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), folded)
    assert relative(decoded(loaded, tokens) @ back, want) < PRESERVED


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["biased", "odd"])
def test_the_fit_sees_what_is_served(method: str, shape: str) -> None:
    """In float64, so that nothing rounds differently: what is left are scales in float32.

    Not the cache: the first token's value is on a grid, and on the next grid its entries may be exact ties.
    """
    model = family("llama", **SHAPES[shape])
    tokens = tokens_for(model, 2, 9)
    used = small(method, "w4a4", solver="rtn")
    weights = used.scheme.weights
    if weights is not None and weights.clip == "search":  # the solver's alone
        weights = dataclasses.replace(weights, clip="none")
    used = dataclasses.replace(used, scheme=dataclasses.replace(used.scheme, weights=weights))
    plan, fits, _ = wrap_all(model, used, noise=0.02)
    seen = logits(model, tokens)
    for fit, block_plan in zip(fits, plan.blocks, strict=True):
        fold_block(fit, dtype=torch.float64)
        solve_block(fit.block, block_plan, make_solver(SolverSpec()), BlockCall(args=(), kwargs={}), None, 1)
    assert relative(logits(model, tokens), seen) < 1e-5


@pytest.mark.parametrize("method, solver", SOLVED)
@pytest.mark.parametrize("shape", ["biased", "odd"])
def test_a_calibrated_model_serves_what_was_calibrated(method: str, shape: str, solver: str, tmp_path: Path) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES[shape])
    tokens = tokens_for(original, 2, 9)
    used = small(method, "w4a4kv4", solver=solver)
    model, plan, _ = calibrated(original, used)
    got = logits(model, tokens)
    assert torch.isfinite(got).all()
    artifact.save(model, plan, tmp_path / "out", recipe=to_dict(used), report={})
    loaded = artifact.load(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), got)
    torch.testing.assert_close(decoded(loaded, tokens), hidden(model, tokens), rtol=1e-3, atol=1e-3)
    assert artifact.inspect(tmp_path / "out").damaged == ()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["w4a16", "w16a4", "kv4", "w3g2a8", "w4a4,mlp_mid=w16a16", "w16a16kv16"])
def test_every_scheme_works(method: str, scheme: str) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["gqa"])
    tokens = tokens_for(original, 2, 9)
    model, _, _ = calibrated(original, small(method, scheme, solver="rtn"))
    got = logits(model, tokens)
    assert torch.isfinite(got).all()
    assert torch.equal(got, logits(original, tokens)) == (scheme == "w16a16kv16")


@pytest.mark.parametrize("method", METHODS)
def test_eight_bits_are_nearly_lossless_and_methods_beat_rounding(method: str) -> None:
    original = family("llama", dtype=torch.float32, **SHAPES["biased"])
    tokens = tokens_for(original, 16, 16, seed=9)
    want = logits(original, tokens)

    def error(name: str, scheme: str) -> float:
        made = small(name, scheme, solver="rtn", samples=8, seqlen=24)
        if name == "direct":  # trains the weights themselves, on the text, which takes the function elsewhere
            assert made.end_to_end is not None
            made = dataclasses.replace(made, end_to_end=dataclasses.replace(made.end_to_end, steps=0))
        model, _, _ = calibrated(original, made)
        return float((logits(model, tokens) - want).square().mean() / want.square().mean())

    static = method == "flattenquant"  # one scale for all tokens, from little text: some values lie beyond it
    assert error(method, "w8a8kv8") < (0.1 if static else 0.01)
    relative = method == "direct"  # its levels of activations mind small channels as much as the two that are large
    if not (static or relative):  # rounding has a scale per token and row
        assert error(method, "w4a4kv4") < error("rtn", "w4a4kv4")


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_one_result(method: str) -> None:
    original = family("llama", dtype=torch.float32)
    tokens = tokens_for(original, 2, 9)
    first, again, other = (logits(calibrated(original, small(method, "w4a4"), seed=s)[0], tokens) for s in (5, 5, 6))
    assert torch.equal(first, again)
    drawn = any(t.init in ("orthogonal", "hadamard") for ts in recipe(method, "w4a4").transforms.values() for t in ts)
    assert torch.equal(first, other) != drawn


# ------------------------------------------------------------------------------------------- plain data


@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_plain_data(method: str) -> None:
    for preset in ("reference", "quick"):
        made = recipe(method, "w4a4kv4", preset)
        assert made.name == method
        assert from_dict(Recipe, to_dict(made)) == made
    scheme = Scheme.parse("w3a8", clip="none")
    assert RECIPES[method](scheme).scheme == scheme
    with pytest.raises(SpecError, match="preset"):
        recipe(method, "w4", "slow")


def test_no_method_is_named_outside_the_recipes() -> None:
    """A method is a choice of parts: the engine knows none of them. Papers are cited as they spell themselves."""
    package = Path(__file__).parents[1] / "src" / "flatquant"
    solvers = get_args(get_type_hints(SolverSpec)["kind"])
    names = set(RECIPES) - {"flatquant"} - set(solvers)  # the package itself, and parts that carry a method's name
    found = [
        f"{path.relative_to(package)}: {name}"
        for path in sorted(package.rglob("*.py"))
        if "recipes" not in path.parts
        for name in names
        if re.search(rf"(?<![A-Za-z]){name}(?![A-Za-z])", path.read_text(encoding="utf-8"))
    ]
    assert not found
