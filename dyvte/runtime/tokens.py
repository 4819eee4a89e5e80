"""Where the decoder layers and the visual tokens of a model are.

Everything here asks the model or its config; nothing is a table of architectures.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VISUAL_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
DECODER_NAMES = ("language_model", "text_model", "llm", "decoder", "model")


def underlying_model(model: nn.Module) -> nn.Module:
    """The model whose ``forward`` runs: inside a peft wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def override(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Sets an attribute of this module alone; returns what puts back the one that it had, or its class's."""
    own = vars(module).get(name)
    setattr(module, name, value)

    def restore() -> None:
        if own is None:
            vars(module).pop(name, None)
        else:
            setattr(module, name, own)

    return restore


def full_precision(device: torch.device) -> AbstractContextManager:
    """Where text states are read and decided on: as they were when the heads were trained, whatever autocast is on."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def find_decoder(model: nn.Module, decoder: str | nn.Module | None = None) -> nn.Module:
    """The module that owns the list of decoder layers.

    Asks ``model.get_decoder()`` and, since that may return a wrapper, goes on inwards until there is a ``.layers``.

    Args:
        decoder: the module itself, or the dotted path to it such as ``"language_model.model"``, where it is known.

    Raises:
        ValueError: no module with ``.layers`` is found, or its layers cannot do without the visual tokens.
    """
    if decoder is not None:
        return _check_layers(_named_decoder(model, decoder))
    module = model.get_decoder() if hasattr(model, "get_decoder") else model
    for start in (module, model):
        seen: set[int] = set()
        while start is not None and id(start) not in seen:
            if _has_layers(start):
                return _check_layers(start)
            seen.add(id(start))
            inner = (getattr(start, name, None) for name in DECODER_NAMES)
            start = next((m for m in inner if isinstance(m, nn.Module) and id(m) not in seen), None)
    raise ValueError(
        f"no decoder layers found in {type(model).__name__}: neither get_decoder() nor "
        f"{', '.join('.' + name for name in DECODER_NAMES)} lead to a module with a ModuleList .layers. "
        "Name it: decoder='path.to.it'"
    )


def _has_layers(module: nn.Module | None) -> bool:
    return isinstance(getattr(module, "layers", None), nn.ModuleList) and len(module.layers) > 0


def _named_decoder(model: nn.Module, decoder: str | nn.Module) -> nn.Module:
    if not isinstance(decoder, (str, nn.Module)):
        raise TypeError(f"decoder must be a module or the dotted path to it, not {type(decoder).__name__}")
    module: nn.Module | None = decoder if isinstance(decoder, nn.Module) else model
    if isinstance(decoder, str):
        for name in decoder.split("."):
            module = getattr(module, name, None)
    if not _has_layers(module):
        owners = [path for path, inner in model.named_modules() if _has_layers(inner)]
        named = repr(decoder) if isinstance(decoder, str) else type(decoder).__name__
        raise ValueError(
            f"decoder {named} has no ModuleList .layers in {type(model).__name__}: these have: {', '.join(owners)}"
        )
    return module


def _check_layers(decoder: nn.Module) -> nn.Module:
    for index, layer in enumerate(decoder.layers):
        takes = inspect.signature(layer.forward).parameters
        if "per_layer_input" in takes:
            why = "takes an input of its own for every token"
        elif "cross_attention_states" in takes:
            why = "sees images through cross attention, so there are no visual tokens to withdraw"
        else:
            continue
        raise ValueError(f"decoder layer {index} of {type(decoder).__name__} {why}: use the model without the exit")
    return decoder


def smallest_exit(model: nn.Module, decoder: nn.Module) -> int:
    """The smallest exit layer: some decoders add features to the visual tokens after their first layers (deepstack).

    Raises:
        ValueError: the decoder takes such features, but the config does not say for which layers.
    """
    config = getattr(model, "config", None)
    configs = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))] if config is not None else []
    for found in configs:
        indexes = getattr(found, "deepstack_visual_indexes", None)  # as many layers, from the first on
        if indexes is not None:
            return max(len(indexes), 1)
        pairs = getattr(found, "deepstack_layer_map", None)  # (layer of the vision tower, decoder layer)
        if pairs is not None:
            more = getattr(found, "spatial_target_layers", None) or ()
            return max([layer for _, layer in pairs] + list(more)) + 1
    takes = [name for name in inspect.signature(decoder.forward).parameters if name.startswith("deepstack")]
    if takes:
        raise ValueError(
            f"{type(decoder).__name__} takes {takes[0]}, features for visual tokens of some layers, but the config "
            "does not say which (deepstack_visual_indexes): exits before the last of them would be wrong. Add it"
        )
    return 1


def visual_token_ids(model: nn.Module) -> list[int]:
    """The ids that stand for visual tokens in ``input_ids``, as the model's config names them (images and videos).

    Raises:
        ValueError: the config names none.
    """
    config = getattr(model, "config", None)
    ids = {getattr(config, name, None) for name in VISUAL_ID_NAMES}
    ids = sorted(i for i in ids if isinstance(i, int) and i >= 0)
    if not ids:
        raise ValueError(
            f"the config of {type(model).__name__} names no visual token id ({', '.join(VISUAL_ID_NAMES)}): "
            "pass visual_mask, a bool tensor [batch, sequence] that is True at the visual tokens"
        )
    return ids


def visual_tokens(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Where the visual tokens are: ids [batch, sequence] -> bool of that shape.

    Raises:
        ValueError: the config names no visual token id.
    """
    return torch.isin(input_ids, torch.tensor(visual_token_ids(model), device=input_ids.device))


@dataclass(frozen=True)
class Columns:
    """Some columns of a [batch, sequence] grid, compacted to the right.

    Attributes:
        index: long [batch, width], the column each compact place comes from; distinct within a row.
        valid: bool [batch, width]; False on the left of rows that keep fewer columns than ``width``.
        ragged: whether any place is not valid.
    """

    index: torch.Tensor
    valid: torch.Tensor
    ragged: bool
    _reordered: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, keep: torch.Tensor) -> Columns:
        """Columns where ``keep`` (bool [batch, sequence]) is True, in order; at least one place wide."""
        counts = keep.sum(1)
        width, fewest = max(int(counts.max()), 1), int(counts.min())
        index = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -width:]
        return cls(index, keep.gather(1, index), ragged=fewest < width)

    def rows(self, rows: torch.Tensor) -> Columns:
        """The same columns for some rows of the batch."""
        return Columns(self.index[rows], self.valid[rows], self.ragged)

    def reordered(self, order: torch.Tensor) -> Columns:
        """Like :meth:`rows`; the same object for the same ``order``, so that layers go on sharing their columns."""
        if not self._reordered or self._reordered[0] is not order:
            self._reordered[:] = order, self.rows(order.to(self.index.device))
        return self._reordered[1]

    def take(self, grid: torch.Tensor) -> torch.Tensor:
        """[batch or 1, sequence, ...] -> [batch, width, ...]."""
        index = self.index.to(grid.device)
        if len(grid) == 1:
            return grid[0][index]
        return grid[torch.arange(len(index), device=grid.device)[:, None], index]


