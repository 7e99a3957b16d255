"""How a run is laid out in memory: what it will need, counted from shapes before it starts, and what it does about it.

The count follows the stages (text, fit, fold, round) of the largest block and takes the largest. Of a fit it knows how
many copies of weights and of activations the passes of `FitSite` and of a transformer block leave for the backward
pass; those factors are counted from the code and held to measured peaks by tests. Host memory is that of the process:
what it has when the run starts (Python, torch, transformers) is measured, not counted. It is an estimate: a family with
wider attention, or a library that needs workspace, is off by that.

Where a limit is short, in this order: blocks are computed again in an end-to-end fit's backward pass; fewer blocks side
by side; activations in host memory, else in a file; a batch in parts; if the recipe leaves that to us, weights in an
end-to-end fit in 5 bytes instead of 16, or in 16 that ranks divide. The first three leave every bit as it is.
"""

from __future__ import annotations

from flatquant.calibrate.memory.block import WeightBytes, linear_weights
from flatquant.calibrate.memory.choose import estimate
from flatquant.calibrate.memory.layout import (
    Estimate,
    check_streamable,
    full_step,
    needs_all_blocks,
    splits,
)
from flatquant.calibrate.memory.limits import Limits, capped, parse_bytes
from flatquant.calibrate.memory.machine import (
    forget_peak,
    free_device,
    free_host_bytes,
    freed_memory_returned,
    peak_bytes,
    peak_resident_bytes,
    release,
    resident_bytes,
    return_freed_memory,
)

__all__ = [
    "Estimate",
    "Limits",
    "WeightBytes",
    "capped",
    "check_streamable",
    "estimate",
    "forget_peak",
    "free_device",
    "free_host_bytes",
    "freed_memory_returned",
    "full_step",
    "linear_weights",
    "needs_all_blocks",
    "parse_bytes",
    "peak_bytes",
    "peak_resident_bytes",
    "release",
    "resident_bytes",
    "return_freed_memory",
    "splits",
]
