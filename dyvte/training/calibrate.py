"""How often a threshold changes an answer, and the threshold that keeps a promised rate.

Everything here works on traces: which exit a threshold picks for each sample, and whether the answer stays the same
there, is all known beforehand.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import beta

from dyvte.heads import ExitHeads
from dyvte.promise import Curve, Promise, Reliability, boldest_safe
from dyvte.training.fit import probability_of
from dyvte.training.held_out import check_held_out
from dyvte.training.identity import IDENTITY
from dyvte.training.store import TraceSet


@dataclass
class RiskCurve:
    """What every threshold would do to the same samples, from the most cautious threshold to the least.

    Attributes:
        threshold: float [t], descending.
        risk: the share of samples whose answer differs from the dense one, [t].
        bound: upper confidence bound of that risk, [t].
        exit_layer: mean exit layer, [t].
        saved: share of the visual-token layers saved, (L - e) / L, [t].
        samples: how many samples these are shares of.
        delta: 1 - confidence of ``bound``.
    """

    threshold: torch.Tensor
    risk: torch.Tensor
    bound: torch.Tensor
    exit_layer: torch.Tensor
    saved: torch.Tensor
    samples: int
    delta: float

    def thinned(self) -> Curve:
        """For the record: one point, the boldest, of every run of thresholds that have the same bound."""
        last = torch.cat([self.bound[1:] != self.bound[:-1], torch.ones(1, dtype=torch.bool)])
        threshold, risk, bound, saved = (
            getattr(self, name)[last].tolist() for name in ("threshold", "risk", "bound", "saved")
        )
        return Curve({"learned.threshold": threshold}, risk, bound, saved)


def exits_at(probability: torch.Tensor, threshold: float) -> torch.Tensor:
    """The exit layer a threshold picks: the first where the probability exceeds it, else L.

    Args:
        probability: [n, L]; column e - 1 decides exit layer e, the last one is ignored.
    """
    layers = probability.shape[1]
    over = probability[:, :-1] > threshold
    return torch.where(over.any(1), over.int().argmax(1) + 1, layers)


def oracle_exits(same: torch.Tensor) -> torch.Tensor:
    """The earliest exit that keeps the answer: bool [n, L] -> long [n]."""
    return same.int().argmax(1) + 1


def disagreement(same: torch.Tensor, exits: torch.Tensor) -> torch.Tensor:
    """Whether each sample's answer changes at its exit layer: bool [n, L], long [n] -> bool [n]."""
    return ~same.gather(1, exits[:, None] - 1).squeeze(1)


def clopper_pearson(errors: torch.Tensor | int, n: int, delta: float) -> torch.Tensor:
    """Exact upper confidence bound of a binomial rate: it is exceeded with probability ``delta`` at most."""
    errors = torch.as_tensor(errors, dtype=torch.double)
    upper = torch.as_tensor(beta.ppf(1 - delta, errors.numpy() + 1, n - errors.numpy()))
    return upper.nan_to_num(1.0)


def samples_needed(alpha: float, delta: float) -> int:
    """The fewest calibration samples that can prove a risk below ``alpha``: even without one error."""
    # Without an error the bound is 1 - delta ** (1 / n).
    return math.ceil(math.log(delta) / math.log1p(-alpha))


def threshold_grid(points: int = 800) -> torch.Tensor:
    """The thresholds that are looked at, from 1 (never exit) down, evenly spaced in logits.

    They are fixed before any data is seen, as fixed-sequence testing demands.
    """
    return torch.cat(
        [torch.ones(1, dtype=torch.double), torch.linspace(14, -4, points - 1, dtype=torch.double).sigmoid()]
    )


