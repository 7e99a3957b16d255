"""What a model's folder says of itself: its file names, config.json, tokenizer."""

import json
import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from flatquant.errors import ModelError, first_line, one_line
from flatquant.models.float8 import headers
from flatquant.models.gguf import ALIASES

# Model types of several parts, whose text part (`text_config`) is quantised where it is.
WRAPPERS = (
    "aya_vision", "cohere2_vision", "deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "exaone4_5", "gemma3",
    "gemma4", "gemma4_unified", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmasr", "glmga", "got_ocr2",
    "granite_docling", "hunyuan_vl", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "janus", "kimi_k25",
    "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr",
    "minicpmv4_6", "minicpmv4_7", "mistral3", "ovis2", "paddleocr_vl", "pp_chart2table", "qianfan_ocr", "qwen2_5_vl",
    "qwen2_audio", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_asr", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
    "video_llama_3", "voxtral",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def near(path: Path) -> str:
    """Folders beside a missing one that are called nearly the same."""
    try:
        beside = [other.name for other in path.parent.iterdir() if other.is_dir()]
    except OSError:
        return ""
    found = get_close_matches(path.name, beside, n=1)
    return f" (there is {path.parent / found[0]})" if found else ""


def check_folder(folder: Path) -> None:
    """What can be said about a folder from its file names and config.json alone."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; give a folder written by save_pretrained, or a .gguf file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({first_line(error)}); fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object; fetch the model again")
    refuse_ours(config.get("quantization_config"), folder)
    names = sorted(file.name for file in folder.iterdir())
    if any(file.endswith(".safetensors") for file in names):
        return
    pickles = [file for file in names if file.endswith(_PICKLES)]
    if pickles:
        raise ModelError(
            f"{folder} holds its weights as pickles only ({pickles[0]}), which can run code and are not loaded; "
            "convert them with save_pretrained, which writes safetensors"
        )
    raise ModelError(f"{folder} holds no .safetensors weights; fetch the model again")


def refuse_ours(quantization_config: Any, name: object) -> None:
    """Raise a ModelError for a config that says that the model is quantised by this package."""
    if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "flatquant":
        raise ModelError(f"{name} is already quantised; use flatquant.load")


def read_config(folder: Path | str, name: object, trust_remote_code: bool) -> Any:
    """transformers' config of a model; whatever is wrong with it is a ModelError."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not trust_remote_code:
            vars(config).pop("auto_map", None)  # transformers' own classes are used, whatever code the folder has
        return config
    except Exception as error:  # transformers raises nearly any type here; all of them are about the user's model
        if isinstance(folder, str):
            raise ModelError(
                f"there is no folder {name} here{near(Path(folder))}, and as a hub id it cannot be fetched "
                f"({first_line(error)}); check the spelling and the connection, or use {ALIASES[0]}: it needs no hub"
            ) from error
        why = _unknown_type(folder) or first_line(error)
        raise ModelError(f"cannot use {folder / 'config.json'}: {why}") from error


def _unknown_type(folder: Path) -> str:
    """That the installed transformers does not know a model type, and what is near it; empty if it does."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return ""
    near = get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=3, cutoff=0.65)
    meant = f" (near it: {', '.join(near)})" if near else ""
    return (
        f"transformers {transformers_version} knows no model type {one_line(kind)}{meant}; correct it, or install a "
        "release that knows it"
    )


def auto_class(model_type: str) -> Any:
    """transformers' class that makes a type's models: causal ones, of wrappers those that take images or sounds too."""
    if model_type not in WRAPPERS:
        return AutoModelForCausalLM
    seeing = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if seeing else AutoModelForMultimodalLM


def check_config(config: Any, name: object) -> None:
    """Raise a ModelError for what is no causal language model, or quantised already."""
    refuse_ours(getattr(config, "quantization_config", None), name)
    if getattr(config, "auto_map", None) or config.model_type in WRAPPERS:
        return  # the model's own code decides, or its text part
    known: set[str] = set()
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update((entry,) if isinstance(entry, str) else entry)
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(kind, str) for kind in architectures):
        raise ModelError(f"the config of {name} names architectures that are no names; fetch the model again")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and known.isdisjoint(architectures)
    ):
        what = one_line(architectures[0] if architectures else config.model_type)
        text = getattr(getattr(config, "text_config", None), "model_type", None)
        part = f", such as its text part, a {one_line(text)}" if text else ""
        others = " or of several parts that docs/families.md lists" if text else ""
        raise ModelError(f"{name} is {what}, not a causal language model; give one that is decoder-only{others}{part}")


def check_size(folder: Path, config: Any) -> None:
    """A config that asks for far more than the files hold: transformers would make up the rest, whatever its size.

    A little more is left to `_check_report`, which names what is missing.
    """
    if getattr(config, "quantization_config", None) or getattr(config, "auto_map", None):
        return  # fewer numbers than parameters, or code that decides
    try:
        sizes = [math.prod(shape) for _, _, shape, _ in headers(folder)]
        layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
        if layers <= len(sizes):  # the number of modules is bounded by the size of the files
            with torch.device("meta"):
                model = auto_class(config.model_type).from_config(config)
            if sum(p.numel() for p in model.parameters()) <= 4 * sum(sizes) + (1 << 24):
                return
    except Exception as error:  # as above
        raise ModelError(f"cannot load the weights of {folder}: {first_line(error)}; fetch the model again") from error
    raise ModelError(f"{folder / 'config.json'} describes a larger model than its weights; fetch the model again")


def read_tokenizer(folder: Path | str, name: object, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a model; whatever is wrong with it is a ModelError."""
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except Exception as error:  # as above
        raise ModelError(
            f"cannot load a tokenizer from {name}: {first_line(error)}; copy tokenizer.json and tokenizer_config.json "
            "of the original model into the folder"
        ) from error


def generation_config(folder: Path) -> GenerationConfig:
    """What a folder says of generation, or what its config.json implies."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # no such file: what `from_pretrained` of a model does then
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
