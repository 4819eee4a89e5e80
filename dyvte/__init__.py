"""dyvte: multimodal LLMs that answer faster by letting visual tokens leave when they are no longer needed."""

from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.policies import ExitPolicy, FixedExit, LearnedExit, NeverExit, RandomExit
from dyvte.tracing import Trace, trace_batch
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
    "attach",
    "visual_exit",
]
__version__ = "0.1.0"
