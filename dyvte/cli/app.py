"""Ask about images on a page of this machine: the answer with exits beside the dense one."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dyvte.cli.arguments import read_arguments
from dyvte.cli.configs import AppConfig

if TYPE_CHECKING:
    from dyvte.data import Sample
    from dyvte.evaluation.side_by_side import SideBySide

EXAMPLES = ("dyvte app", "dyvte app llava-hf/llava-1.5-7b-hf heads=checkpoints/my-heads data=configs/data/pope.yaml")
SCENES = {"scenes": {"split": "test", "n": 6, "seed": 7}}


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(AppConfig, arguments, prog="dyvte app", examples=EXAMPLES, positional="model"))


def run(config: AppConfig) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError("the page needs gradio: pip install 'dyvte[app]'") from None
    from dyvte.integrations.app import serve

    serve(*prepare(config))


def prepare(config: AppConfig) -> tuple[SideBySide, Sequence[Sample], AppConfig]:
    """The model with its heads, the first questions, and the config with nothing left open.

    Raises:
        ValueError: something is missing, cannot be loaded, or does not fit.
    """
    from dyvte.cli.demo import checkpoint
    from dyvte.data import load_samples, read_config
    from dyvte.evaluation.side_by_side import SideBySide
    from dyvte.loading import load_heads, load_mllm, needs_group
    from dyvte.ranks import Ranks

    check_address(config.host, config.port)
    if config.loader or needs_group(config):
        raise ValueError("`dyvte app` is for models of transformers in one process: leave loader out, and shard too")
    if config.model is None:
        dtype = "float32" if config.dtype == "auto" else config.dtype  # in which its heads were made
        config = replace(config, model=str(checkpoint(None, "model", "reference-mllm")), dtype=dtype)
        config = replace(config, heads=str(checkpoint(config.heads, "heads", "reference-heads")))
    if config.heads is None:
        raise ValueError("`dyvte app MODEL` needs heads=FOLDER: heads made for this model")
    first = load_samples(read_config(SCENES if config.data is None else config.data))[:6]
    samples = [sample for sample in first if len(sample.images) == 1]
    if not samples:
        raise ValueError("of the first six samples of data, none asks about one image: choose other data")
    heads = load_heads(config.heads)
    with Ranks.launched(config.device) as ranks:
        asked = SideBySide(load_mllm(config, ranks), heads, config.max_new_tokens)
    risk = heads.config.promise.alpha if config.risk is None else config.risk
    heads.threshold_for(risk)  # now, not at the first question
    return asked, samples, replace(config, risk=risk)


def check_address(host: str, port: int) -> None:
    """Raises ``ValueError`` if nothing can listen there."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{host} port {port} cannot be listened on ({reason}): choose another port or host") from None
