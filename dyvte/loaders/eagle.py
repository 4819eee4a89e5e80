"""Eagle-X5, of https://github.com/NVlabs/EAGLE: ``loader: dyvte.loaders.eagle:load``."""

from __future__ import annotations

from dyvte.config import ModelConfig
from dyvte.loaders.llava import Loaded, load_style

REPOSITORY = "https://github.com/NVlabs/EAGLE"
TEMPLATES = (("llama3", "llama3"), ("llama-3", "llama3"), ("x4-8b", "llama3"), ("x5", "vicuna_v1"))


def load(config: ModelConfig) -> Loaded:
    """An Eagle-X5 with its own builder, prompts and images; its code base is LLaVA's, under another name.

    Raises:
        ValueError: the package is not installed, or cannot do what the config asks for.
    """
    return load_style(config, "eagle", REPOSITORY, TEMPLATES)
