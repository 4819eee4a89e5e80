"""From a data config to its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyvte.data.config import check_config
from dyvte.data.conversations import ConversationSamples
from dyvte.data.samples import Source
from dyvte.data.scenes import SceneSamples
from dyvte.data.tables import TableSamples

FORMATS = {"table": TableSamples, "llava": ConversationSamples, "messages": ConversationSamples}


def load_samples(config: Mapping[str, Any]) -> Source:
    """The samples a config describes (see :mod:`dyvte.data.config`); images are decoded when a sample is read.

    Raises:
        ValueError: the config is wrong; the message names the fault and the remedy.
    """
    check_config(config)
    if "scenes" in config:
        return SceneSamples(config)
    layout = config.get("format") or "table"
    if layout not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {layout!r}")
    return FORMATS[layout](config)
