"""Train exit heads from traces, and choose the threshold that keeps a promise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dyvte.cli.arguments import read_arguments
from dyvte.config import FitConfig

if TYPE_CHECKING:
    from dyvte.heads import ExitHeads

SHOWN = ("alpha", "delta", "samples", "risk", "bound", "saved")
EXAMPLES = (
    "dyvte fit configs/train.yaml alpha=0.02 output=runs/heads",
    "dyvte fit traces=runs/traces/train calibration=runs/traces/held-out output=runs/heads",
)


def main(arguments: Sequence[str]) -> None:
    """Seconds on a CPU; the MLLM is not needed."""
    run(read_arguments(FitConfig, arguments, prog="dyvte fit", examples=EXAMPLES))


def run(config: FitConfig) -> None:
    from dyvte.cli.outputs import check_folder
    from dyvte.ranks import Ranks
    from dyvte.training.cost import told
    from dyvte.training.recipes import fit

    check_folder(config.output)
    with Ranks.launched() as ranks:
        if told(config, ranks):
            return
        heads = fit(config, ranks)
        if ranks.first:
            print(promise_of(heads))


def promise_of(heads: ExitHeads) -> str:
    """What the calibration of heads came to, as JSON; without a promise, their threshold alone."""
    promise = heads.config.promise
    found = {} if promise is None else {name: getattr(promise, name) for name in SHOWN}
    return json.dumps({"threshold": heads.config.threshold} | found, indent=2)
