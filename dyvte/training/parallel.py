"""The ranks that train the same heads: gradients and what belongs to them, through the collectives of torch.

:class:`dyvte.ranks.Ranks` is how processes start, share work out and learn of each other's faults, through the store of
their launcher and with all the time they need. This is for what happens at every step, where all ranks are busy with
the same; it needs nothing but the default process group, whoever made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """This process among those that train the same heads; one process alone is rank 0 of 1.

    Attributes:
        rank, size: its number, and how many there are.
        device: where it computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def here(cls, device: str | torch.device | None = None) -> Group:
        """All ranks of the default process group, if there is one.

        Args:
            device: the current GPU if there is one, else the CPU, if not given. Ranks that share a machine have to
                choose their GPUs before (``torch.cuda.set_device``).
        """
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), torch.device(device))
        return cls(device=torch.device(device))

    def share(self, count: int) -> range:
        """Which of ``count`` things in a row are this rank's: as many as any other's, give or take one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, the same bits on each of them."""
        if self.size == 1:
            return values
        summed = values.detach().to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def sum_(self, values: torch.Tensor) -> None:
        """The same in place, of what lies on the device."""
        if self.size > 1:
            dist.all_reduce(values)

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, rank by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank fails on all, so that none waits for another for ever.

        No rank may wait for another inside.

        Raises:
            ValueError: it failed elsewhere.
        """
        if self.size == 1:
            yield
            return
        fault: Exception | None = None
        try:
            yield
        except Exception as error:
            fault = error
        if not self.sum(torch.tensor(float(fault is not None))):
            return
        said = self.gather(None if fault is None else str(fault) or type(fault).__name__)
        if fault is not None:
            raise fault
        raise ValueError("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None))
