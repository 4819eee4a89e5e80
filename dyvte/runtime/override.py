"""Methods of one module in place of its class's, and how to put them back whatever was put around them since."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

# Where accelerate keeps the ``forward`` that its hooks stand around.
HOOKED = "_old_forward"


class Override:
    """Stands for a method of one module; unlike a function, it does not go along unnoticed in a copy."""

    def __init__(self, method: Callable[..., Any], called: Callable[..., Any]):
        functools.update_wrapper(self, method)
        self._method, self._called = method, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._called(*args, **kwargs)

    def undo(self) -> None:
        """From now on the method alone, also where a wrapper of somebody else has kept hold of this."""
        self._called = self._method

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._called is not self._method:
            refuse_copy()
        return Override, (self._method, self._method)


def refuse_copy() -> None:
    raise TypeError(
        "a model cannot be copied or pickled while a visual exit is attached, since the copy would run the "
        "original's layers: detach() the exit, or leave its with block, first"
    )


def forward_name(module: nn.Module) -> str:
    """Where the ``forward`` of a module is: accelerate's hooks stand around it and may go."""
    return HOOKED if hasattr(module, "_hf_hook") else "forward"


def override(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of this module alone; returns what puts back the one that it had, or its class's.

    Accelerate may have put its hooks around the value meanwhile, or taken them away: they stay as they are.
    """
    owned, before = name in vars(module), getattr(module, name, None)
    setattr(module, name, value)

    def restore() -> None:
        if isinstance(value, Override):
            value.undo()
        place = next((p for p in (name, "forward", HOOKED) if vars(module).get(p) is value), None)
        if place == name and not owned:
            delattr(module, name)
        elif place is not None:
            setattr(module, place, before)

    return restore
