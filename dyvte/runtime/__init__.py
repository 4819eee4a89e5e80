"""Which visual tokens each decoder layer works on, on a running model. Knows no method."""

from dyvte.runtime.edits import LayerEdit
from dyvte.runtime.handle import Handle, PromptRecord, attach, edit_layers, reduce_tokens, visual_exit
from dyvte.runtime.reduction import Reduction, TopK
from dyvte.runtime.splice import SplicedVisualMask
from dyvte.runtime.view import LayerView

__all__ = [
    "Handle",
    "LayerEdit",
    "LayerView",
    "PromptRecord",
    "Reduction",
    "SplicedVisualMask",
    "TopK",
    "attach",
    "edit_layers",
    "reduce_tokens",
    "visual_exit",
]
