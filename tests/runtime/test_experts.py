"""Mixtures of experts: opened experts are the stacked ones, share one rounded input, and few tokens do no harm."""

import copy
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import flatquant
from flatquant import spec
from flatquant.calibrate.capture import BlockCall, Observer
from flatquant.calibrate.solve import solve_block
from flatquant.calibrate.state import RunState
from flatquant.cli import app
from flatquant.errors import ArtifactError, ModelError
from flatquant.ops import grouped_linear
from flatquant.recipes import RECIPES, gptq, rtn
from flatquant.report import FILE
from flatquant.runtime import linear
from flatquant.runtime.artifact import load, save
from flatquant.runtime.experts import Experts, is_stacked, open_experts, stacked_again
from flatquant.runtime.folder import content_hash
from flatquant.runtime.linear import FrozenLinear, FrozenSite, PackedLinear
from flatquant.solvers import RTN, InputGram, OutputAdaptive, blended
from flatquant.spec import DataSpec, Scheme, SolverSpec, by_expert
from flatquant.transforms import Diagonal, Kronecker
from flatquant.wiring.arch import Geometry, linear_at, submodule
from flatquant.wiring.archs import arch_of
from flatquant.wiring.cost import online_flops
from flatquant.wiring.fold import fold_block
from flatquant.wiring.plan import make_plan
from tests.laws import (
    BASES,
    bare,
    calibrated,
    hidden,
    in_a_pass,
    quick,
    relative,
    rtn_by_hand,
    same_bytes,
    tokens_for,
    wrap,
    wrap_all,
)
from tests.tiny_models import tiny_family, tiny_llama, tiny_tokenizer

NAMES = ("mixtral", "qwen3_moe")
EXPERTS, UNREACHED = 5, 4


def with_an_unreached_expert(name: str = "mixtral"):
    """Of four experts two opposite pairs win everywhere; the fifth never does."""
    model = tiny_family(name)
    generator = torch.Generator().manual_seed(3)
    for block in model.model.layers:
        if isinstance(getattr(block.mlp, "gate", None), nn.Module):
            v = torch.randn(24, generator=generator)
            block.mlp.gate.weight.data = torch.stack([3 * v, -3 * v, 2 * v, -2 * v, 0 * v])
    return model


# ------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opened_experts_are_the_stacked_ones(name: str, dtype: torch.dtype) -> None:
    model = tiny_family(name, dtype=dtype)
    opened = copy.deepcopy(model)
    stacked = opened.model.layers[0].mlp.experts
    weight = stacked.gate_up_proj
    assert is_stacked(stacked)
    open_experts(opened)
    experts = opened.model.layers[0].mlp.experts
    assert isinstance(experts, Experts)
    assert len(experts) == EXPERTS
    rows = weight.shape[1] // 2
    for e in range(EXPERTS):  # where they were in memory
        assert experts[e].gate_proj.weight.data_ptr() == weight[e].data_ptr()
        assert experts[e].up_proj.weight.data_ptr() == weight[e, rows:].data_ptr()
    open_experts(opened)
    assert opened.model.layers[0].mlp.experts is experts  # a second time changes nothing
    tokens = tokens_for(model, 3, 17)
    assert relative(hidden(opened, tokens), hidden(model, tokens)) < (1e-5 if dtype == torch.float32 else 2e-2)
    state = opened.state_dict()
    for key, tensor in model.state_dict().items():
        if key not in state:
            assert torch.equal(stacked_again(state, key, model.get_submodule(key.rpartition(".")[0])), tensor)
    with pytest.raises(KeyError):
        stacked_again(state, "model.layers.0.mlp.nowhere.down_proj", model)


def test_what_is_not_stacked_is_left_alone() -> None:
    model = tiny_llama()
    before = [type(m) for m in model.modules()]
    open_experts(model)
    assert [type(m) for m in model.modules()] == before
    other = nn.Module()
    other.act_fn = nn.SiLU()
    other.gate_up_proj = nn.Parameter(torch.zeros(3, 4, 16))
    other.down_proj = nn.Parameter(torch.zeros(3, 5, 4))  # of other experts than those
    assert not is_stacked(other)


@pytest.mark.parametrize("name", NAMES)
def test_experts_that_are_not_open_are_an_error(name: str) -> None:
    model = tiny_family(name)
    with pytest.raises(ModelError, match="have not been opened"):
        make_plan(rtn("w4"), arch_of(model.config), Geometry.of(model.config), model.model.layers)


