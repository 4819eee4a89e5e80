"""The model card of a checkpoint of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyvte.heads.config import ExitHeadsConfig
from dyvte.promise import Promise


def model_card(config: ExitHeadsConfig, parameters: int, together: Promise | None = None) -> str:
    """The README.md of a checkpoint: what it is for, how to use it, how it was made.

    Args:
        parameters: how many the heads have.
        together: the promise of the heads on top of a pruning, which they do not keep alone.
    """
    promise = config.promise if together is None else together
    base = config.base_model or "an unrecorded base model"
    lines = [
        "---",
        "library_name: dyvte",
        "tags: [dyvte, visual-token-exit]",
        *([f"base_model: {config.base_model}"] if config.base_model else []),
        "---",
        f"# Exit heads for {base}",
        "",
        f"{parameters:,} parameters that read the text state after each of the {config.num_layers} decoder layers and "
        "decide, per sample, when the visual tokens can leave. The base model stays as it is.",
        "",
        "```python",
        "import dyvte",
        "",
        'with dyvte.reduce_tokens(model, dyvte.load("path/to/this/checkpoint")) as exits:',
        "    output = model.generate(**inputs)",
        "exits.layers  # the exit layer of each sample",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base} (revision {config.base_revision or 'not recorded'}) |",
        f"| weights | {(config.identity or {}).get('weights', 'not recorded')} |",
        f"| form | {config.form}, width {config.width} |",
        f"| text state | {config.text_state} |",
        f"| lookahead | {config.lookahead} |",
        f"| label rule | {config.label_rule} |",
        f"| threshold | {config.threshold:.6g} |",
        f"| guard | {'none' if config.guard is None else f'{config.guard:g} of usual samples pass'} |",
        f"| dyvte | {config.dyvte_version} |",
    ]
    if promise is not None:
        lines += ["", "## The promise", "", *promise_rows(promise)]
    shown = {k: v for k, v in (config.training or {}).items() if isinstance(v, (str, int, float))}
    if shown:
        lines += ["", "## Training", "", *_table(shown)]
    return "\n".join(lines) + "\n"


def promise_rows(promise: Promise) -> list[str]:
    """A promise in a sentence and a table, as lines of Markdown."""
    return [
        f"With {100 * (1 - promise.delta):g} % confidence at most {100 * promise.alpha:g} % of the answers differ from "
        "the dense model's, on samples like those of the calibration.",
        "",
        *_table(
            promise.setting
            | {
                "alpha": promise.alpha,
                "delta": promise.delta,
                "samples": promise.samples,
                "risk": promise.risk,
                "bound": promise.bound,
                "visual-token layers left out": promise.saved,
                "rule": promise.rule,
                "content": promise.content or "not recorded",
                "images shared with training": "not known" if promise.shared_images is None else promise.shared_images,
            }
        ),
    ]


def _table(values: Mapping[str, Any]) -> list[str]:
    rows = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.values())
    return ["| | |", "|---|---|", *(f"| {key} | {row} |" for key, row in zip(values, rows))]
