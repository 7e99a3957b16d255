"""What the package and its development depend on that this environment has in another release than the lock.

torch and triton are pinned by constraints.txt in every environment.
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

from newest import requirements


def normal(name: str) -> str:
    """A name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


lines = (Path(__file__).parents[1] / "requirements.lock").read_text(encoding="utf-8").split()
locked = {normal(name): release for name, _, release in (line.partition("==") for line in lines)}
for requirement in requirements():
    name = normal(re.split(r"[^\w.-]", requirement)[0])
    if name not in ("torch", "triton") and version(name) != locked.get(name):
        sys.stdout.write(f"{name} {version(name)}\n")
