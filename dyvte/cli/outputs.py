"""Whether results will find their place, asked before the work."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(path: str, key: str = "output") -> Path:
    """A folder that is there and can be written to, or that can be made.

    Raises:
        ValueError: neither.
    """
    folder = Path(path)
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{key} {path} cannot be a folder, since {place} is a file: choose another one")
            if not os.access(place, os.W_OK | os.X_OK):
                raise ValueError(f"{key} {path} cannot be written, {place} does not allow it: choose another folder")
            break
    return folder


def check_file(path: str, key: str = "output") -> Path:
    """A file in such a folder.

    Raises:
        ValueError: it is a folder, or there cannot be one.
    """
    if Path(path).is_dir():
        raise ValueError(f"{key} {path} is a folder: name a file")
    check_folder(str(Path(path).absolute().parent), f"the folder of {key}")
    return Path(path)
