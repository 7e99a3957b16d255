"""What all kernels have in common: they are launched on the device of their tensors, whichever is current."""

import ast
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")
from flatquant.ops import triton as common

KERNELS = sorted(Path(common.__file__).parent.glob("*/triton.py"))


def launches(function: ast.FunctionDef) -> bool:
    """Whether a function has a `kernel[grid](...)` in it, and is no kernel itself."""
    if any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list):
        return False
    return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) for node in ast.walk(function))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.parent.name)
def test_every_launch_has_a_device_guard(path: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    launching = [f for f in functions if launches(f)]
    assert launching
    for function in launching:
        assert "on_device" in map(ast.unparse, function.decorator_list), function.name


def test_the_guard_is_of_the_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Guard:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

        def __enter__(self) -> None:
            seen.append(self.x)

        def __exit__(self, *_: object) -> None:
            seen.append("left")

    @common.on_device
    def launch(kernel: str, x: torch.Tensor, y: torch.Tensor) -> int:
        seen.append(kernel)
        return 3

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    x, y = torch.zeros(1), torch.ones(1)
    assert launch("kernel", x, y) == 3
    assert seen[0] is x
    assert seen[1:] == ["kernel", "left"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_second_gpu_while_the_first_is_current() -> None:
    from flatquant.ops import divergence, quantize
    from flatquant.ops.divergence import reference
    from flatquant.ops.quantize import reference as grids

    g = torch.Generator().manual_seed(0)
    t, s = (torch.randn(5, 100, generator=g) for _ in range(2))
    got = divergence.kl_rows(t.to("cuda:1"), s.to("cuda:1").requires_grad_())
    torch.testing.assert_close(got.cpu(), reference.kl_rows(t, s), rtol=1e-4, atol=1e-5)
    got.sum().backward()
    one = torch.ones(1)
    rounded = quantize.fake_quantize_rows(t.to("cuda:1"), one.to("cuda:1"), one.to("cuda:1"), -8, 7)
    torch.testing.assert_close(rounded.cpu(), grids.fake_quantize_rows(t, one, one, -8, 7))
    assert torch.cuda.current_device() == 0
