"""What the vision tower attends to: for methods that score patches before the decoder runs.

The tower is the module that the model's ``vision_config`` describes. Its attention is read as the decoder's is (see
:mod:`dyvte.runtime.attention`): from what the modules were called with, a few rows computed a second time, the first
use checked against the module's own output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from dyvte.runtime.attention import TOLERANCE, call_arguments
from dyvte.runtime.tokens import KeptTokens

OUTPUTS = ("out_proj", "o_proj", "projection_layer", "proj")
CLS = ("class_embedding", "cls_token")
_REMEDY = "Choose a method that scores in the decoder, such as FastV or DivPrune"
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class VisionTower:
    """The vision tower of a model.

    Attributes:
        attentions: the attention module of every vision layer.
        cls: whether its first token is no patch but a summary (CLS).

    Raises:
        ValueError: the model has no vision tower, or none whose attention can be read.
    """

    def __init__(self, model: nn.Module):
        config = getattr(getattr(model, "config", None), "vision_config", None)
        towers = (m for m in model.modules() if config is not None and type(getattr(m, "config", None)) is type(config))
        tower = next(towers, None)
        if tower is None:
            raise ValueError(f"{type(model).__name__} has no vision tower that its vision_config describes. {_REMEDY}")
        self.model, self.name = type(model).__name__, type(tower).__name__
        self.attentions = [
            module
            for module in tower.modules()
            if all(isinstance(getattr(module, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj"))
            and hasattr(module, "head_dim")
        ]
        if not self.attentions:
            raise ValueError(f"{self.name} has no attention with q_proj, k_proj, v_proj that could be read. {_REMEDY}")
        self.cls = any(hasattr(module, name) for module in tower.modules() for name in CLS)

    def check_cls(self) -> None:
        """Raises ``ValueError`` if there is no CLS token."""
        if not self.cls:
            raise ValueError(f"{self.name} has no CLS token to ask: choose FoPru, or a method of the decoder")

    def watch(self, layers: Sequence[slice]) -> VisionReader:
        """Begins to read some of its layers."""
        return VisionReader(self, {layer for part in layers for layer in range(len(self.attentions))[part]})


class VisionReader:
    """Keeps what the attention modules of some vision layers were called with, until a prompt takes it."""

    def __init__(self, tower: VisionTower, layers: Collection[int]):
        self.tower = tower
        self._calls: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._hooks = [
            tower.attentions[layer].register_forward_hook(self._keep(layer), with_kwargs=True) for layer in layers
        ]

    def remove(self) -> None:
        """The tower is as it was."""
        while self._hooks:
            self._hooks.pop().remove()

    def take(self) -> VisionAttention:
        """What the tower did for the prompt that enters the decoder."""
        calls, self._calls = self._calls, {}
        return VisionAttention(self.tower, calls)

    def _keep(self, layer: int) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = call_arguments(module, args, kwargs)["hidden_states"]
            self._calls[layer] = hidden, output[0] if isinstance(output, tuple) else output

        return after


class VisionAttention:
    """The attention of the vision tower for the images of one batch of prompts.

    Attributes:
        tower: whose.
    """

    def __init__(self, tower: VisionTower, calls: dict[int, tuple[torch.Tensor, torch.Tensor]]):
        self.tower, self._calls = tower, calls

    def weights(self, layer: int, queries: slice = slice(None)) -> torch.Tensor:
        """Attention weights after softmax, float32 [images, heads, queries, tokens], a CLS token included.

        Args:
            layer: of the tower, from 0.
            queries: which tokens attend.

        Raises:
            ValueError: the tower did not run for this prompt, or does more than plain dot-product attention.
        """
        if layer not in self._calls:
            raise ValueError(
                f"{self.tower.name} did not run in the call that brought this prompt, so its attention is not known: "
                f"give the model pixels, not features or embeddings. {_REMEDY}"
            )
        module, (hidden, output) = self.tower.attentions[layer], self._calls[layer]
        if module not in _checked:
            self._check(module, hidden, output)
        return _weights(module, hidden, queries)

    def cls_rows(self, layer: int) -> torch.Tensor:
        """What the CLS token gives to each patch: float32 [images, heads, patches].

        Raises:
            ValueError: see :meth:`weights`; or the tower has no CLS token.
        """
        self.tower.check_cls()
        return self.weights(layer, slice(0, 1))[:, :, 0, 1:]

    def to_tokens(self, patches: torch.Tensor, visual: torch.Tensor, tokens: KeptTokens, rows: torch.Tensor):
        """Values of patches at the visual tokens that they became: [images, patches] -> [n, width], zero elsewhere.

        Args:
            visual: bool [batch, sequence], of the prompts.
            tokens, rows: where to: see :class:`~dyvte.runtime.reduction.LayerView`.

        Raises:
            ValueError: there is not one visual token for each patch.
        """
        if patches.numel() != int(visual.sum()):
            raise ValueError(
                f"{self.tower.name} made {list(patches.shape)} patches and the prompts have {int(visual.sum())} visual "
                f"tokens: {self.tower.model} merges patches or adds tokens, so their scores do not go over. {_REMEDY}"
            )
        grid = patches.new_zeros(visual.shape)
        grid[visual.to(grid.device)] = patches.flatten()
        return tokens.gather(grid, rows)

    def _check(self, module: nn.Module, hidden: torch.Tensor, output: torch.Tensor) -> None:
        weights = _weights(module, hidden, slice(None))
        project = next((getattr(module, name) for name in OUTPUTS if hasattr(module, name)), None)
        error = float("inf")
        if project is not None and weights.shape[-1] == hidden.shape[1]:
            heads = weights @ _heads(module, module.v_proj(hidden)).float()
            expected = project(heads.transpose(1, 2).flatten(2).to(hidden.dtype)).float()
            error = float((expected - output.float()).norm() / output.float().norm().clamp(min=1e-12))
        if not error <= TOLERANCE.get(hidden.dtype, 5e-2):
            raise ValueError(
                f"attention of {type(module).__name__} cannot be read from its queries and keys: recomputed outputs "
                f"are off by {error:.1%}. {_REMEDY}"
            )
        _checked.add(module)


def _heads(module: nn.Module, flat: torch.Tensor) -> torch.Tensor:
    return flat.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def _weights(module: nn.Module, hidden: torch.Tensor, queries: slice) -> torch.Tensor:
    query, key = module.q_proj(hidden[:, queries]), module.k_proj(hidden)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    scale = getattr(module, "scale", getattr(module, "scaling", module.head_dim**-0.5))
    query, key = _heads(module, query).float(), _heads(module, key).float()
    return (query @ key.transpose(-1, -2) * scale).softmax(-1)
