"""The model card of a checkpoint of heads."""

from __future__ import annotations

from dyvte.heads.config import ExitHeadsConfig


def model_card(config: ExitHeadsConfig, parameters: int) -> str:
    """The README.md of a checkpoint: what it is for, how to use it, how it was made.

    Args:
        parameters: how many the heads have.
    """
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
        'heads = dyvte.ExitHeads.from_pretrained("path/to/this/checkpoint")',
        "with dyvte.visual_exit(model, dyvte.LearnedExit(heads)) as exits:",
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
    for title, values in (("How the threshold was chosen", config.calibration), ("Training", config.training)):
        shown = {k: v for k, v in (values or {}).items() if isinstance(v, (str, int, float))}
        if shown:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [
                f"| {key} | {value:.6g} |" if isinstance(value, float) else f"| {key} | {value} |"
                for key, value in shown.items()
            ]
    return "\n".join(lines) + "\n"
