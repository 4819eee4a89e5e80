"""What can be evaluated: reductions, exits known beforehand, anything that changes a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dyvte.data import Sample
from dyvte.methods.exits import FixedExit
from dyvte.runtime import Reduction, reduce_tokens

DENSE = "dense"  # the name of the model without a policy among policies
VisualMask = Callable[[dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class PerSampleExit:
    """An exit layer for every sample, known in advance by its id: the oracle, or any schedule made offline.

    Attributes:
        layers: exit layer, 1 ... L, by sample id.
    """

    layers: Mapping[str, int]

    def of(self, samples: Sequence[Sample]) -> FixedExit:
        """The policy for one batch."""
        missing = [sample.id for sample in samples if sample.id not in self.layers]
        if missing:
            raise ValueError(f"no exit layer for {len(missing)} samples, such as {missing[0]!r}: give one for every id")
        return FixedExit([self.layers[sample.id] for sample in samples])


Policy = Reduction | PerSampleExit | Callable[[nn.Module], AbstractContextManager]


@contextmanager
def applied(
    model: nn.Module, policy: Policy | None, samples: Sequence[Sample], visual_mask: VisualMask | None = None
) -> Iterator[Any]:
    """The model with a policy at work on a batch; yields what tells the exit layers, or None.

    Args:
        policy: None is the dense model.
        samples: the batch's, by which a :class:`PerSampleExit` knows its layers.
        visual_mask: called with the model's inputs, gives bool [batch, sequence]; where ``input_ids`` cannot show it.
    """
    if policy is None:
        yield None
        return
    if isinstance(policy, PerSampleExit):
        policy = policy.of(samples)
    if isinstance(policy, Reduction):
        policy = policy.keyed([sample.id for sample in samples])
        with reduce_tokens(model, policy, visual_mask) as handle:
            yield handle
    else:
        with policy(model) as handle:
            yield handle
