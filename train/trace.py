"""Traces of a data set: what every exit layer would do to every answer of a frozen model.

::

    torchrun --nproc_per_node 8 train/trace.py model=MODEL data=train.yaml output=runs/traces/train
"""

from __future__ import annotations

from pathlib import Path

from dyvte.cli.arguments import read_arguments
from dyvte.cli.faults import faults
from dyvte.config import TraceConfig
from dyvte.data import load_samples, read_config
from dyvte.loading import load_mllm, needs_group
from dyvte.ranks import Ranks
from dyvte.tracking import Tracker
from dyvte.training.cost import told
from dyvte.training.recipes import trace_data


def main(config: TraceConfig, ranks: Ranks) -> None:
    samples = load_samples(read_config(config.data))  # what is wrong with it is said before a model is loaded
    with Tracker(config.tracking, Path(config.output), vars(config), ranks) as tracker:
        mllm = load_mllm(config, ranks)
        trace_data(mllm, config.data, config.output, config, ranks, tracker, samples)


if __name__ == "__main__":
    config = read_arguments(TraceConfig, prog="train/trace.py")
    with faults(), Ranks.launched(config.device, group=needs_group(config)) as ranks:
        if not told(config, ranks):
            main(config, ranks)
