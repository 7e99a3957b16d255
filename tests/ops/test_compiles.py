"""The runtime's kernels compile for an H100 at the shapes of Llama-2-7B, Llama-3-8B and a 28,672-wide MLP."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no build for this platform")

SHARED = 227 << 10  # bytes that a block may have on an H100


@pytest.mark.slow
def test_kernels_compile_for_an_h100() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.compiling"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout)
    kernels = {name.split()[0] for name in shared}
    assert kernels >= {"gate", "norm", "plain", "merge", "vector", "few", "expand", "append", "attend"}
    assert {name: size for name, size in shared.items() if size > SHARED} == {}
