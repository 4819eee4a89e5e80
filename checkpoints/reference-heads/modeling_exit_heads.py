"""Exit heads for AutoModel.from_pretrained(REPOSITORY, trust_remote_code=True); the classes are those of dyvte."""

from dyvte.heads import ExitHeads, ExitHeadsConfig

__all__ = ["ExitHeads", "ExitHeadsConfig"]
