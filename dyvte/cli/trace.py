"""Run a frozen MLLM over questions once, and write down what every exit layer would do."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.cli.arguments import read_arguments
from dyvte.config import TraceConfig

EXAMPLES = (
    "dyvte trace configs/trace.yaml data.scenes.n=500 output=runs/traces/small",
    "dyvte trace model=llava-hf/llava-1.5-7b-hf data=configs/data/gqa.yaml data.limit=1000 output=runs/traces/gqa",
    "torchrun --nproc_per_node 8 train/trace.py configs/trace.yaml   # ranks share the work",
)


def main(arguments: Sequence[str]) -> None:
    """Interrupted runs go on where they stopped."""
    run(read_arguments(TraceConfig, arguments, prog="dyvte trace", examples=EXAMPLES))


def run(config: TraceConfig) -> None:
    from dyvte.cli.outputs import check_folder
    from dyvte.loading import needs_group
    from dyvte.ranks import Ranks
    from dyvte.training.cost import told
    from dyvte.training.recipes import trace

    check_folder(config.output)
    with Ranks.launched(config.device, group=needs_group(config)) as ranks:
        if told(config, ranks):
            return
        trace(config, ranks)
