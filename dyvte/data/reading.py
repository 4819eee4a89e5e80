"""Reading samples some of which are damaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dyvte.data.errors import SampleError, TooManyErrors
from dyvte.data.samples import Sample


class Readable:
    """The samples that can be used, and a record of those that cannot.

    ::

        readable = Readable(samples, on_error="skip", max_errors=100)
        for index, sample in readable:
            ...
        readable.skipped  # {index: SampleError}

    Args:
        samples: any sequence of samples, such as a source.
        on_error: "stop" raises the first :class:`SampleError`, "skip" goes on.
        max_errors: how many samples may be skipped, whenever and however often they are read.

    Raises:
        ValueError: another ``on_error``, or a negative ``max_errors``.
    """

    def __init__(self, samples: Sequence[Sample], on_error: str = "stop", max_errors: int = 100):
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be stop or skip, not {on_error!r}")
        if not isinstance(max_errors, int) or max_errors < 0:
            raise ValueError(f"max_errors must be a number of samples, 0 or more, not {max_errors!r}")
        self.samples, self.on_error, self.max_errors = samples, on_error, max_errors
        self.skipped: dict[int, SampleError] = {}

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        """All usable samples with their indices."""
        return self.at(range(len(self.samples)))

    def at(self, indices: Iterable[int]) -> Iterator[tuple[int, Sample]]:
        """The usable ones of these samples, with their indices.

        Raises:
            SampleError: one cannot be used, and ``on_error`` is "stop".
            TooManyErrors: more than ``max_errors`` cannot be used.
        """
        for index in indices:
            try:
                sample = self.samples[index]
            except SampleError as error:
                if self.on_error == "stop":
                    raise
                self.skipped[index] = SampleError(*error.args)  # without the pixels that its traceback holds
                if len(self.skipped) > self.max_errors:
                    raise TooManyErrors(list(self.skipped.values()), self.max_errors) from error
            else:
                yield index, sample

    def record(self) -> list[dict[str, str | int]]:
        """What was skipped, in the order of the samples, for JSON: index, id, file and reason."""
        return [
            {"index": index, "id": error.sample_id, "file": error.file, "reason": error.reason}
            for index, error in sorted(self.skipped.items())
        ]
