"""Progress on stderr: a bar with an ETA for people, whole lines for logs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mbq_export.progress import Progress, silent

SECONDS_BETWEEN_LINES = 10.0
SHARE_BETWEEN_LINES = 0.1


@contextmanager
def open_progress(title: str, *, mode: str) -> Iterator[Progress]:
    """Yield a listener for one stage.

    Args:
        title: What is being done.
        mode: ``bar``, ``plain``, ``none``, or ``auto``: a bar on a terminal, lines elsewhere.
    """
    if mode == "none":
        yield silent
    elif mode == "bar" or (mode == "auto" and sys.stderr.isatty()):
        with _bar(title) as report:
            yield report
    else:
        yield _Lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield report


@dataclass
class _Lines:
    """Whole lines: the first, the last, and one per 10 % that is at least 10 s after the one before."""

    title: str
    started: float = field(default_factory=time.monotonic)
    spoken: float = 0.0
    share: float = -1.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now, share = time.monotonic(), done / max(total, 1)
        late = now - max(self.spoken, self.started) >= SECONDS_BETWEEN_LINES
        if not late or share - self.share < SHARE_BETWEEN_LINES:
            return
        self.spoken, self.share = now, share
        left = (now - self.started) / max(done, 1) * (total - done)
        sys.stderr.write(f"{self.title}  {done}/{total}  ETA {left:.0f} s  {note}".rstrip() + "\n")
