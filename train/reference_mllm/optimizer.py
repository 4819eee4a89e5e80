"""The optimizer of both stages, over one process or several."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from .settings import Stage


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for everything else; warm-up, then cosine to a twentieth."""

    def __init__(self, module: nn.Module, stage: Stage):
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if p.ndim == 2 and "embed" not in n and "head" not in n]
        outer = [p for n, p in named if not any(p is q for q in inner)]
        self.parts = [
            torch.optim.Muon(inner, lr=stage.lr, weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.parameters = inner + outer
        self.lr, self.steps, self.warmup = stage.lr, stage.steps, stage.warmup

    def step(self, step: int) -> None:
        """Updates the weights by the mean of the ranks' gradients, at the learning rate of this step."""
        if dist.is_initialized():
            self._average()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        progress = step / self.steps
        scale = min(1.0, (step + 1) / self.warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * scale
            part.step()
            part.zero_grad(set_to_none=True)

    def _average(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]  # the tower has layers that nothing reads
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients)])

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[dict]) -> None:
        for part, part_state in zip(self.parts, state):
            part.load_state_dict(part_state)
