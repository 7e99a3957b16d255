"""Tiny random wrappers: models of several parts, one of which is a text model, and inputs with an image or a sound."""

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from tests.tiny_models import DELTA, GEMMA4, GEMMA4_SMALL, LATENT, SPARSE, STRETCHED, VOCAB, randomised, widened

_IMAGE, _BEGIN, _END, _VIDEO = 100, 101, 102, 103  # tokens of wrappers
_SOUND = _IMAGE

_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 56,
    "patch_size": 14,
}
_HEARING = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": 8}
_QWEN_VISION = {"hidden_size": 16, "depth": 2, "num_heads": 2, "intermediate_size": 16, "patch_size": 4}
_QWEN_TOKENS = {
    "image_token_id": _IMAGE,
    "video_token_id": _VIDEO,
    "vision_start_token_id": _BEGIN,
    "vision_end_token_id": _END,
}


_GEMMA4_VISION = {
    **_VISION,
    "model_type": "gemma4_vision",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 8,
}
_GEMMA4_TOKENS = {
    "image_token_id": _IMAGE,
    "boi_token_id": _BEGIN,
    "eoi_token_id": _END,
    "video_token_id": _VIDEO,
    "audio_token_id": 104,
    "audio_config": None,
}


def _by_three(*sections: int) -> dict[str, Any]:
    """A rotary embedding by time, height and width."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections)}


_SAM = {  # Segment Anything's encoder
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "output_channels": 8,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 16,
}

# Wrappers: fields of the text part, of the tower that sees or hears, of the whole.
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (  # heads wider than the hidden size has room for, and a vocabulary larger than the rest
        {
            "model_type": "gemma3_text",
            "hidden_size": 20,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "vocab_size": 520,
            "query_pre_attn_scalar": 6,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {**_VISION, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "image_token_id": _IMAGE, "boi_token_id": _BEGIN, "eoi_token_id": _END},
    ),
    "gemma4": (
        {
            **GEMMA4,
            **SPARSE,
            "model_type": "gemma4_text",
            "enable_moe_block": True,
            "top_k_experts": 5,  # all: rounding changes no choice
            "use_bidirectional_attention": "vision",
        },
        _GEMMA4_VISION,
        _GEMMA4_TOKENS,
    ),
    "gemma4 small": (  # E2B: the second block reads the keys and values of the first
        {
            **GEMMA4_SMALL,
            "model_type": "gemma4_text",
            "hidden_size": 48,
            "hidden_size_per_layer_input": 24,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 1,
            "layer_types": ["full_attention", "full_attention"],
        },
        _GEMMA4_VISION,
        _GEMMA4_TOKENS,
    ),
    "gemma4_unified": (
        {**GEMMA4, "model_type": "gemma4_unified_text"},
        {
            "model_type": "gemma4_unified_vision",
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 16,
            "mm_posemb_size": 8,
            "output_proj_dims": 16,
        },
        _GEMMA4_TOKENS,
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {**_VISION, "model_type": "pixtral"},
        {"image_token_id": _IMAGE, "tie_word_embeddings": False},
    ),
    "llava": (
        {"model_type": "llama"},
        {**_VISION, "model_type": "clip_vision_model"},
        {"image_token_id": _IMAGE},
    ),
    "mistral3 mistral4": (
        {
            **LATENT,
            "model_type": "mistral4",
            "n_routed_experts": 6,
            "num_experts_per_tok": 6,  # as above
            "n_group": 1,
            "topk_group": 1,
            "hidden_size": 32,
            "rope_parameters": {**STRETCHED, "rope_type": "default"},
        },
        {**_VISION, "model_type": "pixtral"},
        {"image_token_id": _IMAGE, "tie_word_embeddings": False},
    ),
    "kimi_k25": (
        {**LATENT, "model_type": "deepseek_v3", "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
        {**_VISION, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
        {**_QWEN_TOKENS, "projection_hidden_size": 16},
    ),
    "internvl": (
        {"model_type": "qwen3"},
        {**_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        {"image_token_id": _IMAGE},
    ),
    "glm4v": (
        {"model_type": "glm4v_text", "head_dim": 8, "hidden_size": 32, "rope_parameters": _by_three(2, 1, 1)},
        {**_QWEN_VISION, "out_hidden_size": 32, "image_size": 32},
        {**_QWEN_TOKENS, "image_start_token_id": _BEGIN, "image_end_token_id": _END},
    ),
    "glm4v_moe": (
        {
            **SPARSE,
            "model_type": "glm4v_moe_text",
            "head_dim": 12,  # half of which is turned
            "n_routed_experts": 4,
            "num_experts_per_tok": 4,  # as above
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "rope_parameters": _by_three(1, 1, 1),
        },
        {**_QWEN_VISION, "out_hidden_size": 24, "image_size": 32},
        {**_QWEN_TOKENS, "image_start_token_id": _BEGIN, "image_end_token_id": _END},
    ),
    "llava_next": (
        {"model_type": "mistral", "sliding_window": None},
        {**_VISION, "model_type": "clip_vision_model", "image_size": 28},
        {"image_token_id": _IMAGE, "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]]},
    ),
    "llava_onevision": (
        {"model_type": "qwen2"},
        {**_VISION, "model_type": "siglip_vision_model", "image_size": 28},
        {"image_token_id": _IMAGE, "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]], "video_token_id": _VIDEO},
    ),
    "idefics2": (
        {"model_type": "mistral", "sliding_window": None},
        {**_VISION, "image_size": 56},
        {
            "image_token_id": _IMAGE,
            "perceiver_config": {
                "hidden_size": 24,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            },
        },
    ),
    "idefics3": ({"model_type": "llama"}, _VISION, {"image_token_id": _IMAGE}),
    "smolvlm": ({"model_type": "llama"}, _VISION, {"image_token_id": _IMAGE}),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {**_VISION, "model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4},
        {"image_token_id": _IMAGE, "projector_hidden_size": 16},
    ),
    "lfm3_vl": (
        {"model_type": "lfm3", "layer_types": ["conv", "full_attention"]},
        {**_VISION, "num_key_value_heads": 1, "patch_size": 4},
        {**_QWEN_TOKENS, "projector_hidden_size": 16},
    ),
    "got_ocr2": (
        {"model_type": "qwen2"},
        {**_SAM, "image_size": 128, "patch_size": 8, "window_size": 4},
        {"image_token_id": _IMAGE},
    ),
    "ovis2": (
        {"model_type": "qwen2"},
        {**_VISION, "vocab_size": 8, "hidden_stride": 2, "num_visual_indicator_tokens": 2},
        {
            "image_token_id": _IMAGE,
            "visual_indicator_token_ids": [_BEGIN, _END],
            "vocab_size": VOCAB,
            "hidden_size": 24,
        },
    ),
    "cohere2_vision": (
        {"model_type": "cohere2", "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        {**_VISION, "model_type": "siglip_vision_model"},
        {"image_token_id": _IMAGE, "alignment_intermediate_size": 32},
    ),
    "aya_vision": (
        {"model_type": "cohere2", "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        {**_VISION, "model_type": "siglip_vision_model"},
        {"image_token_id": _IMAGE, "alignment_intermediate_size": 32},
    ),
    "deepseek_vl": (
        {"model_type": "llama"},
        {**_VISION, "model_type": "siglip_vision_model"},
        {"image_token_id": _IMAGE},
    ),
    "janus": (
        {"model_type": "llama"},
        {**_VISION, "mlp_ratio": 1, "projection_dim": 24, "num_image_tokens": 16},
        {
            "image_token_id": _IMAGE,
            "vq_config": {
                "embed_dim": 4,
                "num_embeddings": 8,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 4,
                "projection_dim": 24,
                "image_token_embed_dim": 24,
            },
        },
    ),
    "lighton_ocr": ({"model_type": "qwen3"}, {**_VISION, "model_type": "pixtral"}, {"image_token_id": _IMAGE}),
    "video_llama_3": (
        {"model_type": "qwen2"},
        {**_VISION, "patch_size": 4},
        {"image_token_id": _IMAGE, "video_token_id": _VIDEO},
    ),
    "exaone4_5": (
        {"model_type": "exaone4", "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        {
            **_QWEN_VISION,
            "out_hidden_size": 24,
            "fullatt_block_indexes": [1],
            "window_size": 16,
            "num_key_value_heads": 1,
        },
        {"image_token_id": _IMAGE, "video_token_id": _VIDEO},
    ),
    "hyperclovax_vision_v2": (
        {"model_type": "hyperclovax"},
        {
            **_QWEN_VISION,
            "model_type": "qwen2_5_vl_vision",
            "out_hidden_size": 24,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
        {"image_token_id": _IMAGE, "video_token_id": _VIDEO},
    ),
    "minicpmv4_6": (
        {**DELTA, "model_type": "qwen3_5_text", "head_dim": 8},
        {**_VISION, "patch_size": 4, "image_size": 32, "insert_layer_id": 0},
        {"image_token_id": _IMAGE, "video_token_id": _VIDEO, "insert_layer_id": 0, "downsample_mode": "16x"},
    ),
    "minicpmv4_7": (
        {**DELTA, "model_type": "qwen3_5_text", "head_dim": 8, "rope_parameters": _by_three(2, 1, 1)},
        {**_VISION, "patch_size": 4, "image_size": 32, "insert_layer_id": 0},
        {
            "image_token_id": _IMAGE,
            "video_token_id": _VIDEO,
            "insert_layer_id": 0,
            "image_start_id": _BEGIN,
            "image_end_id": _END,
            "slice_start_id": 104,
            "slice_end_id": 105,
            "newline_id": 106,
        },
    ),
    "qianfan_ocr": (
        {"model_type": "qwen3"},
        {**_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        {"image_token_id": _IMAGE},
    ),
    "glm46v": (
        {"model_type": "glm4v_text", "head_dim": 8, "hidden_size": 32, "rope_parameters": _by_three(2, 1, 1)},
        {**_QWEN_VISION, "model_type": "glm4v_vision", "out_hidden_size": 32, "image_size": 32},
        {**_QWEN_TOKENS, "image_start_token_id": _BEGIN, "image_end_token_id": _END},
    ),
    "glm_ocr": (
        {"model_type": "glm_ocr_text", "head_dim": 8, "hidden_size": 32, "rope_parameters": _by_three(2, 1, 1)},
        {**_QWEN_VISION, "out_hidden_size": 32, "image_size": 32},
        {**_QWEN_TOKENS, "image_start_token_id": _BEGIN, "image_end_token_id": _END},
    ),
    "hunyuan_vl": (
        {"model_type": "hunyuan_vl_text", "head_dim": 8, "rope_parameters": _by_three(1, 1, 1, 1)},
        {**_VISION, "patch_size": 4, "out_hidden_size": 24, "text_hidden_size": 24, "max_image_size": 32},
        {"image_token_id": _IMAGE, "im_start_id": _BEGIN, "im_end_id": _END, "im_newline_id": _VIDEO},
    ),
    "deepseek_vl_hybrid": (
        {"model_type": "llama"},
        {**_VISION, "model_type": "siglip_vision_model"},
        {
            "image_token_id": _IMAGE,
            "high_res_vision_config": _SAM,
        },
    ),
    "llava_next_video": (
        {"model_type": "llama"},
        {**_VISION, "model_type": "clip_vision_model", "image_size": 28},
        {"image_token_id": _IMAGE, "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]], "video_token_id": _VIDEO},
    ),
    "deepseek_ocr2": (
        {
            "model_type": "deepseek_ocr2_text",
            "n_routed_experts": 5,
            "num_experts_per_tok": 5,  # as above
            "moe_intermediate_size": 28,
            "mlp_layer_types": ["dense", "sparse"],
        },
        {
            "sam_config": {**_SAM, "downsample_channels": [16, 16]},
            "encoder_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 16,
            },
        },
        {"image_token_id": _IMAGE},
    ),
    "granite_docling": (  # what the tower's blocks see is added behind blocks of the text part
        {
            "model_type": "granite_docling_text",
            "num_hidden_layers": 3,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
        },
        {**_VISION, "image_size": 32, "patch_size": 4, "out_hidden_size": 24, "deepstack_visual_indexes": [0]},
        {"image_token_id": _IMAGE, "pad_token_id": VOCAB - 1},
    ),
    "paddleocr_vl": (
        {"model_type": "paddleocr_vl_text", "head_dim": 8, "rope_parameters": _by_three(1, 1, 2)},
        {**_VISION, "patch_size": 4, "image_size": 32},
        _QWEN_TOKENS,
    ),
    "qwen2_vl": (
        {"model_type": "qwen2_vl_text", "hidden_size": 32, "head_dim": 8, "rope_parameters": _by_three(1, 1, 2)},
        {"embed_dim": 16, "depth": 2, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 1, "patch_size": 4},
        _QWEN_TOKENS,
    ),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl_text", "hidden_size": 32, "head_dim": 8, "rope_parameters": _by_three(1, 1, 2)},
        {**_QWEN_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
        _QWEN_TOKENS,
    ),
    "qwen3_vl": (  # what the tower's blocks see is added behind blocks of the text part
        {
            "model_type": "qwen3_vl_text",
            "head_dim": 8,
            "rope_parameters": _by_three(2, 1, 1),
            "num_hidden_layers": 3,  # nothing is added behind the last
        },
        {**_QWEN_VISION, "out_hidden_size": 24, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        _QWEN_TOKENS,
    ),
    "qwen3_5": (
        {**DELTA, "model_type": "qwen3_5_text", "head_dim": 8, "rope_parameters": _by_three(2, 1, 1)},
        {**_QWEN_VISION, "out_hidden_size": 24, "num_position_embeddings": 16},
        _QWEN_TOKENS,
    ),
    "qwen3_5_moe": (
        {
            **DELTA,
            **SPARSE,
            "num_experts_per_tok": 5,  # as above
            "model_type": "qwen3_5_moe_text",
            "head_dim": 8,
            "rope_parameters": _by_three(2, 1, 1),
            "shared_expert_intermediate_size": 24,
        },
        {**_QWEN_VISION, "out_hidden_size": 24, "num_position_embeddings": 16},
        _QWEN_TOKENS,
    ),
    "qwen3_vl_moe": (
        {
            **SPARSE,
            "num_experts_per_tok": 5,  # as above
            "model_type": "qwen3_vl_moe_text",
            "head_dim": 8,
            "rope_parameters": _by_three(2, 1, 1),
            "num_hidden_layers": 3,
        },
        {**_QWEN_VISION, "out_hidden_size": 24, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        _QWEN_TOKENS,
    ),
    "qwen2_audio": (
        {"model_type": "qwen2"},
        {
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "num_mel_bins": 8,
            "max_source_positions": 16,
        },
        {"audio_token_id": _SOUND},
    ),
    "voxtral": (
        {"model_type": "llama"},
        {**_HEARING, "intermediate_size": 64, "max_source_positions": 16},
        {"audio_token_id": _SOUND},
    ),
    "glmasr": ({"model_type": "llama"}, {**_HEARING, "intermediate_size": 64}, {"audio_token_id": _SOUND}),
    "qwen3_asr": (
        {"model_type": "qwen3"},
        {
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "num_mel_bins": 8,
            "n_window_infer": 100,
            "downsample_hidden_size": 4,
            "output_dim": 24,
        },
        {"audio_token_id": _SOUND, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 1},
    ),
}

# Wrappers with the parts of others.
WRAPPERS |= {
    "glmga": WRAPPERS["glm46v"],
    "minicpm_ocr": WRAPPERS["minicpmv4_6"],
    "pp_chart2table": WRAPPERS["got_ocr2"],
}

# Those that are given a sound.
_HEAR = {
    name for name, (_, _, whole) in WRAPPERS.items() if "image_token_id" not in whole and "audio_token_id" in whole
}

# Older releases of transformers lack some.
WRAPPERS = {name: fields for name, fields in WRAPPERS.items() if name.split()[0] in CONFIG_MAPPING}


def wrapper_config(name: str, **text: Any) -> PreTrainedConfig:
    """The config of one of `WRAPPERS`; `text` are fields of its text part."""
    own, tower, whole = WRAPPERS[name]
    ends = {"bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 1}
    sizes = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
    }
    parts = {"text_config": {**sizes, **ends, **own, **text}}
    parts["audio_config" if name in _HEAR else "vision_config"] = tower
    return AutoConfig.for_model(name.split()[0], **parts, **whole)


def tiny_wrapper(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A random model of `wrapper_config`, in eval mode."""
    return widened(randomised(wrapper_config(name, **text), seed), dtype)


