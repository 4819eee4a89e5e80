"""The text of the report's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyvte.report.runs import DENSE, Run

COLUMNS = [
    ("policy", "policy"),
    ("score", "score"),
    ("agreement", "same answer"),
    ("changed", "changed"),
    ("exit", "mean exit"),
    ("visual", "visual layers removed"),
    ("flops", "FLOPs removed"),
    ("cache", "KV cache removed"),
    ("prefill", "prefill time"),
    ("decoder", "its decoder part"),
    ("decode", "decode time"),
]
KIND_COLUMNS = [
    ("policy", "kind"),
    ("n", "samples"),
    ("dense", "dense score"),
    ("score", "score"),
    ("agreement", "same answer"),
    ("exit", "mean exit"),
    ("flops", "FLOPs removed"),
]


def table_row(name: str, values: Mapping[str, Any]) -> dict[str, str]:
    """The cells of :data:`COLUMNS` for a policy, or for a kind of question under it."""
    timing = values.get("timing") or {}
    decode = timing.get("decode_seconds") or {}
    score = values.get("score")
    error = values.get("stderr")
    return {
        "policy": name,
        "score": "–" if score is None else f"{100 * score:.1f}" + (f" ± {100 * error:.1f}" if error else ""),
        "agreement": f"{100 * values['agreement']:.1f} %",
        "changed": f"{values['disagreements']} of {values['n']}",
        "exit": f"{values['mean_exit_layer']:.2f}",
        "visual": _percent(values["visual_layers_removed"]),
        "flops": _percent(values["flops_removed"]),
        "cache": _percent(values["kv_bytes_removed"]),
        "prefill": f"× {timing['prefill_ratio']:.2f}" if timing else "–",
        "decoder": f"× {timing['decoder_ratio']:.2f}" if timing.get("decoder_ratio") else "–",
        "decode": f"× {decode['exit'] / decode[DENSE]:.2f}" if decode and decode[DENSE] > 0 else "–",
    }


def headline(values: Mapping[str, Any]) -> str:
    """What a policy does, in a sentence."""
    same = f"Answers stay the same in {100 * values['agreement']:.1f} % of {values['n']:,} questions"
    saved = f"{_percent(values['visual_layers_removed'])} of the layers' work on visual tokens is left out"
    timing = values.get("timing")
    time = f", and the first token takes {timing['prefill_ratio']:.2f} times as long" if timing else ""
    return f"{same} while {saved}{time}."


def kind_rows(run: Run, policy: str) -> list[dict[str, str]]:
    """The cells of :data:`KIND_COLUMNS`, kind by kind."""
    dense = run.policies[DENSE].get("by_kind") or {}
    return [
        table_row(kind, values) | {"n": str(values["n"]), "dense": table_row(kind, dense[kind])["score"]}
        for kind, values in (run.policies[policy].get("by_kind") or {}).items()
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of what a run was made with."""
    settings, versions, hardware = (run.summary[key] for key in ("settings", "versions", "hardware"))
    dense, threads = run.policies[DENSE], hardware["threads"]
    text = sum(row["text_tokens"] for row in run.rows[DENSE]) / max(len(run.rows[DENSE]), 1)
    visual = sum(row["visual_tokens"] for row in run.rows[DENSE]) / max(len(run.rows[DENSE]), 1)
    return [
        ("model", f"{settings['model_name'] or settings['model']['class']}, {settings['model']['dtype']}"),
        ("decoder", f"{run.layers} layers; {visual:.0f} visual and {text:.0f} text tokens per prompt"),
        ("samples", f"{dense['n']}, scored by {settings['metric'].replace('_', ' ')}"),
        ("hardware", f"{hardware['name']}, {threads} thread{'s' * (threads > 1)}, batch of {settings['batch_size']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
