"""What a layout is: a name, a version, and two inverse functions."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import IncompatibleError


class Pack(Protocol):
    """Codes to words."""

    def __call__(self, codes: NDArray[np.uint8], *, bits: int) -> NDArray[np.uint32]:
        """Pack (N, K) codes below ``2**bits``."""


class Unpack(Protocol):
    """Words to codes."""

    def __call__(self, words: NDArray[np.uint32], *, bits: int, columns: int) -> NDArray[np.uint8]:
        """Return the (N, K) codes, K given as ``columns``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One placement of bits. Any change of a bit's place is a new version."""

    name: str
    version: int
    pack: Pack
    unpack: Unpack

    def check_version(self, found: int) -> None:
        """Refuse a version this release does not know.

        Raises:
            IncompatibleError: E7005.
        """
        if found != self.version:
            raise IncompatibleError(
                "E7005",
                f"Layout {self.name} version {found} is unknown here.",
                why=f"this release reads version {self.version}",
                fix="use the release of mbq-export that wrote the file",
            )
