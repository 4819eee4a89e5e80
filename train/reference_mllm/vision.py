"""The first stage: the CLIP tower alone learns to see, with dense supervision."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from dyvte.data import scenes

from .loop import run_stage
from .model import normalise
from .settings import Stage


class DensePatches(nn.Module):
    """The tower and a linear readout per patch: digit, colour, row and column of the cell under the patch."""

    def __init__(self, tower: nn.Module, patch: int):
        super().__init__()
        self.tower = tower
        self.sizes = [10, len(scenes.COLOURS), scenes.GRID, scenes.GRID]
        self.readout_head = nn.Linear(tower.config.hidden_size, sum(self.sizes))
        centres = (torch.arange(scenes.CANVAS // patch) * patch + patch // 2) // scenes.CELL
        self.rows, self.columns = (grid.flatten() for grid in torch.meshgrid(centres, centres, indexing="ij"))

    def forward(self, pixels: torch.Tensor, batch: scenes.Scenes) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The loss, and the share of patches of which digit, colour, row and column are right."""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        logits = self.readout_head(hidden).float().split(self.sizes, -1)
        digit, colour = (cells[:, self.rows, self.columns] for cells in (batch.digits, batch.colours))
        targets = [digit, colour, self.rows.expand_as(digit), self.columns.expand_as(digit)]
        losses = [F.cross_entropy(p.flatten(0, 1), t.flatten()) for p, t in zip(logits, targets)]
        right = [(p.argmax(-1) == t).float().mean() for p, t in zip(logits, targets)]
        return sum(losses), right


def train_vision(model: LlavaForConditionalGeneration, processor: LlavaProcessor, stage: Stage, work: Path) -> None:
    """Trains the tower of the model."""
    dense = DensePatches(model.model.vision_tower, model.config.vision_config.patch_size)

    def loss_of_step(step: int, generator: torch.Generator, size: int) -> torch.Tensor:
        batch = scenes.draw(size, "train", generator, augment=True)
        return dense(normalise(batch.images, processor), batch)[0]

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        batch = scenes.draw(256, "dev", torch.Generator().manual_seed(-1))
        loss, right = dense(normalise(batch.images, processor), batch)
        names = ["digit", "colour", "row", "column"]
        return {"dev_loss": round(loss.item(), 4)} | {n: round(r.item(), 4) for n, r in zip(names, right)}

    run_stage("vision", dense, stage, work, loss_of_step, evaluate)


def load_tower(model: LlavaForConditionalGeneration, work: Path) -> None:
    """Puts the trained tower into the model.

    Raises:
        ValueError: none was trained.
    """
    saved = work / "vision.pt"
    if not saved.exists():
        raise ValueError(f"there is no trained tower {saved}: run the stage vision first, with the same --work")
    state = torch.load(saved, weights_only=True)["module"]
    tower = {k.removeprefix("tower."): v for k, v in state.items() if k.startswith("tower.")}
    model.model.vision_tower.load_state_dict(tower)
