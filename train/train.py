"""Exit heads for a model: trace, fit, calibrate, card.

::

    python train/train.py model=MODEL data=train.yaml held_out=held-out.yaml output=checkpoints/my-heads
    torchrun --nproc_per_node 8 train/train.py ...      # deepspeed and accelerate launch do as well
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT train/train.py ...

The same command goes on after an interruption, with any number of ranks. ``--help`` explains every key.
"""

from __future__ import annotations

import json

from dyvte.cli.arguments import read_arguments
from dyvte.cli.faults import faults
from dyvte.config import TrainConfig
from dyvte.data import load_samples, read_config
from dyvte.loading import load_mllm, needs_group
from dyvte.ranks import Ranks
from dyvte.tracking import Tracker
from dyvte.training import recipes
from dyvte.training.calibrate import check_enough, compare
from dyvte.training.cost import told
from dyvte.training.fit import fit_heads
from dyvte.training.store import load_traces


def main(config: TrainConfig, ranks: Ranks) -> None:
    # What can be wrong without a model is said before one is loaded.
    recipes.check_promise(config, config.held_out)
    sets = {"train": config.data} | ({"held-out": config.held_out} if config.held_out else {})
    samples = {name: load_samples(read_config(data)) for name, data in sets.items()}
    if config.alpha is not None:
        check_enough(len(samples["held-out"]), config.alpha, config.delta)
    work = recipes.work_folder(config)

    with Tracker(config.tracking, work, vars(config), ranks) as tracker:
        mllm = load_mllm(config, ranks)
        if config.mode == "online":  # trace, learn, forget; then trace the held-out samples, and calibrate
            heads = recipes.learn_online(mllm, samples["train"], samples.get("held-out"), config, ranks, tracker)
            recipes.write_heads(heads, config.output, ranks, tracker)
            return

        # One frozen pass per sample says what every exit layer would do to its answer. Ranks share the units of the
        # plan; finished units stay.
        for name, data in sets.items():
            recipes.trace_data(mllm, data, work / name, config, ranks, tracker, samples[name])
        recipes.release(mllm)

        # Heads learn from the traces, which stay on the disk; the model is not needed any more.
        traces = load_traces(work / "train")
        held_out = load_traces(work / "held-out") if config.held_out else None
        recipes.check_split(traces, held_out, config)
        heads = fit_heads(traces, config.fit, ranks.first, work / "fit", ranks.device, tracker.epochs("fit"))

        # The boldest threshold whose bound on held-out samples keeps the promise; then weights, config and card.
        heads = recipes.finish(heads, held_out, config, config.output, ranks, tracker)

    if ranks.first and held_out is not None:
        found = compare(heads, held_out)
        print(json.dumps({key: found[key] for key in ("samples", "threshold", "learned", "oracle")}, indent=2))


if __name__ == "__main__":
    config = read_arguments(TrainConfig, prog="train/train.py")
    with faults(), Ranks.launched(config.device, group=needs_group(config)) as ranks:
        if not told(config, ranks):
            main(config, ranks)
