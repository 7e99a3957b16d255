"""Into a model: which calls of its forward pass and of `generate` the kernels serve."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Mapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from flatquant.runtime.fused.model import Fused
from flatquant.runtime.kernels import Unsupported
from flatquant.runtime.packedcache import PackedCache
from flatquant.seams import CACHE, generation_cache_hook

# Beside the models, not on them: a copy of a model finds its own.
_made: WeakKeyDictionary[PreTrainedModel, tuple[torch.device, torch.dtype, Fused | None]] = WeakKeyDictionary()
_making = threading.RLock()
_DEVICES = "flatquant_fused_devices"
_KNOWN = ("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "return_dict")
_OUTPUTS = ("output_hidden_states", "output_attentions")  # asked for by keyword or by config
_FORMER_CACHE = "past_key_values"  # what callers may still say


def attach(model: PreTrainedModel, devices: tuple[str, ...] = ("cuda",)) -> None:
    """Let a packed model's forward pass and `generate` use the fused runtime on such devices.

    Whether it can is found out at the first call there; a model that it cannot serve stays as it is, after a warning.
    """
    ours: Any = model
    forward, prepare = type(ours).forward, generation_cache_hook(type(ours))

    @functools.wraps(forward)
    def fused_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = _forward(self, *args, **kwargs) if serves(self) and not _trained(self) else None
        return forward(self, *args, **kwargs) if output is None else output

    @functools.wraps(prepare)
    def fused_prepare(
        self: Any, config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        fused = runtime(self, again=True) if serves(self) else None
        plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and config.num_return_sequences == 1
        plain &= config.cache_implementation is None and config.use_cache is not False
        given = {name for name, value in model_kwargs.items() if value is not None}
        asked = any(getattr(config, name, False) for name in _OUTPUTS) or _asked(self, {})
        if fused is None or not plain or not given <= set(_KNOWN) - {CACHE} or asked or fused.modules.heard(again=True):
            return prepare(self, config, model_kwargs, mode, batch_size, max_cache_length)
        cache = fused.cache_for(batch_size, max_cache_length)
        cache.masks_grow = not config.return_dict_in_generate  # who gets to see the cache may give it any mask
        model_kwargs[CACHE] = cache
        return None

    setattr(ours, _DEVICES, devices)
    ours.forward = MethodType(fused_forward, model)
    ours._prepare_cache_for_generation = MethodType(fused_prepare, model)


def serves(model: PreTrainedModel) -> bool:
    """Whether the fused runtime was attached for the device that the model is on."""
    return model.device.type in getattr(model, _DEVICES, ())


def runtime(model: PreTrainedModel, *, again: bool = False) -> Fused | None:
    """The fused runtime of a model, made at the first call; None for one that it cannot serve, after one warning.

    Args:
        again: make it anew if the model's modules or tensors have changed.
    """
    known = _made.get(model)
    same = known is not None and known[:2] == (model.device, model.dtype)
    if known is not None and same and not (again and known[2] is not None and known[2].modules.changed()):
        return known[2]
    with _making:
        if _made.get(model) is known:  # nobody else has made it meanwhile
            _made[model] = (model.device, model.dtype, _fused(model))
        return _made[model][2]


def _fused(model: PreTrainedModel) -> Fused | None:
    try:
        return Fused(model)
    except Unsupported as reason:
        warnings.warn(f"slow: this model runs without fused kernels, since {reason}", stacklevel=4)
        return None


def _trained(model: PreTrainedModel) -> bool:
    """Whether a forward pass now has gradients, of which the kernels have none."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())


def _asked(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call with such arguments returns hidden states or attentions."""
    return any(kwargs.get(name, getattr(model.config, name, False)) for name in _OUTPUTS)


@torch.no_grad()
def _forward(model: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """What transformers' forward pass would return, or None where it has to be asked."""
    given = {name: value for name, value in kwargs.items() if value is not None and name not in _OUTPUTS}
    if _FORMER_CACHE in given:
        given[CACHE] = given.pop(_FORMER_CACHE)
    cache = given.get(CACHE)
    if isinstance(cache, PackedCache) and input_ids is not None:
        cache.check(len(input_ids), input_ids.device)
    elif cache is not None or input_ids is None:
        return None
    if args or model.training or not set(given) <= set(_KNOWN) or _asked(model, kwargs):
        return None
    batch, tokens = input_ids.shape
    length = 0 if cache is None else cache.room.length
    one = tokens == 1 and length > 0
    fused = runtime(model, again=not one)
    if fused is None or fused.modules.heard(again=not one):
        return None
    if cache is None:
        cache = fused.new_cache(batch, tokens)
    if not _masked(cache, given.get("attention_mask"), length + tokens):
        return None
    if length + tokens > cache.room.places:
        cache.room.reserve(2 * (length + tokens))
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(length, length + tokens, device=input_ids.device)[None]
    if one:
        logits = fused.decode(input_ids, positions, cache)
    else:
        keep = given.get("logits_to_keep", 0)
        whole = isinstance(keep, Tensor)
        logits = fused.prefill(input_ids, positions, cache, 0 if whole else keep)
        logits = logits[:, keep] if whole else logits
    kept = CACHE in given or given.get("use_cache", model.config.use_cache)
    output = CausalLMOutputWithPast(logits=logits, **{CACHE: cache if kept else None})  # type: ignore[arg-type]
    return output if given.get("return_dict", model.config.return_dict) else output.to_tuple()


def _masked(cache: PackedCache, mask: Tensor | None, total: int) -> bool:
    """Note in a cache what padding a mask says; False for a mask of anything but padding on the left."""
    room = cache.room
    if mask is not None and mask.shape != (room.batch, total):
        return False
    if mask is not None and cache.masks_grow and room.length:
        return True
    if mask is None or bool(mask.all()):
        room.pad(None)
        return True
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        return False
    room.pad((mask == 0).sum(1))
    return True