def test_paths_are_grouped_by_the_rows_they_multiply() -> None:
    assert by_expert(("a.q", "a.k")) == (("a.q", "a.k"),)
    paths = ("mlp.shared.up", "mlp.experts.0.gate", "mlp.experts.0.up", "mlp.experts.10.gate", "mlp.experts.10.up")
    assert by_expert(paths) == (paths[:1], paths[1:3], paths[3:])


def test_blocks_without_experts_are_wired_like_dense_ones() -> None:
    model = tiny_family("qwen3_moe")
    open_experts(model)
    arch = arch_of(model.config)
    sparse, dense = (arch.of(block) for block in model.model.layers)
    assert [len(e.readers) for e in sparse.edges] == [3, 1, 2 * EXPERTS, EXPERTS]
    assert [len(e.readers) for e in dense.edges] == [3, 1, 2, 1]
    assert sparse.residual is not None
    assert sparse.residual.writers[-1] == f"mlp.experts.{EXPERTS - 1}.down_proj"


# ------------------------------------------------------------------------------------------ one rounded input


class _Counted:
    """Rows that pass a site's transform, call by call."""

    def __init__(self, site: FrozenSite) -> None:
        self.rows: list[int] = []
        inner = site.activations.quantize

        def quantize(x: Tensor):
            self.rows.append(x.shape[:-1].numel())
            return inner(x)

        site.activations.quantize = quantize


@pytest.mark.parametrize("name", NAMES)
def test_all_experts_share_one_rounded_input(name: str, tmp_path: Path) -> None:
    """The transform and the rounding run once a tensor: over the tokens, and over what the chosen experts hold."""
    original = tiny_family(name)
    model, plan, _ = calibrated(original, quick("w4a4kv4"))
    save(model, plan, tmp_path / "model", recipe={}, report={}, scheme="w4a4kv4")
    tokens = tokens_for(model, 2, 9)
    for served, kind in ((model, FrozenLinear), (load(tmp_path / "model"), PackedLinear)):
        block = served.model.layers[0]
        assert type(block.mlp.experts[0].up_proj) is kind
        counted = {site: _Counted(block.flatquant[site]) for site in ("mlp_in", "mlp_mid")}
        with torch.no_grad():
            served(tokens, use_cache=False)
        assert counted["mlp_in"].rows == [18]
        assert counted["mlp_mid"].rows == [2 * 18]


def test_rows_of_a_site_are_rows_of_its_output() -> None:
    model, _, _ = calibrated(tiny_family("mixtral"), quick("w4a4"))
    experts, site = model.model.layers[0].mlp.experts, model.model.layers[0].flatquant["mlp_in"]
    x, index = torch.randn(7, 24), torch.tensor([5, 0, 3])
    alone = experts[1].up_proj(x[index])

    def check() -> None:
        part = site.rows(x, index)
        assert torch.equal(part, x[index])
        assert torch.equal(experts[1].up_proj(part), alone)
        assert torch.equal(experts[1].up_proj(x)[index], alone)

    check()  # outside of a forward pass: computed for every reader
    in_a_pass(check)


def test_rows_of_a_fit_are_rows_of_its_output_with_their_gradient() -> None:
    model = tiny_family("mixtral", dtype=torch.float64)
    _, fits = wrap(model, bare(BASES["inverse orthogonal"], Scheme.parse("w4a4")))
    site, experts = fits[0].sites["mlp_in"], model.model.layers[0].mlp.experts
    x = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([5, 0, 3])
    parameters = [p for p in site.parameters() if p.requires_grad]
    assert len(parameters) == 7  # two factors, a scale, both ends of the clips of weights and activations
    want = experts[2].gate_proj(x)[index]
    want_grads = torch.autograd.grad(want.square().sum(), parameters)
    got = in_a_pass(lambda: experts[2].gate_proj(site.rows(x, index)))
    grads = torch.autograd.grad(got.square().sum(), parameters)
    assert relative(got, want) < 1e-12
    for a, b in zip(grads, want_grads, strict=True):  # of a symmetric grid, one end of a row may have none
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("basis", ["svd orthogonal", "inverse hadamard"])
def test_integers_compute_what_the_fit_saw(basis: str) -> None:
    """In float64 no value rounds differently on either side: one integer that did would show as 1e-3."""
    model = tiny_family("mixtral", dtype=torch.float64)
    plan, fits = wrap(model, bare(BASES[basis], Scheme.parse("w4a4")), noise=0.05)
    experts = model.model.layers[0].mlp.experts
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    handle = experts.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    hidden(model, tokens_for(model, 3, 9))
    handle.remove()
    ((x, index, weights), want) = seen[0]
    scale = next(part for part in fits[0].sites["mlp_in"].transform.parts if isinstance(part, Diagonal)).scale.detach()
    fold_block(fits[0], dtype=torch.float64)
    solve_block(fits[0].block, plan.blocks[0], RTN(), BlockCall(args=(), kwargs={}), None, 1)
    with torch.no_grad():
        got = experts(x * scale, index, weights)  # the norm has the scale now
    assert type(experts[0].up_proj) is FrozenLinear
    assert relative(got, want) < 5e-6


