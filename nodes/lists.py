"""For nodes that take lists: ComfyUI then hands them every input as one."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def one_value_each(*lists: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Hands a function one value of every input, and of those named ``lists`` the whole list.

    ValueError for an input that got several values or none: training takes one of each.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(*args: Any, **inputs: Any) -> T:
            return function(*args, **{n: v if n in lists else _one(n, v) for n, v in inputs.items()})

        return call

    return decorate


def _one(name: str, value: Any) -> Any:
    if not isinstance(value, list):  # from Python
        return value
    if len(value) != 1:
        raise ValueError(f"{name} got a list of {len(value)} values, and training takes one: link a single one")
    return value[0]
