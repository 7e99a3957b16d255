"""The only places where we touch transformers' forward passes: the attention function and the cache.

Keys, values and queries are reached after RoPE without copying any modeling file:

- every attention module calls the attention function named in its config. Ours, registered as "flatquant", maps the
  queries into the keys' basis and calls scaled-dot-product attention;
- an attention module that is given a cache hands its keys and values to `cache.update(...)` first. A forward pre-hook
  puts `_CacheSeam` around every cache among the module's arguments, whatever the argument is called. The seam
  transforms and quantises keys and values, so that a cache only ever holds quantised ones. Without a cache, the
  attention function does it;
- latent attention caches latent vectors and the rotary part of keys, and makes keys and values of what the cache gives
  back. Without a cache it is given one that holds nothing.
- an attention module that lends its keys and values to later blocks (Gemma 4 E2B) lends what its cache gives back. It
  too is given a cache that holds nothing where there is none, so that it lends quantised ones in any case.

Nothing here relies on transformers calling back: forward hooks check that queries, keys and values of one forward
pass all went through the seam, and that the model took its mask from ours, and raise a ModelError otherwise. Numbers in
mixed bases look plausible, and so do those of padding that is attended to.

torch.compile does not look into these hooks and functions: where a frame of it breaks inside a module, what they note
about the thread would be lost.

What was given up: attention implementations other than ours (eager, flash) on a quantised model; asking for one fails
loudly instead of reading keys in the wrong basis.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from flatquant.errors import ModelError
from flatquant.rotary import Angles
from flatquant.spec import Pairing
from flatquant.versions import broken

_F = TypeVar("_F", bound=Callable[..., Any])


def _uncompiled(function: _F) -> _F:
    """A function that torch.compile calls as it is."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType] - it says that it returns a decorator


ATTENTION = "flatquant"
_SLOT = "flatquant_kv"
_HOOKS = "flatquant_hooks"
_WATCHED = "flatquant_masks_watched"


def _cache_keyword() -> str:
    """What transformers calls the cache in calls of a model and in its outputs: `past_key_values` up to 5.23."""
    names = [f.name for f in dataclasses.fields(CausalLMOutputWithPast) if Cache.__name__ in str(f.type)]
    if len(names) != 1:
        raise broken("a causal language model's output has no one field for the cache")
    return names[0]


CACHE = _cache_keyword()
LENT = "shared_kv_states"  # what blocks are given keys and values of earlier blocks as: a mapping that these fill


def lends(attention: nn.Module) -> bool:
    """Whether later blocks read the keys and values of an attention module in the same forward pass."""
    shared = getattr(getattr(attention, "config", None), "num_kv_shared_layers", 0)
    return bool(shared) and bool(getattr(attention, "store_full_length_kv", False))


def borrows(attention: nn.Module) -> bool:
    """Whether an attention module has no keys and values of its own, and reads those that an earlier one lends."""
    return bool(getattr(attention, "is_kv_shared_layer", False))


def is_cache(value: object) -> bool:
    """Whether an argument of a forward pass is a cache of keys and values."""
    return isinstance(value, Cache | _CacheSeam) or (hasattr(value, "update") and hasattr(value, "get_seq_length"))


def position_angles(angles: Angles | None, pairing: Pairing) -> Tensor | None:
    """What turns the keys at hand, a cosine and a sine a pair; None without rotary embedding.  # (B or 1, T, r)

    Raises:
        ModelError: there is a rotary embedding, and the attention module was not given its angles.
    """
    if pairing == "none":
        return None
    if angles is None:
        raise broken("an attention module was not given the cosines and sines of its positions")
    return angles.of_pairs(pairing)