def risk_curve(probability: torch.Tensor, same: torch.Tensor, delta: float = 0.1, points: int = 800) -> RiskCurve:
    """Risk and savings of every threshold on the same samples.

    Args:
        probability: [n, L], what heads say.
        same: bool [n, L], whether the answer stays the same at exit layer e (column e - 1).
        points: how many thresholds, see :func:`threshold_grid`.
    """
    n, layers = probability.shape
    thresholds = threshold_grid(points)
    wrong, mean = torch.empty(len(thresholds), dtype=torch.long), torch.empty(len(thresholds), dtype=torch.double)
    probability = probability.double()
    for i, threshold in enumerate(thresholds.tolist()):
        exits = exits_at(probability, threshold)
        wrong[i], mean[i] = disagreement(same, exits).sum(), exits.double().mean()
    return RiskCurve(
        threshold=thresholds,
        risk=wrong.double() / n,
        bound=clopper_pearson(wrong, n, delta),
        exit_layer=mean,
        saved=1 - mean / layers,
        samples=n,
        delta=delta,
    )


def calibrate(
    heads: ExitHeads, traces: TraceSet, alpha: float = 0.01, delta: float = 0.1, shared_images: bool = False
) -> RiskCurve:
    """Sets the threshold of ``heads`` so that P(answer differs from dense) <= alpha, with confidence 1 - delta.

    Heads that would then never exit are warned of, with what would make them.

    Args:
        traces: held out: none of them, nor their images, may have trained the heads.
        shared_images: allow other questions about images of training; their number is noted.

    Raises:
        ValueError: too few traces for that promise, traces of training or of another model, or no threshold keeps it.
    """
    check_enough(len(traces), alpha, delta)
    if traces.provenance.get("pruning") is not None:
        raise ValueError(
            f"these traces are of a pruned model ({traces.provenance['pruning']}), so a threshold alone would keep no "
            "promise: calibrate both with dyvte.training.together, or trace without the pruning"
        )
    shared = refuse_training_samples(heads, traces, shared_images)
    check_traced(heads, traces)
    same = traces.agreement >= 1
    probability = probability_of(heads, traces)
    curve = risk_curve(probability, same, delta)
    shown = curve.thinned()
    chosen = boldest_safe(shown.bound, alpha)
    if chosen is None:
        raise ValueError(f"no threshold keeps the risk below {alpha} with confidence {1 - delta:g}: allow more risk")
    if shown.saved[chosen] == 0:
        warnings.warn(f"these heads will never exit: {_what_would_do(curve, alpha)}", stacklevel=2)
    columns = [*(e - 1 for e in heads.config.decided), traces.num_layers - 1]
    promise = Promise(
        alpha=alpha,
        delta=delta,
        samples=curve.samples,
        methods=["learned"],
        curve=shown,
        chosen=chosen,
        reliability=reliability(probability[:, columns], same[:, columns]),
        **subject_of(traces, shared),
    )
    heads.config.threshold, heads.config.calibration = promise.setting["learned.threshold"], promise.as_dict()
    return curve


def check_traced(heads: ExitHeads, traces: TraceSet) -> None:
    """Raises ``ValueError`` if traces are of another model than the heads, or lack exits that the heads decide."""
    source = traces.provenance
    heads.check_fits(
        traces.num_layers, traces.state.shape[-1] // 2, source.get("base_model"), weights=source.get("weights")
    )
    missing = set(heads.config.decided) - set(traces.exits)
    if missing:
        raise ValueError(
            f"the heads decide exits {sorted(missing)}, which were not traced here: trace with the same exits"
        )


def subject_of(traces: TraceSet, shared_images: int | None) -> dict[str, Any]:
    """What a promise that was calibrated on traces is true of, as fields of :class:`dyvte.Promise`."""
    source = traces.provenance
    return {
        "base_model": source.get("base_model"),
        "identity": {name: source[name] for name in IDENTITY} if all(name in source for name in IDENTITY) else None,
        "data": source.get("data"),
        "content": source.get("content"),
        "shared_images": shared_images,
    }


def check_enough(samples: int, alpha: float, delta: float) -> None:
    """Raises ``ValueError`` if so many samples could not show the risk, even without one changed answer."""
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, not {value}")
    needed = samples_needed(alpha, delta)
    if samples < needed:
        least = f"; {samples} can show {1 - delta ** (1 / samples):.3g} at best" if samples else ""
        raise ValueError(
            f"{samples} traces cannot show a risk below {alpha} with confidence {1 - delta:g}: "
            f"at least {needed} held-out samples are needed{least}"
        )


