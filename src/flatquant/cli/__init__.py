"""The command line: a module for each kind of command, in the order of `flatquant --help`.

Results go to stdout, progress and errors to stderr, so that `--json` can be piped. An error that the user can act on
is one line and exit code 1 (3: a model was written, and its verdict is destroyed); anything else is a defect and keeps
its traceback. What takes time to import is imported inside the commands, so that `--help` answers at once.
"""

from flatquant.cli import quantize, compare, evaluate, serve, folders, interchange, demo  # noqa: F401, I001
from flatquant.cli.app import app, main

__all__ = ["app", "main"]
