"""Steps that train the adapters of EAS: the frozen MLLM runs with them, and the loss of the answers flows back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dyvte.data import Sample, encode
from dyvte.eas_config import EASSettings
from dyvte.loading import Mllm
from dyvte.methods.eas_adapters import EASAdapters
from dyvte.methods.eas_edit import EAS
from dyvte.training.agreement import teacher_forced
from dyvte.training.learner import MOMENTS, key, weights_of
from dyvte.training.parallel import Group
from dyvte.training.state import Tensors
from dyvte.training.tracer import answer_mask, greedy_answers

Rate = Callable[[float], float]  # share of the steps done -> share of the highest learning rate


class Questions:
    """The batches of a training: samples in an order that follows from a seed, with the answers to be learned.

    Args:
        answers: "dataset" or "dense", see :class:`dyvte.eas_config.EASConfig`.
    """

    def __init__(
        self,
        mllm: Mllm,
        samples: Sequence[Sample],
        answers: str = "dataset",
        max_new_tokens: int = 16,
        template: str | None = None,
    ):
        self.mllm, self.samples, self.answers = mllm, samples, answers
        self.max_new_tokens, self.template = max_new_tokens, template
        self._epoch: tuple[tuple[int, int], list[int]] | None = None

    def indices(self, seed: int, step: int, size: int) -> list[int]:
        """The samples of a step, over all ranks."""
        places = range(step * size, (step + 1) * size)
        return [self._order(seed, place // len(self.samples))[place % len(self.samples)] for place in places]

    def read(self, indices: Iterable[int]) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        """Inputs of the model, ids of the answers and which of them belong to these: two [n, length]."""
        model, processor = self.mllm.model, self.mllm.processor
        samples = [self.samples[i] for i in indices]
        device = next(weight.device for weight in model.parameters())
        inputs = dict(encode(processor, samples, self.template).to(device, model.dtype))
        if self.answers == "dense":
            ids = greedy_answers(model, inputs, self.max_new_tokens, together=False)
        else:
            tokenizer = processor.tokenizer
            nothing = [sample.id for sample in samples if not (sample.answers and sample.answers[0].strip())]
            if nothing:
                raise ValueError(f"sample {nothing[0]!r} has no answer to learn: use answers=dense, or map its column")
            rows = [tokenizer(sample.answers[0], add_special_tokens=False).input_ids for sample in samples]
            rows = [row + [tokenizer.eos_token_id] for row in rows]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [-100] * (longest - len(row)) for row in rows], device=device)
        return inputs, ids, answer_mask(ids, model.generation_config.eos_token_id)

    def _order(self, seed: int, epoch: int) -> list[int]:
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(key(seed, "epoch", epoch))
            self._epoch = ((seed, epoch), torch.randperm(len(self.samples), generator=generator).tolist())
        return self._epoch[1]


class AdapterLearner:
    """AdamW on the adapters alone; each rank runs its share of a batch, and all take the same step.

    Args:
        adapters: to be trained, in place.
        steps: of the whole training.
        rate: of the learning rate.
    """

    def __init__(
        self,
        adapters: EASAdapters,
        questions: Questions,
        settings: EASSettings,
        steps: int,
        rate: Rate,
        group: Group,
    ):
        if settings.batch_size < group.size:
            raise ValueError(f"eas.batch_size={settings.batch_size} does not give each of {group.size} ranks a sample")
        self.adapters, self.questions, self.settings, self.group = adapters.to(group.device), questions, settings, group
        self.steps, self.rate, self.done = steps, rate, 0
        self.optimizer = torch.optim.AdamW(adapters.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)

    def step(self, skipped: Sequence[int]) -> float:
        """Learns from the next batch, with the attention of some layers skipped.

        Returns:
            The mean loss of the answers before the step, nats per token.

        Raises:
            ValueError: on all ranks, if the loss is not finite, or something failed on one of them.
        """
        self.adapters.train()
        self.optimizer.zero_grad(set_to_none=True)
        devices = [self.group.device] if self.group.device.type == "cuda" else []
        with self.group.together(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(key(self.settings.seed, "dropout", self.done, self.group.rank))
            loss = self._loss(self._batch(), skipped)
            loss.backward()
        total = self._mean(loss)
        for parameter in self.adapters.parameters():
            if parameter.grad is not None:
                self.group.sum_(parameter.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self.rate((self.done + 0.5) / self.steps)
        self.optimizer.step()
        self.done += 1
        return total

    @torch.no_grad()
    def judge(self, sets: Sequence[Sequence[int]]) -> list[float]:
        """The loss of the batch of the latest step with each of several sets of layers skipped."""
        self.adapters.eval()
        with self.group.together():
            batch = self._batch(self.done - 1)
            losses = [self._loss(batch, skipped) for skipped in sets]
        return [self._mean(loss) for loss in losses]

    def _batch(self, step: int | None = None) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        size = self.settings.batch_size
        indices = self.questions.indices(self.settings.seed, self.done if step is None else step, size)
        return self.questions.read(indices[place] for place in self.group.share(size))

    def _loss(self, batch: tuple[dict[str, Any], torch.Tensor, torch.Tensor], skipped: Sequence[int]) -> torch.Tensor:
        """This rank's part of the mean loss of a batch."""
        mllm, method = self.questions.mllm, EAS(self.adapters, skipped=skipped, other_weights=True)
        logits, labels, _ = teacher_forced(mllm.model, method, *batch, mllm.visual_mask, mllm.decoder)
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return (losses.sum(1) / (labels != -100).sum(1)).sum() / self.settings.batch_size

    def _mean(self, loss: torch.Tensor) -> float:
        total = float(self.group.sum(loss.detach()))
        if not math.isfinite(total):
            raise ValueError(
                "the loss of the answers is not finite: choose a smaller lr, or load the model in bfloat16 or float32"
            )
        return total

    def progress(self) -> dict[str, Any]:
        """What JSON can hold of the state."""
        updates = {name: int(self.optimizer.state[p]["step"]) for name, p in self._trained()}
        return {"done": self.done, "updates": updates}

    def tensors(self) -> Tensors:
        """Weights and moments."""
        tensors = {f"weights.{name}": weight for name, weight in self.adapters.state_dict().items()}
        for name, parameter in self._trained():
            tensors |= {f"{kind}.{name}": self.optimizer.state[parameter][kind] for kind in MOMENTS}
        return tensors

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes on from a state."""
        self.done = progress["done"]
        self.adapters.load_state_dict(weights_of(tensors))
        for name, parameter in self.adapters.named_parameters():
            if name in progress["updates"]:
                moments = {kind: tensors[f"{kind}.{name}"].to(self.group.device) for kind in MOMENTS}
                step = torch.tensor(float(progress["updates"][name]))
                self.optimizer.state[parameter] = {"step": step} | moments

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The parameters that a step has changed: in a search, adapters may not have been drawn yet."""
        return [(name, p) for name, p in self.adapters.named_parameters() if self.optimizer.state.get(p)]
