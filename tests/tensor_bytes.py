"""The bytes of all tensors that a piece of code makes: at every moment, and at most."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """While active, `now` and `peak` count the storages that operations have made and that are still alive.

    What existed before does not count, nor what an operation takes for itself and gives back, nor meta tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.before: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self.known:
                self.known[leaf.untyped_storage()] = 0  # it was there
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self.known:
                storage, size = leaf.untyped_storage(), 0 if leaf.is_meta else leaf.untyped_storage().nbytes()
                self.known[storage] = size
                weakref.finalize(storage, self._gone, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


class ResizedBytes(TensorBytes):
    """The same, where storages are emptied and filled again, as FSDP2 does with gathered weights."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0  # takes the place of `peak`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, sum(storage.nbytes() for storage, size in list(self.known.items()) if size))
        return out
