"""A table of many benchmarks with lmms-eval: the commands that are still to run, and what the others have found."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.cli.arguments import read_arguments
from dyvte.cli.configs import BenchmarkConfig

EXAMPLES = (
    "dyvte benchmark configs/benchmark.yaml            # writes commands.sh, and the table as far as it goes",
    "sh runs/benchmark/commands.sh                     # or some of its lines, on as many machines as there are",
    "dyvte benchmark configs/benchmark.yaml 'benchmarks=[POPE, MME]' limit=100",
)


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(BenchmarkConfig, arguments, prog="dyvte benchmark", examples=EXAMPLES))


def run(config: BenchmarkConfig) -> None:
    from dyvte.cli.outputs import check_folder
    from dyvte.integrations.benchmark import benchmarks, plan
    from dyvte.integrations.benchmark_table import join, markdown, write
    from dyvte.provenance import atomic_write

    folder = check_folder(config.output)
    runs = plan(config.models, config.risks, benchmarks(config.benchmarks), folder, config.limit)
    joined = join(runs)
    names = ("batch_size", "device", "include_path", "gen_kwargs")
    options = {name: getattr(config, name) for name in names}
    to_run = [run for run in runs if run.name in {*joined["missing"], *joined["damaged"]}]
    folder.mkdir(parents=True, exist_ok=True)
    commands = "".join(f"{run.command(config.launcher, options, config.compare)}\n" for run in to_run)
    atomic_write(folder / "commands.sh", commands)
    write(folder, runs, joined)
    print(markdown(runs, joined["rows"]))
    for fault in joined["damaged"].values():
        print(f"damaged: {fault}")
    for name in joined["missing"]:
        print(f"missing: {name}")
    print(f"{len(joined['rows'])} of {len(runs)} runs are in {folder}/table.md, .csv and .json", end="")
    print(f"; the other {len(to_run)} are in {folder}/commands.sh" if to_run else "")
    judged = sorted({run.benchmark.name for run in to_run if run.benchmark.judge})
    if judged:
        print(f"{', '.join(judged)}: an API model reads the answers; give lmms-eval its key, such as OPENAI_API_KEY")
