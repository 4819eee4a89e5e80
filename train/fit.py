"""Exit heads from traces, with the threshold that keeps the promise on held-out traces.

::

    python train/fit.py traces=runs/traces/train calibration=runs/traces/held-out output=checkpoints/my-heads
"""

from __future__ import annotations

import sys

from dyvte.cli.arguments import read_arguments
from dyvte.config import FitConfig
from dyvte.ranks import Ranks
from dyvte.training import recipes
from dyvte.training.fit import fit_heads
from dyvte.training.store import load_traces


def main(config: FitConfig, ranks: Ranks) -> None:
    recipes.check_promise(config, config.calibration)
    traces = load_traces(*recipes.listed(config.traces))
    held_out = None if config.alpha is None else load_traces(*recipes.listed(config.calibration))
    recipes.check_split(traces, held_out, config)
    heads = fit_heads(traces, config.fit, progress=ranks.first)
    recipes.finish(heads, held_out, config, config.output, ranks)


if __name__ == "__main__":
    config = read_arguments(FitConfig, prog="train/fit.py")
    try:
        with Ranks.launched() as ranks:
            main(config, ranks)
    except ValueError as error:
        sys.exit(f"train/fit.py: {error}")
