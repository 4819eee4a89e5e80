"""dyvte: multimodal LLMs that answer faster by letting visual tokens leave when they are no longer needed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dyvte.version import __version__

if TYPE_CHECKING:
    from dyvte.heads import ExitHeads, ExitHeadsConfig
    from dyvte.methods import EAS, ExitPolicy, FastV, FixedExit, LearnedExit, NeverExit, RandomExit, RandomPruning
    from dyvte.methods.promised import load
    from dyvte.promise import Promise
    from dyvte.runtime import (
        Handle,
        LayerEdit,
        LayerView,
        Reduction,
        SplicedVisualMask,
        TopK,
        attach,
        edit_layers,
        reduce_tokens,
        visual_exit,
    )
    from dyvte.training.trace import trace_batch
    from dyvte.training.trace_pass import Trace

# Where the public names live. They are imported when they are first used, so that what needs none of them, such as a
# command line that explains itself, does not wait for torch.
_HOMES = {
    "dyvte.heads": ("ExitHeads", "ExitHeadsConfig"),
    "dyvte.methods": (
        "EAS",
        "ExitPolicy",
        "FastV",
        "FixedExit",
        "LearnedExit",
        "NeverExit",
        "RandomExit",
        "RandomPruning",
    ),
    "dyvte.methods.promised": ("load",),
    "dyvte.promise": ("Promise",),
    "dyvte.runtime": (
        "Handle",
        "LayerEdit",
        "LayerView",
        "Reduction",
        "SplicedVisualMask",
        "TopK",
        "attach",
        "edit_layers",
        "reduce_tokens",
        "visual_exit",
    ),
    "dyvte.training.trace": ("trace_batch",),
    "dyvte.training.trace_pass": ("Trace",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "EAS",
    "ExitHeads",
    "ExitHeadsConfig",
    "ExitPolicy",
    "FastV",
    "FixedExit",
    "Handle",
    "LayerEdit",
    "LayerView",
    "LearnedExit",
    "NeverExit",
    "Promise",
    "RandomExit",
    "RandomPruning",
    "Reduction",
    "SplicedVisualMask",
    "TopK",
    "Trace",
    "__version__",
    "attach",
    "edit_layers",
    "load",
    "reduce_tokens",
    "trace_batch",
    "visual_exit",
]


_PARTS = ("data", "evaluation", "heads", "methods", "report", "runtime", "training")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"dyvte.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("dyvte.heads")  # lets the Auto classes of transformers know exit heads
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
