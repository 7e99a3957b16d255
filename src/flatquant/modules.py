"""Traits of modules, declared by their owners: training, following a schedule, keeping to bounds, sharing work, keeping
exact buffers.

Fits collect parameters by walking modules for `Trainable`, never by looking for substrings in names: a renamed module
still trains, and one that is not a `Trainable` never does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

# "rotation" parameters are orthogonal matrices and stay so: their optimiser moves them on the manifold of those.
Group = Literal["transform", "scale", "clip", "weight", "rotation", "code"]

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


class Site(nn.Module, ABC):
    """Transforms one tensor and puts it on its grid, once for all linears that read it or some of its rows."""

    @abstractmethod
    def rows(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """x[index]; a linear that is given just this tensor next multiplies those rows of the transformed x.

        Args:
            x: (rows, n).
        """


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
