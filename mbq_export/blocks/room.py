"""Where hidden rows wait between two passes: in memory, or on disk where memory is short.

    room.rows(tensors) ──► list-like, one tensor per batch          in memory: a list
                                                                    on disk: one file per batch, read when asked for

Only the bytes move; what is computed from them is the same either way. Files lie in a folder of the run's own, are
gone when their rows are, and the folder goes with the run.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Self, overload

import torch
from torch import Tensor

from mbq_export.errors import FormatError
from mbq_export.writing import explained

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from mbq_export.blocks.memory import MemoryPlan


FOLDER: Final = "rows"


class RowsOnDisk(Sequence[Tensor]):
    """Tensors in files, one each; an element that is set replaces its file."""

    def __init__(self, folder: Path, tensors: Sequence[Tensor]) -> None:
        """Write all of them.

        Raises:
            ResourceError: E5001 if the disk is full, E5008 if the folder cannot be written.
        """
        self._folder = folder
        self._about = [(tensor.shape, tensor.dtype) for tensor in tensors]
        with explained(folder):
            folder.mkdir(parents=True)
        for place, tensor in enumerate(tensors):
            self[place] = tensor

    def __len__(self) -> int:
        """How many."""
        return len(self._about)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        """Read one, or some.

        Raises:
            FormatError: E4802 if a file is gone or was cut.
        """
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        shape, dtype = self._about[place]
        path = self._path(range(len(self))[place])
        data = bytearray(shape.numel() * dtype.itemsize)
        try:
            with path.open("rb") as file:
                complete = file.readinto(data) == len(data)
        except OSError:
            complete = False
        if not complete:
            raise FormatError(
                "E4802",
                f"Hidden rows in {path} are gone or incomplete.",
                why="they were written there by this run, which still needs them",
                fix="run the same command again and leave its .partial folder alone",
            )
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def __setitem__(self, place: int, tensor: Tensor) -> None:
        """Write one.

        Raises:
            ResourceError: E5001 or E5008.
        """
        path = self._path(range(len(self))[place])
        whole = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        with explained(path), path.open("wb") as file:
            file.write(whole)
        self._about[place] = (tensor.shape, tensor.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        """One after the other; only the one that was asked for last is in memory."""
        return (self[place] for place in range(len(self)))

    def drop(self) -> None:
        """Delete the files."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder)

    def _path(self, place: int) -> Path:
        return self._folder / f"{place:05}.rows"


Rows = list[Tensor] | RowsOnDisk
"""One tensor per batch, elements may be set."""


class Room:
    """Decides where rows lie; use as a context that takes the files away again.

    Attributes:
        limit: Bytes of memory that the process may take.
        plan: What it will take, once that is known.
        on_disk: Whether rows go to disk.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        limit: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Keep everything in memory until a plan says that it exceeds the limit.

        Args:
            folder: Where a folder for files is made when the first rows go to disk; None keeps all in memory.
            limit: Bytes; None for no limit.
            tell: Hears the plan in one line.
        """
        self.limit = limit
        self.plan: MemoryPlan | None = None
        self.on_disk = False
        self._tell = tell
        self._folder = None if folder is None else folder / FOLDER
        self._numbers = itertools.count()

    def settle(self, plan: MemoryPlan) -> None:
        """Hear what is going to be needed, decide, and say so."""
        self.plan = plan
        exceeds = self.limit is not None and plan.peak() > self.limit
        self.on_disk = exceeds and self._folder is not None
        if self._tell is not None:
            self._tell(plan.told(on_disk=self.on_disk, limit=self.limit))

    def rows(self, tensors: Sequence[Tensor]) -> Rows:
        """Keep rows.

        Raises:
            ResourceError: E5001 or E5008.
        """
        if not self.on_disk:
            return list(tensors)
        assert self._folder is not None  # nothing goes to disk without it
        return RowsOnDisk(self._folder / f"{next(self._numbers):06}", tensors)

    def as_json(self) -> dict[str, object] | None:
        """The plan and where rows went; None where nothing was planned."""
        if self.plan is None:
            return None
        return {**self.plan.as_json(on_disk=self.on_disk), "limit": self.limit}

    def __enter__(self) -> Self:
        """Delete what a run that was killed has left, and return itself."""
        self._clear()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Delete what is left on disk."""
        self._clear()

    def _clear(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def drop(rows: Sequence[Tensor]) -> None:
    """Give the place of rows back that nobody will read again."""
    if isinstance(rows, RowsOnDisk):
        rows.drop()
