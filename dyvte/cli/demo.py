"""Answer held-out questions with the reference MLLM, dense and with exits: a table, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dyvte.cli.arguments import read_arguments
from dyvte.cli.configs import DemoConfig

EXAMPLES = ("dyvte demo", "dyvte demo per_kind=8 output=runs/small-demo")
TITLES = ("kind", "dense right", "exit right", "agreement", "exit layer", "FLOPs removed", "prefill time")
REFERENCE = Path(__file__).parents[1] / "reference"  # travels with the package


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(DemoConfig, arguments, prog="dyvte demo", examples=EXAMPLES))


def run(config: DemoConfig) -> None:
    import torch

    from dyvte.cli.outputs import check_folder
    from dyvte.cli.table import table
    from dyvte.evaluation.demo import run as answer

    folder = check_folder(config.output)
    model = checkpoint(config.model, "model", "reference-mllm")
    heads = checkpoint(config.heads, "heads", "reference-heads")
    torch.set_num_threads(config.threads)
    rows = answer(model, heads, config.per_kind, config.repeats, folder)
    cells = []
    for row in rows:
        shares = [f"{100 * share:.1f} %" for share in (row.dense_right, row.exit_right, row.agreement)]
        saved = [f"{100 * row.flops_removed:.0f} %", f"{row.prefill_time:.2f}x"]
        cells.append([row.kind, *shares, f"{row.exit_layer:.1f}", *saved])
    print(
        f"{table(TITLES, cells, last_apart=True)}\n\n"
        f"Prefill time: the language model on a batch of {config.per_kind} prompts, with exits over dense, median of\n"
        f"{config.repeats} runs in turn. The vision tower, the same for both, is left out.\n\n"
        f"{folder / 'demo.png'}"
    )


def checkpoint(folder: str | None, key: str, shipped: str) -> Path:
    """A folder with a checkpoint: the one that was named, or the one that came with the package.

    Raises:
        ValueError: there is none.
    """
    path = REFERENCE / shipped if folder is None else Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"there is no checkpoint in {path}: name the folder of one as {key}=FOLDER, or install dyvte again"
        )
    return path
