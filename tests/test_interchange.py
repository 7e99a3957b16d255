"""Other tools: matrices of the original project in, checkpoints for everybody out."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import flatquant
from flatquant.cli import app
from flatquant.errors import ArtifactError, ModelError
from flatquant.interchange import export_compressed, export_dense, import_matrices, read_matrices
from flatquant.recipes import autoround, gptq, rtn
from flatquant.runtime.artifact import load
from flatquant.spec import Recipe
from tests.laws import calibrated, quick, tokens_for
from tests.tiny_models import tiny_family, tiny_llama, tiny_tokenizer

SHAPE = {"hidden": 40, "heads": 4, "kv_heads": 2, "head_dim": 10, "intermediate": 42}


def well_conditioned(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n)).Q + 0.1 * torch.randn(n, n)


def their_block(model: torch.nn.Module) -> dict[str, Tensor]:
    """What the original's `save_flat_matrices` writes of a block: names as in its modules, inverses included."""
    block: dict[str, Tensor] = {}

    def pair(name: str, left: int, right: int) -> None:
        for side, n in (("left", left), ("right", right)):
            matrix = well_conditioned(n)
            block[f"{name}.matrix_{side}"] = matrix
            block[f"{name}.matrix_{side}_inv"] = torch.linalg.inv(matrix).T
        block[f"{name}.diag_scale"] = torch.rand(left * right) + 0.5

    def single(name: str, n: int) -> None:
        block[f"{name}.matrix"] = well_conditioned(n)
        block[f"{name}.matrix_inv_t"] = torch.linalg.inv(block[f"{name}.matrix"]).T

    pair("self_attn.ln_trans", 5, 8)
    pair("mlp.up_gate_trans", 5, 8)
    pair("mlp.down_trans", 6, 7)
    single("self_attn.o_trans", 4)
    single("self_attn.vcache_trans", 10)
    single("self_attn.kcache_trans", 10)
    layer = model.model.layers[0]
    for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                 "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
        rows = layer.get_submodule(path).weight.shape[0]
        for end in ("max", "min"):
            block[f"{path}.clip_factor_w_{end}"] = 2 + torch.rand(rows, 1)
            block[f"{path}.act_quantizer.clip_factor_a_{end}"] = torch.full((1,), 3.0)
    for name in ("k", "v"):
        for end in ("max", "min"):
            block[f"self_attn.{name}_cache_quantizer.clip_factor_a_{end}"] = torch.full((1,), 2.5)
    return {k: torch.nn.Parameter(v) for k, v in block.items()}


def kron(left: Tensor, right: Tensor) -> Tensor:
    return torch.kron(left.detach().contiguous(), right.detach().contiguous()).double()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[Path, dict[int, dict[str, Tensor]]]:
    torch.manual_seed(0)
    data = {i: their_block(tiny_llama(**SHAPE)) for i in range(2)}
    path = tmp_path_factory.mktemp("theirs")
    torch.save(data, path / "flat_matrices.pth")
    return path, data


# --------------------------------------------------------------------------------------------- in


def test_imported_weights_are_what_the_original_computes(theirs) -> None:
    """By its formulas, from dense Kronecker products: clip(W diag^-1 P^-T) on its grid, outputs times P_v."""
    path, data = theirs
    model = tiny_llama(**SHAPE)
    original = copy.deepcopy(model)
    import_matrices(model, path)
    for index, (block, before) in enumerate(zip(model.model.layers, original.model.layers, strict=True)):
        m = data[index]
        diag, p = m["self_attn.ln_trans.diag_scale"].detach().double(), kron(
            m["self_attn.ln_trans.matrix_left_inv"], m["self_attn.ln_trans.matrix_right_inv"]
        )  # fmt: skip
        for name in ("q_proj", "v_proj"):
            w = before.self_attn.get_submodule(name).weight.detach().double() / diag @ p
            high = w.amax(1, keepdim=True) * torch.sigmoid(m[f"self_attn.{name}.clip_factor_w_max"]).double()
            low = w.amin(1, keepdim=True) * torch.sigmoid(m[f"self_attn.{name}.clip_factor_w_min"]).double()
            w = w.clamp(low, high)
            if name == "v_proj":
                w = torch.block_diag(*[m["self_attn.vcache_trans.matrix"].detach().double()] * 2).T @ w
            scale = torch.maximum(w.amax(1), -w.amin(1)) / 7
            ours = block.self_attn.get_submodule(name).qweight()
            torch.testing.assert_close(ours.scale[:, 0].double(), scale, rtol=1e-5, atol=0)
            integers = (w / scale[:, None]).round().clamp(-8, 7)
            assert (ours.values == integers).float().mean() > 0.999  # float32 against float64 at a tie
        site = block.flatquant["attn_in"]
        torch.testing.assert_close(site.left, m["self_attn.ln_trans.matrix_left"].detach())
        gain = before.input_layernorm.weight * m["self_attn.ln_trans.diag_scale"]
        torch.testing.assert_close(block.input_layernorm.weight, gain)
        o = before.self_attn.o_proj.weight.detach().double() @ kron(
            m["self_attn.o_trans.matrix_inv_t"], m["self_attn.vcache_trans.matrix_inv_t"]
        )
        top = torch.maximum(
            o.amax(1) * torch.sigmoid(m["self_attn.o_proj.clip_factor_w_max"])[:, 0].double(),
            -o.amin(1) * torch.sigmoid(m["self_attn.o_proj.clip_factor_w_min"])[:, 0].double(),
        )
        torch.testing.assert_close(block.self_attn.o_proj.scale[:, 0].double(), top / 7, rtol=1e-5, atol=0)
        keeps = site.activations.clip.ratio
        torch.testing.assert_close(keeps, torch.sigmoid(torch.full((2,), 3.0)))


