"""What heads learn from traces: where the visual tokens can leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dyvte.training.store import TraceSet

LEAST = 20  # traces
PART = 4096  # labels looked at at a time


def exit_labels(traces: TraceSet, rule: str = "agreement", index: Any = slice(None)) -> torch.Tensor:
    """Whether the visual tokens can leave, per sample and exit layer: bool [n, L].

    Args:
        rule: "agreement": every answer token is the dense model's; "original" (DyVTE): more than 99 % of them are, and
            the answer's NLL is below 1.03 times the dense one.
        index: of the samples to look at.
    """
    if rule == "agreement":
        return labels_of(rule, traces.agreement[index])
    return labels_of(rule, traces.agreement[index], traces.nll[index].float(), traces.dense_nll[index])


def labels_of(
    rule: str, agreement: torch.Tensor, nll: torch.Tensor | None = None, dense_nll: torch.Tensor | None = None
) -> torch.Tensor:
    """The labels of samples whose agreement and NLL [n, L] and dense NLL [n] are known, see :func:`exit_labels`."""
    if rule == "agreement":
        return agreement >= 1
    if rule == "original":
        return (agreement > 0.99) & (nll < 1.03 * dense_nll[:, None])
    raise ValueError(f"unknown label rule {rule!r}: choose agreement or original")


def check_labels(traces: TraceSet, rule: str, columns: list[int]) -> None:
    """Raises ``ValueError`` if there is nothing to learn from: too few traces, or labels that are all alike.

    Args:
        columns: e - 1 for the exit layers e that are decided.
    """
    if len(traces) < LEAST:
        raise ValueError(f"{len(traces)} traces are too few to train heads: trace at least some hundred samples")
    seen: set[bool] = set()
    for start in range(0, len(traces), PART):
        seen |= set(exit_labels(traces, rule, slice(start, start + PART))[:, columns].unique().tolist())
        if len(seen) == 2:
            return
    refuse_one_label({label: label in seen for label in (False, True)})


def refuse_one_label(seen: Mapping[bool, bool]) -> None:
    """Raises ``ValueError`` if only one label was seen."""
    if not all(seen.values()):
        raise ValueError(
            "every exit of every sample has the same label, so there is nothing to learn: "
            f"{'any fixed exit layer keeps all answers' if seen[True] else 'no exit keeps any answer'}"
        )
