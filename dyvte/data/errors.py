"""What may be wrong with a sample."""

from __future__ import annotations

from collections.abc import Sequence


class DamageError(ValueError):
    """A row or a picture that cannot be used, said where the sample it belongs to is not known.

    Attributes:
        reason: what is wrong with it.
        file: the file at fault, where it is not the one that holds the row.
    """

    def __init__(self, reason: str, file: str | None = None):
        super().__init__(reason, file)
        self.reason, self.file = reason, file

    def __str__(self) -> str:
        return self.reason if self.file is None else f"{self.file}: {self.reason}"


class SampleError(ValueError):
    """A sample that cannot be used, raised when it is read.

    Attributes:
        sample_id: its id.
        file: the file at fault: a picture, the file that holds the row, or the id of the data set.
        reason: what is wrong with it.
    """

    def __init__(self, sample_id: str, file: str, reason: str):
        super().__init__(sample_id, file, reason)
        self.sample_id, self.file, self.reason = sample_id, file, reason

    def __str__(self) -> str:
        return f"sample {self.sample_id!r} ({self.file}): {self.reason}"


class TooManyErrors(ValueError):
    """More samples than allowed could not be used.

    Attributes:
        skipped: what was wrong with each of them, as :class:`SampleError`, as far as this process has read them.
        total: how many they are.
    """

    def __init__(self, skipped: Sequence[SampleError], allowed: int, total: int | None = None):
        super().__init__(skipped, allowed, total)
        self.skipped, self.allowed = list(skipped), allowed
        self.total = len(self.skipped) if total is None else total

    def __str__(self) -> str:
        last = "; ".join(map(str, self.skipped[-3:]))
        return (
            f"{self.total} samples cannot be used, and max_errors allows {self.allowed}; the last: {last}. "
            "Mend the data, or raise max_errors"
        )
