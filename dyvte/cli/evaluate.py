"""Ask held-out questions, dense and with every policy: score, agreement, exit layers, what is saved."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dyvte.cli.arguments import read_arguments
from dyvte.cli.configs import EvaluateConfig

EXAMPLES = (
    "dyvte evaluate configs/evaluate.yaml 'policies={learned: {}, fixed-6: {layer: 6}}' output=runs/eval/mine",
    "dyvte evaluate model=llava-hf/llava-1.5-7b-hf heads=runs/heads data=configs/data/pope.yaml output=runs/pope",
    "torchrun --nproc_per_node 8 -m dyvte.cli.main evaluate configs/evaluate.yaml   # ranks share the samples",
)
TITLES = ("policy", "right", "agreement", "exit layer", "FLOPs removed", "prefill time")


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(EvaluateConfig, arguments, prog="dyvte evaluate", examples=EXAMPLES))


def run(config: EvaluateConfig) -> None:
    from dyvte.cli.outputs import check_folder
    from dyvte.cli.policies import make_policies
    from dyvte.data import load_samples, read_config
    from dyvte.evaluation.runner import evaluate
    from dyvte.loading import load_heads, load_mllm, needs_group
    from dyvte.ranks import Ranks

    folder = check_folder(config.output)
    if config.loader:
        raise ValueError("`dyvte evaluate` takes models of transformers, without a loader: see dyvte.evaluation.runner")
    with Ranks.launched(config.device, group=needs_group(config)) as ranks:
        policies = make_policies(config.policies, config.heads)
        data = read_config(config.data)
        samples = load_samples(data)
        mllm = load_mllm(config, ranks)
        settings = {
            "metric": config.metric or data.get("metric", "exact_match"),
            "max_new_tokens": config.max_new_tokens or data.get("max_new_tokens", 16),
        }
        summary = evaluate(
            mllm.model,
            mllm.processor,
            samples,
            policies,
            folder,
            batch_size=config.batch_size,
            template=data.get("template"),
            config=asdict(config) | settings | {"data": data},
            ranks=ranks,
            **settings,
        )
        if ranks.first:
            promise = None if config.heads is None else load_heads(config.heads).config.promise
            if promise is not None:
                promise.write(folder)  # for the report
            print(json.dumps(summary, indent=2) if config.json else results_table(summary))


def results_table(summary: Mapping[str, Any]) -> str:
    """What a summary comes to, a row for each policy."""
    from dyvte.cli.table import table

    rows = []
    for name, values in summary["policies"].items():
        score, timing = values.get("score"), values.get("timing")
        rows.append(
            [
                name,
                "-" if score is None else f"{100 * score:.1f} %",
                f"{100 * values['agreement']:.1f} %",
                f"{values['mean_exit_layer']:.1f}",
                f"{100 * values['flops_removed']:.0f} %",
                f"{timing['prefill_ratio']:.2f}x" if timing else "-",
            ]
        )
    return table(TITLES, rows)
