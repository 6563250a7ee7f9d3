"""Text as it streams: whole characters only, up to a stop string.

A character may span several tokens and a token's text may depend on the one before it, so a token is
decoded together with its neighbours, and what could still change is held back::

    tokens      Ã   ¤   b   c
    decoded     "�" "ä" "äb" "äbc"
    released        "ä" "b"  "c"
"""

from collections.abc import Callable, Sequence
from typing import Final

UNFINISHED: Final = "�"
"""What decoders put where the bytes of a character are not complete."""


class TextStream:
    """Turns tokens, one at a time, into the pieces of their text.

    Attributes:
        text: Everything released so far.
        stopped: The stop string that ended the text, or an empty string.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._from = 0
        self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain now."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        fresh = self._fresh()
        if not fresh:
            # A special token. As a neighbour it would hide the space in front of the next word.
            self._tokens.pop()
        if not fresh or fresh.endswith(UNFINISHED):
            return ""
        self._from, self._read = self._read, len(self._tokens)
        self._held += fresh
        return self._release(len(self._held) - self._undecided())

    def finish(self) -> str:
        """Return what was held back, when no token follows."""
        if self.stopped:
            return ""
        self._held += self._fresh()
        self._from = self._read = len(self._tokens)
        return self._release(len(self._held))

    def _fresh(self) -> str:
        """Text of the newest tokens: decoded behind their predecessors, whose text is cut off again."""
        before = self._decode(self._tokens[self._from : self._read])
        return self._decode(self._tokens[self._from :])[len(before) :]

    def _release(self, count: int) -> str:
        """Give out the first characters of what is held, at most up to a stop string."""
        found = [(place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            count, self.stopped = min(found)
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece

    def _undecided(self) -> int:
        """Length of the longest end of the held text that a stop string could begin with."""
        ends = range(min(len(self._held), max(map(len, self._stop), default=1) - 1), 0, -1)
        return next((n for n in ends if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