def test_imported_transforms_leave_the_function_alone(theirs) -> None:
    original = tiny_llama(**SHAPE)
    data = copy.deepcopy(theirs[1])
    model = copy.deepcopy(original)
    torch.save({i: {k: v + 30 if "clip" in k else v for k, v in b.items()} for i, b in data.items()}, theirs[0] / "x")
    import_matrices(model, theirs[0] / "x", "w8a8")
    tokens = tokens_for(original, 2, 9)
    with torch.no_grad():
        ours, want = model(tokens).logits, original(tokens).logits
    assert (ours - want).abs().mean() < 0.1 * want.abs().mean()


def test_the_command_line_imports(theirs, tmp_path: Path) -> None:
    tiny_llama(**SHAPE).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["import", tmp_path / "model", "--matrices", theirs[0], "-o", tmp_path / "out"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert torch.isfinite(load(tmp_path / "out")(torch.ones(1, 4, dtype=torch.long)).logits).all()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize("kind", ["code", "text", "cut", "list", "strings", "gap", "absent", "pickle"])
def test_other_files_are_refused_and_not_run(theirs, tmp_path: Path, kind: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, data = tmp_path / "flat_matrices.pth", theirs[1]
    match kind:
        case "code":
            torch.save({0: Evil()}, path)
        case "text":
            path.write_text("hello")
        case "cut":
            whole = (theirs[0] / "flat_matrices.pth").read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        case "list":
            torch.save([1, 2], path)
        case "strings":
            torch.save({0: {"a": "b"}}, path)
        case "gap":
            torch.save({1: data[1]}, path)
        case "pickle":
            path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ArtifactError) as caught:
        read_matrices(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def test_matrices_of_another_model(theirs) -> None:
    with pytest.raises(ArtifactError, match="2 blocks, the model has 3"):
        import_matrices(tiny_llama(**SHAPE, layers=3), theirs[0])
    with pytest.raises(ArtifactError, match=r"block 0: .* not "):
        import_matrices(tiny_llama(**{**SHAPE, "hidden": 48}), theirs[0])


# --------------------------------------------------------------------------------------------- out


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "olmo2", "mixtral", "qwen3_moe"])
def test_a_dense_checkpoint_computes_the_same(name: str, tmp_path: Path) -> None:
    model, plan, _ = calibrated(tiny_family(name), quick("w4a16"))
    export_dense(model, plan, tmp_path / "out", tokenizer=tiny_tokenizer())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = tokens_for(model, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-3)


def test_a_dense_checkpoint_cannot_round_activations(tmp_path: Path) -> None:
    model, plan, _ = calibrated(tiny_llama(), quick("w4a4kv4"))
    with pytest.raises(ModelError, match="--weights-only"):
        export_dense(model, plan, tmp_path / "out")
    export_dense(model, plan, tmp_path / "out", weights_only=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "recipe, tied",
    [(rtn("w4a16"), True), (gptq("w4g8a16"), False), (rtn("w8a16"), True), (autoround("w4g8a16", "quick"), True)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_compressed_tensors_load_in_transformers(recipe: Recipe, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = tiny_llama(tied=tied, intermediate=72)
    tokens = tokens_for(model, 16, 16, seed=1)
    result = flatquant.quantize(model, recipe, tokens if recipe.needs_data else None, device="cpu")
    export_compressed(result.model, result.plan, tmp_path / "out", tokenizer=tiny_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = tokens_for(model, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, result.model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_what_compressed_tensors_has_no_place_for(tmp_path: Path) -> None:
    for recipe, match in (
        (quick("w4a16"), "online transforms"),
        (rtn("w4a4"), "weight-only"),
        (rtn("w3a16"), "4 or 8 bits"),
        (rtn("w4a16,mlp_mid=w8"), "one symmetric grid"),
    ):
        model, plan, _ = calibrated(tiny_llama(), recipe)
        with pytest.raises(ModelError, match=match):
            export_compressed(model, plan, tmp_path / "out")
    model, plan, _ = calibrated(tiny_family("mixtral"), rtn("w4a16"))
    with pytest.raises(ModelError, match="mixtures of experts"):
        export_compressed(model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_exports(tmp_path: Path) -> None:
    flatquant.quantize(tiny_llama(), rtn("w4a16"), tokenizer=tiny_tokenizer(), output=tmp_path / "model", device="cpu")
    for form in ("dense", "compressed-tensors"):
        where = str(tmp_path / form)
        done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "-o", where, "--format", form])
        assert done.exit_code == 0, done.output
        assert (tmp_path / form / "model.safetensors").is_file()
        assert (tmp_path / form / "tokenizer.json").is_file()
    done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "-o", str(tmp_path / "x"), "--format", "gguf"])
    assert done.exit_code == 1
