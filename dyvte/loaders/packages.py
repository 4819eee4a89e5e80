"""What all loaders have to do: import a package that may not be there, and place what it builds."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dyvte.config import ModelConfig


def import_package(name: str, repository: str) -> ModuleType:
    """A module of a code base that the user has installed.

    Raises:
        ValueError: it is not there, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        missing = getattr(error, "name", None)
        if missing is not None and missing.partition(".")[0] == package:
            raise ValueError(
                f"this model is built by {repository}, whose package {package} is not installed: clone the repository, "
                "and install it or put its folder on PYTHONPATH"
            ) from error
        raise ValueError(
            f"{name} of {repository} cannot be imported: {error}. Install what it needs beside it; names that "
            "transformers no longer has ask for the version of transformers the repository was written for"
        ) from error


def refuse(config: ModelConfig, *settings: str, remedy: str) -> None:
    """Raises ``ValueError`` for settings that a code base has no way to follow."""
    given = [name for name in settings if getattr(config, name)]
    if given:
        raise ValueError(f"{config.loader} takes no {' and no '.join(given)}: {remedy}")


def device_of(config: ModelConfig) -> str:
    """Where a model is built: in place, or on the CPU if it is going to be sharded."""
    if config.shard != "none":
        return "cpu"
    if config.device != "auto":
        return config.device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def finish(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model in the type that was asked for, frozen, in evaluation mode."""
    if config.dtype != "auto":
        model.to(getattr(torch, config.dtype))
    return model.eval().requires_grad_(False)


def take_new_arguments(model: nn.Module) -> None:
    """Lets a ``forward`` written for an older transformers be called by a newer ``generate``.

    That hands on the cache as ``cache`` (since 5.24), and ``cache_position`` and ``logits_to_keep``, which save work.
    """
    forward = model.forward
    takes = inspect.signature(forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return

    @functools.wraps(forward)
    def adapted(*args: Any, **given: Any) -> Any:
        if "cache" not in takes and given.get("cache") is not None:
            given["past_key_values"] = given["cache"]
        unneeded = {"cache", "cache_position", "logits_to_keep"} - set(takes)
        return forward(*args, **{name: value for name, value in given.items() if name not in unneeded})

    model.forward = adapted
