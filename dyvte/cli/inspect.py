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
    from dyvte.cli.outputs import check_folder
    from dyvte.data import load_samples, read_config
    from dyvte.evaluation.inspection import inspect_model
    from dyvte.loading import load_mllm, needs_group
    from dyvte.ranks import Ranks

    folder = check_folder(config.output)
    with Ranks.launched(config.device, group=needs_group(config)) as ranks:
        if ranks.world_size > 1 or config.loader:
            raise ValueError("`dyvte inspect` is for one process and models of transformers: start it without torchrun")
        data = read_config(config.data)
        samples = load_samples(data)
        mllm = load_mllm(config, ranks)
        max_new_tokens = config.max_new_tokens or data.get("max_new_tokens", 16)
        inspect_model(
            mllm.model,
            mllm.processor,
            samples,
            folder,
            batch_size=config.batch_size,
            max_new_tokens=max_new_tokens,
            template=data.get("template"),
            config=asdict(config) | {"data": data, "max_new_tokens": max_new_tokens},
        )
    print(folder / "inspect.png")
