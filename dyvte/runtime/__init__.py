"""Which visual tokens each decoder layer works on, on a running model. Knows no method."""

from dyvte.runtime.handle import Handle, PromptRecord, attach, reduce_tokens, visual_exit
from dyvte.runtime.reduction import Reduction, TopK
from dyvte.runtime.splice import SplicedVisualMask
from dyvte.runtime.view import LayerView

__all__ = [
    "Handle",
    "LayerView",
    "PromptRecord",
    "Reduction",
    "SplicedVisualMask",
    "TopK",
    "attach",
    "reduce_tokens",
    "visual_exit",
]
