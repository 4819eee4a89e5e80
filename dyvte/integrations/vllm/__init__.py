"""Exits inside vLLM: ``DYVTE_HEADS=folder DYVTE_RISK=0.01 vllm serve MODEL``, see docs/vllm.md."""

from __future__ import annotations

import os


def register() -> None:
    """The entry point of ``vllm.general_plugins``; without DYVTE_HEADS it does nothing."""
    if os.environ.get("DYVTE_HEADS"):
        from dyvte.integrations.vllm.plugin import install

        install()
