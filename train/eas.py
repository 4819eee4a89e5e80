"""EAS for a model and a task: which attentions it does not need, and adapters in their place.

::

    python train/eas.py model=MODEL data=configs/data/scenes.yaml output=checkpoints/my-adapters eas.skip=4
    torchrun --nproc_per_node 8 train/eas.py ...      # deepspeed and accelerate launch do as well
    python train/eas.py model=MODEL adapter=MY-LORA ...      # on a peft adapter, which stays as it is

The same command goes on after an interruption. ``--help`` explains every key.
"""

from __future__ import annotations

import json
from pathlib import Path

from dyvte.cli.arguments import read_arguments
from dyvte.cli.faults import faults
from dyvte.data import load_samples, read_config
from dyvte.eas_config import EASConfig
from dyvte.loading import load_mllm
from dyvte.ranks import Ranks
from dyvte.tracking import Tracker
from dyvte.training.eas import train_eas
from dyvte.training.parallel import Group


def main(config: EASConfig, ranks: Ranks) -> None:
    if config.shard not in ("none", "device_map"):
        raise ValueError(f"adapters need the model whole on each rank, not shard={config.shard}: use shard=none")
    samples = load_samples(read_config(config.data))  # what is wrong with it is said before a model is loaded
    with Tracker(config.tracking, Path(config.output), vars(config), ranks) as tracker:
        mllm = load_mllm(config, ranks)
        adapters = train_eas(mllm, samples, config, Group.here(ranks.device), tracker.epochs, ranks.first)
        if ranks.first:
            adapters.save(config.output)
            told = adapters.config.training
            print(json.dumps({"output": config.output, "layers": told["layers"], "loss": told["loss"]}))
        ranks.wait()


if __name__ == "__main__":
    config = read_arguments(EASConfig, prog="train/eas.py")
    with faults(), Ranks.launched(config.device) as ranks:
        main(config, ranks)
