"""One run at a time in a folder: a lock that its process cannot leave behind when it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dyvte.ranks import Ranks
from dyvte.training.parallel import Group

LOCK = ".lock"
TRIES, WAIT = 20, 0.05  # seconds


def run_name(ranks: Ranks | Group) -> str:
    """What the ranks of one run have in common, and no other run at the same time; all of them ask together."""
    names = ranks.gather(f"process {os.getpid()} on {socket.gethostname()}")
    return names[0] if len(names) == 1 else f"a run of {len(names)} ranks, the first of them {names[0]}"


@contextmanager
def one_run(folder: Path, run: str) -> Iterator[None]:
    """Holds a folder for the ranks of a run; the system lets go of it when the last of their processes ends.

    Args:
        run: see :func:`run_name`.

    Raises:
        ValueError: another run is at work there.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            _hold(file.fileno(), folder, run)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            warnings.warn(
                f"the file system of {folder} has no locks: see to it that no second run works in this folder",
                stacklevel=3,
            )
        yield


def _hold(descriptor: int, folder: Path, run: str) -> None:
    for _ in range(TRIES):  # another rank holds it alone for a moment, while it writes the name of the run
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, run.encode())
        except BlockingIOError:
            pass
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # the other ranks may come in
            if os.pread(descriptor, 1000, 0).decode() == run:
                return
        except BlockingIOError:
            pass
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(WAIT)
    holder = os.pread(descriptor, 1000, 0).decode() or "another run"
    raise ValueError(f"{folder} is in use by {holder}: wait for it, stop it, or choose another folder")
