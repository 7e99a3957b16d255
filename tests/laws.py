"""What the law tests share: tiny models of every family, random changes of basis, and what must stay as it was."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from flatquant import seams
from flatquant.calibrate.capture import Observer
from flatquant.calibrate.pipeline import calibrate
from flatquant.modules import share_inputs
from flatquant.recipes import flatquant
from flatquant.runtime.artifact import load, save
from flatquant.runtime.build import install
from flatquant.runtime.experts import open_experts
from flatquant.seams import CACHE
from flatquant.spec import DataSpec, FitSpec, Plan, Recipe, Scheme, Transforms, TransformSpec, to_dict
from flatquant.transforms import Factor
from flatquant.transforms.factor import cayley
from flatquant.wiring.arch import Geometry, submodule
from flatquant.wiring.archs import ARCHS, arch_of
from flatquant.wiring.fitted import FitBlock, InputStatistics
from flatquant.wiring.plan import make_plan
from flatquant.wiring.residual import residual_factor, rotate_ends
from flatquant.wiring.wrap import wrap_block
from tests.tiny_models import tiny_llama

CPU = torch.device("cpu")

T = TypeVar("T")

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"hidden": 24, "heads": 4, "kv_heads": 4, "intermediate": 40},
    "gqa": {"hidden": 24, "heads": 4, "kv_heads": 2, "intermediate": 40},
    "mqa": {"hidden": 24, "heads": 4, "kv_heads": 1, "intermediate": 37},  # a prime: its Kronecker factors are 1 x 37
    "biased": {"hidden": 24, "heads": 4, "kv_heads": 2, "intermediate": 40, "bias": True, "mlp_bias": True},
    "untied": {"hidden": 24, "heads": 4, "kv_heads": 2, "intermediate": 40, "tied": False},
    "wide heads": {"hidden": 24, "heads": 4, "kv_heads": 2, "head_dim": 10, "intermediate": 40, "bias": True},
    "odd": {
        "hidden": 90, "heads": 9, "kv_heads": 3, "head_dim": 10, "intermediate": 154, "bias": True, "mlp_bias": True,
    },
}  # fmt: skip


def family(model_type: str, *, dtype: torch.dtype = torch.float64, **shape: Any) -> PreTrainedModel:
    """A tiny random model of a type that `archs` lists, in eval mode; the tensors are those of `tiny_llama`."""
    shape = {**SHAPES["gqa"], **shape}
    if model_type == "llama":
        return tiny_llama(dtype=dtype, **shape)
    if model_type == "qwen2":  # q, k and v always have biases, the others never
        shape.update(bias=True, mlp_bias=False)
    if model_type == "mistral":  # no biases at all
        shape.update(bias=False, mlp_bias=False)
    llama = tiny_llama(dtype=dtype, **shape)
    names = (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
        "num_hidden_layers", "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    fields = {name: getattr(llama.config, name) for name in names}
    if model_type == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**fields))
    else:
        model = MistralForCausalLM(MistralConfig(**fields, sliding_window=5))  # shorter than the tests' windows
    state = llama.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.to(dtype).eval()


def basis(
    parameters: Literal["inverse", "svd", "rotation", "fixed"],
    init: str,
    *,
    kind: str = "kronecker",
    scale: bool = True,
    size: int = 0,
    ranks: int = 1,
) -> dict[str, Transforms]:
    """A change of basis on every edge. Diagonals start at 1: `perturb` moves them."""
    diagonal = (TransformSpec(kind="diagonal"),) if scale else ()
    full = TransformSpec(kind=kind, parameters=parameters, init=init, size=size, ranks=ranks)  # type: ignore[arg-type]
    heads = full if kind == "blocks" else dataclasses.replace(full, kind="kronecker")
    wide = (*diagonal, full)
    return {
        "attn_in": wide,
        "attn_out": (heads,),
        "mlp_in": wide,
        "mlp_mid": wide,
        "qk": (dataclasses.replace(full, kind="matrix", size=0, ranks=1),),
    }


DIAGONAL = {site: (TransformSpec(kind="diagonal"),) for site in ("attn_in", "mlp_in", "mlp_mid")}

BASES: dict[str, dict[str, Transforms]] = {
    "inverse orthogonal": basis("inverse", "orthogonal"),
    "inverse hadamard": basis("inverse", "hadamard"),
    "inverse identity": basis("inverse", "identity"),
    "svd orthogonal": basis("svd", "orthogonal"),
    "svd hadamard": basis("svd", "hadamard"),
    "svd identity": basis("svd", "identity"),
    "no scale": basis("svd", "orthogonal", scale=False),
    "full matrices": basis("inverse", "orthogonal", kind="matrix"),
    "blocks orthogonal": basis("inverse", "orthogonal", kind="blocks", size=4),
    "blocks hadamard": basis("rotation", "hadamard", kind="blocks", size=8),
    "blocks product": basis("product", "hadamard", kind="blocks", size=8),
    "blocks fixed": basis("fixed", "hadamard", kind="blocks", size=8, scale=False),
    "two ranks": basis("inverse", "orthogonal", ranks=2),
    "four ranks": basis("svd", "hadamard", ranks=4),
    "diagonal only": DIAGONAL,
}


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """A model's blocks, wherever its family has them."""
    blocks = submodule(model, arch_of(model.config).blocks)
    assert isinstance(blocks, torch.nn.ModuleList)
    return blocks


