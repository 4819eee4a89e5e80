"""Steps that train heads: each rank learns from its share of a batch, and all take the same step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dyvte.config import FitSettings
from dyvte.heads import ExitHeads
from dyvte.training.parallel import Group
from dyvte.training.state import Tensors

Batch = tuple[torch.Tensor, torch.Tensor, Callable[[list[int]], list[str]]]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """AdamW with a short warm-up and cosine decay; gradients are summed over ranks.

    Nothing is drawn from a generator that would have a state: order and dropout follow from the seed and the number of
    the step, so the heads do not depend on how many ranks there are, nor on where a training was interrupted.

    Args:
        heads: to be trained, in place.
        steps: of the whole training.
    """

    def __init__(self, heads: ExitHeads, settings: FitSettings, steps: int, group: Group):
        self.heads, self.settings, self.group = heads.to(group.device), settings, group
        self.columns = [e - 1 for e in heads.config.decided]
        self.steps = 0  # taken
        self.optimizer = torch.optim.AdamW(heads.heads.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.lr, total_steps=steps, pct_start=0.1
        )

    def step(self, count: int, places: Sequence[int], read: Callable[[Sequence[int]], Batch]) -> float:
        """Learns from a batch.

        Args:
            count: samples of the batch, over all ranks.
            places: which of them are this rank's.
            read: gives some of them by their places in the batch: states [n, L, 2d], labels [n, columns], and what
                tells the ids of some of these rows.

        Returns:
            The mean loss of the batch, nats.

        Raises:
            ValueError: on all ranks, if states or the loss are not finite, or something failed on one of them.
        """
        with self.group.together():
            state, labels, names = read(places)
            state, labels = state.to(self.group.device).float(), labels.to(self.group.device)
            logits = self._forward(self._dropout(state, places))[:, self.columns]
            loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
            loss = loss / (count * len(self.columns))
        total = float(self.group.sum(loss.detach()))
        if not math.isfinite(total):
            self._refuse(state, names)
        self._learn(loss)
        self.schedule.step()
        self.steps += 1
        return total

    def _forward(self, state: torch.Tensor) -> torch.Tensor:
        self.heads.train()
        return self.heads(state)

    def _learn(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.heads.heads.parameters():
            self.group.sum_(parameter.grad)
        self.optimizer.step()

    def _dropout(self, state: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        if self.settings.dropout == 0:
            return state
        generator, keep = torch.Generator(state.device), 1 - self.settings.dropout
        kept = torch.empty_like(state)
        for one, place in zip(kept, places):
            generator.manual_seed(key(self.settings.seed, "dropout", self.steps, place))
            one.bernoulli_(keep, generator=generator)
        return state * kept.div_(keep)

    def _refuse(self, state: torch.Tensor, names: Callable[[list[int]], list[str]]) -> None:
        bad = [row for row, one in enumerate(state) if not bool(one.isfinite().all())]
        refuse([name for some in self.group.gather(names(bad)) for name in some])

    def progress(self) -> dict[str, Any]:
        """What JSON can hold of the state; all ranks ask for it together, as for :meth:`tensors`."""
        group = self.optimizer.param_groups[0]
        rates = {name: group[name] for name in ("lr", "betas")}
        return {"steps": self.steps, "schedule": self.schedule.state_dict(), "rates": rates}

    def tensors(self) -> Tensors:
        """Weights and moments, whole, on rank 0; others have the weights alone."""
        tensors = {f"weights.{name}": weight for name, weight in self.heads.heads.state_dict().items()}
        for name, parameter in self.heads.heads.named_parameters():
            for kind, moment in self._moments(parameter).items():
                if self.group.rank == 0:
                    tensors[f"{kind}.{name}"] = moment.cpu()
        return tensors

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a state."""
        self.steps = progress["steps"]
        self._restore_tensors(tensors)
        self.schedule.load_state_dict(progress["schedule"])
        for group in self.optimizer.param_groups:
            group |= {"lr": progress["rates"]["lr"], "betas": tuple(progress["rates"]["betas"])}

    def _moments(self, parameter: torch.nn.Parameter) -> Tensors:
        return {kind: self.optimizer.state[parameter][kind] for kind in MOMENTS}

    def _restore_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.heads.heads.load_state_dict(weights_of(tensors))
        for name, parameter in self.heads.heads.named_parameters():
            moments = {kind: tensors[f"{kind}.{name}"].to(self.group.device) for kind in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.steps))} | moments


def weights_of(tensors: Mapping[str, torch.Tensor], prefix: str = "weights.") -> Tensors:
    """The weights of the heads among the tensors of a state."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def make_learner(heads: ExitHeads, settings: FitSettings, steps: int, group: Group) -> Learner:
    """Plain data parallelism, or ZeRO where the settings name a DeepSpeed config."""
    if settings.deepspeed is None:
        return Learner(heads, settings, steps, group)
    from dyvte.training.zero import ZeroLearner  # needs deepspeed

    return ZeroLearner(heads, settings, steps, group)


def refuse(samples: Sequence[str]) -> None:
    """Raises ``ValueError`` about a loss that is not finite.

    Args:
        samples: those whose states are not.
    """
    if samples:
        names = ", ".join(map(repr, samples))
        raise ValueError(f"the states of sample {names} are not finite: leave them out, or trace again in bfloat16")
    raise ValueError("the loss is no longer finite though all states are: choose a smaller lr")


def key(*parts: int | str) -> int:
    """A seed that follows from some numbers and names, and from no others."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
