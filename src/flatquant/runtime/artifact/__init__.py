"""A quantised model as a folder: `save`, `load`, `inspect`. The format itself is described in `runtime/folder.py`.

A folder appears complete or not at all, its bytes depend on nothing but the model (and the report), and a loaded model
computes the same logits, to the last bit, as the one that was saved.
"""

from flatquant.runtime.artifact.adopt import Origin, adopt
from flatquant.runtime.artifact.evaluations import facing, keep_evaluation, merged, read_evaluation
from flatquant.runtime.artifact.inspection import Inspection, inspect
from flatquant.runtime.artifact.read import furnish, load, read_tensors, rebuild_buffers, skeleton
from flatquant.runtime.artifact.write import check_output, is_tied, rounded_ends_of, save, unquantised

__all__ = [
    "Inspection",
    "Origin",
    "adopt",
    "check_output",
    "facing",
    "furnish",
    "inspect",
    "is_tied",
    "keep_evaluation",
    "load",
    "merged",
    "read_evaluation",
    "read_tensors",
    "rebuild_buffers",
    "rounded_ends_of",
    "save",
    "skeleton",
    "unquantised",
]
