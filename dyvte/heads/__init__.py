"""Exit heads: what reads a text state and says whether the visual tokens can leave."""

from dyvte.heads.model import ExitHeads, ExitHeadsConfig

__all__ = ["ExitHeads", "ExitHeadsConfig"]
