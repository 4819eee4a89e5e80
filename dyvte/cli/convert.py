"""Turn gates that the original DyVTE code has trained into exit heads that decide the same."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.cli.arguments import read_arguments
from dyvte.cli.configs import ConvertConfig

EXAMPLES = ("dyvte convert weights=gates.bin base_model=llava-hf/llava-1.5-7b-hf output=runs/original-heads",)


def main(arguments: Sequence[str]) -> None:
    run(read_arguments(ConvertConfig, arguments, prog="dyvte convert", examples=EXAMPLES))


def run(config: ConvertConfig) -> None:
    from dyvte.cli.outputs import check_folder
    from dyvte.heads import ExitHeads

    check_folder(config.output)
    heads = ExitHeads.from_original(read_state(Path(config.weights)), base_model=config.base_model)
    heads.save_pretrained(config.output)
    print(f"{heads.config.num_layers} gates of width {heads.config.hidden_size} -> {config.output}")


def read_state(path: Path) -> Mapping[str, Any]:
    """The tensors of a safetensors or torch file; no code in it is run.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the state dict that the original training saved")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path} holds no weights that can be read ({' '.join(str(error).split())}); save it again"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict: give a mapping of names to tensors")
    return state
