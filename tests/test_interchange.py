"""Other tools: matrices of the original project in, checkpoints for everybody out."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import flatquant
from flatquant.cli import app
from flatquant.errors import ArtifactError, ModelError
from flatquant.interchange import export_compressed, export_dense, import_compressed, import_matrices, read_matrices
from flatquant.recipes import autoround, gptq, rtn
from flatquant.runtime.artifact import load, save
from flatquant.spec import DataSpec, Recipe, Scheme, to_dict
from flatquant.wiring.arch import submodule
from tests.laws import calibrated, quick, relative, tokens_for
from tests.test_laws import ALL_READERS
from tests.tiny_models import tiny_family, tiny_llama, tiny_tokenizer

TOKENS = torch.arange(18).reshape(2, 9)
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
    assert "weights_only" not in str(caught.value)
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


FITTED = autoround("w4g8a16", "best")
assert FITTED.end_to_end is not None
FITTED = dataclasses.replace(FITTED, end_to_end=dataclasses.replace(FITTED.end_to_end, steps=3))


@pytest.mark.parametrize(
    "recipe, tied",
    [
        (rtn("w4a16"), True),
        (gptq("w4g8a16"), False),
        (rtn("w8a16"), True),
        (rtn("w4g96a16"), True),
        (autoround("w4g8a16", "quick"), True),
        (FITTED, False),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_compressed_tensors_load_in_transformers(recipe: Recipe, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = tiny_llama(tied=tied, intermediate=72)
    if "g96" in str(recipe.scheme):
        model = tiny_family("llama", hidden_size=96, head_dim=24, intermediate_size=192)
    tokens = tokens_for(model, 16, 16, seed=1)
    result = flatquant.quantize(model, recipe, tokens if recipe.needs_data else None, device="cpu")
    export_compressed(result.model, result.plan, tmp_path / "out", tokenizer=tiny_tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = tokens_for(model, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, result.model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheme, group, parts", [("w4a16", None, 1), ("w4g96a16", 32, 3), ("w4g64a16", 64, 1), ("w4g48a16", 48, 1)]
)
def test_groups_are_cut_into_those_that_vllm_takes(scheme: str, group: int | None, parts: int, tmp_path: Path) -> None:
    model, plan, _ = calibrated(tiny_family("llama", hidden_size=192, head_dim=48, intermediate_size=192), rtn(scheme))
    export_compressed(model, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert group_of(config)["weights"]["group_size"] == group
    state = load_file(tmp_path / "out" / "model.safetensors")
    scale = model.get_submodule("model.layers.0.mlp.up_proj").qweight().scale
    assert torch.equal(state["model.layers.0.mlp.up_proj.weight_scale"], scale.repeat_interleave(parts, dim=-1))


def test_what_vllm_does_not_serve_on_a_cpu_is_said(tmp_path: Path) -> None:
    def notes(scheme: str, **sizes: int) -> list[str]:
        model, plan, _ = calibrated(tiny_family("llama", head_dim=8, **sizes), rtn(scheme))
        return export_compressed(model, plan, tmp_path / f"{scheme}{len(sizes)}")

    assert notes("w4a16", hidden_size=32, intermediate_size=64) == []
    assert notes("w8a16", hidden_size=32, intermediate_size=64) == ["vLLM has no kernel for weights of 8 bits on a CPU"]
    said = "vLLM takes multiples of 32 x 32 weights on a CPU"
    assert notes("w4a16", hidden_size=32, intermediate_size=72, num_hidden_layers=1) == [
        f"{said}; mlp.gate_proj reads 32 channels",
        f"{said}; mlp.down_proj reads 72 channels",
    ]


def test_what_compressed_tensors_has_no_place_for(tmp_path: Path) -> None:
    for recipe, match in (
        (quick("w4a16"), "online transforms"),
        (rtn("w4a4"), "weight-only"),
        (rtn("w3a16"), "4 or 8 bits"),
        (rtn("w4a16,mlp_mid=w8"), "one symmetric grid"),
        (rtn("wnvfp4,mlp_mid=wmxfp4"), "one symmetric grid"),
        (rtn("wmxfp4a8"), "weight-only"),
        (rtn("mxfp4,mlp_mid=a16"), "weight-only"),
        (rtn("mxfp4kv4"), "weight-only"),
        (rtn("w4a16,lm_head=w8a8"), "its input in 16 bit"),
        (rtn("w4a16,lm_head=w3a16"), "4 or 8 bits"),
        (rtn("wmxfp4,lm_head=w8a16"), "beside integers only"),
        (rtn(Scheme.parse("mxfp4")), "--activation-clip none"),
    ):
        model, plan, _ = calibrated(tiny_llama(), recipe)
        with pytest.raises(ModelError, match=match):
            export_compressed(model, plan, tmp_path / "out")
    model, plan, _ = calibrated(tiny_family("mixtral"), rtn("w4a16"))
    with pytest.raises(ModelError, match="mixtures of experts"):
        export_compressed(model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


FP4 = {"hidden": 64, "intermediate": 96, "bias": True}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["nvfp4", "wnvfp4", "mxfp4", "wmxfp4"])
@pytest.mark.parametrize("method", [rtn, gptq])
def test_fp4_goes_to_compressed_tensors_and_back(
    method: Callable[[str], Recipe], scheme: str, tied: bool, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    original = tiny_llama(tied=tied, **FP4)
    recipe = dataclasses.replace(method(scheme), data=DataSpec(samples=4, seqlen=12))
    model, plan, _ = calibrated(original, recipe)
    export_compressed(model, plan, tmp_path / "out", tokenizer=tiny_tokenizer())
    with torch.no_grad():
        want = model(TOKENS).logits

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        theirs(TOKENS)  # weights are decompressed on the first call, into bfloat16
        torch.nn.Module.float(theirs)
        held = theirs.state_dict()
        theirs.load_state_dict({n: t for n, t in model.state_dict().items() if n in held}, strict=False)
        for block, ours in zip(theirs.model.layers, model.model.layers, strict=True):
            for path in ALL_READERS:
                linear, exact = submodule(block, path), submodule(ours, path).plain()
                assert torch.equal(linear.weight.bfloat16(), exact.bfloat16()), path
                linear.weight.copy_(exact)
        got = theirs(TOKENS).logits
    if scheme == "nvfp4":  # sums in another order: one activation in many takes another code
        assert relative(got, want) < 1e-1
        assert float((got - want).norm() / want.norm()) < 2e-2
    elif scheme != "mxfp4":  # they round MX scales of activations by a rule of their own
        assert relative(got, want) < 1e-5

    again, plan_again, recipe_again, _ = import_compressed(tmp_path / "out")
    assert str(recipe_again.scheme) == str(recipe.scheme)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, want)
    save(again, plan_again, tmp_path / "folder", recipe=to_dict(recipe_again), report={})
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "folder")(TOKENS).logits, want)
    export_compressed(again, plan_again, tmp_path / "twice", tokenizer=tiny_tokenizer())
    names = ("model.safetensors", "config.json")
    assert [(tmp_path / "twice" / n).read_bytes() for n in names] == [
        (tmp_path / "out" / n).read_bytes() for n in names
    ]


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_what_compressed_tensors_compresses_is_read(scheme: str, tmp_path: Path) -> None:
    """Their compressor, their scales, our reader: the numbers that they would decompress."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    original = tiny_llama(**FP4)
    model, plan, _ = calibrated(original, rtn(f"w{scheme}"))
    export_compressed(model, plan, tmp_path / "out")
    theirs = preset_name_to_scheme(f"{scheme.upper()}A16", ["Linear"])
    assert theirs.weights is not None
    assert theirs.weights.group_size is not None
    compressor, state = BaseCompressor.get_value_from_registry(f"{scheme}-pack-quantized"), {}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if not name.endswith(("weight_packed", "weight_scale", "weight_global_scale")):
            state[name] = tensor
    decompressed: dict[str, Tensor] = {}
    for path in (f"model.layers.{i}.{reader}" for i in range(2) for reader in ALL_READERS):
        w = submodule(original, path).weight.detach()
        groups = w.unflatten(-1, (-1, theirs.weights.group_size))
        whole = generate_gparam(w.amin(), w.amax()) if scheme == "nvfp4" else None
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), theirs.weights, whole)
        given = {"weight": w, "weight_scale": scale} | ({} if whole is None else {"weight_global_scale": whole})
        packed = compressor.compress(given, theirs)
        decompressed[path] = compressor.decompress(packed, theirs)["weight"]
        state |= {f"{path}.{leaf}": tensor.contiguous() for leaf, tensor in packed.items()}
    save_file(state, tmp_path / "out" / "model.safetensors")
    again, *_ = import_compressed(tmp_path / "out")
    for path, want in decompressed.items():
        assert torch.equal(submodule(again, path).plain().bfloat16(), want), path


