"""Adam for weights that are too many for float32: each moves in the backward pass, once its gradient is there.

The gradient is freed at once, so that gradients of all weights never exist together. With `ops.adam` a weight in
training takes 5 bytes, instead of 16: 3 of its own, of which the model sees bfloat16, and two moments of 8 bits.

What was given up: a step that is taken or not as a whole. Weights whose gradients were found before the first one that
is not finite have moved by then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flatquant import distributed
from flatquant.ops.adam import adam_step, fresh_state

_KEYS = 1_000_003  # between the keys of two runs' first parameters


class ConsumingAdam(torch.optim.Optimizer):
    """Adam whose steps are parts of backward passes; without weight decay. `lr` of a group is a tensor.

    Args:
        params: groups of bfloat16 parameters.
        seed: of the chance by which is rounded.

    Attributes:
        active: whether gradients are consumed. Otherwise they add up, as those of a batch's first parts do.
        hold: a scalar on the device; where it is not 0, gradients are consumed, and nothing moves.
        norms: of the gradients that the last step consumed, summed over ranks.  # float32, (parameters,)
    """

    def __init__(self, params: Iterable[dict], *, eps: float, seed: int) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.eps, self.seed = eps, seed
        self.active = False
        self.owned = owned = [(p, group) for group in self.param_groups for p in group["params"]]
        device = owned[0][0].device
        self.hold, self.held = (torch.zeros((), device=device) for _ in range(2))
        self.norms = torch.zeros(len(owned), device=device)
        # Not `self`: parameters outlive their fit, and would keep its moments.
        consume = weakref.WeakMethod(self._consume)
        for number, (p, group) in enumerate(owned):
            assert p.dtype == torch.bfloat16
            self.state[p] = fresh_state(p)

            def consumed(p: Tensor, number: int = number, group: dict = group) -> None:
                if (method := consume()) is not None:
                    method(p, number, group["lr"])

            p.register_post_accumulate_grad_hook(consumed)

    def begin(self) -> None:
        """Called before the backward pass whose gradients, with those that have added up, are a step's."""
        self.active = True
        self.norms.zero_()
        self.held.copy_(self.hold)

    def end(self) -> None:
        """Called after that backward pass: gradients of earlier parts alone are left."""
        for number, (p, group) in enumerate(self.owned):
            self._consume(p, number, group["lr"])

    def stop(self) -> None:
        """Called after `end`, or where the backward pass has failed."""
        self.active = False

    @torch.no_grad()
    def _consume(self, p: Tensor, number: int, lr: Tensor) -> None:
        if not self.active or p.grad is None:
            return
        grad = distributed.summed(p.grad)
        p.grad = None
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        self.norms[number] = norm
        self.held.copy_(torch.maximum(self.held, (~torch.isfinite(norm)).float()))
        key = (self.seed * _KEYS + number) % (1 << 32)
        adam_step(p, grad, self.state[p], lr=lr, hold=self.held, eps=self.eps, key=key)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Nothing is left to do."""
        assert closure is None

    def load(self, p: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Go on with what `state` had of a parameter."""
        for name, tensor in self.state[p].items():
            tensor.copy_(state[name])
