"""What the rows of a policy come to, beside the dense rows of the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dyvte.evaluation.metrics import AnswerMetric


def summarise(
    scorer: AnswerMetric, rows: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], num_layers: int
) -> dict[str, Any]:
    """What the rows of a policy come to, beside the dense rows of the same samples, over all and per kind."""
    by_kind: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_kind.setdefault(row["kind"], []).append(i)
    whole = _summary_of(scorer, rows, dense, num_layers)
    if len(by_kind) > 1:
        whole["by_kind"] = {
            kind: _summary_of(scorer, [rows[i] for i in index], [dense[i] for i in index], num_layers)
            for kind, index in sorted(by_kind.items())
        }
    return whole


def _summary_of(
    scorer: AnswerMetric, rows: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], num_layers: int
) -> dict[str, Any]:
    n = len(rows)
    exits = torch.tensor([row["exit_layer"] for row in rows])
    visual = torch.tensor([row["visual_tokens"] for row in rows], dtype=torch.float64)
    seen = [row.get("visual_places", row["visual_tokens"] * row["exit_layer"]) for row in rows]
    agrees = torch.tensor([row["agrees"] for row in rows], dtype=torch.float64)
    summary: dict[str, Any] = {"n": n}
    scored = [row for row in rows if row["answers"]]
    if scored:
        scorer.reset()
        scorer.update(*([row[key] for row in scored] for key in ("answer", "answers", "choices")))
        summary |= {name: _number(value) for name, value in scorer.compute().items() if name != "n"}
        scorer.reset()

    def mean(key: str, of: Sequence[Mapping[str, Any]]) -> float:
        return sum(row[key] for row in of) / n

    agreement = agrees.mean().item()
    return summary | {
        "agreement": agreement,
        "agreement_stderr": (agreement * (1 - agreement) / n) ** 0.5,
        "disagreements": int(n - agrees.sum()),
        "mean_exit_layer": exits.double().mean().item(),
        "exit_layers": torch.bincount(exits - 1, minlength=num_layers).tolist(),
        "visual_layers_removed": _number(1 - sum(seen) / (visual.sum() * num_layers)),
        "flops": mean("flops", rows),
        "flops_removed": 1 - mean("flops", rows) / mean("flops", dense),
        "kv_bytes": mean("kv_bytes", rows),
        "kv_bytes_removed": 1 - mean("kv_bytes", rows) / mean("kv_bytes", dense),
    }


def _number(value: torch.Tensor) -> float | None:
    """A float that JSON can hold: what is not defined becomes null."""
    return None if torch.isnan(value) else value.item()
