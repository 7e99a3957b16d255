"""The families we know: one literal each. docs/families.md says how to add one, and the laws decide whether it holds.

Most differ from Llama in what the attention function, the norms and the masks do, which no transform touches: q and k
norms, rotary embeddings, sliding windows and logit caps all lie between an edge's readers and the next edge.
"""

from dataclasses import replace
from difflib import get_close_matches

from torch import nn

from flatquant.errors import ModelError
from flatquant.models import WRAPPERS
from flatquant.wiring.arch import Arch, find
from flatquant.wiring.archs import dense, experts, hybrid, latent
from flatquant.wiring.archs.dense import LLAMA, QWEN3
from flatquant.wiring.archs.draft import draft

ARCHS = (*dense.ARCHS, *experts.ARCHS, *latent.ARCHS, *hybrid.ARCHS)

# Text parts that transformers has inside wrappers alone. Most turn keys by positions of three kinds.
PARTS = (
    replace(LLAMA, model_types=("granite_docling_text", "paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_vl_text")),
    replace(dense.HUNYUAN, model_types=("hunyuan_vl_text",)),
    replace(dense.GLM4, model_types=("glm4v_text", "glm_ocr_text"), rotary="interleaved"),
    replace(
        experts.mixture(LLAMA, "mlp", "gate", shared="shared_experts"),
        model_types=("deepseek_ocr2_text",),
        others=(LLAMA,),  # the first blocks have no experts
    ),
    replace(experts.GLM4_MOE, model_types=("glm4v_moe_text",)),
    replace(latent.DEEPSEEK_V3, model_types=("mistral4",)),
    replace(QWEN3, model_types=("qwen3_vl_text",)),
    replace(experts.QWEN3_MOE, model_types=("qwen3_vl_moe_text",)),
)

_TEXT = "model.language_model"  # the text part of most wrappers
_TEXTS = dict.fromkeys(("granite_docling", "idefics2", "idefics3", "smolvlm"), "model.text_model")  # of the others


def arch_of(config, model: nn.Module | None = None) -> Arch:
    """The description for a transformers config; of a wrapper's, that of its text part, where the wrapper has it.

    Args:
        model: of that config; a note of the error then says what it is made of.

    Raises:
        ModelError: a family without a description; in a note, where one can be had, a draft of it.
    """
    wrapped = config.model_type in WRAPPERS
    text = config.get_text_config() if wrapped else config
    for arch in (*ARCHS, *PARTS) if wrapped else ARCHS:
        if text.model_type in arch.model_types and all(getattr(text, k, v) == v for k, v in arch.when.items()):
            return _inside(arch, _TEXTS.get(config.model_type, _TEXT)) if wrapped else arch
    raise _other_form(text) or _unknown(config, model)


def _inside(arch: Arch, text: str) -> Arch:
    """A description with the paths that its modules have inside a wrapper's text part."""
    blocks, norm = (f"{text}.{path.partition('.')[2]}" for path in (arch.blocks, arch.final_norm))
    return replace(arch, blocks=blocks, final_norm=norm)


def _other_form(config) -> ModelError | None:
    """The error for a family that is described, but not with a config's fields."""
    for arch in ARCHS:
        if config.model_type in arch.model_types:
            fields = [f"{k}={getattr(config, k, v)}" for k, v in arch.when.items() if getattr(config, k, v) != v]
            return ModelError(
                f"{config.model_type} with {', '.join(fields)} is not supported; docs/families.md says why"
            )
    return None


def _unknown(config, model: nn.Module | None) -> ModelError:
    """One short line, and the way to a description in a note."""
    kind = str(config.model_type)[:40]
    known = [*known_types(), *WRAPPERS]
    near = [name for name in (f"{kind}_text",) if name in known]  # of a wrapper, its text part first
    near = [*dict.fromkeys([*near, *get_close_matches(kind, known, n=3, cutoff=0.65)])][:3]
    hint = f"near it: {', '.join(near)}" if near else "`flatquant methods --families` lists those that are"
    error = ModelError(f"model type {kind!r} is not supported; {hint}; docs/families.md says how to add one")
    text = getattr(config, "text_config", None)
    causal = not getattr(text, "use_bidirectional_attention", None)  # PaliGemma's is not
    if causal and getattr(text, "model_type", None) in known_types() and (model is None or find(model, _TEXT)):
        error.add_note(_TEXT_PART.format(kind=getattr(text, "model_type", None)))
    elif model is not None:
        error.add_note(draft(kind, model))
    return error


def known_types() -> list[str]:
    """The model types that have a description."""
    return sorted({kind for arch in ARCHS for kind in arch.model_types})


_TEXT_PART = """\
Its text part is a {kind}, which is supported as a model of its own:

    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    whole = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="auto")
    text = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=whole.dtype)
    text.config.tie_word_embeddings = whole.config.tie_word_embeddings
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    text.save_pretrained(FOLDER)  # and the tokenizer"""
