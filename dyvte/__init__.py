"""dyvte: multimodal LLMs that answer faster by letting visual tokens leave when they are no longer needed."""

from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.methods import ExitPolicy, FastV, FixedExit, LearnedExit, NeverExit, RandomExit, RandomPruning
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
from dyvte.version import __version__

__all__ = [
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
