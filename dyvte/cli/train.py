"""From a model and two sets of questions to exit heads that keep a promise."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.cli import fit
from dyvte.cli.arguments import named_keys, read_arguments
from dyvte.config import FitConfig, TrainConfig

EXAMPLES = (
    "dyvte train model=llava-hf/llava-1.5-7b-hf data=train.yaml held_out=held-out.yaml output=runs/heads",
    "dyvte train configs/train.yaml   # traces= instead of a model: the same as dyvte fit",
)


def main(arguments: Sequence[str]) -> None:
    """All stages, or, where ``traces`` are named, the last ones alone."""
    if "traces" in named_keys(arguments):
        fit.run(read_arguments(FitConfig, arguments, prog="dyvte train", examples=fit.EXAMPLES))
    else:
        run(read_arguments(TrainConfig, arguments, prog="dyvte train", examples=EXAMPLES))


def run(config: TrainConfig) -> None:
    from dyvte.cli.outputs import check_folder
    from dyvte.loading import needs_group
    from dyvte.ranks import Ranks
    from dyvte.training.cost import told
    from dyvte.training.recipes import train, work_folder

    check_folder(config.output)
    check_folder(str(work_folder(config)), "work")
    with Ranks.launched(config.device, group=needs_group(config)) as ranks:
        if told(config, ranks):
            return
        heads = train(config, ranks)
        if ranks.first:
            print(fit.promise_of(heads))
