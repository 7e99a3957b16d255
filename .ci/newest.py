"""What the package and its development depend on, a line each, without upper bounds: for `make test-newest`."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
    sys.stdout.write(re.sub(r",<=?[\w.]+", "", requirement) + "\n")
