"""``model.generate(**inputs, custom_generate=REPOSITORY, trust_remote_code=True)`` for repositories of exit heads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from dyvte.methods.promised import load
from dyvte.runtime import reduce_tokens


def generate(model: GenerationMixin, risk: float | None = None, **arguments: Any) -> Any:
    """``model.generate`` with the exits of the heads in the repository that was given as ``custom_generate``.

    Args:
        model: the one whose ``generate`` was called.
        risk: share of answers that may change, instead of the one calibrated for.
        arguments: all others of ``generate``.

    Returns:
        What ``generate`` returns; with ``return_dict_in_generate=True`` it has ``exit_layers``, long [batch], too.

    Raises:
        ValueError: the heads are not for this model, or were not calibrated for such a risk.
    """
    # transformers runs a copy of the repository's file and does not hand on where that came from.
    repository = sys._getframe(1).f_locals.get("custom_generate")
    if repository is None:
        raise ValueError("heads lie in a repository of their own: model.generate(..., custom_generate=REPOSITORY)")
    folder = repository if Path(repository).is_dir() else snapshot_download(repository)
    with reduce_tokens(model, load(folder, risk)) as exits:
        output = model.generate(**arguments)
    if isinstance(output, ModelOutput):
        output["exit_layers"] = exits.layers
    return output
