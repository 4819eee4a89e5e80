"""The processes of a run, however they were started: by python, torchrun, deepspeed or accelerate launch.

Ranks agree with each other through the key-value store that every launcher provides, not through collectives: waiting
has no time limit that a long calibration on another rank could exceed, works without GPUs, and a rank whose peer has
failed is told so instead of waiting for ever. Steps of training are another matter: :mod:`dyvte.training.parallel`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE = timedelta(minutes=30)  # the longest that one rank may be behind the others inside a sharded model
PATIENCE = 0.02  # seconds, the longest between two looks at the store


class RankError(ValueError):
    """Another rank of this run has failed."""


class Ranks:
    """This process among those of its run; by default it is alone.

    Attributes:
        rank, world_size: which process of how many.
        local_rank: which process of this machine.
        device: where this process computes.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        device: str | torch.device = "cpu",
        store: dist.Store | None = None,
    ):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device = torch.device(device)
        self._store = dist.HashStore() if store is None else store
        self._meetings = self._counters = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and reports what all have in common."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def launched(cls, device: str = "auto", group: bool = False) -> Iterator[Ranks]:
        """The ranks as the launcher's environment tells them, with a process group where there are several.

        What happens inside happens :meth:`together`.

        Args:
            device: cpu, cuda, cuda:1 ...; auto: the GPU of this rank, if there is one.
            group: a process group for a single rank, too, as sharded models need one.

        Raises:
            ValueError: half an environment, or more ranks on this machine than GPUs.
        """
        rank, world_size, local_rank = place(os.environ)
        chosen = _device(device, local_rank, world_size)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        store: dist.Store = dist.HashStore()
        if world_size > 1:
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(rendezvous("env://"))
        if world_size > 1 or group:
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=world_size,
                timeout=COLLECTIVE,
            )
        ranks = cls(rank, world_size, local_rank, chosen, dist.PrefixStore("ranks", store))
        with ranks.together():
            yield ranks
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank fails on all, as soon as they ask anything of each other; at the end they wait.

        A rank that waits inside a collective of a sharded model cannot ask; the launcher ends it when this one ends.
        """
        try:
            yield
            self.wait()
            self._leave()
        except BaseException as error:  # an interrupt, too, must not leave the others waiting
            self._fail(error)
            raise

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives, in their order; values as JSON can hold them. All ranks must call this together.

        Raises:
            RankError: one of them has failed.
        """
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        number, self._meetings = self._meetings, self._meetings + 1
        with self._connected():
            self._store.set(f"{number}/{self.rank}", json.dumps(value))
            found = [json.loads(self._get(f"{number}/{rank}")) for rank in range(self.world_size)]
            if number > 0:  # who is here has read all of the meeting before
                self._store.delete_key(f"{number - 1}/{self.rank}")
        return found

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        self.gather(None)

    def counter(self) -> Callable[[int], int]:
        """A number that all ranks add to without waiting for each other; each call gives the sum so far.

        All ranks must make their counters in the same order.
        """
        self._counters += 1
        return partial(self._add, f"count/{self._counters}")

    def check(self) -> None:
        """Raises :class:`RankError` if another rank has failed."""
        if self.world_size > 1:
            with self._connected():
                self._check()

    def _fail(self, error: BaseException) -> None:
        """Tells the other ranks that this one will not come; those that fail for that reason say nothing."""
        if self.world_size > 1 and not isinstance(error, RankError):
            try:
                self._store.set("fault", json.dumps([self.rank, f"{type(error).__name__}: {error}"]))
            except RuntimeError:  # the rank that keeps the store is gone, so the others know
                pass

    def _check(self) -> None:
        if self._store.check(["fault"]):
            rank, text = json.loads(self._store.get("fault"))
            raise RankError(f"rank {rank} has failed ({text})")

    def _get(self, key: str) -> bytes:
        pause = 1e-4
        while not self._store.check([key]):
            self._check()
            time.sleep(pause)
            pause = min(2 * pause, PATIENCE)
        return self._store.get(key)

    def _leave(self) -> None:
        """The first rank may keep the store, so it goes last."""
        gone = self._add("gone", 1)
        while self.first and gone < self.world_size:
            time.sleep(PATIENCE)
            gone = self._add("gone", 0)

    def _add(self, key: str, more: int) -> int:
        with self._connected():
            return self._store.add(key, more)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise RankError(f"the rank that keeps the store has gone ({error})") from error


def place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, world size and local rank as launchers write them into the environment.

    Raises:
        ValueError: some of them are missing or make no sense.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if int(environment.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, int(environment.get("LOCAL_RANK", 0))
    needed = (*names, "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is set without {', '.join(missing)}: start the ranks with torchrun, deepspeed or accelerate "
            "launch, or unset WORLD_SIZE for a single process"
        )
    rank, world_size, local_rank = (int(environment[name]) for name in names)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK {rank} is not one of {world_size} ranks: let the launcher set RANK and WORLD_SIZE")
    return rank, world_size, local_rank


def _device(device: str, local_rank: int, world_size: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda, cuda:1 ... or auto, not {device!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device}, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs: choose another, "
            "device=cpu, or a build of torch for this machine's GPUs"
        )
    if chosen.type != "cuda" or chosen.index is not None:
        if chosen.index is not None and world_size > 1:
            raise ValueError(f"device={device} would put all ranks on one device: leave it at auto")
        return chosen
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU, of {torch.cuda.device_count()}: start as many ranks per machine as "
            "it has GPUs, or set device=cpu"
        )
    return torch.device("cuda", local_rank)
