"""Run a frozen MLLM over questions once, and write down what every exit layer would do."""

from __future__ import annotations

import os
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
    from dyvte.cli.loading import load_data, load_model
    from dyvte.cli.outputs import check_folder
    from dyvte.data import fingerprint
    from dyvte.training.write import write_traces

    check_folder(config.output)
    data, samples = load_data(config.data)
    model, processor = load_model(config)
    write_traces(
        model,
        processor,
        samples,
        config.output,
        answers=config.answers,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens or data.get("max_new_tokens", 16),
        template=data.get("template"),
        provenance=data | {"fingerprint": fingerprint(data)},
        exits=config.exits,
        unit_size=config.unit_size,
        seed=config.seed,
        on_error=config.on_error,
        max_errors=config.max_errors,
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )
