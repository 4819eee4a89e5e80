"""The second stage: projector and decoder learn to answer, the tower frozen."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dyvte.data import scenes

from .loop import run_stage
from .settings import AnswersStage
from .turns import IGNORED, KINDS, Turns


def train_answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, stage: AnswersStage, work: Path
) -> None:
    """Trains all of the model but its tower."""
    model.model.vision_tower.requires_grad_(False)
    turns = Turns(processor, model.config.image_seq_length)
    # The tower is saved by its own stage.
    trained = nn.ModuleDict(
        {
            "projector": model.model.multi_modal_projector,
            "decoder": model.model.language_model,
            "head": model.lm_head,
        }
    )

    def logits_of(packed: dict) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.model(**packed["inputs"], use_cache=False).last_hidden_state
        asked = packed["labels"] != IGNORED
        return model.lm_head(hidden[asked]).float(), packed["labels"][asked]

    def loss_of_step(step: int, generator: torch.Generator, size: int) -> torch.Tensor:
        batch = scenes.draw(size, "train", generator, augment=True)
        phase = next(phase for phase in stage.phases if step < phase.until)
        weights = [phase.weights.get(kind, 1.0) for kind in KINDS]
        return F.cross_entropy(*logits_of(turns.pack(batch, stage.turns, weights, generator.initial_seed())))

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        batch = scenes.draw(128, "dev", torch.Generator().manual_seed(-1))
        packed = turns.pack(batch, 20, [1.0] * len(KINDS), seed=-1)
        logits, labels = logits_of(packed)
        model.train()
        return accuracies(packed, logits.argmax(-1) == labels)

    run_stage("answers", trained, stage, work, loss_of_step, evaluate)


def accuracies(packed: dict, right: torch.Tensor) -> dict[str, float]:
    """Shares of answers all of whose tokens are right, of all answers and of each kind.

    Args:
        packed: a batch of :class:`Turns`.
        right: bool [tokens], the tokens that have a label, in order.
    """
    asked = packed["labels"] != IGNORED
    row = torch.arange(len(asked))[:, None].expand_as(asked)[asked]
    answers, inverse = (row * 1000 + packed["turn"][asked]).unique(return_inverse=True)
    whole = torch.ones(len(answers)).scatter_reduce(0, inverse, right.float(), "amin")
    kind = torch.zeros(len(answers), dtype=torch.long).scatter(0, inverse, packed["kind"][asked])
    by_kind = {name: round(whole[kind == i].mean().item(), 4) for i, name in enumerate(KINDS)}
    return {"dev_accuracy": round(whole.mean().item(), 4)} | by_kind
