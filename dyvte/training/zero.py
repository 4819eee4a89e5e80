"""DeepSpeed's ZeRO-1 and ZeRO-2 under the same steps: gradients and moments are spread over the ranks.

For the published form of heads, whose optimizer state takes 16 bytes for each of half a billion parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

from dyvte.config import FitSettings
from dyvte.heads import ExitHeads
from dyvte.training.learner import MOMENTS, Learner, weights_of
from dyvte.training.parallel import Ranks
from dyvte.training.state import Tensors

OURS = ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps", "bf16", "fp16")


def read_deepspeed(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config, from a file or as it is.

    Raises:
        ValueError: there is no such file, or it asks for what cannot be.
    """
    if isinstance(config, str):
        if not Path(config).is_file():
            raise ValueError(f"there is no DeepSpeed config {config}: name a file such as configs/deepspeed/zero2.json")
        config = json.loads(Path(config).read_text())
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        raise ValueError(f"heads are trained with ZeRO-1 or ZeRO-2, not with stage {stage!r}; ZeRO-3 is for the base")
    wrong = [name for name in OURS if name in config]
    if wrong:
        raise ValueError(
            f"the DeepSpeed config sets {', '.join(wrong)}, but that comes from the settings of the fit: leave it out "
            "(for bfloat16, use torch_autocast)"
        )
    return dict(config)


class ZeroLearner(Learner):
    """As :class:`Learner`; the state it saves is the same, too."""

    def __init__(self, heads: ExitHeads, settings: FitSettings, steps: int, ranks: Ranks):
        self.config = read_deepspeed(settings.deepspeed)
        if not torch.distributed.is_initialized():
            raise ValueError("DeepSpeed needs ranks: start with torchrun or deepspeed, or leave fit.deepspeed out")
        super().__init__(heads, settings, steps, ranks)
        self.config["train_micro_batch_size_per_gpu"] = -(-settings.batch_size // ranks.size)
        self.engine: Any = None

    def _start(self) -> Any:
        """The engine takes over the weights that the heads have by then."""
        if self.engine is None:
            self.engine = deepspeed.initialize(model=self.heads, optimizer=self.optimizer, config=self.config)[0]
        return self.engine

    def _forward(self, state: torch.Tensor) -> torch.Tensor:
        engine = self._start()
        engine.train()
        return engine(state)

    def _learn(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss * self.ranks.size)  # the engine takes the mean over ranks, not the sum
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
                safe_set_full_optimizer_state(parameter, tensors[f"{kind}.{name}"].to(self.ranks.device), kind)
