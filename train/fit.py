"""Exit heads from traces, with the threshold that keeps the promise on held-out traces.

::

    python train/fit.py traces=runs/traces/train calibration=runs/traces/held-out output=checkpoints/my-heads
"""

from __future__ import annotations

from pathlib import Path

from dyvte.cli.arguments import read_arguments
from dyvte.cli.faults import faults
from dyvte.config import FitConfig
from dyvte.ranks import Ranks
from dyvte.tracking import Tracker
from dyvte.training import recipes
from dyvte.training.cost import told
from dyvte.training.fit import fit_heads
from dyvte.training.store import load_traces


def main(config: FitConfig, ranks: Ranks) -> None:
    recipes.check_promise(config, config.calibration)
    traces = load_traces(*recipes.listed(config.traces))
    held_out = None if config.alpha is None else load_traces(*recipes.listed(config.calibration))
    recipes.check_split(traces, held_out, config)
    with Tracker(config.tracking, Path(config.output), vars(config), ranks) as tracker:
        states = Path("runs", Path(config.output).name, "fit")  # of the training, to go on from after an interruption
        heads = fit_heads(traces, config.fit, ranks.first, states, ranks.device, tracker.epochs("fit"))
        recipes.finish(heads, held_out, config, config.output, ranks, tracker)


if __name__ == "__main__":
    config = read_arguments(FitConfig, prog="train/fit.py")
    with faults(), Ranks.launched() as ranks:
        if not told(config, ranks):
            main(config, ranks)
