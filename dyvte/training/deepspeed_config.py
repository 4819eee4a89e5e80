"""What a DeepSpeed config may say about the training of heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OURS = ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps", "bf16", "fp16")


def read_deepspeed(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config, from a file or as it is.

    Raises:
        ValueError: there is no such file, it asks for what cannot be, or DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise ValueError("fit.deepspeed needs deepspeed: pip install deepspeed, or leave it out")
    if isinstance(config, str):
        if not Path(config).is_file():
            raise ValueError(f"there is no DeepSpeed config {config}: name a file such as configs/deepspeed/zero2.json")
        config = json.loads(Path(config).read_text())
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2):
        raise ValueError(f"heads are trained with ZeRO-1 or ZeRO-2, not with stage {stage!r}; ZeRO-3 is for the base")
    wrong = [name for name in OURS if name in config]
    if wrong:
        raise ValueError(
            f"the DeepSpeed config sets {', '.join(wrong)}, but that comes from the settings of the fit: leave it out "
            "(for bfloat16, use torch_autocast)"
        )
    return dict(config)
