"""Checks signatures that name shapes and dtypes, like `Float[Tensor, "o n"]`, at every call."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and result checked if its signature names shapes; others are left as they are.

    Methods are left alone: a fit calls transforms a hundred thousand times, and a check takes longer than they do.
    """
    named = "[Tensor, " in str(getattr(function, "__annotations__", ""))
    return beartype(function) if named and "." not in function.__qualname__ else function
