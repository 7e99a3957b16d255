"""Preflight: it passes on every family and on models with outliers, and fails on every break made on purpose."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StableLmConfig, StableLmForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import flatquant
from flatquant import seams
from flatquant.api.call import _streamed
from flatquant.calibrate import preflight as module
from flatquant.calibrate.preflight import Preflight, preflight
from flatquant.errors import ModelError
from flatquant.recipes import RECIPES, gptq, rtn
from flatquant.runtime.experts import open_experts
from flatquant.spec import Recipe
from flatquant.transforms import HeadDiagonal
from flatquant.wiring.arch import Arch
from flatquant.wiring.linear import FitSite, HeadOutput
from tests.laws import CPU, blocks_of, everything, quick, same_bytes, tokens_for
from tests.tiny_models import FAMILIES, tiny_family, tiny_llama, tiny_tokenizer

FLATQUANT = RECIPES["flatquant"]("w4a4kv4")


def checked(model: PreTrainedModel, recipe: Recipe = FLATQUANT) -> Preflight:
    open_experts(model)
    result = preflight(model, recipe, device=CPU)
    assert result is not None
    return result


def fails(model: PreTrainedModel, match: str, recipe: Recipe = FLATQUANT) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        checked(model, recipe)
    assert "\n" not in str(caught.value)


def described(monkeypatch: pytest.MonkeyPatch, change: Callable[[Arch], Arch]) -> None:
    """Change the description that a model's family has."""
    real = module.arch_of
    monkeypatch.setattr(module, "arch_of", lambda *args: change(real(*args)))


# ------------------------------------------------------------------------------------------------- it passes


# Of these, the two blocks differ.
MIXED = {
    "gemma2", "gemma3_text", "gemma4_text", "smollm3", "qwen3_moe", "ministral", "olmo3", "exaone4", "cohere2",
    "qwen2_moe", "glm4_moe", "dots1", "ernie4_5_moe", "llama4_text", "gpt_oss", "qwen3_5_text", "qwen3_5_moe_text",
    "qwen3_next", "lfm2", "granitemoehybrid", "granitemoehybrid dense", "deepseek_v2", "deepseek_v2 lite",
    "deepseek_v3", "deepseek_v3 lite", "glm4_moe_lite", "axk1", "cwm", "hy_v3", "mellum", "afmoe", "exaone_moe",
    "flint", "gemma4_text experts", "gemma4_unified_text", "granite_swa", "granitemoe_swa", "kolibri1", "laguna",
    "lara_mini", "vaultgemma", "olmo_hybrid",
}  # fmt: skip
OF_THREE_KINDS = {"cohere2_moe", "lfm3"}
OF_FOUR_KINDS = {"nemotron_h", "lfm2_moe"}
KINDS = dict.fromkeys(MIXED, 2) | dict.fromkeys(OF_THREE_KINDS, 3) | dict.fromkeys(OF_FOUR_KINDS, 4)
KINDS["gemma4_text small"] = 5  # windows and full attention, that lend keys and values, borrow them, or neither


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_far_below_a_tight_bound(name: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = tiny_family(name, dtype=dtype)
        before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), model.config._attn_implementation
        result = checked(model, RECIPES["flatquant"](everything(name)))
        assert 0 < result.seconds < 10
        assert 10 * result.error < result.bound < 2e-4
        assert result.kinds == KINDS.get(name, 1)
        assert torch.equal(before[1], torch.get_rng_state())
        assert before[2] == model.config._attn_implementation
        assert all("forward" not in vars(block) for block in blocks_of(model))
        untouched = tiny_family(name, dtype=dtype)
        open_experts(untouched)
        assert same_bytes(model, untouched)


@pytest.mark.parametrize("method", sorted(RECIPES.keys() - {"vptq"}))  # which has neither a transform nor a seam
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_every_method_passes(name: str, method: str) -> None:
    result = checked(tiny_family(name), RECIPES[method]("w4a4kv4"))
    assert 10 * result.error < result.bound < 2e-4


