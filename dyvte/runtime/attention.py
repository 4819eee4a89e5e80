"""What some tokens of a running model attend to, from the queries and keys of one layer at a time.

The model keeps its attention implementation and gives up no maps. Hooks keep what an attention module's own projections
give, and the few query rows that are asked for are computed from that a second time. Because a module may do more than
this knows of, its first use is checked against what the module itself puts out.

All that needs weights is done while the layer runs: where they are sharded or offloaded, they are gone afterwards.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
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

    def __init__(self, call: AttentionCall, queries: KeptTokens):
        self.attention = call.attention
        rotation = call.arguments.get("position_embeddings")
        query, key = queries.gather(call.query).transpose(1, 2), call.key.transpose(1, 2)
        if getattr(self.attention, "use_rope", True):
            if rotation is None:
                raise ValueError(f"{type(self.attention).__name__} got no position_embeddings: {_REMEDY}")
            rotate = _rotary(self.attention)
            cos, sin = rotation
            query = rotate(query, query, queries.gather(cos), queries.gather(sin))[0]
            key = rotate(key, key, cos, sin)[1]
        before = call.before
        self.query, self.key = query, key if before is None else torch.cat([before.to(key), key], 2)
        self.before = 0 if before is None else before.shape[2]
        self.bias = self._bias(call.arguments.get("attention_mask"), queries)

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


class AttentionCall:
    """One call of an attention module for a group of samples, kept until the next layer has been decided on.

    Attributes:
        query, key: [n, tokens, heads, head size], not rotated yet; of tensor-parallel modules the heads of this rank.
        before: keys of earlier turns.
    """

    def __init__(self, attention: nn.Module, arguments: Mapping[str, Any]):
        self.attention, self.arguments = attention, arguments
        self.before = _cached(attention, call_cache(arguments))  # the call itself will add to it
        self.projected: dict[str, torch.Tensor] = {}

    def finish(self, output: Any, valid: torch.Tensor) -> None:
        """When the module has run, and its weights are still there.

        Args:
            output: of the module.
            valid: bool [n, tokens], what is not padding.

        Raises:
            ValueError: the module does something else than rotated dot-product attention.
        """
        if missing := [name for name in PROJECTIONS if name not in self.projected]:
            raise ValueError(f"{type(self.attention).__name__} does not call its {', '.join(missing)}. {_REMEDY}")
        self._ranks = getattr(self.attention.q_proj.weight, "device_mesh", None)  # tensor-parallel: fsdp is undone here
        self.query, self.key = (_heads(self.attention, name, self.projected[f"{name}_proj"]) for name in "qk")
        if self.attention not in _checked and self.before is None:
            last = valid & (valid.flip(1).cumsum(1).flip(1) == 1)
            self._check(output[0] if isinstance(output, tuple) else output, KeptTokens.from_mask(last))
            _checked.add(self.attention)
        self.projected.clear()

    def _check(self, made: torch.Tensor, queries: KeptTokens) -> None:
        """Compares what the module made with what queries and keys lead to."""
        rows, flat = AttentionRows(self, queries), self.projected["v_proj"]
        value = flat.unflatten(-1, (rows.key.shape[1], -1)).transpose(1, 2).float()
        heads = torch.cat([weights @ value[:, group, None] for group, weights in enumerate(rows)], 1)
        expected = self.attention.o_proj(heads.transpose(1, 2).flatten(2).to(flat.dtype))
        valid = queries.valid.to(expected.device)
        expected, found = expected[valid].float(), queries.gather(made)[valid].float()
        error = (expected - found).norm() / found.norm().clamp(min=1e-12)
        if not error <= TOLERANCE.get(flat.dtype, 5e-2):
            raise ValueError(
                f"attention of {type(self.attention).__name__} cannot be read from its queries and keys: recomputed "
                f"outputs are off by {float(error):.1%}. {_REMEDY}"
            )

    def paid(self, queries: torch.Tensor) -> torch.Tensor:
        """What the marked tokens attend to, mean over heads and summed over them: bool -> float32 [n, width]."""
        return self.paid_to_all(queries)[:, -queries.shape[1] :]

    def paid_to_all(self, queries: torch.Tensor) -> torch.Tensor:
        """Like :meth:`paid`, keys of earlier calls included and first: float32 [n, keys]."""
        columns = KeptTokens.from_mask(queries)
        read = AttentionRows(self, columns)
        asked = columns.valid.to(read.query.device, torch.float32)
        paid = [torch.einsum("nq,nhqk->nk", asked, weights) for weights in read]
        return self._mean(sum(paid[1:], paid[0]), read.query.shape[1])

    def _mean(self, total: torch.Tensor, heads: int) -> torch.Tensor:
        """Over all heads; where they are shared out over tensor-parallel ranks, all ranks get the same."""
        if self._ranks is None:
            return total / heads
        ranks = self._ranks.get_group("tp") if self._ranks.ndim > 1 else self._ranks.get_group()
        whole = torch.cat([total.flatten(), total.new_tensor([heads])])
        torch.distributed.all_reduce(whole, group=ranks)
        return whole[:-1].view_as(total) / whole[-1]


PROJECTIONS = ("q_proj", "k_proj", "v_proj")
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


def _heads(attention: nn.Module, which: str, flat: torch.Tensor) -> torch.Tensor:
    """Queries ("q") or keys ("k") before rotation, from their projection: [n, tokens, heads, head size]."""
    size = attention.head_dim
    norm = getattr(attention, f"{which}_norm", None)
    over_all = norm is not None and getattr(norm, "weight", torch.empty(size)).shape[-1] == flat.shape[-1] != size
    if over_all:
        flat = norm(flat)
    heads = flat.unflatten(-1, (-1, size))
    return heads if norm is None or over_all else norm(heads)


def _cached(attention: nn.Module, cache: Any) -> torch.Tensor | None:
    """The keys of earlier turns that the module is about to see."""
    layers, index = getattr(cache, "layers", ()), getattr(attention, "layer_idx", None)
    keys = layers[index].keys if index is not None and index < len(layers) else None
    return keys if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[2] > 0 else None


def watch(
    attention: nn.Module, valid: Callable[[], torch.Tensor | None], keep: Callable[[AttentionCall], None]
) -> Callable[[], None]:
    """Hands every call of a module on to ``keep``; returns what ends it.

    Args:
        valid: what is not padding among the tokens of the call, bool [n, tokens]; None for calls that are not kept.
    """
    running: list[AttentionCall] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        running[:] = [] if valid() is None else [AttentionCall(module, call_arguments(module, args, kwargs))]

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if running:
            call = running.pop()
            call.finish(output, valid())
            keep(call)

    def projecting(name: str) -> Callable[..., None]:
        def projected(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if running:
                running[0].projected[name] = output

        return projected

    handles = [getattr(attention, name).register_forward_hook(projecting(name)) for name in PROJECTIONS]
    handles += [attention.register_forward_pre_hook(before, with_kwargs=True), attention.register_forward_hook(after)]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end
