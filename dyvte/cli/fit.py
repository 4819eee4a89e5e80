"""Train exit heads from traces, and choose the threshold that keeps a promise."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dyvte.cli.arguments import read_arguments
from dyvte.config import FitConfig

EXAMPLES = (
    "dyvte fit configs/train.yaml alpha=0.02 output=runs/heads",
    "dyvte fit traces=runs/traces/train calibration=runs/traces/held-out output=runs/heads",
)


def main(arguments: Sequence[str]) -> None:
    """Seconds on a CPU; the MLLM is not needed."""
    run(read_arguments(FitConfig, arguments, prog="dyvte fit", examples=EXAMPLES))


def run(config: FitConfig) -> None:
    from dyvte.cli.loading import set_threads
    from dyvte.cli.outputs import check_folder
    from dyvte.training.calibrate import calibrate, check_enough, compare
    from dyvte.training.fit import fit_heads, quality
    from dyvte.training.held_out import check_held_out
    from dyvte.training.store import load_traces

    check_folder(config.output)
    set_threads(config.threads)
    if config.alpha is None:
        fit_heads(load_traces(*as_list(config.traces)), config.fit).save_pretrained(config.output)
        return
    if config.calibration is None:
        raise ValueError("a promise needs held-out traces: set calibration=FOLDER, or alpha=null for none")
    held_out = load_traces(*as_list(config.calibration))
    check_enough(len(held_out), config.alpha, config.delta)
    traces = load_traces(*as_list(config.traces))
    check_held_out(traces.content.sketch(), held_out.content, config.shared_images)
    heads = fit_heads(traces, config.fit)
    calibrate(heads, held_out, config.alpha, config.delta, config.shared_images)
    heads.config.training |= {f"calibration_{k}": v for k, v in quality(heads, held_out)["mean"].items()}
    heads.save_pretrained(config.output)
    result = compare(heads, held_out)
    print(json.dumps({key: result[key] for key in ("samples", "threshold", "learned", "oracle")}, indent=2))


def as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]
