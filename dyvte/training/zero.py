"""DeepSpeed's ZeRO-1 and ZeRO-2 under the same steps: gradients and moments are spread over the ranks.

For the published form of heads, whose optimizer state takes 16 bytes for each of half a billion parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

from dyvte.config import FitSettings
from dyvte.heads import ExitHeads
from dyvte.training.deepspeed_config import read_deepspeed
from dyvte.training.learner import MOMENTS, Batch, Learner, weights_of
from dyvte.training.parallel import Group
from dyvte.training.state import Tensors


class ZeroLearner(Learner):
    """As :class:`Learner`; the state it saves is the same, too."""

    def __init__(self, heads: ExitHeads, settings: FitSettings, steps: int, group: Group):
        self.config = read_deepspeed(settings.deepspeed)
        if not torch.distributed.is_initialized():
            raise ValueError("DeepSpeed needs ranks: start with torchrun or deepspeed, or leave fit.deepspeed out")
        super().__init__(heads, settings, steps, group)
        self.config["train_micro_batch_size_per_gpu"] = -(-settings.batch_size // group.size)
        self.engine: Any = None

    def _start(self) -> Any:
        """The engine takes over the weights that the heads have by then."""
        if self.engine is None:
            self.engine = deepspeed.initialize(model=self.heads, optimizer=self.optimizer, config=self.config)[0]
        return self.engine

    def step(self, count: int, places: Sequence[int], read: Callable[[Sequence[int]], Batch]) -> float:
        self._start()  # all ranks at once
        return super().step(count, places, read)

    def _forward(self, state: torch.Tensor) -> torch.Tensor:
        self.engine.train()
        return self.engine(state)

    def _learn(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self.group.size)  # the engine takes the mean over ranks, not the sum
        self.engine.step()

    def _moments(self, parameter: torch.nn.Parameter) -> Tensors:
        return {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}

    def _restore_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.heads.heads.load_state_dict(weights_of(tensors))
        zero = self._start().optimizer
        for part in zero.single_partition_of_fp32_groups:  # the moments would come with the first step
            moments = {kind: torch.zeros_like(part) for kind in MOMENTS}
            self.optimizer.state[part] = {"step": torch.tensor(float(self.steps))} | moments
        zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.heads.heads.named_parameters():
            for kind in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{kind}.{name}"].to(self.group.device), kind)