@dataclass(frozen=True)
class Prompt:
    """The tokens of a batch of prompts.

    Attributes:
        visual: bool [batch, sequence], the visual tokens.
        text: bool [batch, sequence], everything else that is not padding (answers, when traced, included).
        tail: the text tokens of the prompt after its last visual token; the last one is the last prompt token.
        can_leave: bool [batch] on the CPU; False where there is nothing to withdraw (no visual token) or where the
            prompt ends in a visual token, whose own output is needed.
    """

    visual: torch.Tensor
    text: torch.Tensor
    tail: Columns
    can_leave: torch.Tensor

    @classmethod
    def of(cls, visual: torch.Tensor, valid: torch.Tensor, answer: torch.Tensor | None = None) -> Prompt:
        """From bool [batch, sequence] masks: the visual tokens, the tokens that are not padding, the answer's."""
        visual, text = visual & valid, ~visual & valid
        column = torch.arange(visual.shape[1], device=visual.device)
        last_visual = torch.where(visual, column, -1).amax(1, keepdim=True)
        tail = text & (column > last_visual)
        if answer is not None:
            tail &= ~answer
        can_leave = visual.any(1) & tail.any(1)
        return cls(visual, text, Columns.of(tail), can_leave.cpu())

    def visual_state(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The mean visual token of each sample as they enter the decoder: [batch, sequence, d] -> float32 [batch, d].

        Zeros where there are none.
        """
        weights = self.visual / self.visual.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bs,bsd->bd", weights.to(embeddings), embeddings).float()

    @functools.cached_property
    def reader(self) -> TextReader:
        """Reads the text states of the whole batch."""
        batch, length = self.visual.shape
        return TextReader(self.tail, torch.arange(batch, device=self.visual.device), length, whole=True)

    def text_state(self, hidden: torch.Tensor) -> torch.Tensor:
        """The text states of the whole batch, see :class:`TextReader`."""
        return self.reader(hidden)


class TextReader:
    """Reads text states off the output of a decoder layer, before the final norm.

    [mean of the text tokens after the last visual token, but for the last one; last prompt token], the recipe of DyVTE
    (arXiv 2411.19628). With a single text token there the mean has nothing to average: it is that token. Where to look
    is worked out once, so that a layer costs one gather of those tokens and one product.

    Args:
        tail: see :class:`Prompt`, for the samples to read.
        row: long [n], the row of the hidden states that each of them is in.
        length: of the hidden states.
        whole: whether these are all of their rows, in order.
    """

    def __init__(self, tail: Columns, row: torch.Tensor, length: int, whole: bool):
        index, valid = tail.index, tail.valid
        # Places that hold nothing look at the last token, with no weight.
        self.place = torch.where(valid, index, index[:, -1:])
        self.row = row[:, None].expand_as(index)
        rest, last = valid.float(), torch.zeros_like(valid, dtype=torch.float)
        last[:, -1], rest[:, -1] = 1, 0
        count = rest.sum(1, keepdim=True)
        mean = torch.where(count > 0, rest / count.clamp(min=1), last)
        self.weights = torch.stack([mean, last], 1)
        # Where the same number of tokens ends every sequence, as in a batch of one, they are a view and not a copy.
        end = torch.arange(length - index.shape[1], length, device=index.device)
        self.at_end = whole and bool((valid & (index == end)).all())

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, d] -> float32 [n, 2 * d]"""
        if self.weights.device != hidden.device:
            self.place, self.row, self.weights = (t.to(hidden.device) for t in (self.place, self.row, self.weights))
        tokens = hidden[:, -self.weights.shape[2] :] if self.at_end else hidden[self.row, self.place]
        with full_precision(hidden.device):
            return torch.bmm(self.weights, tokens.float()).flatten(1)


class SplicedVisualMask:
    """The visual mask of a model in the style of the LLaVA code, for ``visual_mask=``.

    Such models put one sentinel (-200) per image into ``input_ids`` and replace it by many embeddings in a method of
    their own, which also splices ``labels``. While attached, that method is called with labels of zeros where it gets
    none: it marks what it inserts with -100, so the visual tokens are where the new labels are -100 and the new
    attention mask is True. The model gets back what it would have got without; images are encoded once.

    Args:
        model: the model with the method.
        method: its name, taking ``input_ids``, ``attention_mask`` and ``labels``.
        mask_at: where in the tuple it returns the new attention mask is; 2 in LLaVA, VILA-1.5 and Eagle.
        labels_at: where the new labels are, 5 there. NVILA's ``_embed`` returns (embeddings, labels, mask): 2 and 1.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "prepare_inputs_labels_for_multimodal",
        mask_at: int = 2,
        labels_at: int = 5,
    ):
        self.model, self.method, self.mask_at, self.labels_at = underlying_model(model), method, mask_at, labels_at
        splice = getattr(self.model, method, None)
        if not callable(splice):
            raise ValueError(
                f"{type(self.model).__name__} has no method {method!r}: name the one that splices image features into "
                "the text, method='...'"
            )
        missing = {"input_ids", "attention_mask", "labels"} - set(inspect.signature(splice).parameters)
        if missing:
            raise ValueError(
                f"{method} takes no {', '.join(sorted(missing))}, so it cannot tell where it puts visual tokens: pass "
                "visual_mask as a bool tensor or a callable instead"
            )
        self.latest: torch.Tensor | None = None

    def __call__(self, call: dict[str, Any]) -> torch.Tensor:
        if self.latest is None:
            raise ValueError(
                f"{self.method} was not called before the decoder: call the model with input_ids and images, or pass "
                "visual_mask as a bool tensor"
            )
        return self.latest

    def attach(self) -> None:
        splice = getattr(self.model, self.method)
        self._restore = override(self.model, self.method, self._telling(splice))

    def detach(self) -> None:
        self._restore()
        self.latest = None

    def _telling(self, splice: Callable[..., tuple]) -> Callable[..., tuple]:
        signature = inspect.signature(splice)

        @functools.wraps(splice)
        def told(*args: Any, **kwargs: Any) -> tuple:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            ids = given["input_ids"]
            added = [name for name in ("labels", "attention_mask") if given[name] is None]
            if "labels" in added:
                given["labels"] = torch.zeros_like(ids)
            if "attention_mask" in added:
                given["attention_mask"] = torch.ones_like(ids, dtype=torch.bool)
            result = list(splice(*bound.args, **bound.kwargs))
            labels = result[self.labels_at]
            self.latest = (labels == -100) & result[self.mask_at][:, -labels.shape[1] :].bool()
            for name, place in (("labels", self.labels_at), ("attention_mask", self.mask_at)):
                if name in added:
                    result[place] = None
            return tuple(result)

        return told
