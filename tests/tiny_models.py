"""Tiny random models and a tokenizer for them, so that tests need no network and no minute.

The models have what makes real ones hard to quantise: norm weights that are not 1, and a few channels that are many
times larger than the rest.
"""

import re
from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 128


def tiny_llama(
    *,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int = 96,
    layers: int = 2,
    vocab: int = VOCAB,
    bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A random Llama in eval mode; the same arguments give the same weights. The global random state is left alone."""
    config = LlamaConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        vocab_size=vocab,
        attention_bias=bias,
        mlp_bias=mlp_bias,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * torch.randn(weight.shape))
                weight[torch.randperm(len(weight))[:2]] *= 8  # channels that are large in every token
            elif name.endswith("bias"):
                weight.copy_(0.1 * torch.randn(weight.shape))
            else:
                weight.copy_(torch.randn(weight.shape) * weight.shape[1] ** -0.5)
                if name.endswith("up_proj.weight"):
                    weight[torch.randperm(len(weight))[:2]] *= 10  # large inputs of down_proj
    return model.to(dtype).eval()


PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.7}

# Queries of later positions are larger.
STRETCHED = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.1,
}

SPARSE = {"num_experts": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28}

LATENT = {  # three sizes of heads: keys without and with rotary embedding, and values
    **SPARSE,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "head_dim": 4,  # of the rotary embedding
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}

BARE_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_expand": 2, "mamba_n_groups": 2, "mamba_d_state": 8}

MAMBA = {
    **BARE_MAMBA,
    "layer_types": ["mamba", "attention"],
    "shared_intermediate_size": 20,
    "position_embedding_type": "rope",
    "residual_multiplier": 0.6,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": PARTIAL,
}

GEMMA4 = {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
    "global_head_dim": 12,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "attention_bias": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}

GEMMA4_SMALL = {
    **GEMMA4,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": VOCAB,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention",
        "sliding_attention", "full_attention", "full_attention",
    ],
    "use_double_wide_mlp": True,
}  # fmt: skip

# Every family, and the variants that are wired differently; what a config has beyond `tiny_family`'s fields.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},  # shorter than the tests' windows
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "gemma2": {
        "query_pre_attn_scalar": 6,
        "sliding_window": 5,
        "attn_logit_softcapping": 2.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 6,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "gemma4_text small": GEMMA4_SMALL,  # E2B and E4B
    "phi3": {"rope_parameters": PARTIAL},
    "olmo": {"attention_bias": True},
    "olmo2": {"attention_bias": True},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
    },
    "smollm3": {"no_rope_layers": [1, 0], "attention_bias": True},
    "stablelm": {
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": False,
        "rope_parameters": PARTIAL,
    },
    "stablelm parallel": {"use_qkv_bias": True, "use_parallel_residual": True, "rope_parameters": PARTIAL},
    "cohere": {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.3},
    "glm4": {"attention_bias": True, "rope_parameters": PARTIAL},
    "ministral": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {"rope_parameters": STRETCHED},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "hunyuan_v1_dense": {"attention_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"attention_bias": True},
    "gemma": {"attention_bias": True},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "apertus": {"attention_bias": True},
    "olmo3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.3},
    "phi": {"qk_layernorm": True, "rope_parameters": PARTIAL},
    "starcoder2": {"sliding_window": 5, "use_bias": True},
    "nemotron": {"attention_bias": True, "mlp_bias": True, "rope_parameters": PARTIAL},
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24},
    "gpt_neox": {"use_parallel_residual": True, "rope_parameters": PARTIAL},
    "gpt_neox sequential": {"use_parallel_residual": False, "rope_parameters": PARTIAL},
    "falcon": {"multi_query": True, "parallel_attn": True},  # 7B
    "falcon groups": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},  # 40B, 180B
    "falcon alibi": {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},  # RW
    "persimmon": {"rope_parameters": PARTIAL},
    "bloom": {},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 56,
        "norm_topk_prob": False,
        "mlp_only_layers": [1],  # a block without experts
    },
    "olmoe": {**SPARSE, "attention_bias": True},
    "minimax_m2": {**SPARSE, "use_qk_norm": True, "rope_parameters": PARTIAL},
    "qwen2_moe": {**SPARSE, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    "glm4_moe": {
        **SPARSE,
        "num_experts": 6,
        "num_local_experts": 6,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "use_qk_norm": True,
        "attention_bias": True,
        "rope_parameters": PARTIAL,
    },
    "deepseek_v3": {**LATENT, "attention_bias": True, "rope_parameters": YARN},
    "deepseek_v3 lite": {**LATENT, "q_lora_rank": None, "rope_interleave": False},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v2 lite": {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "mlp_bias": True},
    "glm4_moe_lite": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "minicpm3": {**LATENT, "scale_emb": 2.0, "scale_depth": 0.9, "dim_model_base": 8},
    # transformers zeroes the embedding of padding whenever it loads one.
    "youtu": {**LATENT, "attention_bias": True, "pad_token_id": None},
    "axk1": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "dots1": {
        **SPARSE,
        "num_experts": 6,
        "num_local_experts": 6,
        "n_shared_experts": 2,
        "n_group": 2,
        "first_k_dense_replace": 1,
        "topk_group": 1,
    },
    "hunyuan_v1_moe": {**SPARSE, "moe_topk": 2},
    "ernie4_5_moe": {
        **SPARSE,
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "granitemoe": {**SPARSE, "attention_multiplier": 0.3, "residual_multiplier": 0.6, "logits_scaling": 3.0},
    "mellum": {
        **SPARSE,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": True,
    },
    "hy_v3": {
        **SPARSE,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
        "enable_moe_fp32_combine": False,  # sums in float32 would hide what float64 shows
    },
    "solar_open": {**SPARSE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "flex_olmo": {**SPARSE, "attention_bias": True},
    "cwm": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "glm": {"attention_bias": True, "rope_parameters": PARTIAL},
    "lfm2_moe": {
        **SPARSE,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 2,
    },
    "llama4_text": {
        **SPARSE,
        "intermediate_size_mlp": 32,
        "moe_layers": [0],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 4,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "qwen3_5_text": {**DELTA, "attention_bias": True},
    "qwen3_5_moe_text": {**SPARSE, **DELTA, "shared_expert_intermediate_size": 24},
    "qwen3_next": {**SPARSE, **DELTA, "shared_expert_intermediate_size": 20},
    "lfm2": {
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
    },
    "nemotron_h": {
        **SPARSE,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 20,
        "routed_scaling_factor": 1.7,
        "mlp_bias": True,
    },
    "granitemoehybrid": {**SPARSE, **MAMBA},
    "granitemoehybrid dense": {**MAMBA, "num_local_experts": 0},
    "internlm3": {"qkv_bias": True, "bias": True},
    "granite_swa": {
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 3.0,
        "attention_bias": True,
    },
    "hyperclovax": {"use_post_norm": True, "attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.6},
    "vaultgemma": {
        "query_pre_attn_scalar": 6,
        "sliding_window": 5,
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "apertus1p5_text": {"attention_bias": True},
    "jais2": {},
    "exaone_moe": {
        **SPARSE,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "n_group": 1,
        "topk_group": 1,
    },
    "kolibri1": {
        **SPARSE,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "shared_expert_intermediate_size": 20,
    },
    "flint": {
        **SPARSE,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "shared_expert_intermediate_size": 20,
    },
    "phimoe": {**SPARSE, "attention_bias": True, "lm_head_bias": True},
    "laguna": {
        **SPARSE,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_attention_heads_per_layer": [4, 6],
        "shared_expert_intermediate_size": 20,
        "attention_bias": True,
    },
    "afmoe": {
        **SPARSE,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_dense_layers": 1,
        "attention_bias": True,
    },
    "granitemoe_swa": {
        **SPARSE,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "residual_multiplier": 0.6,
    },
    "granitemoeshared": {**SPARSE, "shared_intermediate_size": 20, "residual_multiplier": 0.6},
    "cohere2_moe": {
        **SPARSE,
        "num_shared_experts": 1,
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "logit_scale": 0.3,
    },
    "gemma4_text experts": {
        **GEMMA4,
        **SPARSE,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "lara_mini": {
        **SPARSE,
        **DELTA,
        "layer_types": ["linear_attention", "sliding_attention"],
        "sliding_window": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "shared_expert_intermediate_size": 20,
        "attention_bias": True,
    },
    "lfm3": {
        "num_hidden_layers": 3,
        "sliding_window": 5,
        "layer_types": ["conv", "sliding_attention", "full_attention"],
    },
    "olmo_hybrid": {
        **DELTA,
        "linear_key_head_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "attention_bias": True,
    },
    "falcon_h1": {
        **BARE_MAMBA,
        "mamba_d_ssm": 48,
        "attention_in_multiplier": 0.7,
        "ssm_in_multiplier": 1.3,
        "key_multiplier": 0.4,
        "attention_bias": True,
        "mlp_bias": True,
        "projectors_bias": True,
    },
    "gpt_oss": {**SPARSE, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}

# Types that transformers gives the classes of another family.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "exaone": ("llama", {}),
    "iquestcoder": ("llama", {}),
    "sarvam_moe": ("glm4_moe", {**SPARSE, "n_group": 1, "topk_group": 1}),
    "sarvam_mla": ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
}

# Older releases of transformers lack some.
FAMILIES = {name: fields for name, fields in FAMILIES.items() if name.split()[0] in CONFIG_MAPPING}
ALIASES = {name: known for name, known in ALIASES.items() if name in CONFIG_MAPPING}

# What computes in float32 whatever the model's dtype is.
_NARROW = re.compile(
    "Norm|Router|Gate$|Rotary|DeltaNet|Mamba|FalconH1Mixer|Lightning|"
    "(Bloom|Ernie4_5|Ernie4_5_Moe|Flint|GraniteSWA|GraniteMoeSWA|Helium|Laguna|Llama4Text)Attention"
)


class _Wide(TorchFunctionMode):
    """float64 wherever float32 is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@cache
def exact(kind: type) -> type:
    """A class of modules with arithmetic in float64, if it is one that computes in float32; any other as it is."""
    if not _NARROW.search(kind.__name__) or kind.__module__.startswith("torch."):
        return kind

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Wide():
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


def randomised(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model whose every tensor matters, norms and biases too, with outlier channels, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        wrapped = config.get_text_config() is not config
        model = (AutoModelForMultimodalLM if wrapped else AutoModelForCausalLM).from_config(config)
        n = config.get_text_config().hidden_size
        for key, weight in model.named_parameters():
            if key.endswith("bias"):
                weight.copy_(0.1 * torch.randn(weight.shape))
            elif "norm" in key or ".ln_" in key:
                weight.add_(0.2 * torch.randn(weight.shape))
                if weight.ndim == 1 and len(weight) == n:
                    weight[torch.randperm(n)[:2]] *= 4
            else:
                weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)
    return model.eval()


def tiny_family(
    name: str,
    *,
    kv_heads: int = 2,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **sizes: int,
) -> PreTrainedModel:
    """A random model of one of `FAMILIES` or `ALIASES`, in eval mode: four heads of 6 channels, two blocks, or as told.

    In float64, norms and routers that compute in float32 are replaced by ones that do not: a law is about our
    arithmetic.
    """
    fields = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 6,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 512,
        "bos_token_id": VOCAB - 2,
        "eos_token_id": VOCAB - 1,
        "pad_token_id": VOCAB - 1,
    }
    own = ALIASES[name][1] if name in ALIASES else FAMILIES[name]
    kind, wanted = name.split()[0], {**fields, **own, **sizes}
    computed = {key for key in wanted if isinstance(getattr(CONFIG_MAPPING[kind], key, None), property)}
    config = AutoConfig.for_model(kind, **{key: value for key, value in wanted.items() if key not in computed})
    return widened(randomised(config, seed), dtype)


def widened(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model in a dtype; in float64 with what computes in float32 replaced."""
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # the grouped product has no float64
        for module in model.modules():
            module.__class__ = exact(type(module))
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the first 125 ASCII characters, then `<unk>`, `<s>` and `</s>`: 128 in all."""
    vocab = {chr(code): code for code in range(VOCAB - 3)}
    vocab |= {"<unk>": VOCAB - 3, "<s>": VOCAB - 2, "</s>": VOCAB - 1}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
