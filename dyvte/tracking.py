"""Figures of a run for those who watch it: TensorBoard, trackio or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dyvte.config import Tracking
from dyvte.ranks import Ranks

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
EVERY = 5.0  # seconds between two figures of one stage


class Tracker:
    """Logs on the first rank; without a kind, nothing.

    Args:
        kind: what logs.
        folder: of the run; its name is the name of the run, and TensorBoard writes into its
            subfolder ``tracking``.
        config: what the run was told, for the record.

    Raises:
        ValueError: what logs is not installed.
    """

    def __init__(self, kind: Tracking, folder: Path, config: Mapping[str, Any], ranks: Ranks):
        self.step, self._tracker = 0, None
        if kind == "none":
            return
        if not any(map(find_spec, PACKAGES[kind])):
            raise ValueError(f"tracking={kind} needs {PACKAGES[kind][0]}: pip install {PACKAGES[kind][0]}")
        if not ranks.first:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        name, place = folder.name or "dyvte", {}
        if kind == "tensorboard":
            name, place = "tracking", {"logging_dir": str(folder)}
        self._tracker = LOGGER_TYPE_TO_CLASS[kind](name, **place)
        self._tracker.start()
        self._tracker.store_init_configuration({key: _plain(value) for key, value in config.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None:
            self._tracker.finish()

    def log(self, figures: Mapping[str, float], step: int | None = None) -> None:
        """Logs figures, by default as the next step."""
        self.step = self.step + 1 if step is None else step
        if self._tracker is not None:
            self._tracker.log(dict(figures), step=self.step)

    def progress(self, stage: str) -> Callable[[int, int], None]:
        """What a stage reports its progress to: how much is done, and of how much. Logs throughput and what is left."""
        began, first, latest = time.perf_counter(), None, 0.0

        def report(done: int, total: int) -> None:
            nonlocal first, latest
            now = time.perf_counter()
            if first is None:  # what earlier runs did is no throughput of this one
                first, latest = done, now
                return
            if now - latest < EVERY and done < total:
                return
            latest = now
            rate = (done - first) / (now - began)
            left = {f"{stage}/seconds left": (total - done) / rate} if rate else {}
            self.log({f"{stage}/done": done, f"{stage}/per second": rate} | left)

        return report

    def epochs(self, stage: str) -> Callable[[int, Mapping[str, float]], None]:
        """What a training reports its epochs to, by number, with their losses."""
        return lambda epoch, figures: self.log(
            {f"{stage}/epoch": epoch} | {f"{stage}/{k}": v for k, v in figures.items()}
        )


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) else str(value)
