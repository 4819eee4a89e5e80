"""Groups of processes that talk through gloo, forked: they start at once and inherit what a test has made."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tqdm.auto

SECONDS = 60  # ranks that wait for each other for ever are a failure


def start(size: int, folder: Path, work: Callable[[int], Any]) -> list[int]:
    """Forks ``size`` ranks, each of which writes what ``work`` gives it, or its error, below ``folder``.

    Returns:
        Their process ids. One rank alone has no group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [pid for rank in range(size) if (pid := os.fork()) or _run(rank, size, folder, work)]


def _run(rank: int, size: int, folder: Path, work: Callable[[int], Any]) -> None:
    for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # by default a lock that a process that is killed keeps from the others
        bar.set_lock(threading.RLock())
    os.environ["LOCAL_RANK"] = str(rank)
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
    """Waits for processes, and takes those that ended from the list; whether all did."""
    left, ends = list(pids), time.monotonic() + seconds
    while left and time.monotonic() < ends:
        left = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0]
        time.sleep(0.01)
    pids[:] = left
    return not left


def run(size: int, folder: Path, work: Callable[[int], Any]) -> list[dict[str, Any]]:
    """What each rank came to: its ``result``, or its ``error``."""
    pids = start(size, folder, work)
    assert wait(pids) or not kill(pids), "the ranks wait for each other"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def results(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What each rank came to, if none failed."""
    found = run(size, folder, work)
    for one in found:
        assert "result" in one, one["where"]
    return [one["result"] for one in found]
