"""What a run is told: configs/reference_mllm.yaml and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(kw_only=True)
class Stage:
    """Settings of a stage that trains.

    Args:
        steps: updates of the weights.
        batch_size: images per step, over all ranks.
        lr: learning rate after the warm-up.
        weight_decay: of the matrices inside the layers.
        warmup: steps until the learning rate is reached.
        log_every: steps between rows of the learning curve.
        evaluate_every: steps between rows that hold figures of dev scenes.
        save_every: steps between states to resume from.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: int
    log_every: int
    evaluate_every: int
    save_every: int


@dataclass(kw_only=True)
class Phase:
    """What is asked, and for how long.

    Args:
        until: the step that ends the phase.
        weights: how often each kind of question is asked, 1.0 where it is not named.
    """

    until: int
    weights: dict[str, float]


@dataclass(kw_only=True)
class AnswersStage(Stage):
    """Settings of the stage that learns to answer.

    Args:
        turns: questions about each image.
        phases: the curriculum, one phase after the other.

    Raises:
        ValueError: the phases end before the stage does.
    """

    turns: int
    phases: list[Phase]

    def __post_init__(self) -> None:
        if not self.phases or self.phases[-1].until < self.steps:
            raise ValueError(f"the phases must go on to the last step: let the last one have `until: {self.steps}`")


@dataclass(kw_only=True)
class Report:
    """Settings of the report.

    Args:
        questions: held-out questions.
        seed: of their scenes.
    """

    questions: int
    seed: int


@dataclass(kw_only=True)
class Settings:
    """Train the reference MLLM, or go on where an earlier run was stopped.

    Args:
        vision_config: sizes of the CLIP tower, as ``transformers.CLIPVisionConfig`` takes them.
        text_config: sizes of the decoder, as ``transformers.LlamaConfig`` takes them.
        vision: training of the tower.
        answers: training of projector and decoder.
        report: held-out questions.
        seed: of the initial weights.
        stage: the one to run; all three, one after the other, if not given.
        work: folder of states to resume from and of learning curves.
        output: folder of the model, its processor and its report.
    """

    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    vision: Stage
    answers: AnswersStage
    report: Report
    seed: int = 0
    stage: Literal["vision", "answers", "report"] | None = None
    work: Path = Path("runs/reference-mllm")
    output: Path = Path("checkpoints/reference-mllm")
