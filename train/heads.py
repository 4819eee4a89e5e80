"""Exit heads from traces: ``python train/heads.py configs/train.yaml``."""

from __future__ import annotations

import sys

from dyvte.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
