"""Groups of processes that talk through gloo, forked: they start at once and inherit what a test has made."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # ranks that wait for each other for ever are a failure


def start(size: int, folder: Path, work: Callable[[int], Any]) -> list[int]:
    """Forks ``size`` ranks, each of which writes what ``work`` gives it, or its error, below ``folder``.

    Returns:
        Their process ids. One rank alone has no group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [pid for rank in range(size) if (pid := os.fork()) or _run(rank, size, folder, work)]


def _run(rank: int, size: int, folder: Path, work: Callable[[int], Any]) -> None:
    try:
        if size > 1:
            store = dist.FileStore(str(folder / "store"), size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS))
        found = {"result": work(rank)}
    except BaseException as error:
        found = {"error": str(error), "kind": type(error).__name__, "where": traceback.format_exc()}
    try:
        torch.save(found, folder / f"{rank}.pt")
    finally:
        os._exit(0)


def kill(pids: list[int]) -> bool:
    """Ends processes without a word; whether any of them was still at work."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return any([os.WIFSIGNALED(os.waitpid(pid, 0)[1]) for pid in pids])


def wait(pids: list[int], seconds: float = SECONDS) -> bool:
    """Waits for processes; False if they had to be killed."""
    left, ends = list(pids), time.monotonic() + seconds
    while left and time.monotonic() < ends:
        left = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0]
        time.sleep(0.01)
    kill(left)
    return not left


def run(size: int, folder: Path, work: Callable[[int], Any]) -> list[dict[str, Any]]:
    """What each rank came to: its ``result``, or its ``error``."""
    assert wait(start(size, folder, work)), "the ranks wait for each other"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def results(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What each rank came to, if none failed."""
    found = run(size, folder, work)
    for one in found:
        assert "result" in one, one["where"]
    return [one["result"] for one in found]
