"""Turn the results of evaluate into one self-contained HTML page and pictures."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.cli.arguments import read_arguments
from dyvte.cli.configs import ReportConfig

EXAMPLES = ("dyvte report runs/evaluation",)


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(ReportConfig, arguments, prog="dyvte report", examples=EXAMPLES, positional="directory"))


def run(config: ReportConfig) -> None:
    from dyvte.report.page import report

    print(report(config.directory))
