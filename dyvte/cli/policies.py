"""Policies by name, as ``dyvte evaluate`` is told them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyvte.evaluation.policies import PerSampleExit
from dyvte.loading import load_heads
from dyvte.methods import METHODS, LearnedExit, by_name
from dyvte.training.calibrate import oracle_exits
from dyvte.training.store import load_traces
from dyvte.training.vtw import vtw_exit


def make_policies(described: Mapping[str, Any], heads: str | None) -> dict[str, Any]:
    """Policies by name from a config; the part of a name before the first dash says what it is.

    Raises:
        ValueError: an unknown policy, or wrong settings for one.
    """

    def learned(heads: str | None = heads, **settings: Any) -> LearnedExit:
        if heads is None:
            raise ValueError("it needs exit heads: set heads=FOLDER")
        return LearnedExit(load_heads(heads), **settings)

    makers = {"learned": learned, "oracle": oracle, "vtw": vtw_exit}
    policies = {}
    for name, settings in described.items():
        kind = str(name).split("-")[0]
        if kind not in makers and kind not in METHODS:
            raise ValueError(f"unknown policy {name!r}: start its name with one of {', '.join([*makers, *METHODS])}")
        if not isinstance(settings, Mapping | None):
            raise ValueError(f"policy {name!r} must have a mapping of settings, such as {{layer: 6}}, not {settings!r}")
        settings = dict(settings or {})
        later = settings.pop("exit", None) if kind in METHODS else None
        try:
            policies[name] = makers[kind](**settings) if kind in makers else by_name(kind, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"wrong settings for policy {name!r}: {error}") from None
        if later is not None:
            if not isinstance(later, Mapping) or len(later) != 1:
                raise ValueError(f"exit of policy {name!r} must name one policy, such as {{fixed: {{layer: 6}}}}")
            (leaving,) = make_policies(later, heads).values()
            policies[name] = policies[name] & leaving
    return policies


def oracle(traces: str | list[str]) -> PerSampleExit:
    """The earliest exit that keeps each sample's answer, looked up in traces of the same samples."""
    known = load_traces(*([traces] if isinstance(traces, str) else traces))
    exits = oracle_exits(known.agreement >= 1).tolist()
    layers = dict(zip(known.content.samples.tolist(), exits))
    return PerSampleExit(layers, by_content=True)
