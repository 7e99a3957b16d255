"""The fused runtime: a packed model's forward pass in a dozen kernels a block, and a decode step in one CUDA graph.

It takes over where it can serve exactly what the model is - a block of one of `FAMILIES`, 4-bit weights with one scale
a row, symmetric 4-bit activations, asymmetric 4-bit keys and values - and where it can serve what was asked for.
Everything else runs through the modules that transformers calls, one by one. Of a model without kernels, a warning says
once why.
A call steps aside (`calls.py`) for forward hooks on submodules, hidden states, masks other than padding on the left,
and gradients; its modules go on with the same `PackedCache`.

Threads and streams: all products of a model share scratch, so one call at a time runs on a device (`lock.py`). A cache
handed out by `cache_for` belongs to its caller; its room and graph serve again once the caller has dropped it.

A block, for one token:

    norm, transform, quantise | q k v in one product | turn, transform, quantise, store | attention over parts |
    merge, transform, quantise | o, plus residual | norm, transform, quantise | gate and up in one product |
    SwiGLU, transform, quantise | down, plus residual

Prompts take the same way, but for attention, which is PyTorch's, over the numbers that the stored integers stand for.
"""

from flatquant.runtime.fused.block import Block
from flatquant.runtime.fused.calls import attach, runtime, serves
from flatquant.runtime.fused.family import FAMILIES
from flatquant.runtime.fused.model import Fused
from flatquant.runtime.kernels import Unsupported

__all__ = ["FAMILIES", "Block", "Fused", "Unsupported", "attach", "runtime", "serves"]