@pytest.mark.parametrize("name", NAMES)
def test_plain_rounding_is_plain_rounding(name: str) -> None:
    original = tiny_family(name)
    model, _, _ = calibrated(original, rtn("w3a16"))
    open_experts(original)
    for ours, theirs in zip(model.model.layers, original.model.layers, strict=True):
        for path in (n for n, m in theirs.named_modules() if isinstance(m, nn.Linear)):
            values, scale = rtn_by_hand(submodule(theirs, path).weight, 3)
            assert np.array_equal(submodule(ours, path).values.numpy(), values)
            assert np.array_equal(submodule(ours, path).scale.numpy()[:, 0], scale)


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model, recipe = tiny_family("qwen3_moe"), quick("w4a4kv4", solver=SolverSpec(kind="gptq"))
    whole, _, report = calibrated(model, recipe)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "solve":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, recipe, state=RunState(tmp_path, {"run": 1}, resume=False), progress=kill)
    resumed, _, again = calibrated(model, recipe, state=RunState(tmp_path, {"run": 1}, resume=True))
    assert same_bytes(resumed, whole)
    assert [b.get("experts") for b in again.blocks] == [b.get("experts") for b in report.blocks]


# ------------------------------------------------------------------------------------------- grouped products

# An expert that every token passes, biases and a clamp, no gate, matrices that lie transposed.
GROUPED = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "llama4_text")


def one_by_one(block: nn.Module) -> list[RemovableHandle]:
    """Watch all experts' linears: then each is called."""
    linears = [m for e in block.modules() if isinstance(e, Experts) for m in e.modules() if hasattr(m, "site")]
    assert linears
    return [linear.register_forward_hook(lambda *_: None) for linear in linears]


def with_experts(model: nn.Module) -> list[tuple[int, nn.Module]]:
    blocks = submodule(model, arch_of(model.config).blocks)
    return [(i, b) for i, b in enumerate(blocks) if any(isinstance(m, Experts) for m in b.modules())]