def test_a_model_that_does_not_run_by_itself_is_refused() -> None:
    """StableLM turns a share of each head's channels; transformers multiplies sizes that differ where that is odd."""
    size = {"hidden_size": 36, "intermediate_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = StableLmConfig(vocab_size=64, num_hidden_layers=1, partial_rotary_factor=0.25, **size)
    with pytest.raises(ModelError, match=r"block 0: the model itself does not run in transformers 5\.\d+"):
        checked(StableLmForCausalLM(config))


def test_what_transforms_nothing_is_not_checked() -> None:
    for recipe in (rtn("w4a4"), gptq("w4")):
        assert preflight(tiny_family("llama"), recipe, device=CPU) is None
    assert checked(tiny_family("llama"), rtn("w4kv4")).error > 0  # the seam of keys and values


@pytest.mark.parametrize("bias", [354.0, 3e4])
@pytest.mark.parametrize("queries", [1.0, 100.0])
def test_outliers_do_not_fire_it(bias: float, queries: float) -> None:
    """Biases of keys as Qwen2.5 has them and beyond, a residual stream of thousands, channels that overflow float16."""
    model = tiny_family("qwen2", dtype=torch.float16)
    block = model.model.layers[0]
    with torch.no_grad():
        block.self_attn.k_proj.bias[3], block.self_attn.k_proj.bias[7] = bias, -bias
        block.self_attn.q_proj.bias.mul_(queries)
        block.mlp.down_proj.weight[:, 4] *= 1000
        block.input_layernorm.weight[3] = 300
        model.model.embed_tokens.weight[:, 2] = 3368
    result = checked(model)
    assert result.error < result.bound < 1e-3


def test_zeros_do_not_fire_it() -> None:
    model = tiny_family("qwen2")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert checked(model).error == 0


def test_a_streamed_model_is_checked_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_family("gemma2", dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _, checkpoint = _streamed(tmp_path)
    filled: list[str] = []
    fill = checkpoint.fill
    monkeypatch.setattr(checkpoint, "fill", lambda block, prefix, device: filled.append(prefix) or fill(block, prefix))
    result = preflight(model, FLATQUANT, device=CPU, checkpoint=checkpoint)
    assert result is not None
    assert result.kinds == 2
    assert result.bound == pytest.approx(checked(whole).bound, rel=0.5)  # rounding, which differs with alignment
    assert result.error < result.bound
    assert filled == ["model.layers.0.", "model.layers.1."]
    assert all(p.is_meta for p in model.model.layers.parameters())


def test_a_run_is_checked_first_and_its_bytes_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe, models = quick("w4a4kv4"), [tiny_llama(), tiny_llama(), tiny_llama()]
    tokens = tokens_for(models[0], 4, 12)
    one = flatquant.quantize(models[0], recipe, tokens, device="cpu")
    entry = one.report["timing"]["preflight"]
    assert entry.keys() == {"kinds", "error", "bound", "seconds"}
    assert entry["kinds"] == 1
    monkeypatch.setattr("flatquant.api.run.preflight", lambda *args, **options: None)
    other = flatquant.quantize(models[1], recipe, tokens, device="cpu")
    assert other.report["timing"]["preflight"] is None
    assert same_bytes(one.model, other.model)

    def stop(*args: object, **options: object) -> None:
        raise ModelError("preflight, block 0: attn_in")

    monkeypatch.setattr("flatquant.api.run.preflight", stop)
    with pytest.raises(ModelError, match=r"^preflight"):
        flatquant.quantize(models[2], recipe, tokens, device="cpu", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())  # nothing to resume, nothing in the way
    assert same_bytes(models[2], tiny_llama())


# -------------------------------------------------------------------------------------------- breaks on purpose


def edge(site: str, **changes: object) -> Callable[[Arch], Arch]:
    return lambda arch: dataclasses.replace(
        arch,
        edges=tuple(dataclasses.replace(e, **changes) if e.site == site else e for e in arch.edges),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "name, site, change",
    [
        ("gemma2", "attn_in", lambda arch: dataclasses.replace(arch, norm_offset=0.0)),
        ("llama", "attn_in", lambda arch: dataclasses.replace(arch, norm_offset=1.0)),
        ("llama", "mlp_in", edge("mlp_in", norm="input_layernorm")),
        ("gemma3_text", "mlp_in", edge("mlp_in", norm="post_attention_layernorm")),
        ("olmo2", "attn_in", edge("attn_in", norm="post_attention_layernorm")),
        ("llama", "mlp_mid", edge("mlp_mid", writer="mlp.gate_proj")),
        ("phi3", "mlp_mid", edge("mlp_mid", writer="mlp.gate_up_proj")),  # the gate's rows
        ("phi3", "attn_out", edge("attn_out", writer="self_attn.qkv_proj")),  # the queries' rows
        ("llama", "attn_out", edge("attn_out", writer="self_attn.k_proj")),
        ("mixtral", "mlp_in", edge("mlp_in", routers=())),  # the norm changes what the router reads
    ],
)
def test_a_wrong_description_is_named_by_its_edge(
    name: str, site: str, change: Callable[[Arch], Arch], monkeypatch: pytest.MonkeyPatch
) -> None:
    described(monkeypatch, change)
    said = rf"^preflight, block 0: {site}: .* moves the block's output by [\d.]+.*wiring/archs does not describe"
    fails(tiny_family(name), said)


def test_a_writer_s_bias_left_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FitSite, "transformed_bias", lambda self: self.bias)
    fails(tiny_family("qwen2"), "attn_out: ")
    checked(tiny_family("mistral"))  # which has none


def test_a_scale_that_does_not_commute_with_rotary_embeddings_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(self: HeadDiagonal) -> Tensor:
        log = torch.cat([self.log_scale, -self.log_scale], 1) if self.paired else self.log_scale
        return log.exp().flatten()

    monkeypatch.setattr(HeadDiagonal, "scale", property(scale))
    fails(tiny_family("llama"), "qk: ", RECIPES["omniquant"]("w4a4kv4"))


def test_a_rotation_that_writers_forget_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = HeadOutput.forward
    monkeypatch.setattr(HeadOutput, "forward", lambda self, y: y if self.factor.size == 24 else forward(self, y))
    fails(tiny_family("llama"), "residual: ", RECIPES["quarot"]("w4a4kv4"))


def test_a_final_norm_that_no_rotation_passes_is_noticed() -> None:
    model = tiny_family("llama")
    model.model.norm = nn.LayerNorm(24)
    fails(model, "^preflight: a rotation moves the final norm's output", RECIPES["quarot"]("w4a4kv4"))


# What another release of transformers could do to attention, by the check that notices.


def test_attention_that_ignores_its_cache_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaAttention.forward

    def deaf(self: LlamaAttention, *args: object, **kwargs: object) -> object:
        return forward(self, *args, **{k: None if seams.is_cache(v) else v for k, v in kwargs.items()})

    monkeypatch.setattr(LlamaAttention, "forward", deaf)
    fails(tiny_family("llama"), "^preflight, block 0: .* did not hand its keys and values to the cache's update")
    fails(tiny_family("llama"), "^preflight, block 0: ", rtn("w4kv4"))


def test_a_cache_that_gives_back_too_little_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicLayer

    update = DynamicLayer.update

    def forgetful(self: DynamicLayer, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> object:
        k, v = update(self, keys, values, *args, **kwargs)
        return torch.cat([torch.zeros_like(k[:, :, :1]), k[:, :, 1:]], 2), v

    monkeypatch.setattr(DynamicLayer, "update", forgetful)
    fails(tiny_family("llama"), "with a cache")


def test_padding_that_is_attended_to_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(seams.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: None)
    fails(tiny_family("llama"), "with padding on the left")


def test_attention_unlike_the_model_s_own_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = seams.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def biased(module: nn.Module, q: Tensor, *args: object, **kwargs: object) -> object:
        return sdpa(module, 1.01 * q, *args, **kwargs)

    monkeypatch.setitem(seams.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", biased)
    fails(tiny_family("llama"), "the model's own attention and 'flatquant' differ by .* tested releases")


def test_outside_the_tested_releases_the_installed_one_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    described(monkeypatch, edge("mlp_mid", writer="mlp.gate_proj"))
    monkeypatch.setattr(module.transformers, "__version__", "5.99.0.dev0")
    monkeypatch.setattr("flatquant.versions.version", lambda _: "5.99.0.dev0")
    fails(tiny_family("llama"), "mlp_mid: .*: transformers 5.99.0.dev0 works differently from the tested releases")
