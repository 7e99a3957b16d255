"""Quantise a model from Python, and load what was saved: `quantize`, `load`.

A run with an output folder keeps its state in a sibling, `<output>.partial`: the calibration text if the model wrote
it, and every finished block. The output folder appears by one rename at the very end, and the state goes after that,
so that a run may be killed at any point and started again with `resume=True`: it ends with the same bytes, the entry
`timing` of `flatquant_report.json` excepted, which tells of the last run only.

Of several ranks (`flatquant.distributed`), each calls `quantize` with the same arguments. The first reads the text,
keeps the state, measures the verdict and writes the folder; the others receive what calibrating their blocks needs.
"""

from flatquant.api.call import quantize
from flatquant.api.checks import stored_bytes
from flatquant.api.place import check_output, discard, state_folder
from flatquant.api.result import Quantized
from flatquant.runtime.artifact import load

__all__ = ["Quantized", "check_output", "discard", "load", "quantize", "state_folder", "stored_bytes"]
