"""Random draws that belong to a sample, whatever was drawn before it and whatever it is batched with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from dyvte.runtime.reduction import LayerView


def uniform(key: int, size: int) -> torch.Tensor:
    """``size`` numbers in [0, 1) that follow from a key: float64 [size]."""
    return torch.rand(size, generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def row_keys(view: LayerView, seed: int, names: Sequence[str] | None = None) -> list[int]:
    """A key for each row of a view at the first layer, from a seed and the name of its sample, or else its prompt.

    Raises:
        ValueError: there are not as many names as samples.
    """
    rows, copies = len(view.samples), view.prompt.copies
    if names is None:
        return _prompt_keys(view, seed)
    if len(names) * copies != rows:
        raise ValueError(f"draws are keyed to {len(names)} samples, but {rows // copies} were given: key them anew")
    return [_key(seed, names[row // copies].encode()) for row in range(rows)]


def _prompt_keys(view: LayerView, seed: int) -> list[int]:
    """From the text of a prompt and the places of its visual tokens; padding and answers do not count.

    Text is known by its ids; where the model got embeddings only, by those, which are rows of a table.
    """
    prompt = view.prompt
    mine = prompt.valid if prompt.answer is None else prompt.valid & ~prompt.answer
    keys = []
    for row in range(len(view.samples)):
        columns = mine[row].nonzero().flatten()
        visual = prompt.visual[row, columns]
        tokens = prompt.ids if prompt.ids is not None else view.hidden
        text = tokens[row, columns[~visual].to(tokens.device)].contiguous().cpu()
        keys.append(_key(seed, visual.cpu().numpy().tobytes(), text.view(torch.uint8).numpy().tobytes()))
    return keys


def _key(seed: int, *parts: bytes) -> int:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little") >> 1
