"""Number formats: what the codes of a linear mean, one file per scheme."""

from typing import Final

from mbq_export.registry import Folder
from mbq_export.schemes.base import QuantScheme

SCHEMES = Folder(
    package=__name__,
    constant="SCHEME",
    kind=QuantScheme,
    shared=frozenset({"base", "affine", "integers", "layouts", "oracle"}),
)
JOINT: Final = "+"
"""Between the names of formats that one checkpoint mixes."""


def schemes_named(name: str) -> tuple[QuantScheme, ...]:
    """Formats of the decoder's linears by the name that a checkpoint gives: ``w3a16``, or ``w3a16+w4a16``.

    Returns:
        In the order of the name: fewest bits first.
    """
    return tuple(SCHEMES[part] for part in name.split(JOINT))
