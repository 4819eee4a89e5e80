"""Exits on top of a pruning, with one promise for both: what a declared path through prunings and thresholds saves.

Heads learn from traces under all prunings of the grid, other traces declare the path, a third set calibrates and a
fourth judges. Exits alone, and the pruning alone, are paths through the same grid. Whether promises are kept is asked
of 500 random splits of the last two sets.

    python benchmarks/together.py                 # hours on two cores; goes on where it stopped
    python benchmarks/together.py --share 0.01 --prunings 3 --alpha 0.2    # a small run, into runs/together-small
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from shapes import record

from dyvte.config import FitSettings, ModelConfig
from dyvte.data import load_samples
from dyvte.heads import ExitHeads
from dyvte.loading import load_mllm
from dyvte.promise import boldest_safe
from dyvte.training.calibrate import clopper_pearson
from dyvte.training.fit import fit_heads
from dyvte.training.store import TraceSet, load_traces
from dyvte.training.together import (
    THRESHOLD,
    GridPath,
    calibrate_together,
    declare_path,
    outcomes,
    prunings_of,
    save_together,
)
from dyvte.training.write import write_traces

ROOT = Path(__file__).parents[1]
GRID = ((2, 1.0), (4, 0.5), (3, 0.5), (2, 0.7), (2, 0.5), (3, 0.3), (2, 0.3), (1, 0.5), (2, 0.15))  # FastV's K, share
PRUNINGS = [{"fastv.layer": layer, "fastv.keep": keep} for layer, keep in GRID]
TRAIN = 2000  # samples a pruning, other ones for each
SETS = {"path": ("dev", 2000, 41), "calibration": ("dev", 4000, 42), "test": ("test", 4000, 43)}
ALPHAS, DELTA, SPLITS = (0.005, 0.01, 0.02, 0.05), 0.1, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the samples, for a small run")
    parser.add_argument("--prunings", type=int, default=len(PRUNINGS), help="how many of the grid, the first ones")
    parser.add_argument("--alpha", type=float, default=0.01, help="of the checkpoint that is written")
    parser.add_argument("--model", default=str(ROOT / "checkpoints/reference-mllm"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = options.share == 1 and options.prunings == len(PRUNINGS)
    work = ROOT / "runs" / ("together" if whole else "together-small")
    traces = trace(options.model, work, options.share, PRUNINGS[: options.prunings])
    train = load_traces(*traces["train"])
    if not (work / "heads/model.safetensors").exists():
        fit_heads(train, FitSettings(epochs=30, seed=0)).save_pretrained(work / "heads")
    heads = ExitHeads.from_pretrained(work / "heads")
    sets = {name: [load_traces(folder) for folder in traces[name]] for name in SETS}
    paths = declared_paths(heads, sets["path"])
    promise = calibrate_together(heads, sets["calibration"], paths["together"], options.alpha, DELTA)
    save_together(heads, promise, work / "checkpoint")
    result = {
        "command": "python benchmarks/together.py",
        "prunings": PRUNINGS,
        "samples": {"train": len(train)} | {name: len(some[0]) for name, some in sets.items()},
        "splits": SPLITS,
        "delta": DELTA,
        "promise": {"setting": promise.setting} | {k: getattr(promise, k) for k in ("alpha", "risk", "bound", "saved")},
        "paths": judge(heads, paths, [sets["calibration"], sets["test"]]),
    }
    if whole:
        record("together", result)
    else:
        print_rows(result)


def trace(model: str, work: Path, share: float, prunings: Sequence[Mapping[str, Any]]) -> dict[str, list[Path]]:
    """The folders of all traces; what is there is not traced again."""
    mllm = load_mllm(ModelConfig(model=model, dtype="float32", threads=1))
    folders: dict[str, list[Path]] = {"train": []} | {name: [] for name in SETS}
    for number, pruning in enumerate(prunings):
        parts = {"train": ("train", TRAIN, 100 + number)} | SETS
        for name, (split, count, seed) in parts.items():
            scenes = {"scenes": {"split": split, "n": max(round(share * count), 40), "seed": seed}}
            folder = work / "traces" / f"{name}-{number}"
            settings = {"batch_size": 32, "max_new_tokens": 8, "pruning": pruning, "provenance": scenes}
            folders[name].append(write_traces(mllm.model, mllm.processor, load_samples(scenes), folder, **settings))
    return folders


def declared_paths(heads: ExitHeads, traces: Sequence[TraceSet]) -> dict[str, GridPath]:
    """Through the whole grid, along its edge of thresholds, and along its edge of prunings."""
    never = torch.ones(1, dtype=torch.double)
    return {
        "exits alone": declare_path(heads, traces[:1]),
        "pruning alone": declare_path(heads, traces, never),
        "together": declare_path(heads, traces),
    }


def judge(heads: ExitHeads, paths: Mapping[str, GridPath], sets: Sequence[Sequence[TraceSet]]) -> list[dict[str, Any]]:
    """What each path saves at each alpha, and how often it breaks its promise, over random splits of all samples."""
    rows = []
    for name, path in paths.items():
        wrong, saved = pooled(heads, path, sets)
        n = wrong.shape[1]
        held = n // 2
        for alpha in ALPHAS:
            risks, savings, broken = [], [], 0
            for seed in range(SPLITS):
                order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
                bound = clopper_pearson(wrong[:, order[:held]].sum(1), held, DELTA)
                chosen = boldest_safe(bound.tolist(), alpha)
                risks.append(0.0 if chosen is None else wrong[chosen, order[held:]].double().mean().item())
                savings.append(0.0 if chosen is None else saved[chosen].item())
                broken += risks[-1] > alpha
            rows.append(
                {
                    "path": name,
                    "points": len(path.settings),
                    "alpha": alpha,
                    "saved": sum(savings) / SPLITS,
                    "mean_risk_on_the_rest": sum(risks) / SPLITS,
                    "broken_on_the_rest": broken / SPLITS,
                }
            )
    return rows


def pooled(heads: ExitHeads, path: GridPath, sets: Sequence[Sequence[TraceSet]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every point of a path on all samples: bool [points, n], and float64 [points]."""
    parts, shares, sizes = [], [], []
    for traces in sets:
        n = len(traces[0])
        wrong, saved = torch.zeros(len(path.settings), n, dtype=torch.bool), torch.zeros(len(path.settings)).double()
        for pruning, some in zip(prunings_of(traces), traces):
            places = [
                i for i, s in enumerate(path.settings) if {k: v for k, v in s.items() if k != THRESHOLD} == pruning
            ]
            if places:
                thresholds = torch.tensor([path.settings[i][THRESHOLD] for i in places], dtype=torch.double)
                wrong[places], saved[places] = outcomes(heads, some, thresholds)
        parts.append(wrong)
        shares.append(saved * n)
        sizes.append(n)
    return torch.cat(parts, 1), sum(shares) / sum(sizes)


def print_rows(result: Mapping[str, Any]) -> None:
    print(result["samples"], result["promise"])
    for row in result["paths"]:
        risk, broken = row["mean_risk_on_the_rest"], row["broken_on_the_rest"]
        print(f"{row['path']:14} alpha {row['alpha']:g} saved {row['saved']:.1%} risk {risk:.2%} broken {broken:.1%}")


if __name__ == "__main__":
    main()