@pytest.mark.parametrize("name", GROUPED)
def test_a_fit_s_experts_at_once_are_experts_one_after_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and all gradients, in float64."""
    model = tiny_family(name, dtype=torch.float64)
    _, fits = wrap(model, bare(BASES["inverse orthogonal"], Scheme.parse("w4a4")), noise=0.05)
    monkeypatch.setattr(grouped_linear, "gains", lambda device: True)
    monkeypatch.setattr(grouped_linear, "_FEW", 10**6)
    products = counted(monkeypatch, grouped_linear, "padded")
    tokens = tokens_for(model, 2, 9)
    parameters = [p for fit in fits for ps in fit.parameters().values() for p in ps if p.requires_grad]

    def run() -> list[Tensor]:
        out = model(tokens, use_cache=False).logits
        return [out.detach(), *torch.autograd.grad(out.square().sum(), parameters, materialize_grads=True)]

    with torch.enable_grad():
        got = run()
        assert len(products) == 2 * len(with_experts(model))
        for _, block in with_experts(model):
            one_by_one(block)
        want = run()
    assert len(products) == 2 * len(with_experts(model))  # and no more
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16", "w3g8a8", "w16a4", "wnvfp4a4", "w4a4,mlp_mid=w16a16"])
def test_served_experts_at_once_are_experts_one_after_another(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen and packed; of integers, to the last bit."""
    name = "gpt_oss" if scheme == "w4a4" else "mixtral"
    model, plan, _ = calibrated(tiny_family(name, hidden_size=32, intermediate_size=48, head_dim=8), rtn(scheme))
    save(model, plan, tmp_path / "model", recipe={}, report={}, scheme=scheme)
    tokens = tokens_for(model, 2, 9)
    for served in (model, load(tmp_path / "model")):
        with torch.no_grad():
            alone = served(tokens).logits
        with monkeypatch.context() as patch:
            for module in (grouped_linear, linear):
                patch.setattr(module, "gains", lambda device: True)
            patch.setattr(linear, "_TOGETHER", 2000)  # a few experts at a time
            products = counted(patch, linear, "by_row" if name == "gpt_oss" else "grouped_linear")
            products += counted(patch, linear, "grouped_int_linear")
            with torch.no_grad():
                together = served(tokens).logits
                for _, block in with_experts(served):
                    one_by_one(block)
                assert torch.equal(served(tokens).logits, alone)
        if scheme in ("w4a4", "w3g8a8"):
            assert torch.equal(together, alone)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def counted(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """Calls of a function from now on."""
    calls: list[None] = []
    inner = getattr(module, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return inner(*args, **kwargs)

    patch.setattr(module, name, counting)
    return calls


# ------------------------------------------------------------------------------------------------- the router


@pytest.mark.parametrize("name", NAMES)
def test_the_router_stays_in_sixteen_bit_and_undoes_the_norm_s_scale(name: str) -> None:
    original = tiny_family(name, dtype=torch.bfloat16)
    plain, _, _ = calibrated(original, rtn("w4a4kv4"))
    router = plain.model.layers[0].mlp.gate.weight
    assert router.dtype == torch.bfloat16
    assert torch.equal(router, original.model.layers[0].mlp.gate.weight)

    model = tiny_family(name, dtype=torch.float64)
    before = copy.deepcopy(model)
    _, fits = wrap(model, bare(BASES["diagonal only"]), noise=0.3, force=True)
    scale = next(p for p in fits[0].sites["mlp_in"].transform.parameters()).detach().exp()
    for fit in fits:
        fold_block(fit, dtype=torch.float64)
    ours, theirs = (m.model.layers[0].mlp.gate.weight for m in (model, before))
    assert relative(ours, theirs / scale) < 1e-12
    assert (scale - 1).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_router_follows_a_rotation_that_is_learned(name: str) -> None:
    model = tiny_family(name, dtype=torch.float64)
    tokens = tokens_for(model, 2, 9)
    recipe = dataclasses.replace(RECIPES["spinquant"]("w4a4kv4"), scheme=Scheme(), data=DataSpec(samples=8, seqlen=12))
    with torch.no_grad():
        want = model(tokens).logits
    _, fits, residual = wrap_all(model, recipe, force=True)
    assert residual is not None
    scores = model.model.layers[0].mlp.gate(torch.randn(3, 24, dtype=torch.float64))[0]
    grads = torch.autograd.grad(scores.square().sum(), [p for p in residual.parameters() if p.requires_grad])
    assert all(g.abs().max() > 0 for g in grads)
    with torch.no_grad():
        assert relative(model(tokens).logits, want) < 1e-9
        for fit in fits:
            fold_block(fit, dtype=torch.float64)
        assert relative(model(tokens).logits, want) < 1e-9
    assert type(model.model.layers[0].mlp.gate).__name__.endswith("Router")  # as it was


# -------------------------------------------------------------------------------------- experts with few tokens


def recipes():
    for name, make in RECIPES.items():
        recipe = make({"vptq": "w4a16", "flattenquant": "w4a4"}.get(name, "w4a4kv4"))
        yield pytest.param(recipe, id=name)
    yield pytest.param(quick("w4a4kv4", solver=SolverSpec(kind="gptq")), id="flatquant with gptq")


@pytest.mark.parametrize("recipe", list(recipes()))
def test_an_expert_that_no_token_reaches_does_no_harm(recipe: spec.Recipe) -> None:
    original = with_an_unreached_expert()
    changes = {"data": DataSpec(samples=4, seqlen=12)}
    if recipe.fit is not None:
        changes["fit"] = dataclasses.replace(recipe.fit, epochs=1, batch_size=2)
    if recipe.end_to_end is not None:
        changes["end_to_end"] = dataclasses.replace(recipe.end_to_end, steps=2, batch_size=2)
    if recipe.solver.codebook is not None:
        changes["solver"] = dataclasses.replace(
            recipe.solver, codebook=dataclasses.replace(recipe.solver.codebook, length=2, outliers=0)
        )
    recipe = dataclasses.replace(recipe, **changes)
    model, _, report = calibrated(original, recipe)
    if recipe.needs_data:
        for block in report.blocks:
            tokens = block["experts"]["tokens"]
            assert tokens[UNREACHED] == 0
            assert sum(tokens) == 2 * 4 * 12
            assert UNREACHED in block["experts"]["rare"]
    assert all(math.isfinite(loss) for block in report.blocks for loss in block["losses"])
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor.float()).all(), name
    with torch.no_grad():
        assert torch.isfinite(model(tokens_for(model, 2, 9)).logits).all()


@pytest.mark.parametrize("hessian", ["input", "output_adaptive"])
def test_an_unreached_expert_keeps_its_weights(hessian: str) -> None:
    """Without the blend its Hessian would be zero, and error compensation would take all weights for unused ones."""
    original = with_an_unreached_expert()
    recipe = dataclasses.replace(
        gptq("w4a16"), solver=SolverSpec(kind="gptq", hessian=hessian), data=DataSpec(samples=4, seqlen=12)
    )
    model, _, _ = calibrated(original, recipe)
    open_experts(original)
    for ours, theirs in zip(model.model.layers, original.model.layers, strict=True):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            path = f"mlp.experts.{UNREACHED}.{leaf}"
            linear, want = submodule(ours, path), linear_at(theirs, path).weight
            assert isinstance(linear, FrozenLinear)
            assert (linear.qweight().dequantize() - want).norm() < 0.3 * want.norm(), path


@pytest.mark.parametrize("kind", ["input", "output adaptive"])
def test_few_tokens_count_little(kind: str) -> None:
    n, generator = 8, torch.Generator().manual_seed(0)

    def gram(tokens: int) -> InputGram | OutputAdaptive:
        g = InputGram(n, "cpu") if kind == "input" else OutputAdaptive(n, "cpu", "token")
        for _ in range(tokens):
            x = torch.randn(1, 1, n, generator=generator) @ torch.diag(torch.arange(1.0, n + 1))
            g.add(x) if isinstance(g, InputGram) else g.add(x, torch.ones(1, 1, 3))
        return g

    mean = torch.eye(n)
    torch.testing.assert_close(blended(gram(0), mean), 2 * mean)
    equal = gram(n)
    assert equal.tokens == n
    torch.testing.assert_close(blended(equal, mean), equal.sum / n + mean)
    many = gram(4000)
    assert relative(blended(many, mean), 2 * many.sum / 4000) < 0.01
    assert torch.linalg.eigvalsh(blended(gram(2), mean)).min() > 0.5  # two tokens alone leave it singular
    if kind == "input":
        torch.testing.assert_close(blended(many, many.sum / 4000), many.hessian())


@torch.no_grad()
def test_error_compensation_uses_what_each_expert_sees() -> None:
    """Rounded on its own tokens, every expert that sees many loses less on such tokens than by plain rounding."""
    original = tiny_family("mixtral", seed=1)
    recipe = dataclasses.replace(gptq("w3a16"), data=DataSpec(samples=48, seqlen=32))
    solved, _, report = calibrated(original, recipe)
    rounded, _, _ = calibrated(original, rtn("w3a16"))
    assert min(report.blocks[0]["experts"]["tokens"]) > 2 * 40
    open_experts(original)
    seen: dict[int, Tensor] = {}
    experts = original.model.layers[0].mlp.experts
    handles = [
        experts[e].gate_proj.register_forward_pre_hook(lambda _, args, e=e: seen.__setitem__(e, args[0]))
        for e in range(EXPERTS)
    ]
    hidden(original, tokens_for(original, 16, 32, seed=9))
    for handle in handles:
        handle.remove()
    for e, x in seen.items():
        want = experts[e].gate_proj(x)
        errors = []
        for model in (solved, rounded):
            weight = model.model.layers[0].mlp.experts[e].gate_proj.qweight().dequantize()
            errors.append(float((x @ weight.mT - want).square().mean()))
        assert errors[0] < errors[1], (e, errors)


def test_statistics_are_those_of_all_tokens() -> None:
    model = tiny_family("mixtral")
    open_experts(model)
    block = model.model.layers[0]
    observer = Observer(block, arch_of(model.config))
    received: list[Tensor] = []
    handle = block.mlp.experts.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    hidden(model, tokens_for(model, 4, 12))
    handle.remove()
    found = observer.close()["mlp_in"]
    torch.testing.assert_close(found.absmax, received[0].abs().amax(0))
    torch.testing.assert_close(found.square, received[0].square().mean(0))
    assert len(found.tokens) == EXPERTS
    assert sum(found.tokens) == 2 * 48


# ----------------------------------------------------------------------------------------------------- around


@pytest.mark.parametrize("number", [4, 6, 10**9])
def test_a_config_with_another_number_of_experts_is_refused_at_once(number: int, tmp_path: Path) -> None:
    model, plan, _ = calibrated(tiny_family("mixtral"), rtn("w4a4"))
    save(model, plan, tmp_path / "m", recipe={}, report={}, scheme="w4a4")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["num_local_experts"] = number
    config["quantization_config"]["content_hash"] = content_hash(config)
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ArtifactError, match=f"{number} experts, 5 planned") as caught:
            read(tmp_path / "m")
        assert "\n" not in str(caught.value)
    assert time.perf_counter() - start < 10


