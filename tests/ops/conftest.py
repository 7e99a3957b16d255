"""What Triton's interpreter has to be taught: a fused multiply-add rounds once."""

from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of float32, rounded once: in float64 to odd, then to float32 (Boldo and Melquiond, 2008)."""
    p, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)  # the product is exact
    s = np.atleast_1d(p + z)
    rest = s - p
    error = np.atleast_1d((p - (s - rest)) + (z - rest))
    bits = s.view(np.int64)
    inexact = np.isfinite(s) & (error != 0) & (bits & 1 == 0)
    bits[inexact] += np.where((error > 0) == (s > 0), 1, -1)[inexact]
    return s.astype(np.float32).reshape(p.shape)


@pytest.fixture(autouse=True, scope="session")
def multiply_adds_round_once() -> None:
    """Of Triton before 3.9, whose interpreter multiplies and then adds."""
    try:
        old = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
    except PackageNotFoundError:
        return
    if old:
        from triton.runtime import interpreter

        plain = interpreter.InterpreterBuilder.create_fma

        def create_fma(self, x, y, z):
            if z.data.dtype != np.float32:
                return plain(self, x, y, z)
            return interpreter.TensorHandle(fma(*np.broadcast_arrays(x.data, y.data, z.data)), z.dtype.scalar)

        interpreter.InterpreterBuilder.create_fma = create_fma
