"""dyvte: multimodal LLMs that answer faster by letting visual tokens leave when they are no longer needed."""

from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.methods.exits import ExitPolicy, FixedExit, LearnedExit, NeverExit, RandomExit
from dyvte.runtime.withdrawal import VisualExit, attach, visual_exit
from dyvte.training.trace import Trace, trace_batch
from dyvte.version import __version__

__all__ = [
    "ExitHeads",
    "ExitHeadsConfig",
    "Trace",
    "trace_batch",
    "ExitPolicy",
    "FixedExit",
    "LearnedExit",
    "NeverExit",
    "RandomExit",
    "VisualExit",
    "__version__",
    "attach",
    "visual_exit",
]
