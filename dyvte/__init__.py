"""dyvte: multimodal LLMs that answer faster by letting visual tokens leave when they are no longer needed."""

from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.policies import ExitPolicy, FixedExit, LearnedExit, NeverExit, RandomExit
from dyvte.tracing import Trace, trace_batch
from dyvte.version import __version__
from dyvte.withdrawal import VisualExit, attach, visual_exit

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
