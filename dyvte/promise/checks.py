"""What makes a record a promise: the rule by which its setting is chosen, and what cannot be in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyvte.promise.record import Promise

RULE = "Clopper-Pearson bound, fixed-sequence testing from the safest setting"
IDENTITY = ("weights", "processor", "dtype", "attention")  # fingerprints of what a promise is about


def boldest_safe(bound: Sequence[float], alpha: float) -> int | None:
    """The boldest setting that keeps the risk below ``alpha``, as an index into a curve.

    Settings are tested in a fixed order, from the safest on, and the first failure ends it (fixed-sequence testing,
    Learn then Test, arXiv 2110.01052), so the confidence holds without correction for the number of settings.

    Args:
        bound: upper confidence bounds of the risk, from the safest setting to the boldest.

    Returns:
        None if even the safest setting fails.
    """
    safe = next((i for i, value in enumerate(bound) if value > alpha), len(bound))
    return safe - 1 if safe > 0 else None


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def faults(promise: Promise) -> Iterator[str]:
    """What of a record cannot be, in words."""
    for name in ("alpha", "delta"):
        if not _is_number(getattr(promise, name), 0, 1) or getattr(promise, name) in (0, 1):
            yield f"{name} must lie strictly between 0 and 1, not {getattr(promise, name)!r}"
    if not _is_count(promise.samples) or promise.samples == 0:
        yield f"samples must be how many there were, not {promise.samples!r}"
    if not _is_list(promise.methods) or not promise.methods:
        yield f"methods must be names, not {promise.methods!r}"
    if promise.rule != RULE:
        yield f"its rule {promise.rule!r} is not the one that is known"
    yield from _faults_of_identity(promise)
    yield from _faults_of_curve(promise)
    if promise.chosen != boldest_safe(promise.curve.bound, promise.alpha) or isinstance(promise.chosen, bool):
        yield f"setting {promise.chosen!r} is not the boldest that keeps the risk below {promise.alpha}"
    reliability = promise.reliability
    if reliability is not None:
        columns = [getattr(reliability, field.name) for field in fields(reliability)]
        if not all(map(_is_list, columns)) or len({len(column) for column in columns}) != 1:
            yield "reliability must hold lists of one length"
        elif not all(_is_number(v, 0, 1) for column in columns[:2] for v in column) or not all(
            map(_is_count, columns[2])
        ):
            yield "reliability must hold shares and counts"


def _faults_of_identity(promise: Promise) -> Iterator[str]:
    identity = promise.identity
    if identity is not None and (
        set(identity) != set(IDENTITY) or not all(isinstance(v, str) for v in identity.values())
    ):
        yield f"identity must hold {', '.join(IDENTITY)}, as text"
    for name in ("base_model", "content"):
        if not isinstance(getattr(promise, name), (str, type(None))):
            yield f"{name} must be text or null, not {getattr(promise, name)!r}"
    if promise.shared_images is not None and not _is_count(promise.shared_images):
        yield f"shared_images must be a count or null, not {promise.shared_images!r}"


def _faults_of_curve(promise: Promise) -> Iterator[str]:
    curve = promise.curve
    columns = {name: getattr(curve, name) for name in ("risk", "bound", "saved")}
    if not isinstance(curve.settings, Mapping) or not curve.settings:
        yield "the curve has no settings"
        return
    for name in curve.settings:
        if name.partition(".")[0] not in promise.methods or not name.partition(".")[2]:
            yield f"setting {name!r} belongs to none of the methods {list(promise.methods)}"
    lists = [*curve.settings.values(), *columns.values()]
    if not all(map(_is_list, lists)) or len({len(values) for values in lists}) != 1 or len(curve.risk) == 0:
        yield "the curve must hold lists of one length"
        return
    for name, values in columns.items():
        if not all(_is_number(value, 0, 1) for value in values):
            yield f"the curve's {name} must be shares, 0 ... 1"
            return
    if any(risk > bound for risk, bound in zip(curve.risk, curve.bound)):
        yield "a bound of the curve lies below its risk"
    changed = [risk * promise.samples for risk in curve.risk]
    if any(not math.isclose(count, round(count), abs_tol=1e-4) for count in changed):
        yield f"a risk of the curve is no share of {promise.samples} samples"
