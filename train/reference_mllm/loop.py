"""The loop that both stages share: steps, progress, the learning curve, states to resume from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

from dyvte.provenance import atomic_path, atomic_write

from .optimizer import Optimizer
from .settings import Stage


def run_stage(
    name: str,
    module: nn.Module,
    stage: Stage,
    work: Path,
    loss_of_step: Callable[[int, torch.Generator, int], torch.Tensor],
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Trains a module, from the beginning or from the latest state that an earlier run has left.

    A step draws from a generator of its own, so a run that was stopped ends with the weights of one that was not.

    Args:
        name: of the stage and its files.
        module: what is trained and saved.
        stage: the settings.
        work: folder of NAME.pt, the latest state, and NAME.jsonl, the learning curve.
        loss_of_step: the loss, from the step, its generator and the number of images on this rank.
        evaluate: figures of dev scenes, by name.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = Optimizer(module, stage)
    start, seconds = resume(name, module, optimizer, work)
    if rank == 0:
        drop_rows_after(start, work / f"{name}.jsonl")
    began, running = time.monotonic() - seconds, None
    for step in tqdm(range(start, stage.steps), initial=start, total=stage.steps, desc=name, disable=rank != 0):
        generator = torch.Generator().manual_seed(step * world + rank)
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
            loss = loss_of_step(step, generator, stage.batch_size // world)
        loss.backward()
        optimizer.step(step)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if rank != 0:
            continue
        done, seconds = step + 1, time.monotonic() - began
        if due(done, stage.log_every, stage):
            row = {"step": done, "loss": round(running, 4), "seconds": round(seconds)}
            if due(done, stage.evaluate_every, stage):
                row |= evaluate()
                tqdm.write(json.dumps(row))
            with (work / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if due(done, stage.save_every, stage):
            state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            with atomic_path(work / f"{name}.pt") as fresh:
                torch.save(state | {"seconds": time.monotonic() - began}, fresh)


def due(done: int, every: int, stage: Stage) -> bool:
    """Whether something happens after ``done`` steps that happens every so often, and at the end."""
    return done % every == 0 or done == stage.steps


def resume(name: str, module: nn.Module, optimizer: Optimizer, work: Path) -> tuple[int, float]:
    """Loads the latest state, if there is one; the steps it has behind it, and their seconds."""
    saved = work / f"{name}.pt"
    if not saved.exists():
        return 0, 0.0
    state = torch.load(saved, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def drop_rows_after(step: int, curve: Path) -> None:
    """What was logged after the latest state comes again."""
    if curve.exists():
        rows = [row for row in curve.read_text().splitlines() if json.loads(row)["step"] <= step]
        atomic_write(curve, "".join(row + "\n" for row in rows))
