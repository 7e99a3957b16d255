"""What a step of a fit takes: the copies of weights and of activations that its passes make."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flatquant.calibrate.memory.block import Sizes


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Copies of a number that the backward pass of a fit keeps, and that its largest step makes besides."""

    kept: float  # of a weight, 4 bytes each
    made: float  # of a weight of the largest site, 4 bytes each
    inputs: float  # of a site's input
    outputs: float  # of a site's output
    hidden: float  # of the residual stream, 4 bytes each
    saved: float = 1.0  # share of a token's numbers that the forward pass alone leaves
    logits: float = 28.0  # bytes a logit of an end-to-end fit


EAGER = Copies(kept=4, made=6, inputs=5, outputs=3, hidden=10)
# Fused: one kernel rounds, products are in half precision.
# Of seven whole runs on an H100 (calibration-h100.json, proof-*.json), the estimate is 1.01 to 1.18 times the peak; of
# end-to-end fits of SmolLM2 on H200s with 128 and 384 windows, and on two with 128, it is 1.00, 1.02 and .95 times.
FUSED = Copies(kept=2.5, made=3.5, inputs=3, outputs=2, hidden=8, saved=0.65, logits=13.0)
# Of a folded block whose rounding is learned, with weights alone on a grid, and with activations too.
_LEARNED = Copies(kept=2, made=1, inputs=1, outputs=1, hidden=5)
_ROUNDED = replace(_LEARNED, inputs=4)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Bytes of a step on one block."""

    fused: bool  # by kernels, on a GPU
    item: int  # bytes of a number in a product
    hidden: int  # numbers of a token in the residual stream
    rounds_inputs: bool  # whether any activations are on a grid

    @property
    def copies(self) -> Copies:
        return FUSED if self.fused else EAGER

    def kept(self, s: Sizes, tokens: int) -> float:
        """What a block's passes hold at most of what its backward pass needs."""
        return self._of_weights(s) + tokens * self._a_token(self.copies, s)

    def left(self, s: Sizes, tokens: int) -> float:
        """What a block's forward pass leaves for its backward pass."""
        return self._of_weights(s) + self.copies.saved * tokens * self._a_token(self.copies, s)

    def learning(self, s: Sizes, tokens: int) -> float:
        """A step of learned rounding: beside the weights their offsets, the gradients of these, and the best so far."""
        c = _ROUNDED if self.rounds_inputs else _LEARNED
        return 4 * (s.weights * (4 + c.kept) + s.largest * c.made) + tokens * self._a_token(c, s)

    def _of_weights(self, s: Sizes) -> float:
        return 4 * (s.weights * self.copies.kept + (3 * s.dense if self.fused else 0))

    def _a_token(self, c: Copies, s: Sizes) -> float:
        """What a step keeps of each token's activations in a block."""
        return self.item * (c.inputs * s.inputs + c.outputs * s.outputs) + 4 * c.hidden * self.hidden

    def made(self, s: Sizes) -> float:
        """What the largest step of a backward pass makes."""
        return 4 * s.largest * self.copies.made