def test_a_report_names_experts_with_few_tokens(tmp_path: Path) -> None:
    model = with_an_unreached_expert("qwen3_moe")
    result = flatquant.quantize(model, quick("w4a4"), tokens_for(model, 4, 12), device="cpu")
    sparse, dense = result.report["blocks"]
    assert sparse["experts"]["tokens"][UNREACHED] == 0
    assert UNREACHED in sparse["experts"]["rare"]
    assert "experts" not in dense


@pytest.mark.parametrize("number", [0, -1, 6, 10**9, 1.5])
def test_a_config_that_sends_tokens_to_more_experts_than_there_are_is_refused(number: float, tmp_path: Path) -> None:
    model, plan, _ = calibrated(tiny_family("mixtral"), rtn("w4a4"))
    save(model, plan, tmp_path / "m", recipe={}, report={}, scheme="w4a4")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["num_experts_per_tok"] = number
    config["quantization_config"]["content_hash"] = content_hash(config)
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path / "m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_takes_a_saved_mixture(name: str, tmp_path: Path) -> None:
    original = tiny_family(name)
    original.save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    arguments = ["quantize", tmp_path / "original", "-o", tmp_path / "out", "--scheme", "w4a4kv4", "--device", "cpu"]
    arguments += ["--calibration", tmp_path / "text.txt", "--samples", 4, "--seqlen", 16, "--epochs", 1]
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    experts = EXPERTS * (2 if name == "mixtral" else 1)
    told = " ".join(done.output.replace("│", " ").split())
    assert f"of {experts} experts saw fewer calibration tokens than they have inputs" in told
    collect = [
        "report",
        "--collect",
        str(tmp_path / "original"),
        "--text",
        str(tmp_path / "text.txt"),
        "--tokens",
        "64",
    ]
    for command in (["inspect"], ["generate", "--prompt", "the", "--max-new-tokens", "3", "--device", "cpu"], collect):
        done = CliRunner().invoke(app, [command[0], str(tmp_path / "out"), *command[1:]])
        assert done.exit_code == 0, done.output
    assert "Calibration tokens by expert" in (tmp_path / "out" / FILE).read_text()
    flatness = json.loads((tmp_path / "out/flatquant_collection.json").read_text())["flatness"]
    assert {entry["site"] for entry in flatness} == {"attn_in", "attn_out", "mlp_in", "mlp_mid"}


def test_operations_are_counted_by_what_a_token_passes() -> None:
    model = tiny_family("mixtral")
    model, plan, _ = calibrated(model, quick("w4a4"))
    h, i = 24, 40
    block = 2 * h * (4 + 6) * 2 + 2 * h * 4 + 2 * 2 * i * (5 + 8)  # attn_in and mlp_in, attn_out, mlp_mid twice
    assert online_flops(plan, Geometry.of(model.config), model.model.layers) == 2 * block


def test_one_transform_serves_a_group() -> None:
    model = tiny_family("mixtral")
    _, fits = wrap(model, quick("w4a4"))
    for fit in fits:
        assert set(fit.sites) == {"attn_in", "attn_out", "mlp_in", "mlp_mid"}
        for site in ("mlp_in", "mlp_mid"):
            kinds = [type(part) for part in fit.sites[site].transform.parts]
            assert kinds == [Diagonal, Kronecker]
        assert len({id(m.site) for m in fit.block.mlp.experts.modules() if hasattr(m, "site")}) == 2
