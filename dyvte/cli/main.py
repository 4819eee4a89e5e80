"""The ``dyvte`` program: from a multimodal model and questions to exit heads, an evaluation and a report."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from dyvte.cli.faults import faults
from dyvte.version import __version__

# Each is a module of this package whose `main` reads its part of the command line and runs.
COMMANDS = (
    "demo",
    "trace",
    "fit",
    "train",
    "calibrate",
    "evaluate",
    "benchmark",
    "inspect",
    "report",
    "app",
    "serve",
    "convert",
)

OVERVIEW = """\
usage: dyvte COMMAND [CONFIG.yaml] [key=value ...]

Multimodal LLMs answer faster when visual tokens leave after the layer from which they are no longer needed. This
program trains the exit heads that decide it, and shows what they save and what they change.

commands:
{commands}

Every command explains its keys: dyvte COMMAND --help. Keys come from a YAML file, then from key=value pairs, whose
dots reach into mappings; later ones win. A usual way through:
  dyvte demo
  dyvte trace model=llava-hf/llava-1.5-7b-hf data=train.yaml output=runs/traces/train
  dyvte trace model=llava-hf/llava-1.5-7b-hf data=held-out.yaml output=runs/traces/held-out
  dyvte fit traces=runs/traces/train calibration=runs/traces/held-out output=runs/heads
  dyvte evaluate model=llava-hf/llava-1.5-7b-hf heads=runs/heads data=test.yaml output=runs/results
  dyvte report runs/results
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; without any, explains them. Faults of the user end the process with exit code 2."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with faults():
        if name in ("-h", "--help", "help"):
            print(overview(), end="")
        elif name in ("-V", "--version", "version"):
            print(__version__)
        elif name in COMMANDS:
            importlib.import_module(f"dyvte.cli.{name}").main(rest)
        else:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
            raise ValueError(f"there is no command {name!r}: {remedy}")


def overview() -> str:
    """The help text of the program."""
    about = {name: (importlib.import_module(f"dyvte.cli.{name}").__doc__ or "").splitlines()[0] for name in COMMANDS}
    return OVERVIEW.format(commands="\n".join(f"  {name:10} {text}" for name, text in about.items()))


if __name__ == "__main__":
    main()
