"""How long work tells its caller where it stands, without knowing who listens.

A stage calls ``progress(done, total, "block 3/28")`` between items; a console turns the calls into a
bar with an ETA, a test into a list, and `silent` into nothing.
"""

from typing import Protocol


class Progress(Protocol):
    """Called after each finished item. Must be cheap and must not raise."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report that ``done`` of ``total`` items are finished.

        Args:
            done: Items finished, 0 .. total.
            total: Items in all, known from the first call on.
            note: The item's own health in a few words, for example ``loss 1.9e-3``.
        """


def silent(done: int, total: int, note: str = "") -> None:
    """Listen to nobody: the default of every stage."""
