"""The promise: how often a method may change an answer, the curve that shows it, and what it is true of."""

from dyvte.promise.checks import IDENTITY, RULE, boldest_safe
from dyvte.promise.record import FILE, Curve, Promise, Reliability

__all__ = ["FILE", "IDENTITY", "RULE", "Curve", "Promise", "Reliability", "boldest_safe"]