class KeyValue(nn.Module, ABC):
    """What happens to queries, keys and values of one attention module, after RoPE.  # all (B, heads, T, head_dim)

    `angles` are those of the keys' positions, if the attention module was given any.

    Attributes:
        rotary: None where a cache holds keys and values. With latent attention, the channels of the rotary part: then
            keys and queries are the last so many channels of theirs, one head of keys for all, and values are latent
            vectors, (B, 1, T, n).
    """

    rotary: int | None = None

    @abstractmethod
    def query(self, q: Tensor) -> Tensor:
        """Queries in the basis of the cached keys."""

    @abstractmethod
    def key(self, k: Tensor, angles: Angles | None = None) -> Tensor:
        """Keys in their own basis, on their grid."""

    @abstractmethod
    def value(self, v: Tensor) -> Tensor:
        """Values on their grid."""

    def store(
        self, cache: Any, k: Tensor, v: Tensor, angles: Angles | None, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values into `cache` and return all it holds."""
        return cache.update(self.key(k, angles), self.value(v), layer, *args, **kwargs)


class _CacheSeam:
    """Stands where an attention module expects its cache; quantises what goes in, forwards the rest."""

    def __init__(self, call: _Call, cache: Any) -> None:
        self._call = call
        self._cache = cache

    def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kv, angles = self._call.kv, self._call.angles
        self._call.stored = True
        if kv.rotary is None:
            return kv.store(self._cache, k, v, angles, layer, *args, **kwargs)
        rotary, latent = kv.store(self._cache, v, k, angles, layer, *args, **kwargs)
        return latent, rotary

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Nothing:
    """A cache that holds nothing: what comes in goes out."""

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return k, v


class _Call:
    """One forward pass of one attention module, and which of its tensors have passed through the seam."""

    def __init__(self, module: nn.Module, kv: KeyValue, arguments: Iterable[Any]) -> None:
        self.module, self.kv = module, kv
        self.angles = next(filter(None, map(Angles.among, arguments)), None)
        self.cached = self.stored = self.attended = False

    def wrapped(self, value: Any) -> Any:
        """An argument of the module; a cache is replaced by a seam."""
        if not is_cache(value):
            return value
        self.cached = True
        return _CacheSeam(self, value._cache if isinstance(value, _CacheSeam) else value)

    def enter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention gets them."""
        self.attended = True
        if self.cached:
            if not self.stored:
                raise broken(f"{_name(self.module)} did not hand its keys and values to the cache's update()")
            if self.kv.rotary is not None:
                plain, last = q.split([q.shape[-1] - self.kv.rotary, self.kv.rotary], dim=-1)
                return torch.cat([plain, self.kv.query(last)], dim=-1), k, v
            return self.kv.query(q), k, v
        return self.kv.query(q), self.kv.key(k, self.angles), self.kv.value(v)


class _Open(threading.local):
    """What this thread is in: forward passes of attached modules, innermost last; whether our mask was asked for."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.masked = False

    def begin(self, call: _Call) -> None:
        """Open a forward pass. No module is inside itself: a pass of it that is still open was interrupted."""
        for i, other in enumerate(self.calls):
            if other.module is call.module:
                del self.calls[i:]
                break
        self.calls.append(call)

    def of(self, module: nn.Module) -> _Call | None:
        return self.calls[-1] if self.calls and self.calls[-1].module is module else None


_open = _Open()


def _name(module: nn.Module) -> str:
    return f"{type(module).__name__} of block {getattr(module, 'layer_idx', '?')}"


@_uncompiled
def _begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook."""
    implementation = getattr(module.config, "_attn_implementation", None)
    if implementation != ATTENTION:
        raise ModelError(
            f"this model's keys and values are quantised for attention implementation {ATTENTION!r}, "
            f"but {implementation!r} is set; leave attn_implementation alone"
        )
    call = _Call(module, getattr(module, _SLOT), (*args, *kwargs.values()))
    args = tuple(map(call.wrapped, args))
    kwargs = {name: call.wrapped(value) for name, value in kwargs.items()}
    if (call.kv.rotary is not None or lends(module)) and not call.cached:
        call.cached, kwargs[CACHE] = True, _CacheSeam(call, _Nothing())
    _open.begin(call)
    return args, kwargs


@_uncompiled
def _end(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook; also called, with None for an output, where the forward pass ended in an exception."""
    call = _open.of(module)
    if call is None:
        return
    _open.calls.pop()
    if output is not None and not call.attended:
        raise broken(f"{_name(module)} did not call the attention function {ATTENTION!r}")


def attach(attention: nn.Module, kv: KeyValue) -> None:
    """Route one attention module's queries, keys and values through `kv`, replacing what was attached before."""
    detach(attention)
    setattr(attention, _SLOT, kv)
    hooks = (
        attention.register_forward_pre_hook(_begin, with_kwargs=True),
        attention.register_forward_hook(_end, always_call=True),
    )
    setattr(attention, _HOOKS, hooks)  # pyright: ignore[reportArgumentType]


def detach(attention: nn.Module) -> None:
    """Undo `attach`; nothing happens if nothing is attached."""
    if hasattr(attention, _SLOT):
        for hook in getattr(attention, _HOOKS):
            hook.remove()
        delattr(attention, _SLOT)
        delattr(attention, _HOOKS)


def attached(attention: nn.Module) -> KeyValue | None:
    """What `attach` put there."""
    return getattr(attention, _SLOT, None)


def use_attention(model: PreTrainedModel, attention: str) -> None:
    """Make the model call our attention and mask functions; unattached modules keep plain attention.

    From now on a forward pass of the model that does not take its mask from ours raises a ModelError.

    Args:
        attention: the path in a block of the module that calls transformers' attention function; empty where none does
            (`spec.Plan.attention`), and then nothing changes.

    Raises:
        ModelError: transformers no longer has our functions in its tables.
    """
    if not attention:
        return
    if ALL_ATTENTION_FUNCTIONS.get(ATTENTION) is not _attention:
        raise broken(f"the attention function {ATTENTION!r} is not registered")
    if ALL_MASK_ATTENTION_FUNCTIONS.get(ATTENTION) is not _mask:
        raise broken(f"the mask function {ATTENTION!r} is not registered")
    model.config.get_text_config()._attn_implementation = ATTENTION  # of a wrapper, no other part's
    decoder = model.base_model
    if not hasattr(decoder, _WATCHED):
        decoder.register_forward_pre_hook(_begin_masks)
        decoder.register_forward_hook(_check_masks, with_kwargs=True)
        setattr(decoder, _WATCHED, True)


@_uncompiled
def _begin_masks(decoder: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a decoder."""
    _open.masked = False


@_uncompiled
def _check_masks(decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Forward hook of a decoder. Finished masks, four-dimensional or one a kind of layer, are taken as they are."""
    config: Any = decoder.config
    if _open.masked or getattr(config.get_text_config(), "_attn_implementation", None) != ATTENTION:
        return
    if not any(isinstance(value, dict) or getattr(value, "ndim", 0) == 4 for value in (*args, *kwargs.values())):
        raise broken(f"{type(decoder).__name__} did not call the mask function {ATTENTION!r}")


def generation_cache_hook(kind: type[PreTrainedModel]) -> Callable[..., Any]:
    """The method of a model's class with which `generate` makes a cache.

    Raises:
        ModelError: transformers no longer has it, or no longer calls it in `generate`.
    """
    name = "_prepare_cache_for_generation"
    if not hasattr(kind, name) or not _generate_calls(kind, name):
        raise broken(f"generate() of {kind.__name__} does not call {name}")
    return getattr(kind, name)


def _generate_calls(kind: type, name: str) -> bool:
    """Whether a class's `generate` names a method, or the one that it calls by `super` (Janus) does."""
    for parent in kind.__mro__:
        if "generate" in vars(parent):
            names = inspect.unwrap(vars(parent)["generate"]).__code__.co_names
            if name in names or "super" not in names:
                return name in names
    return False


@_uncompiled
def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs):
    kv = attached(module)
    if kv is not None:
        call = _open.of(module)
        if call is None:
            raise broken(f"the forward hooks of {_name(module)} were passed by")
        query, key, value = call.enter(query, key, value)
    queries, keys = query.shape[-2], key.shape[-2]
    if attention_mask is None and 1 < queries < keys:
        # The last queries alone are asked for (Gemma 4's `logits_to_keep`); sdpa would take them for the first.
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if cap is not None or sinks is not None:
        return _by_hand(query, key, value, attention_mask, kwargs["scaling"], cap, sinks), None
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


@_uncompiled
def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of scaled-dot-product attention."""
    _open.masked = True
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """What the fused kernel does not have: scores c tanh(s / c) (Gemma 2), and one score a head that no key has, a sink
    (GPT-OSS).  # (B, T, heads, head_dim)
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.mT * scaling if cap is None else cap * torch.tanh(q @ k.mT * (scaling / cap))  # (B, heads, T, S)
    if mask is None:  # transformers leaves out a mask that is merely causal
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    work = torch.promote_types(scores.dtype, torch.float32)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    shares = scores.softmax(-1, dtype=work).to(q.dtype)[..., : k.shape[-2]]
    return (shares @ v).transpose(1, 2).contiguous()


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)
