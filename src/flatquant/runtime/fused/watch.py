"""Whether the modules that kernels stand for are still the same, and whether anyone listens to one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flatquant import modules, seams


class Modules:
    """The modules that kernels stand for: whether anyone listens to one, and whether they are still the same."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._children = [
            (module._modules, name, child)
            for module in (model, *_below(model))
            for name, child in module._modules.items()
        ]
        self._tensors = [
            (owner, name, tensor, _version(tensor))
            for module in _below(model)
            for owner in (module._buffers, module._parameters)
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._below = _below(model)
        self._seen = -1  # number of hooks ever registered, when last looked at
        self._heard = False

    def changed(self) -> bool:
        """Whether a module or a tensor was replaced, or a tensor written to."""
        return any(owner.get(name) is not child for owner, name, child in self._children) or any(
            owner.get(name) is not tensor or _version(tensor) != version
            for owner, name, tensor, version in self._tensors
        )

    def heard(self, *, again: bool = False) -> bool:
        """Whether a forward hook would not be called, or a replaced `forward`.

        Args:
            again: look even if no hook was registered anywhere since the last look.
        """
        registered = RemovableHandle.next_id  # that each hook of PyTorch's counts up
        if again or self._heard or registered != self._seen:
            self._heard = _hooked_everywhere() or any(map(_hooked, self._below))
            self._seen = registered
        return self._heard


def _below(model: nn.Module) -> list[nn.Module]:
    """All modules but the model itself, whose own hooks are called as ever."""
    return list(model.modules())[1:]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


# Hooks that do nothing where the fused runtime serves: ours of attention modules and blocks, and transformers' own,
# which collect hidden states and attentions only in calls that ask for them.
_IDLE_HOOKS = (seams.__name__, modules.__name__, "transformers.utils.output_capturing")


def _hooked(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return "forward" in vars(module) or any(getattr(hook, "__module__", None) not in _IDLE_HOOKS for hook in hooks)


def _hooked_everywhere() -> bool:
    shared = torch.nn.modules.module
    return bool(shared._global_forward_pre_hooks or shared._global_forward_hooks)
