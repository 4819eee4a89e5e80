"""What a training of EAS is told, see :mod:`dyvte.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dyvte.config import ModelConfig, Tracking
from dyvte.ranges import Checked, Count, Nonnegative, Positive, Range


@dataclass(kw_only=True)
class EASSettings(Checked):
    """How EAS (arXiv 2403.15226) chooses attentions to skip, and trains the adapters in their place.

    Args:
        skip: how many attentions are skipped.
        layers: which ones, from 0; searched for if not given.
        width: inner width of an adapter in place of an attention.
        adapted_width: inner width of an adapter before an attention.
        adapt: put an adapter before every attention that is not skipped.
        search_steps: steps of the search, in which layers to skip are drawn, trained and judged.
        warmup: the first steps of the search, in which none are judged.
        every: steps from one judgement to the next.
        sets: how many sets of layers are judged against each other.
        search_rate: how far a judgement moves the scores of layers.
        steps: steps of the training with the chosen layers, from new adapters.
        batch_size: samples per step, over all ranks.
        lr: highest learning rate of AdamW, of the search and of the training.
        weight_decay: weight decay of AdamW.
        dropout: dropout inside of adapters.
        seed: seed of the weights, the order of the samples and all that is drawn.
        save_every: steps between states to resume from.
    """

    skip: Count = 4
    layers: list[int] | None = None
    width: Count = 128
    adapted_width: Count = 128
    adapt: bool = True
    search_steps: Count = 600
    warmup: Count = 200
    every: Count = 3
    sets: Annotated[int, Range(least=2)] = 5
    search_rate: Positive = 1.0
    steps: Count = 1000
    batch_size: Count = 32
    lr: Positive = 4e-4
    weight_decay: Nonnegative = 0.0
    dropout: Annotated[float, Range(least=0, below=1)] = 0.1
    seed: int = 0
    save_every: Count = 100


@dataclass(kw_only=True)
class EASConfig(ModelConfig):
    """Adapters in place of attentions that a task does not need: search for the layers, then train, the MLLM frozen.

    Args:
        data: the questions of the task: a YAML file or a mapping.
        output: folder of the adapters.
        work: folder of states to resume from; runs/NAME-OF-OUTPUT if not given.
        answers: what is learned: the first given answer (dataset), or what the model itself says (dense).
        max_new_tokens: longest answer of the model itself; what the data asks for if not given, else 16.
        eas: how layers are chosen and adapters trained.
        tracking: where the loss is logged: none, tensorboard, trackio or wandb.
    """

    data: str | dict[str, Any]
    output: str
    work: str | None = None
    answers: Literal["dataset", "dense"] = "dataset"
    max_new_tokens: Count | None = None
    eas: EASSettings = field(default_factory=EASSettings)
    tracking: Tracking = "none"
