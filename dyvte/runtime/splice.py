"""The visual mask of models that splice image embeddings into the text themselves (LLaVA's code base and its kin)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dyvte.runtime.calls import IMAGES
from dyvte.runtime.locate import underlying_model
from dyvte.runtime.override import override


class SplicedVisualMask:
    """The visual mask of a model in the style of the LLaVA code, for ``visual_mask=``.

    Such models put one sentinel (-200) per image into ``input_ids`` and replace it by many embeddings in a method of
    their own, which also splices ``labels``. While attached, that method is called with labels that number the columns
    of ``input_ids``: what it inserts it marks with -100. So the visual tokens are where the new labels are -100 and the
    new attention mask is True, and everything else is known to come from which column. The model gets back what it
    would have got without; images are encoded once.

    Args:
        model: the model with the method.
        method: its name, taking ``input_ids``, ``attention_mask`` and ``labels``.
        mask_at: where in the tuple it returns the new attention mask is; 2 in LLaVA, VILA-1.5 and Eagle.
        labels_at: where the new labels are, 5 there. NVILA's ``_embed`` returns (embeddings, labels, mask): 2 and 1.

    Raises:
        ValueError: there is no such method, or it does not take what it must.
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
        self.columns: torch.Tensor | None = None

    def __call__(self, call: dict[str, Any]) -> torch.Tensor:
        if self.latest is not None:
            return self.latest
        ids = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
        images = any(value is not None for name, value in call.items() if name.startswith(IMAGES))
        if ids is None or images:
            raise ValueError(
                f"{self.method} was not called before the decoder: call the model with input_ids and images, or pass "
                "visual_mask as a bool tensor"
            )
        # Without images some models embed the ids themselves.
        entered = ids if call.get("inputs_embeds") is None else call["inputs_embeds"]
        return torch.zeros(entered.shape[:2], dtype=torch.bool, device=entered.device)

    def forget(self) -> None:
        """The outermost call has ended; the next one may be about another prompt."""
        self.latest = self.columns = None

    def expand(self, grid: torch.Tensor, fill: int) -> torch.Tensor:
        """Something given for ``input_ids`` [batch, ids], as the decoder's sequence has it; ``fill`` elsewhere."""
        columns = self.columns.to(grid.device)
        return torch.where(columns >= 0, grid.gather(1, columns.clamp(min=0)), fill)

    def attach(self) -> Callable[[], None]:
        """Begins to watch the method; returns what ends it."""
        splice = getattr(self.model, self.method)
        restore = override(self.model, self.method, self._watching(splice))

        def detach() -> None:
            restore()
            self.forget()

        return detach

    def _watching(self, splice: Callable[..., tuple]) -> Callable[..., tuple]:
        signature = inspect.signature(splice)

        @functools.wraps(splice)
        def watched(*args: Any, **kwargs: Any) -> tuple:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            ids, own = given["input_ids"], given["labels"]
            given["labels"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
            result = list(splice(*bound.args, **bound.kwargs))
            columns, mask = result[self.labels_at], result[self.mask_at]
            if mask is None and bool((columns[:, [0, -1]] == -100).any()) and len(columns) > 1:
                raise ValueError(
                    f"{self.method} made no attention mask, so padding cannot be told from the visual tokens that some "
                    "of the sequences begin or end with: pass attention_mask"
                )
            valid = torch.ones_like(columns, dtype=torch.bool)
            if mask is not None:
                valid = mask[:, -columns.shape[1] :].bool().to(columns.device)
            self.latest = (columns == -100) & valid
            self.columns = torch.where(valid & (columns != -100), columns, -1)
            result[self.labels_at] = None if own is None else self.expand(own, -100)
            return tuple(result)

        return watched
