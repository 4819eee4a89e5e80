"""What can be evaluated: reductions, exits known beforehand, anything that changes a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dyvte.data import Sample, first_bits, sample_digest
from dyvte.methods.exits import FixedExit
from dyvte.runtime import Reduction, reduce_tokens

DENSE = "dense"  # the name of the model without a policy among policies
VisualMask = Callable[[dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class PerSampleExit:
    """An exit layer for every sample, known in advance: the oracle, or any schedule made offline.

    Attributes:
        layers: exit layer, 1 ... L, by sample id.
        by_content: samples are known by :func:`dyvte.data.first_bits` of their :func:`dyvte.data.sample_digest`
            instead, so that the layers of other samples under the same ids are refused.
    """

    layers: Mapping[Any, int]
    by_content: bool = False

    def of(self, samples: Sequence[Sample]) -> FixedExit:
        """The policy for one batch.

        Raises:
            ValueError: no layer is known for some of the samples.
        """
        names = [first_bits(sample_digest(sample)) if self.by_content else sample.id for sample in samples]
        missing = [sample.id for sample, name in zip(samples, names) if name not in self.layers]
        if missing:
            what = "image and question" if self.by_content else "id"
            raise ValueError(
                f"no exit layer for {len(missing)} samples, such as {missing[0]!r}: give one for every {what}"
                f"{', from traces of these very samples' if self.by_content else ''}"
            )
        return FixedExit([self.layers[name] for name in names])


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