def refuse_training_samples(heads: ExitHeads, traces: TraceSet, shared_images: bool) -> int | None:
    """How many images are shared with training; None where it cannot be known."""

    def marks(data: Any) -> set[str]:
        return {part["fingerprint"] for part in data or [] if isinstance(part, dict) and "fingerprint" in part}

    training = heads.config.training or {}
    if marks(training.get("data")) & marks(traces.provenance.get("data")):
        raise ValueError(
            "the traces to calibrate on are those the heads were trained on, so no promise would follow: "
            "trace other samples, with other images"
        )
    if heads.trained_on is not None and traces.content is not None:
        return check_held_out(heads.trained_on, traces.content, shared_images)
    if traces.content is not None:
        warnings.warn(
            "these heads do not remember their training samples, so nobody can tell whether the traces to calibrate on "
            "are held out: the promise holds only if they are",
            stacklevel=3,
        )
    return None


def _what_would_do(curve: RiskCurve, alpha: float) -> str:
    """The alpha, or the number of samples, with which heads that never exit would exit now and then."""
    first = int((curve.saved > 0).int().argmax())
    if curve.saved[first] == 0:
        return "no threshold lets any of these samples leave; train them on more, or on other, samples"
    least, risk = float(curve.bound[: first + 1].max()), float(curve.risk[: first + 1].max())
    text = f"alpha={least:.3g} or more would let them, with these {curve.samples} samples"
    if risk >= alpha:
        return f"{text}; {risk:.3g} of the answers change at their first exits, so more samples alone would not do"
    needed = curve.samples
    while clopper_pearson(math.ceil(risk * needed), needed, curve.delta) > alpha:
        needed = math.ceil(needed * 1.05)
    return f"{text}, or about {needed} samples with alpha={alpha}"


def reliability(probability: torch.Tensor, same: torch.Tensor, bins: int = 15) -> Reliability:
    """How often the answer stayed the same where the heads gave a probability of so much: binned, all exit layers."""
    said, kept = probability[:, :-1].flatten().double(), same[:, :-1].flatten().double()
    place = (said * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    filled = count > 0
    means = (torch.bincount(place, values, minlength=bins)[filled] / count[filled] for values in (said, kept))
    confidence, frequency = (mean.tolist() for mean in means)
    return Reliability([min(c, 1.0) for c in confidence], frequency, count[filled].tolist())


def compare(heads: ExitHeads, traces: TraceSet, threshold: float | None = None) -> dict[str, Any]:
    """The learned policy beside the per-sample oracle and every fixed layer, on traces.

    ``oracle_share`` is the visual-layer compute saved, divided by what the earliest agreeing exit of each sample saves.
    """
    same, layers = traces.agreement >= 1, traces.num_layers
    threshold = heads.config.threshold if threshold is None else threshold
    exits, oracle = exits_at(probability_of(heads, traces), threshold), oracle_exits(same)
    possible = (layers - oracle).sum().item()

    def row(e: torch.Tensor) -> dict[str, float]:
        return {
            "agreement": 1 - disagreement(same, e).float().mean().item(),
            "mean_exit_layer": e.float().mean().item(),
            "oracle_share": (layers - e).sum().item() / max(possible, 1),
        }

    fixed = [row(torch.full_like(exits, e)) for e in range(1, layers + 1)]
    kinds = sorted(set(traces.kinds))
    index = torch.tensor([kinds.index(kind) for kind in traces.kinds])
    return {
        "samples": len(traces),
        "layers": layers,
        "threshold": threshold,
        "learned": row(exits),
        "oracle": row(oracle),
        "fixed": fixed,
        "by_kind": {
            kind: {
                "samples": int((index == i).sum()),
                "agreement": 1 - disagreement(same, exits)[index == i].float().mean().item(),
                "mean_exit_layer": exits[index == i].float().mean().item(),
                "oracle_exit_layer": oracle[index == i].float().mean().item(),
            }
            for i, kind in enumerate(kinds)
        },
    }
