"""Logits of the rows of a trace: those that the model gave, or its head run on a few rows at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dyvte.runtime.arguments import argument_names
from dyvte.runtime.decoder import DecoderSpec


class TraceHead:
    """Logits of the rows of a trace, branch by branch: those the model gave, or its head on a few rows at a time."""

    def __init__(
        self, spec: DecoderSpec, rows: torch.Tensor, logits: torch.Tensor, first: torch.Tensor, returns_tuple: bool
    ):
        self.spec, self.model, self.layers, self.rows = spec, spec.model, spec.layers, rows
        self.returns_tuple = returns_tuple
        self.given = logits.unflatten(0, rows.shape[:2]) if len(logits) == rows.shape[:2].numel() else None
        if self.given is None:
            self._check(logits, first)

    def parts(self) -> list[torch.Tensor]:
        """Which samples to ask for at once: all, or one after the other where their logits would be too large."""
        everyone = torch.arange(self.rows.shape[1])
        return [everyone] if self.given is not None else list(everyone[:, None])

    def __call__(self, branch: int, samples: torch.Tensor) -> torch.Tensor:
        """float32 [n, reads, vocabulary]"""
        if self.given is not None:
            return self.given[branch, samples].float()
        return self._run(self.rows[branch, samples.to(self.rows.device)]).float()

    def _run(self, rows: torch.Tensor) -> torch.Tensor:
        """What the model makes of the output of its last layer: its layers are passed by."""
        states = self.spec.by_layers(rows)
        given: dict[str, Any] = {"inputs_embeds": self.spec.read(rows)}
        if "per_layer_inputs" in argument_names(self.spec.decoder):  # looked up by id; any will do
            given = {"input_ids": torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)}
        layers, output = self.layers._modules, (states,) if self.returns_tuple else states
        own = dict(layers)
        layers.update({name: _PassedBy(layer, output) for name, layer in own.items()})
        try:
            return self.model(**given, use_cache=False).logits
        finally:
            layers.update(own)

    def _check(self, logits: torch.Tensor, first: torch.Tensor) -> None:
        """The model's own logits at the last prompt token must come out again."""
        again = torch.stack([self._run(rows[None])[0, at] for rows, at in zip(self.rows[-1], first.tolist())])
        if not torch.allclose(again, logits[:, 0].to(again), atol=1e-2 * float(logits.abs().max()), rtol=0):
            raise ValueError(
                f"the head of {type(self.model).__name__} gives other logits for a few rows than in the whole pass, so "
                "a trace of this size cannot be read: trace fewer samples or answer tokens at once"
            )


class _PassedBy(nn.Module):
    """In the place of a layer whose weights need not come, however many rows this rank has."""

    def __init__(self, layer: nn.Module, output: Any):
        super().__init__()
        self._of, self._output = [layer], output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output
