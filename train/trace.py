"""Traces on one process or many: ``torchrun --nproc_per_node 8 train/trace.py configs/trace.yaml``."""

from __future__ import annotations

import sys

from dyvte.cli.main import main

if __name__ == "__main__":
    main(["trace", *sys.argv[1:]])
