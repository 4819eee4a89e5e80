"""From the rate of changed answers that a user accepts to a threshold, by the curve a calibration left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def boldest_safe(bound: Sequence[float], alpha: float) -> int | None:
    """The least cautious threshold that keeps the risk below ``alpha``, as an index into a risk curve.

    Thresholds are tested in a fixed order, from the safest on, and the first failure ends it (fixed-sequence testing,
    Learn then Test, arXiv 2110.01052), so the confidence holds without correction for the number of thresholds.

    Args:
        bound: upper confidence bounds of the risk, from the most cautious threshold to the least.

    Returns:
        None if even the safest threshold fails.
    """
    safe = next((i for i, value in enumerate(bound) if value > alpha), len(bound))
    return safe - 1 if safe > 0 else None


def threshold_for(calibration: Mapping[str, Any] | None, risk: float) -> float:
    """The threshold that changes at most ``risk`` of the answers.

    Args:
        calibration: what :func:`dyvte.training.calibrate.calibrate` left in the heads' config.

    Raises:
        ValueError: the heads were never calibrated, or not on enough samples for such a risk.
    """
    curve = (calibration or {}).get("curve")
    if curve is None:
        raise ValueError("these heads carry no risk curve: run `dyvte calibrate`, or give a threshold")
    if isinstance(risk, bool) or not isinstance(risk, (int, float)) or not 0 < risk < 1:
        raise ValueError(f"risk must lie strictly between 0 and 1, not {risk}: it is a share of changed answers")
    chosen = boldest_safe(curve["bound"], risk)
    if chosen is None:
        raise ValueError(
            f"{calibration['samples']} calibration samples cannot show a risk as low as {risk}: "
            f"the least is {curve['bound'][0]:.4g}; calibrate on more samples"
        )
    return curve["threshold"][chosen]
