"""VTW, the static baseline (arXiv 2405.05803): one exit layer for all, chosen by the change in the next token.

The original runs the model once per candidate layer and sample. Traces hold the same numbers for all layers already.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dyvte.methods.exits import FixedExit
from dyvte.provenance import write_json
from dyvte.training.store import TraceSet, load_traces

# The thresholds of the original, in nats, for the models it was published with.
ETA = {"llava-1.5-7b": 0.003, "llava-1.5-13b": 0.0005, "llava-1.6-vicuna-7b": 0.0001}


@dataclass(frozen=True)
class VTWChoice:
    """An exit layer and the numbers it was chosen by.

    Attributes:
        layer: the exit layer, 1 ... L.
        never: no candidate qualified, so ``layer`` is L.
        eta: highest mean KL divergence allowed, nats.
        first: the first candidate; candidates end at L - 1.
        kl: mean KL(exit || dense) of the next token at the last prompt position by exit layer 1 ... L, nats.
        agreement: share of the same samples whose answer stays the same at ``layer``.
        samples: ids of the samples averaged over.
        seed: of their choice.
        base_model: the model they were traced with.
        data: what they were traced from.
    """

    layer: int
    never: bool
    eta: float
    first: int
    kl: list[float]
    agreement: float
    samples: list[str]
    seed: int
    base_model: str | None
    data: Any

    @property
    def policy(self) -> FixedExit:
        """The policy that exits at the layer."""
        return FixedExit(self.layer)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it, with the outcome in words."""
        layers = len(self.kl)
        found = f"exit layer {self.layer} of {layers}: the first from {self.first} on with mean KL <= {self.eta}"
        none = f"never ({layers}): no exit layer {self.first} ... {layers - 1} has mean KL <= {self.eta}"
        return {"policy": "vtw", "outcome": none if self.never else found} | asdict(self)


def choose_exit(
    traces: TraceSet, eta: float | str = ETA["llava-1.5-7b"], first: int = 5, samples: int = 20, seed: int = 0
) -> VTWChoice:
    """The first exit layer from ``first`` on at which the next token changes by no more than ``eta``.

    Args:
        traces: of the model to be used.
        eta: mean KL(exit || dense) allowed, nats; or a name in :data:`ETA`. The right value depends on the model.
        first: smallest candidate; the original starts at 5, which suits decoders of about 32 layers.
        samples: how many traces to average over.
        seed: which ones.

    Raises:
        ValueError: a setting out of range, or fewer traces than samples.
    """
    layers = traces.num_layers
    if isinstance(eta, str):
        if eta not in ETA:
            raise ValueError(f"there is no preset eta {eta!r}: give a number in nats, or one of {', '.join(ETA)}")
        eta = ETA[eta]
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not eta >= 0:
        raise ValueError(f"eta must be a mean KL divergence in nats, 0 or more, not {eta!r}")
    for name, value in (("first", first), ("samples", samples), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, not {value!r}")
    if not 1 <= first < layers:
        raise ValueError(f"first must be an exit layer 1 ... {layers - 1} of this model's {layers}, not {first}")
    if not 1 <= samples <= len(traces):
        raise ValueError(f"{samples} samples were asked for and {len(traces)} traces are there: choose 1 ... as many")
    chosen = torch.randperm(len(traces), generator=torch.Generator().manual_seed(seed))[:samples]
    picked = traces.select(chosen)
    kl = picked.kl.double().mean(0)
    good = [e for e in range(first, layers) if kl[e - 1] <= eta]
    layer = good[0] if good else layers
    return VTWChoice(
        layer=layer,
        never=not good,
        eta=float(eta),
        first=first,
        kl=kl.tolist(),
        agreement=(picked.agreement[:, layer - 1] >= 1).double().mean().item(),
        samples=[row["id"] for row in picked.rows],
        seed=seed,
        base_model=traces.provenance.get("base_model"),
        data=traces.provenance.get("data"),
    )


def calibrate(
    traces: TraceSet | str | os.PathLike | list[str], output: str | os.PathLike | None = None, **settings: Any
) -> VTWChoice:
    """:func:`choose_exit` from trace folders, written to ``output`` (a JSON file), if given.

    Raises:
        ValueError: as above, an unknown setting, or a trace folder that is missing or unfinished.
    """
    known = ("eta", "first", "samples", "seed")
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)} for VTW: choose from {', '.join(known)}")
    if not isinstance(traces, TraceSet):
        traces = load_traces(*(traces if isinstance(traces, list) else [traces]))
    choice = choose_exit(traces, **settings)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(output, choice.as_dict())
    return choice


def vtw_exit(traces: TraceSet | str | os.PathLike | list[str], **settings: Any) -> FixedExit:
    """The policy alone, from traces or the folders they are in; settings as in :func:`choose_exit`."""
    return calibrate(traces, **settings).policy
