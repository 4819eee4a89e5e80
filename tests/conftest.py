"""One thread: the models are tiny, and threads only get in each other's way."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from packaging.version import Version  # noqa: E402

torch.set_num_threads(1)

# The account of all types is one of recent versions: before 5.23, beams of linear attention are wrong without an exit.
if Version(transformers.__version__) < Version("5.23"):
    collect_ignore_glob = ["test_zoo*.py"]
