"""Exit heads: what reads a text state and says whether the visual tokens can leave."""

from transformers import AutoConfig, AutoModel

from dyvte.heads.config import ExitHeadsConfig
from dyvte.heads.model import ExitHeads

AutoConfig.register(ExitHeadsConfig.model_type, ExitHeadsConfig)
AutoModel.register(ExitHeadsConfig, ExitHeads)

__all__ = ["ExitHeads", "ExitHeadsConfig"]
