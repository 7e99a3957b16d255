"""Public functions on tensors name their tensors' shapes, and tests check them."""

import ast
from pathlib import Path

import jaxtyping
import pytest
import torch

from flatquant.solvers.recursion import inverse_factor

SRC = Path(__file__).parents[1] / "src" / "flatquant"
MATHEMATICS = sorted(
    [
        *(SRC / "ops").glob("*/reference.py"),
        *(SRC / "ops").glob("*/__init__.py"),
        *(SRC / "transforms").glob("*.py"),
        *(SRC / "solvers").glob("*.py"),
        SRC / "formats" / "minifloat.py",
    ]
    + [*(SRC / "quantizers").glob("*.py"), SRC / "qtensor.py", SRC / "rotary.py"]
)


@pytest.mark.parametrize("file", MATHEMATICS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_public_functions_name_the_shapes_of_tensors(file: Path) -> None:
    for function in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            annotations = [ast.unparse(node.annotation) for node in arguments if node.annotation]
            for annotation in (*annotations, ast.unparse(function.returns) if function.returns else ""):
                bare = annotation.split(" | ")[0] == "Tensor"
                assert not bare, f"{file.name}, {function.name}: a tensor without its shape"


def test_a_wrong_shape_is_refused_in_tests() -> None:
    assert inverse_factor(torch.eye(3), 0.01).shape == (3, 3)
    with pytest.raises(jaxtyping.TypeCheckError, match="inverse_factor"):
        inverse_factor(torch.ones(3, 4), 0.01)
