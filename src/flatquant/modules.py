"""Traits of modules, declared by their owners: training, following a schedule, keeping to bounds, changing nothing,
sharing work, keeping exact buffers.

Fits collect parameters by walking modules for `Trainable`, never by looking for substrings in names: a renamed module
still trains, and one that is not a `Trainable` never does.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

# "rotation" parameters are orthogonal matrices and stay so: their optimiser moves them on the manifold of those.
# "rounding" parameters are moved by the signs of their gradients.
Group = Literal["transform", "scale", "clip", "weight", "rotation", "code", "rounding"]

GROUPS: tuple[Group, ...] = get_args(Group)


class Trainable(nn.Module):
    """A module whose own parameters (not its children's) are fitted, with the learning rate of `group`."""

    group: ClassVar[Group]


def trainable_parameters(*modules: nn.Module) -> dict[Group, list[nn.Parameter]]:
    """The distinct parameters that train of every `Trainable` inside `modules`, by group, in a fixed order."""
    groups: dict[Group, list[nn.Parameter]] = {group: [] for group in GROUPS}
    seen: set[int] = set()
    for root in modules:
        for module in root.modules():
            if isinstance(module, Trainable) and id(module) not in seen:
                seen.add(id(module))
                groups[module.group].extend(p for p in module.parameters(recurse=False) if p.requires_grad)
    return groups


class Scheduled(nn.Module, ABC):
    """A module that changes from epoch to epoch of a block-wise fit, and is otherwise as in the last one."""

    @abstractmethod
    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called before `epoch` (0-based) of `epochs`; changes buffers in place, so that a CUDA graph sees it."""


class Bounded(nn.Module, ABC):
    """A module whose parameters may not leave their bounds."""

    @abstractmethod
    def settle(self) -> None:
        """Called after every step of an optimiser; changes parameters in place, so that a CUDA graph can hold it."""


class Neutral(nn.Module, ABC):
    """A module that has parameters with which it changes nothing: an identity, a whole range."""

    @abstractmethod
    def neutralise(self) -> None:
        """Take them, in place."""


# --------------------------------------------------------------------------------- work that readers share

T = TypeVar("T")


@dataclass(frozen=True)
class _Seen:
    """A tensor at the moment that something was computed from it."""

    x: Tensor
    version: int | None
    grad: bool
    result: Any

    @classmethod
    def now(cls, x: Tensor, result: Any) -> "_Seen":
        return cls(x, _version(x), torch.is_grad_enabled(), result)

    def serves(self, x: Tensor) -> bool:
        return self.x is x and self.version == _version(x) and self.grad == torch.is_grad_enabled()


class _Pass(threading.local):
    """The forward pass of a block that this thread is in: what sites computed in it; None outside."""

    seen: "dict[tuple[Site, str], _Seen] | None" = None


_pass = _Pass()


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None for one made in inference mode, where nothing counts."""
    return None if x.is_inference() else x._version


def _begin_pass(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a block. A pass that an interrupt cut off ends here at the latest."""
    _pass.seen = {}


def _end_pass(module: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a block, also called where the forward pass ended in an exception."""
    _pass.seen = None


def share_inputs(block: nn.Module) -> None:
    """Let the sites in a block compute once what several readers of one tensor need.

    What they computed lasts as long as a forward pass of the block, in the thread that runs it. Outside of such a pass
    sites remember nothing. Of a block inside another one, the pass of the outer ends where that of the inner begins:
    what follows is computed for every reader.
    """
    if _begin_pass not in block._forward_pre_hooks.values():
        block.register_forward_pre_hook(_begin_pass)
        block.register_forward_hook(_end_pass, always_call=True)


class Site(nn.Module, ABC):
    """Transforms one tensor and puts it on its grid, once for all linears that read it or some of its rows.

    Results are kept by kind, the last of each, while a block's forward pass lasts (`share_inputs`). One is used again
    for the same tensor, unless that was changed in place, or gradients are on now and were off then (or the reverse).
    """

    @abstractmethod
    def rows(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """x[index]; in one forward pass of a block, a linear that is given this tensor multiplies those rows of the
        transformed x.

        Args:
            x: (rows, n).
        """

    def product(
        self,
        experts: Sequence[Sequence[nn.Module]],
        x: Tensor,
        index: Tensor | slice,
        counts: Sequence[int],
    ) -> Tensor | None:
        """What several experts make of rows of the transformed x, in one grouped product, for sites that have one.

        Args:
            experts: of each, the linears that read this site.
            x: (rows, n).
            index: rows of x, those of an expert together, in the order of the experts.
            counts: rows of each expert, 0 for one that none reach.

        Returns:
            The outputs of an expert's linears side by side, (rows of all, o); None where these linears are multiplied
            one after another.
        """
        return None

    def _once(self, name: str, x: Tensor, compute: Callable[[], T]) -> T:
        """What `compute` gives for x, computed once in a forward pass."""
        seen = self._seen(name, x)
        if seen is not None:
            return seen.result
        result = compute()
        self._keep(name, x, result)
        return result

    def _seen(self, name: str, x: Tensor) -> _Seen | None:
        """What was kept of x in this forward pass, if it still holds."""
        seen = None if _pass.seen is None else _pass.seen.get((self, name))
        return seen if seen is not None and seen.serves(x) else None

    def _keep(self, name: str, x: Tensor, result: Any) -> None:
        if _pass.seen is not None:
            _pass.seen[self, name] = _Seen.now(x, result)

    @property
    def _shares(self) -> bool:
        """Whether this is inside a forward pass in which results are kept."""
        return _pass.seen is not None


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors row upon row: of row ranges of one tensor, which follow one another in memory, that memory; else a copy.

    A site's readers hold their rows of one weight: who multiplies or rounds them together needs no second one.

    Args:
        parts: of one dtype, (o, ..) each.

    Returns:
        (sum of o, ..)
    """
    first, size = parts[0], 0
    for part in parts:
        together = part.untyped_storage()._cdata == first.untyped_storage()._cdata and part.dtype == first.dtype
        follows = part.is_contiguous() and part.storage_offset() == first.storage_offset() + size
        if not (together and follows) or part.shape[1:] != first.shape[1:]:
            return torch.cat(list(parts))
        size += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def in_float32(module: nn.Module) -> set[str]:
    """The names of a module's tensors in float32."""
    return {name for name, t in _tensors(module).items() if t.dtype == torch.float32}


def cast(module: nn.Module, dtype: torch.dtype, *, besides: set[str]) -> None:
    """Put a module's tensors into a dtype, in place, but for those of some names: routers may be in float32."""
    kept = {name: t.detach() for name, t in _tensors(module).items() if name in besides}
    module.to(dtype)
    for name, tensor in _tensors(module).items():
        if name in kept:
            tensor.data = kept[name]


@contextmanager
def widened(module: nn.Module, dtype: torch.dtype) -> Iterator[torch.dtype]:
    """Have a module's tensors in the wider of their dtype and another; which one that is.

    A norm, or an expert's router, takes no inputs of another dtype than its own. Grids and transforms keep theirs.
    """
    own = [p.dtype for p in module.parameters() if p.is_floating_point()]
    stored = min(own, key=lambda dtype: dtype.itemsize, default=dtype)  # routers may be in float32
    work, wide = torch.promote_types(stored, dtype), in_float32(module)
    if stored != work:
        module.to(work)
    try:
        yield work
    finally:
        if stored != work:
            cast(module, stored, besides=wide)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


class ExactBuffers(nn.Module):
    """Keeps its tensors' dtype when a model is cast: scales and factors in half precision would lose accuracy.

    Buffers are data, never parts of an autograd graph. They are contiguous, as those read from a file are: matrix
    products sum in an order that depends on strides.
    """

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, None if tensor is None else tensor.detach().contiguous(), persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype or t.is_meta else t.to(out.device)

        return super()._apply(keep, recurse)


def tied_names(model: nn.Module) -> set[str]:
    """Names of parameters that are another parameter, listed before, under a second name."""
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor: its own memory, if it is contiguous and on the CPU."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)  # pyright: ignore[reportArgumentType] - numpy's stubs for Python 3.11 lack __buffer__
