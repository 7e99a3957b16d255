"""What the package and its development depend on, a line each, without upper bounds: for `make test-newest`."""

import re
import sys
import tomllib
from pathlib import Path


def requirements() -> list[str]:
    """As pip takes them."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    both = project["dependencies"] + project["optional-dependencies"]["dev"]
    return [re.sub(r",<=?[\w.]+", "", requirement) for requirement in both]


if __name__ == "__main__":
    sys.stdout.writelines(requirement + "\n" for requirement in requirements())
