"""model.generate(**inputs, custom_generate=REPOSITORY, trust_remote_code=True): answers with the exits of its heads."""

from dyvte.integrations.custom_generate import generate

__all__ = ["generate"]
