"""What a reduction said about some samples, on its way to the host while the device goes on working."""

from __future__ import annotations

import torch

from dyvte.runtime.groups import Group
from dyvte.runtime.view import LayerView


class Verdict:
    """An answer of a reduction. Only a few bits of it go to the host, without blocking.

    Args:
        view: what was asked about.
        keep: bool [n, width], the answer.
        update: new states for the same samples, or None.
    """

    def __init__(self, view: LayerView, keep: torch.Tensor, update: torch.Tensor | None):
        self.view, self.update = view, update
        self.keep = keep.to(view.group.hidden.device)
        # All or nothing, as exits answer: whoever is asked about has visual tokens left.
        alike = self.keep.stride(1) == 0
        fewer = ~self.keep[:, 0] if alike else (view.visual.to(self.keep.device) & ~self.keep).any(1)
        stacked = fewer[None] if view.finite is None else torch.stack([fewer, view.finite])
        self._flags = stacked.to("cpu", non_blocking=True, copy=True)
        self._arrived: torch.Event | None = None
        if stacked.device.type != "cpu":
            self._arrived = torch.Event(stacked.device)
            self._arrived.record(torch.accelerator.current_stream(stacked.device))

    def takes(self) -> bool:
        """Whether it takes anything away; waits for what was queued up to the question, and for nothing after it.

        Raises:
            ValueError: a sample's state is not finite, so that no answer about it means anything.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        fewer, *finite = self._flags.tolist()
        if finite and False in finite[0]:
            rows = [int(sample) for sample, fine in zip(self.view.samples, finite[0]) if not fine]
            raise ValueError(not_finite(rows, self.view.layer))
        return True in fewer

    def update_states(self) -> None:
        """Puts the new states in place."""
        group, places = self.view.group, self.view.places
        hidden = group.hidden.clone()
        hidden[places.to(hidden.device)] = self.update.to(hidden)
        group.hidden = hidden

    def narrow(self, group: Group, keep: torch.Tensor) -> torch.Tensor:
        """``keep`` (bool [n, width] of a group) without what this takes from the group's samples."""
        view = self.view
        if view.group is group:
            here = view.places.to(keep.device)
            said = torch.ones_like(keep)
            said[here] = self.keep.to(keep.device)
            return keep & said
        # Samples have moved to other groups since the question: by the columns of the prompt.
        said = torch.ones_like(group.prompt.visual)
        rows, tokens = view.samples.to(said.device), view.tokens
        said[rows[:, None], tokens.index.to(said.device)] = (self.keep | ~tokens.valid).to(said.device)
        return keep & group.tokens.gather(said, group.samples_on(said.device)).to(keep.device)


def not_finite(rows: list[int], layer: int) -> str:
    """The error text for states that are NaN or infinite."""
    return (
        f"samples {rows} have states that are not finite after {layer} decoder layers, so nothing that follows from "
        "them is right: load the model in bfloat16 or float32 (float16 overflows in some models), or look at the input"
    )
