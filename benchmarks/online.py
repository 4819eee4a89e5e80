"""Online mode against offline training: held-out log loss and AUROC on the reference MLLM, over several seeds.

Scenes are traced once, into runs/online (a run that was stopped goes on), and every seed learns from the same traces:
offline in epochs, online as ``train_online`` would, round by round from a buffer, with the rows read from the disk
where they would be traced.

Settings are chosen with ``--choose``: on a fifth of the scenes to train on, which then trains nothing.

    python benchmarks/online.py                                     # some minutes on two cores
    python benchmarks/online.py --choose --updates 4 8 16 --settling 0 16
    python benchmarks/online.py --train 500 --held-out 300 --seeds 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import record
from transformers import AutoModelForImageTextToText, AutoProcessor

from dyvte.config import FitSettings, OnlineSettings
from dyvte.data import load_samples
from dyvte.heads import ExitHeads
from dyvte.training.epochs import split
from dyvte.training.fit import fit_heads, heads_config, quality, traces_fingerprint
from dyvte.training.online_rounds import OnlineRounds
from dyvte.training.parallel import Group
from dyvte.training.replay import Stream
from dyvte.training.state import TrainingState
from dyvte.training.store import TraceSet, load_traces
from dyvte.training.units import TENSORS
from dyvte.training.write import write_traces

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "checkpoints/reference-mllm"
Way = Callable[[TraceSet, FitSettings], ExitHeads]
OFFLINE, ONLINE = FitSettings(epochs=30), OnlineSettings()


def traced(name: str, split: str, count: int, seed: int) -> TraceSet:
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    samples = load_samples({"scenes": {"split": split, "n": count, "seed": seed}})
    folder = ROOT / f"runs/online/{name}-{count}"
    return load_traces(write_traces(model, AutoProcessor.from_pretrained(MODEL), samples, folder, batch_size=32))


def online(traces: TraceSet, settings: FitSettings, **changes: int) -> ExitHeads:
    """What ``train_online`` does once the samples are known to be held out."""
    config = heads_config(traces.provenance, settings, traces.num_layers, traces.state.shape[-1] // 2)
    group, how = Group.here(), replace(ONLINE, **changes)

    def trace(batch: Sequence[int]) -> list[dict[str, Any]]:
        columns = {name: getattr(traces, name)[torch.tensor(batch)] for name in TENSORS}
        columns["state"] = columns["state"].flatten(1)
        rows = [{name: columns[name][row].numpy() for name in TENSORS} for row in range(len(batch))]
        return [row | {"id": str(i), "dense_nll": float(row["dense_nll"])} for row, i in zip(rows, batch)]

    def stream(indices: torch.Tensor) -> Stream:
        sizes = {"round_size": how.round_size, "batch_size": how.round_size, "seed": settings.seed}
        return Stream(range(len(traces)), indices.tolist(), trace, group, **sizes)

    validation, training = split(len(traces), settings)
    rounds = OnlineRounds(config, settings, how, group, stream(training), stream(validation))
    with tempfile.TemporaryDirectory() as folder:
        return rounds.run(TrainingState(Path(folder), {"traces": traces_fingerprint(traces)}, group), True, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--choose", action="store_true", help="leave the held-out scenes alone; writes no result")
    parser.add_argument("--buffers", type=int, nargs="+", default=[512, 8192], help="traces kept to learn from again")
    parser.add_argument("--updates", type=int, nargs="+", default=[ONLINE.updates], help="steps after each round")
    parser.add_argument("--settling", type=int, nargs="+", default=[ONLINE.settling], help="passes over what is kept")
    given = parser.parse_args()
    torch.set_num_threads(1)
    train = traced("train", "train", given.train, 51)
    if given.choose:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(99)).split(len(train) * 4 // 5)
        train, held_out = train.select(order[0]), train.select(order[1])
    else:
        held_out = traced("held-out", "dev", given.held_out, 52)
    ways: dict[str, Way] = {"offline": fit_heads}
    for buffer, updates, settling in itertools.product(given.buffers, given.updates, given.settling):
        name = f"online, buffer {buffer}, {updates} updates, settling {settling}"
        ways[name] = partial(online, buffer=buffer, updates=updates, settling=settling)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for seed in range(given.seeds):
        for name, way in ways.items():
            found[name].append(quality(way(train, replace(OFFLINE, seed=seed)), held_out)["mean"])
            print(name, seed, found[name][-1], flush=True)
    means = {
        name: {key: sum(row[key] for row in rows) / len(rows) for key in ("auroc", "log_loss")}
        for name, rows in found.items()
    }
    result = {
        "command": " ".join(["python benchmarks/online.py", *sys.argv[1:]]),
        "train": len(train),
        "held_out": len(held_out),
        "weights": train.provenance["weights"],
        "offline": asdict(OFFLINE),
        "online": asdict(ONLINE),
        "seeds": found,
        "mean": means,
        "log_loss_above_offline": {
            name: mean["log_loss"] - means["offline"]["log_loss"] for name, mean in means.items() if name != "offline"
        },
    }
    if given.choose:
        print(json.dumps(result["mean"], indent=2))
    else:
        record("online", result)


if __name__ == "__main__":
    main()