def everything(name: str) -> str:
    """The scheme that rounds all that a family has to round."""
    kinds = [arch for arch in ARCHS if name.split()[0] in arch.model_types]
    return "w4a4kv4" if any(kind.attention for arch in kinds for kind in arch.kinds) else "w4a4"


def final_norm(model: PreTrainedModel) -> torch.nn.Module:
    """The norm behind the last block."""
    return submodule(model, arch_of(model.config).final_norm)


def bare(transforms: dict[str, Transforms], scheme: Scheme | None = None) -> Recipe:
    """Changes of basis and nothing else."""
    return Recipe(name="law", scheme=scheme or Scheme(), transforms=transforms)


def tokens_for(model: PreTrainedModel, *shape: int, seed: int = 0) -> Tensor:
    """Random token ids, of words."""
    config, words = model.config, model.config.get_text_config().vocab_size
    words = getattr(config, "image_token_id", getattr(config, "audio_token_id", words))
    return torch.randint(0, words, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def perturb(fit: FitBlock, noise: float, generator: torch.Generator) -> None:
    """Move every transform and scale, so that nothing stays symmetric or 1, or orthogonal but for rotations."""
    for group, parameters in fit.parameters().items():
        for p in parameters if group != "clip" else ():
            step = noise * torch.randn(p.shape, generator=generator).to(p.dtype)
            p.copy_(p @ cayley(step) if group == "rotation" else p + step)


def wrap(
    model: PreTrainedModel, recipe: Recipe, *, noise: float = 0.1, force: bool = False, seed: int = 0
) -> tuple[Plan, list[FitBlock]]:
    """Wrap all blocks in the model's own dtype and move their parameters away from the start."""
    plan, fits, _ = wrap_all(model, recipe, noise=noise, force=force, seed=seed)
    return plan, fits


def wrap_all(
    model: PreTrainedModel, recipe: Recipe, *, noise: float = 0.1, force: bool = False, seed: int = 0
) -> tuple[Plan, list[FitBlock], Factor | None]:
    """`wrap`, with the rotation of the residual stream, which the model's ends then have taken too."""
    arch, blocks = arch_of(model.config), blocks_of(model)
    open_experts(blocks)
    plan = make_plan(recipe, arch, Geometry.of(model.config), blocks, force=force)
    seams.use_attention(model, plan.attention)
    generator = torch.Generator().manual_seed(seed)
    residual = residual_factor(model, recipe, plan, generator, force=force)
    statistics = observed(model, plan) if recipe.needs_data else [{}] * len(blocks)
    fits = []
    for block, block_plan, seen in zip(blocks, plan.blocks, statistics, strict=True):
        fit = wrap_block(block, arch, block_plan, recipe, seen, generator, residual=residual, force=force)
        fit.block.to(model.dtype)
        perturb(fit, noise, generator)
        fits.append(fit)
    if residual is not None:
        rotate_ends(model, arch, residual)
    return plan, fits, residual


@torch.no_grad()
def observed(model: PreTrainedModel, plan: Plan | None = None) -> list[dict[str, InputStatistics]]:
    """Every block's input statistics on random text."""
    offsets = [None] * len(blocks_of(model)) if plan is None else [block.key_offset for block in plan.blocks]
    pairs = zip(blocks_of(model), offsets, strict=True)
    observers = [Observer(block, arch_of(model.config), offset) for block, offset in pairs]
    model(tokens_for(model, 4, 12, seed=1), use_cache=False)
    return [observer.close() for observer in observers]


def reinstalled(original: PreTrainedModel, plan: Plan, quantised: PreTrainedModel) -> PreTrainedModel:
    """A copy of `original` with empty serving blocks that are then given the tensors of `quantised`."""
    model = copy.deepcopy(original)
    seams.use_attention(model, plan.attention)
    for block, block_plan, source in zip(blocks_of(model), plan.blocks, blocks_of(quantised), strict=True):
        install(block, plan.attention, block_plan, packed=False)
        block.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    return model


@contextmanager
def inputs_of(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Everything a module receives as its first argument."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def hidden(model: PreTrainedModel, tokens: Tensor, norm: torch.nn.Module | None = None) -> Tensor:
    """The hidden states before the final norm (which computes in float32, whatever the model).  # (B, T, h)"""
    with inputs_of(norm or final_norm(model)) as seen:
        model(tokens, use_cache=False)
    return seen[0]


@torch.no_grad()
def decoded(model: PreTrainedModel, tokens: Tensor, steps: int = 3) -> Tensor:
    """The same hidden states by cached decoding: a prefill, then one token at a time.  # (B, T, h)"""
    cache = DynamicCache(config=model.config)
    start = tokens.shape[1] - steps
    with inputs_of(final_norm(model)) as seen:
        for piece in (tokens[:, :start], *tokens[:, start:].split(1, dim=1)):
            model(piece, **{CACHE: cache}, use_cache=True)
    return torch.cat(seen, dim=1)


def in_a_pass(run: Callable[[], T]) -> T:
    """What `run` gives as the forward pass of a block, in which sites keep what they compute."""

    class Block(torch.nn.Module):
        def forward(self) -> T:
            return run()

    block = Block()
    share_inputs(block)
    return block()


def relative(ours: Tensor, want: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    ours, want = ours.detach().double(), want.detach().double()
    return float((ours - want).abs().max() / want.abs().max())


def rtn_by_hand(w: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Round to nearest, symmetric, one scale per row, as flatquant.md writes it; in numpy, in w's own precision.

    s_r = max(max_r, -min_r, 1e-5) / (2^(b-1) - 1); q = clip(rne(w / s_r), -2^(b-1), 2^(b-1) - 1)
    """
    a = w.detach().numpy()
    top = 2 ** (bits - 1) - 1
    scale = np.maximum(np.maximum(a.max(1), -a.min(1)), a.dtype.type(1e-5)) / a.dtype.type(top)
    return np.clip(np.rint(a / scale[:, None]), -top - 1, top), scale


def quick(scheme: str, *, epochs: int = 1, samples: int = 4, seqlen: int = 12, **changes: Any) -> Recipe:
    """FlatQuant on little text."""
    recipe = flatquant(scheme)
    return dataclasses.replace(
        recipe,
        fit=FitSpec(epochs=epochs, batch_size=2),
        data=DataSpec(samples=samples, seqlen=seqlen),
        **changes,
    )


def calibrated(model: PreTrainedModel, recipe: Recipe, **options: Any) -> tuple[PreTrainedModel, Plan, Any]:
    """A quantised copy of a model, its plan and the report."""
    model = copy.deepcopy(model)
    tokens = tokens_for(model, recipe.data.samples, recipe.data.seqlen, seed=1)
    options = {"device": CPU, "dtype": torch.float32, **options}
    plan, report = calibrate(model, recipe, tokens if recipe.needs_data else None, **options)
    return model, plan, report


def varied(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """The model with every weight moved by about 2 %, in place: for what holds on average over models.

    Where one rounding goes moves what a model of this size says by a tenth, and each processor sums in its own order.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.02 * torch.randn(p.shape, generator=g))
    return model


def reloaded(model: PreTrainedModel, plan: Plan, recipe: Recipe, folder: Path) -> PreTrainedModel:
    """What the folder of a quantised model gives: the same logits, to the last bit."""
    save(model, plan, folder, recipe=to_dict(recipe), report={})
    loaded = load(folder)
    tokens = tokens_for(model, 2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    return loaded


def in_pairs(
    a: PreTrainedModel, b: PreTrainedModel, paths: Sequence[str]
) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """The same modules of every block of two models."""
    for ours, theirs in zip(blocks_of(a), blocks_of(b), strict=True):
        for path in paths:
            yield submodule(ours, path), submodule(theirs, path)


def same_bytes(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two modules hold the same tensors, dtype and value."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """A model with every tensor at the beginning of memory of its own.

    transformers' tensors lie in the memory of a file, and the last bits of some of torch's products (with a gate of one
    row, say) depend on where a weight begins.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model
