"""Answer requests of OpenAI clients with exits: transformers' own server, streaming included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dyvte.cli.arguments import read_arguments
from dyvte.cli.configs import ServeConfig

if TYPE_CHECKING:
    from dyvte.runtime import Reduction

EXAMPLES = (
    "dyvte serve llava-hf/llava-1.5-7b-hf heads=checkpoints/my-heads",
    "dyvte serve checkpoints/reference-mllm dtype=float32 heads=checkpoints/reference-heads risk=0.02 port=8080",
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(ServeConfig, arguments, prog="dyvte serve", examples=EXAMPLES, positional="model"))


def run(config: ServeConfig) -> None:
    import transformers
    from packaging.version import Version
    from transformers.utils.import_utils import is_serve_available

    if Version(transformers.__version__) < Version("5.23") or not is_serve_available():
        raise ValueError(
            "`dyvte serve` stands on the server of transformers 5.23 or later and its packages: "
            "pip install 'dyvte[serve]'"
        )
    if config.loader or config.shard not in ("none", "device_map"):
        raise ValueError("`dyvte serve` is one process with a model of transformers: use shard=none or device_map")
    method = method_of(config.heads, config.risk)

    import uvicorn

    import dyvte
    from dyvte.integrations.serve import build_app
    from dyvte.loading import load_mllm
    from dyvte.ranks import Ranks

    with Ranks.launched(config.device, group=False) as ranks:
        mllm = load_mllm(config, ranks)
        exits = dyvte.attach(mllm.model, method)
        if config.host not in LOOPBACK:
            print(f"whoever reaches {config.host}:{config.port} can ask, and have it read pictures by address")
        uvicorn.run(build_app(mllm, config.model, exits), host=config.host, port=config.port, log_level=config.log)


def method_of(name: str, risk: float | None) -> Reduction:
    """What answers with exits: the method of a promise, or exit heads, which may lie on the hub.

    Raises:
        ValueError: there is nothing of the kind, or such a risk was not shown.
    """
    from huggingface_hub import snapshot_download

    import dyvte
    from dyvte.loading import load_heads, loading
    from dyvte.promise import FILE

    with loading(name, "heads"):
        folder = name if Path(name).is_dir() else snapshot_download(name)
    if Path(folder, FILE).is_file():
        return dyvte.load(folder, risk)
    return dyvte.LearnedExit(load_heads(folder), risk=risk)
