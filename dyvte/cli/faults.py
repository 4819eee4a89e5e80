"""What a user can cause ends a program with the fault and its remedy, not with a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

USAGE, INTERRUPTED = 2, 130  # exit codes; 130 is the shell's for Ctrl-C


@contextmanager
def faults() -> Iterator[None]:
    """Turns ``ValueError``, ``OSError`` and ``ImportError`` into ``error: fault; remedy`` on stderr and exit code 2.

    Anything else is a fault of the program and keeps its traceback; with DYVTE_TRACEBACK set, everything does.
    """
    try:
        yield
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on where it stopped", INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ImportError as error:
        _stop(f"{error}; install what this needs: pip install 'dyvte[train,eval]'")
    except ValueError as error:
        _stop(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _stop(f"{place}{error.strerror or error}; choose another place, or make room or permissions there")
    except RuntimeError as error:
        if type(error).__name__ == "RankError":  # by name: at this point torch need not have been loaded
            _stop(f"{error}; its own message says what to do")
        if "out of memory" not in str(error):
            raise
        _stop(f"{str(error).splitlines()[0]}; use a smaller batch_size, another dtype, or more devices (shard)")


def _stop(text: str, code: int = USAGE) -> None:
    if os.environ.get("DYVTE_TRACEBACK"):
        raise
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)
