"""What samples show, as digests: enough to know them again, however many there are."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dyvte.data import DatasetDigest, first_bits

SHA = 32  # bytes


@dataclass(frozen=True)
class Content:
    """What the samples of traces show: the first 64 bits of SHA-256 digests, enough to tell millions of samples apart.

    Attributes:
        samples: int64 [n], see :func:`dyvte.data.sample_digest`.
        images: int64 [m], see :func:`dyvte.data.image_digest`, of all samples in order.
        owner: int32 [m], the sample that shows each image.
    """

    samples: np.ndarray
    images: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[str], images: Sequence[Sequence[str]]) -> Content:
        """From hexadecimal digests, those of the images sample by sample."""
        owner = np.repeat(np.arange(len(images), dtype=np.int32), [len(some) for some in images])
        return cls(_short(samples), _short([digest for some in images for digest in some]), owner)

    def select(self, index: np.ndarray) -> Content:
        """Those of some samples, in their order."""
        start = np.searchsorted(self.owner, index)
        count = np.searchsorted(self.owner, index, side="right") - start
        owner = np.repeat(np.arange(len(index), dtype=np.int32), count)
        shown = np.repeat(start - np.cumsum(count) + count, count) + np.arange(len(owner))
        return Content(self.samples[index], self.images[shown], owner)

    def sketch(self) -> dict[str, torch.Tensor]:
        """What heads remember of the samples they were trained on, see :class:`dyvte.ExitHeads`: each once, sorted."""
        return {
            "samples": torch.from_numpy(np.unique(self.samples)),
            "images": torch.from_numpy(np.unique(self.images)),
        }

    @staticmethod
    def joined(parts: Sequence[Content]) -> Content:
        starts = np.cumsum([0, *(len(part.samples) for part in parts)], dtype=np.int32)
        return Content(
            np.concatenate([part.samples for part in parts]),
            np.concatenate([part.images for part in parts]),
            np.concatenate([part.owner + start for part, start in zip(parts, starts)]),
        )


def _short(digests: Sequence[str]) -> np.ndarray:
    return np.array([first_bits(digest) for digest in digests], np.int64)


class Shuffled:
    """What samples show that come in any order, in as few bytes as it takes to put them in order."""

    def __init__(self) -> None:
        self.digests, self.images, self.answers = bytearray(), bytearray(), bytearray()
        self.counts, self.ends = array("i"), array("q", [0])

    def add(self, samples: Iterable[str], images: Iterable[Sequence[str]], answers: Iterable[Sequence[str]]) -> None:
        """Takes in samples: hexadecimal digests of each and of its images, and accepted answers."""
        for digest, shown, accepted in zip(samples, images, answers):
            self.digests += bytes.fromhex(digest)
            self.images += bytes.fromhex("".join(image[:16] for image in shown))
            self.answers += json.dumps(accepted).encode()
            self.counts.append(len(shown))
            self.ends.append(len(self.answers))

    def content(self, order: np.ndarray) -> Content:
        """Of all samples, in an order of their places here."""
        samples = np.frombuffer(self.digests, "<i8").reshape(-1, SHA // 8)[:, 0]
        owner = np.repeat(np.arange(len(samples), dtype=np.int32), self.counts)
        return Content(samples, np.frombuffer(self.images, "<i8"), owner).select(order)

    def update(self, digest: DatasetDigest, order: np.ndarray) -> None:
        """Adds all samples to the digest of a data set, in an order of their places here."""
        for place in order:
            shown = self.digests[SHA * place : SHA * (place + 1)]
            digest.update(shown.hex(), json.loads(self.answers[self.ends[place] : self.ends[place + 1]]))
