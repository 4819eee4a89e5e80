"""What settings of a method do to the answers of samples, kept in a folder so that nothing is done twice."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from dyvte.data import DatasetDigest, Readable, Sample, encode, sample_digest
from dyvte.methods.families import build
from dyvte.provenance import fingerprint, write_json
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.reduction import Reduction
from dyvte.training.agreement import dense_answers, keeps_answers
from dyvte.training.plan import Plan


@dataclass(frozen=True)
class Outcome:
    """What a setting did to every sample, in the order of their indices."""

    setting: Mapping[str, Any]
    changed: list[bool]
    saved: list[float]


class Work:
    """The folder of a calibration: answers and outcomes that are there, and how to make those that are not."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        processor: Any,
        plan: Plan,
        readable: Readable,
        template: str | None,
        max_new_tokens: int,
        visual_mask: VisualMask | None,
        decoder: str | nn.Module | None,
        progress: bool,
    ):
        self.folder, self.model, self.processor, self.plan, self.readable = folder, model, processor, plan, readable
        self.template, self.max_new_tokens, self.progress = template, max_new_tokens, progress
        self.visual_mask, self.decoder = visual_mask, decoder
        self.device = next((w.device for w in model.parameters() if not w.is_meta), torch.device("cpu"))
        self.answers: dict[int, list[int]] = {}  # ids of the dense answer, by sample
        self.digests: dict[int, str] = {}
        self.content = ""

    def answer(self) -> int:
        """Generates the dense answers that are missing; how many samples there are.

        Raises:
            ValueError: a sample has changed since it was answered.
        """
        digest, given = DatasetDigest(), {}
        (self.folder / "answers").mkdir(exist_ok=True)
        for number, unit in self._units("dense answers"):
            path = self.folder / "answers" / f"{number:06d}.json"
            known = {row["index"]: row for row in _read(path, [])}
            rows = []
            for batch in self.plan.batches(unit):
                if all(index in known for index, _ in batch):
                    rows += [known[index] for index, _ in batch]
                    continue
                ids, answer = dense_answers(self.model, self.encode(batch), self.max_new_tokens)
                rows += [
                    {"index": index, "digest": sample_digest(sample), "ids": ids[i][answer[i]].tolist()}
                    for i, (index, sample) in enumerate(batch)
                ]
            if len(known) < len(rows):
                write_json(path, rows)
            found = {row["index"]: row for row in rows}
            for index, sample in unit:
                if found[index]["digest"] != sample_digest(sample):
                    raise ValueError(
                        f"sample {sample.id!r} has another image or text than when it was answered in {self.folder}: "
                        "bring the old data back, or choose another folder"
                    )
                self.answers[index], given[index] = found[index]["ids"], sample.answers
                self.digests[index] = found[index]["digest"]
        for index in sorted(self.answers):
            digest.update(self.digests[index], given[index])
        self.content = digest.hexdigest()
        return len(self.answers)

    def try_setting(self, methods: Sequence[str], setting: Mapping[str, Any], title: str) -> Outcome:
        """What a setting does, from the folder if it is there."""
        name = fingerprint([list(methods), dict(setting), sorted(self.answers)])
        path = self.folder / "settings" / f"{name}.json"
        known = _read(path, None)
        if known is not None:
            return Outcome(**known)
        path.parent.mkdir(exist_ok=True)
        method = build(methods, setting)
        changed, saved = {}, {}
        for _, unit in self._units(f"setting {title}"):
            for batch in self.plan.batches(unit):
                same, left_out = self._keeps(method, batch)
                for (index, _), kept, share in zip(batch, same.tolist(), left_out.tolist()):
                    changed[index], saved[index] = not kept, share
        outcome = Outcome(dict(setting), [changed[i] for i in sorted(changed)], [saved[i] for i in sorted(saved)])
        write_json(path, asdict(outcome))
        return outcome

    def _keeps(self, method: Reduction, batch: Sequence[tuple[int, Sample]]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, answers = self.encode(batch), [self.answers[index] for index, _ in batch]
        width = max(map(len, answers))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in answers], device=self.device)
        lengths = torch.tensor([len(row) for row in answers], device=ids.device)
        answer = torch.arange(width, device=ids.device) < lengths[:, None]
        method = method.keyed([sample.id for _, sample in batch])
        return keeps_answers(self.model, method, inputs, ids, answer, self.visual_mask, self.decoder)

    def encode(self, batch: Sequence[tuple[int, Sample]]) -> dict[str, Any]:
        """The model's inputs for a batch."""
        samples = [sample for _, sample in batch]
        return encode(self.processor, samples, self.template).to(self.device, self.model.dtype)

    def _units(self, title: str) -> Iterator[tuple[int, list[tuple[int, Sample]]]]:
        with tqdm(total=len(self.readable.samples), desc=title, unit="sample", disable=not self.progress) as bar:
            for number, planned in enumerate(self.plan.units):
                yield number, list(self.readable.at(planned))
                bar.update(len(planned))


def _read(path: Path, missing: Any) -> Any:
    """JSON that was written whole; a damaged file is named and made again."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return missing
    except ValueError as error:
        warnings.warn(f"{path} is damaged ({error}); it is made again", stacklevel=3)
        return missing