DOWN = "model.layers.0.mlp.down_proj"


def group_of(config: dict[str, Any]) -> dict[str, Any]:
    """What all linears share."""
    return config["quantization_config"]["config_groups"]["group_0"]


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c, s: c["quantization_config"].update(format="int-quantized"), "not a compressed-tensors model in"),
        (lambda c, s: c["quantization_config"]["config_groups"].update(b={}), "one scheme"),
        (lambda c, s: c["quantization_config"]["config_groups"].clear(), "one scheme"),
        (lambda c, s: c["quantization_config"].update(format=["nvfp4"]), "not a compressed-tensors model in"),
        (lambda c, s: group_of(c).update(input_activations="x"), "input_activations is x"),
        (lambda c, s: group_of(c).update(weights=None), "weights is None, no description"),
        (
            lambda c, s: group_of(c)["weights"].update(group_size=32),
            "weights with group_size 32 are not nvfp4; only 16",
        ),
        (lambda c, s: group_of(c)["weights"].update(symmetric=False), "symmetric False are not nvfp4"),
        (lambda c, s: group_of(c)["input_activations"].update(num_bits=8), "input_activations with num_bits 8"),
        (lambda c, s: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8}), "keys and values"),
        (lambda c, s: c.update(model_type=["llama"]), "does not know the model type"),
        (lambda c, s: s.update({f"{DOWN}.input_global_scale": torch.zeros(1)}), "no positive number"),
        (lambda c, s: s.update({f"{DOWN}.input_global_scale": torch.ones(2)}), "no positive number"),
        (lambda c, s: s.update({f"{DOWN}.weight_global_scale": torch.ones(2)}), "do not fit"),
        (lambda c, s: s.update({f"{DOWN}.weight_scale": torch.tensor(1.0)}), "do not fit"),
        (lambda c, s: s.update({f"{DOWN}.weight_packed": s[f"{DOWN}.weight_packed"].float()}), "not of uint8"),
        (lambda c, s: c.update(model_type="nonesuch"), "nonesuch"),
        (
            lambda c, s: s.pop("model.layers.0.mlp.up_proj.weight_scale"),
            "lacks tensor model.layers.0.mlp.up_proj.scale",
        ),
        (lambda c, s: s.pop("model.layers.0.mlp.up_proj.input_global_scale"), "do not share"),
        (lambda c, s: s.update({"model.layers.0.mlp.up_proj.input_global_scale": torch.ones(1)}), "do not share"),
        (lambda c, s: s.update(extra=torch.ones(1)), "surplus tensor extra"),
        (lambda c, s: s.update({"model.layers.0.mlp.up_proj.weight_packed": torch.ones(2, 2)}), "do not fit"),
        (
            lambda c, s: s.update(
                {"model.layers.0.mlp.up_proj.weight_scale": torch.full((96, 4), torch.nan).to(torch.float8_e4m3fn)}
            ),
            "positive and finite",
        ),
    ],
)
def test_a_damaged_fp4_folder_is_one_line(
    change: Callable[[dict[str, Any], dict[str, Tensor]], Any], match: str, tmp_path: Path
) -> None:
    model, plan, _ = calibrated(
        tiny_llama(**FP4), dataclasses.replace(rtn("nvfp4"), data=DataSpec(samples=2, seqlen=8))
    )
    export_compressed(model, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    state = load_file(tmp_path / "out" / "model.safetensors")
    change(config, state)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ArtifactError, match=match) as caught:
        import_compressed(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_the_command_line_takes_fp4_back(tmp_path: Path) -> None:
    flatquant.quantize(
        tiny_llama(**FP4), rtn("wnvfp4"), tokenizer=tiny_tokenizer(), output=tmp_path / "model", device="cpu"
    )
    for args in (["export", "model", "-o", "out", "--format", "compressed-tensors"], ["import", "out", "-o", "back"]):
        command = [str(tmp_path / a) if a in ("model", "out", "back") else a for a in args]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "back")(TOKENS).logits, load(tmp_path / "model")(TOKENS).logits)
    done = CliRunner().invoke(app, ["import", str(tmp_path / "out"), "-o", str(tmp_path / "b"), "--scheme", "w4a4"])
    assert done.exit_code == 1
    assert "leave out --scheme" in done.output


@pytest.mark.parametrize("scheme, served", [("w8a16", True), ("w8a16,lm_head=w8a16", False)])
def test_a_folder_that_vllm_refuses_is_not_said_to_be_served(scheme: str, served: bool, tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    flatquant.quantize(tiny_llama(), rtn(scheme), tokenizer=tiny_tokenizer(), output=folder, device="cpu")
    command = ["export", str(folder), "-o", str(tmp_path / "out"), "--format", "compressed-tensors"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "note: vLLM has no kernel for weights of 8 bits" in done.output
    assert ("flatquant serve" in done.output) == served
    assert not served or f"`flatquant serve '{folder}'`" in done.output


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
