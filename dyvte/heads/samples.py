"""What heads remember of the samples that trained them, so that nobody calibrates them on the same ones."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from dyvte.provenance import atomic_write

FILE = "training_samples.safetensors"
Samples = dict[str, torch.Tensor]  # "samples", "images": int64, the first 64 bits of their SHA-256, ascending


def write_samples(folder: str | os.PathLike, samples: Samples | None) -> None:
    """Writes them beside the heads, or removes those of other heads."""
    path = Path(folder, FILE)
    if samples is None:
        path.unlink(missing_ok=True)
    else:
        atomic_write(path, save(samples))


def read_samples(folder: str | os.PathLike) -> Samples | None:
    """What lies beside the heads of a local folder; None if nothing does."""
    path = Path(folder, FILE)
    return load_file(path) if path.is_file() else None
