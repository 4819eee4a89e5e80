"""Look into a model layer by layer: where its text looks, what every exit would change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from dyvte.cli.arguments import read_arguments
from dyvte.cli.configs import InspectConfig

EXAMPLES = (
    "dyvte inspect model=checkpoints/reference-mllm dtype=float32 output=runs/inspect \\\n"
    "      'data={scenes: {split: test, n: 120}}'",
)


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(InspectConfig, arguments, prog="dyvte inspect", examples=EXAMPLES))


def run(config: InspectConfig) -> None:
    from dyvte.cli.loading import load_data, load_model
    from dyvte.cli.outputs import check_folder
    from dyvte.evaluation.inspection import inspect_model

    folder = check_folder(config.output)
    data, samples = load_data(config.data)
    model, processor = load_model(config)
    max_new_tokens = config.max_new_tokens or data.get("max_new_tokens", 16)
    inspect_model(
        model,
        processor,
        samples,
        folder,
        batch_size=config.batch_size,
        max_new_tokens=max_new_tokens,
        template=data.get("template"),
        config=asdict(config) | {"data": data, "max_new_tokens": max_new_tokens},
    )
    print(folder / "inspect.png")
