"""Trained adapters of EAS as a checkpoint: config.json and model.safetensors, which holds adapters only."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dyvte.methods.eas import Adapter
from dyvte.provenance import atomic_folder, read_json, write_json
from dyvte.version import __version__

CONFIG, WEIGHTS, KIND = "config.json", "model.safetensors", "dyvte_eas"


@dataclass(kw_only=True)
class EASAdaptersConfig:
    """What a reader of a checkpoint must know.

    Attributes:
        num_layers, hidden_size: of the decoder that the adapters are for.
        skipped: the layers whose attention an adapter stands for, from 0.
        adapted: the layers with an adapter before their attention.
        width, adapted_width: inner widths of the adapters of either kind.
        groups, temperature, scale, dropout: see :class:`dyvte.methods.eas.Adapter`.
        base_model: the model that they were trained on, by hub id or path.
        identity: ``weights`` (:func:`dyvte.identity.model_fingerprint`, with its peft adapter if there was one) and
            ``dtype`` of that model; None where it was not recorded.
        training: data, settings and figures of the training.
        dyvte_version: version that made the checkpoint.

    Raises:
        ValueError: layers that the decoder does not have, or with both kinds of adapters.
    """

    num_layers: int
    hidden_size: int
    skipped: list[int]
    adapted: list[int] = field(default_factory=list)
    width: int = 128
    adapted_width: int = 128
    groups: int = 2
    temperature: float = 10
    scale: float = 1
    dropout: float = 0.1
    base_model: str | None = None
    identity: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    dyvte_version: str = __version__
    model_type: str = KIND

    def __post_init__(self) -> None:
        self.skipped, self.adapted = sorted(self.skipped), sorted(self.adapted)
        outside = [layer for layer in (*self.skipped, *self.adapted) if not 0 <= layer < self.num_layers]
        if outside:
            raise ValueError(f"layer {outside[0]} is none of the layers 0 ... {self.num_layers - 1}")


class EASAdapters(nn.Module):
    """The adapters of a model, by layer.

    In a search for layers to skip, a layer may have one of either kind.

    Attributes:
        skipped, adapted: the adapters that stand for an attention, and those before one; keys are layers.
    """

    def __init__(self, config: EASAdaptersConfig):
        super().__init__()
        self.config = config
        self.skipped = self._made(config.skipped, config.width, False)
        self.adapted = self._made(config.adapted, config.adapted_width, True)

    def _made(self, layers: Iterable[int], width: int, kept: bool) -> nn.ModuleDict:
        config = self.config
        shape = (config.hidden_size, width, config.groups, config.temperature, config.scale, kept, config.dropout)
        return nn.ModuleDict({str(layer): Adapter(*shape) for layer in layers})

    def save(self, folder: str | os.PathLike) -> None:
        """Writes both files in one step; whatever else is in the folder stays."""
        with atomic_folder(folder, lambda name: name in (CONFIG, WEIGHTS)) as fresh:
            write_json(fresh / CONFIG, asdict(self.config))
            save_file(
                {name: weight.detach().cpu().contiguous() for name, weight in self.state_dict().items()},
                fresh / WEIGHTS,
                {"format": "pt"},
            )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> EASAdapters:
        """Reads a checkpoint; in eval mode.

        Raises:
            ValueError: it is not there, or does not hold the adapters that its config describes.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no adapters of EAS: {name} is missing. Train some with train/eas.py")
        values = read_json(folder / CONFIG, "bring it back from a copy, or train again")
        if not isinstance(values, dict) or values.get("model_type") != KIND:
            raise ValueError(f"{folder / CONFIG} describes no adapters of EAS (model_type {KIND})")
        unknown = sorted(set(values) - {one.name for one in fields(EASAdaptersConfig)})
        missing = sorted({"num_layers", "hidden_size", "skipped"} - set(values))
        if unknown or missing:
            raise ValueError(
                f"{folder / CONFIG} has unknown keys {unknown} and lacks {missing}: use the version of dyvte that made "
                f"it ({values.get('dyvte_version')})"
            )
        adapters = cls(EASAdaptersConfig(**values))
        try:
            weights = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): bring it back from a copy") from error
        own = adapters.state_dict()
        faults = {
            "missing weights": sorted(set(own) - set(weights)),
            "unexpected weights": sorted(set(weights) - set(own)),
            "weights of another shape": [n for n in own if n in weights and weights[n].shape != own[n].shape],
        }
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults.items() if names)
        if told:
            raise ValueError(f"{folder} does not hold the adapters its config describes; {told}")
        adapters.load_state_dict(weights)
        return adapters.eval()


def random_adapters(config: EASAdaptersConfig, seed: int) -> EASAdapters:
    """New adapters, which change nothing yet but for the attentions that they stand for; their weights follow from a
    seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EASAdapters(config)