# By how a wrapper is given an image.
_PATCHES = (
    "qwen",
    "glm",
    "kimi",
    "exaone",
    "hyperclovax",
    "lfm3",
    "paddleocr",
    "video_llama",
    "hunyuan",
)  # rows of patches
_TILES = ("llava_next", "llava_onevision")  # with those of an image, below the whole of it
_SIZED = ("mistral3", "lighton_ocr")


def _pixels(kind: str, g: torch.Generator, seed: int) -> dict[str, Tensor]:
    """An image as a wrapper is given it, and what goes with it; the seed chooses its shape where that is free."""
    if kind.startswith(_PATCHES):
        grid = (1, 4, 4) if seed % 2 else (1, 4, 6)
        shape = (3 * 2 * 4 * 4,)
        if kind in ("hunyuan_vl", "video_llama_3"):
            shape = (3 * 4 * 4,)
        elif kind in ("kimi_k25", "paddleocr_vl"):
            shape = (3, 4, 4)
        found = {"pixel_values": torch.randn(grid[1] * grid[2], *shape, generator=g)}
        found["image_grid_thw"] = torch.tensor([grid])
        return {**found, "image_merge_sizes": torch.tensor([2])} if kind == "video_llama_3" else found
    if kind.startswith("gemma4"):
        pooled = 2 if kind == "gemma4" else 1
        grid = torch.cartesian_prod(torch.arange((2 if seed % 2 else 3) * pooled), torch.arange(4)).flip(1)
        return {"pixel_values": torch.rand(1, len(grid), 48, generator=g), "image_position_ids": grid[None]}
    if kind == "lfm2_vl":
        shape = torch.tensor([[2, 4] if seed % 2 else [4, 4]])
        mask = (torch.arange(16) < shape.prod())[None]
        return {
            "pixel_values": torch.randn(1, 16, 48, generator=g),
            "spatial_shapes": shape,
            "pixel_attention_mask": mask.long(),
        }
    if kind.startswith("minicpm"):
        shape = (4, 8) if seed % 2 else (8, 8)
        pixels = torch.randn(1, 3, 4, 4 * shape[0] * shape[1], generator=g)
        return {"pixel_values": pixels, "target_sizes": torch.tensor([shape], dtype=torch.int32)}
    if kind.startswith(_TILES):
        size = (28, 28) if seed % 2 else (28, 56)
        pixels = torch.randn(1, 1 + size[0] * size[1] // 28**2, 3, 28, 28, generator=g)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}
    if kind in _SIZED:
        size = (56, 28) if seed % 2 else (56, 56)
        return {"pixel_values": torch.randn(1, 3, *size, generator=g), "image_sizes": torch.tensor([size])}
    many = (1,) if kind.startswith(("idefics", "smolvlm")) else ()  # images of one text
    side = {"deepseek_ocr2": 64, "got_ocr2": 128, "pp_chart2table": 128}.get(kind, 56)
    given = {"pixel_values": torch.randn(1, *many, 3, side, side, generator=g)}
    if kind == "granite_docling":
        mask = torch.ones(1, 1, dtype=torch.bool)
        return {"pixel_values": torch.randn(1, 1, 3, 32, 32, generator=g), "pixel_attention_mask": mask}
    if kind == "deepseek_vl_hybrid":
        given["high_res_pixel_values"] = torch.randn(1, 3, 64, 64, generator=g)
    return given


def _mels(kind: str, g: torch.Generator, seed: int) -> dict[str, Tensor]:
    """A sound as a wrapper is given it; the seed chooses its length where that is free."""
    most = 100 if kind == "qwen3_asr" else 32
    frames = torch.arange(most) < (most // 2 if seed % 2 else most)
    given = {"input_features": torch.randn(1, 8, most, generator=g)}
    if kind == "qwen2_audio":
        given["feature_attention_mask"] = frames[None].long()
    elif kind != "voxtral":
        given["input_features_mask"] = frames[None].long()
    return given


def _count(model: PreTrainedModel, given: dict[str, Tensor]) -> int:
    """The tokens that an image or a sound takes."""
    if "feature_attention_mask" in given:  # Qwen2-Audio, which has no such method
        return int(given["feature_attention_mask"].sum()) // 4
    name = "get_audio_features" if "input_features" in given else "get_image_features"
    with torch.no_grad():
        features = getattr(model.base_model, name)(**given).pooler_output
    return sum(part.shape[:-1].numel() for part in (features if isinstance(features, list | tuple) else [features]))


def image_inputs(model: PreTrainedModel, seed: int = 0, *, length: int = 14, prompt: int = 3) -> dict[str, Tensor]:
    """Inputs of a wrapper: `prompt` tokens, an image or a sound, text up to `length` tokens.

    The seed chooses the shape of the image.
    """
    g, kind = torch.Generator().manual_seed(seed), model.config.model_type
    given = (_mels if kind in _HEAR else _pixels)(kind, g, seed)
    given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in given.items()}
    count = _count(model, given)
    length = max(length, prompt + count + 3)
    ids = torch.randint(0, _IMAGE, (1, length), generator=g)
    image = torch.zeros(1, length, dtype=torch.int64)
    image[:, prompt : prompt + count] = 1
    ids[image.bool()] = _IMAGE
    if kind.startswith(("qwen", "glm")) and kind not in _HEAR:
        ids[:, prompt - 1] = _BEGIN
    if kind.startswith(("qwen", "glm", "gemma4", "paddleocr", "hunyuan", "minicpmv4_7")) and kind not in _HEAR:
        given["mm_token_type_ids"] = image
    elif kind == "gemma3":
        given["token_type_ids"] = image
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}
