"""How long a model's passes over prompts take, whoever calls it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn


class PromptTimes:
    """While it is entered, every forward pass over more than one token per sample is a prompt's and is timed.

    Such a pass is what stands between the processor and the first token: vision tower, decoder, output head.

    Attributes:
        seconds: of each pass.
        prompts: how many prompts they were.
    """

    def __init__(self, model: nn.Module):
        self.seconds: list[float] = []
        self.prompts = 0
        self._model, self._start = model, None

    def __enter__(self) -> PromptTimes:
        self._hooks = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("inputs_embeds")
        tokens = tokens if tokens is not None else kwargs.get("input_ids", args[0] if args else None)
        self._start = None
        if tokens is not None and tokens.shape[1] > 1:
            self.prompts += tokens.shape[0]
            self._start = self._now()

    def _after(self, *_: Any) -> None:
        if self._start is not None:
            self.seconds.append(self._now() - self._start)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
