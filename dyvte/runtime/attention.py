"""What some tokens of a running model attend to, from the queries and keys of one layer at a time.

The model keeps its attention implementation and gives up no maps. A hook on an attention module computes the few query
rows that are asked for a second time, with the module's own projections, norms and rotation. Because a module may do
more than this knows of, its first use is checked against what the module itself puts out.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dyvte.runtime.compat import call_cache
from dyvte.runtime.tokens import KeptTokens

# Relative error allowed between the module's output and the recomputed one.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class AttentionRows:
    """Queries and keys of one attention module, for some query columns of a prompt.

    Attributes:
        query: [batch, heads, queries, head size], rotated.
        key: [batch, key heads, keys, head size], rotated; those of earlier turns first.
        bias: float32 [batch, 1 or heads, queries, keys], 0 where a query sees a key, very negative elsewhere.
    """

    def __init__(
        self, attention: nn.Module, arguments: Mapping[str, Any], queries: KeptTokens, before: torch.Tensor | None
    ):
        """From the arguments of the module's own call; see :func:`call_arguments`.

        Args:
            before: keys of earlier turns.
        """
        self.attention, self.arguments = attention, arguments
        hidden = arguments["hidden_states"]
        rotation = arguments.get("position_embeddings")
        few = queries.gather(hidden)
        query = _project(attention, "q", few)
        key = _project(attention, "k", hidden)
        if getattr(attention, "use_rope", True):
            if rotation is None:
                raise ValueError(f"{type(attention).__name__} got no position_embeddings: {_REMEDY}")
            rotate = _rotary(attention)
            cos, sin = rotation
            query = rotate(query, query, queries.gather(cos), queries.gather(sin))[0]
            key = rotate(key, key, cos, sin)[1]
        self.query, self.key = query, key if before is None else torch.cat([before.to(key), key], 2)
        self.before = 0 if before is None else before.shape[2]
        self.bias = self._bias(arguments.get("attention_mask"), queries)

    def _bias(self, mask: Any, queries: KeptTokens) -> torch.Tensor:
        batch, _, _, _ = self.query.shape
        keys, device = self.key.shape[2], self.key.device
        index = queries.index.to(device)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            row = torch.arange(batch, device=mask.device)[:, None]
            rows = mask.expand(batch, -1, -1, -1)[row, :, index.to(mask.device)].transpose(1, 2)[..., :keys]
            if rows.dtype != torch.bool:
                return rows.float().to(device)
            allowed = rows.to(device)
        elif mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            column, place = torch.arange(keys, device=device), self.before + index[..., None]
            allowed = (column <= place) if getattr(self.attention, "is_causal", True) else (column < keys) | (place < 0)
            window = getattr(self.attention, "sliding_window", None)
            if window is not None:
                allowed = allowed & (column > place - window)
            if mask is not None:
                allowed = allowed & mask[:, None, -keys:].bool().to(device)
            allowed = allowed[:, None]
        else:
            raise ValueError(
                f"a {type(mask).__name__} does not show single rows of attention: load the model with "
                "attn_implementation='sdpa' or 'eager'"
            )
        return torch.zeros(allowed.shape, device=device).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Attention weights, float32 [batch, heads of the group, queries, keys], one group per key head."""
        groups = self.key.shape[1]
        per_group = self.query.shape[1] // groups
        scaling = getattr(self.attention, "scaling", self.query.shape[-1] ** -0.5)
        softcap = getattr(self.attention, "attn_logit_softcapping", None)
        for group in range(groups):
            heads = slice(group * per_group, (group + 1) * per_group)
            scores = self.query[:, heads].float() @ self.key[:, group, None].float().transpose(-1, -2) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            bias = self.bias if self.bias.shape[1] == 1 else self.bias[:, heads]
            yield (scores + bias).softmax(-1)

    @property
    def checked(self) -> bool:
        """Whether the module's output was once found to be what these rows lead to."""
        return self.attention in _checked

    def check(self, output: Any, queries: KeptTokens) -> None:
        """Compares with what the module put out for these arguments, the first time it is used.

        Raises:
            ValueError: the module does something else than rotated dot-product attention.
        """
        if self.checked or self.before:
            return
        attention, hidden = self.attention, self.arguments["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        value = attention.v_proj(hidden).unflatten(-1, (self.key.shape[1], -1)).transpose(1, 2).float()
        heads = torch.cat([weights @ value[:, group, None] for group, weights in enumerate(self)], 1)
        expected = attention.o_proj(heads.transpose(1, 2).flatten(2).to(hidden.dtype))
        valid = queries.valid.to(expected.device)
        expected, found = expected[valid].float(), queries.gather(made)[valid].float()
        error = (expected - found).norm() / found.norm().clamp(min=1e-12)
        if not error <= TOLERANCE.get(hidden.dtype, 5e-2):
            raise ValueError(
                f"attention of {type(attention).__name__} cannot be read from its queries and keys: recomputed outputs "
                f"are off by {float(error):.1%}. {_REMEDY}"
            )
        _checked.add(attention)


class AttentionCall:
    """One call of an attention module for a group of samples, kept until the next layer has been decided on."""

    def __init__(self, attention: nn.Module, arguments: Mapping[str, Any]):
        self.attention, self.arguments, self.output = attention, arguments, None
        self.before = _cached(attention, call_cache(arguments))  # the call itself will add to it

    def paid(self, queries: torch.Tensor) -> torch.Tensor:
        """What the marked tokens attend to, mean over heads and summed over them: bool -> float32 [n, width]."""
        return self.paid_to_all(queries)[:, -queries.shape[1] :]

    def paid_to_all(self, queries: torch.Tensor) -> torch.Tensor:
        """Like :meth:`paid`, keys of earlier calls included and first: float32 [n, keys]."""
        columns = KeptTokens.from_mask(queries)
        read = AttentionRows(self.attention, self.arguments, columns, self.before)
        read.check(self.output, columns)
        asked = columns.valid.to(read.query.device, torch.float32)
        paid = [torch.einsum("nq,nhqk->nk", asked, weights) for weights in read]
        return sum(paid[1:], paid[0]) / read.query.shape[1]


_REMEDY = "Only modules with q_proj, k_proj, v_proj, o_proj and rotary positions can be read"


def find_attention(layer: nn.Module) -> nn.Module:
    """The attention module of a decoder layer.

    Raises:
        ValueError: it has none whose queries and keys can be computed from outside.
    """
    for module in (getattr(layer, "self_attn", None), *layer.children()):
        if isinstance(module, nn.Module) and all(
            isinstance(getattr(module, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        ):
            break
    else:
        raise ValueError(f"{type(layer).__name__} has no attention that can be read. {_REMEDY}")
    if getattr(module, "sinks", None) is not None:
        raise ValueError(f"{type(module).__name__} attends to sinks beside its keys. {_REMEDY}")
    _rotary(module)
    return module


def call_arguments(attention: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an attention module's call by name."""
    return dict(zip(inspect.signature(attention.forward).parameters, args)) | dict(kwargs)


def _rotary(attention: nn.Module) -> Any:
    """The function that rotates queries and keys in the source file of the module."""
    for kind in type(attention).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "apply_rotary_pos_emb", None)
        if found is not None:
            return found
    raise ValueError(f"{type(attention).__name__} comes without apply_rotary_pos_emb. {_REMEDY}")


def _project(attention: nn.Module, which: str, hidden: torch.Tensor) -> torch.Tensor:
    """Queries ("q") or keys ("k") before rotation: [batch, heads, tokens, head size]."""
    size = attention.head_dim
    flat = getattr(attention, f"{which}_proj")(hidden)
    norm = getattr(attention, f"{which}_norm", None)
    over_all = norm is not None and getattr(norm, "weight", torch.empty(size)).shape[-1] == flat.shape[-1] != size
    if over_all:
        flat = norm(flat)
    heads = flat.unflatten(-1, (-1, size))
    if norm is not None and not over_all:
        heads = norm(heads)
    return heads.transpose(1, 2)


def _cached(attention: nn.Module, cache: Any) -> torch.Tensor | None:
    """The keys of earlier turns that the module is about to see."""
    layers, index = getattr(cache, "layers", ()), getattr(attention, "layer_idx", None)
    keys = layers[index].keys if index is not None and index < len(layers) else None
    return keys if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[2] > 0 else None
