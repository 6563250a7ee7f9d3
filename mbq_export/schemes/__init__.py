"""Number formats: what the codes of a linear mean, one file per scheme."""

from mbq_export.registry import Folder
from mbq_export.schemes.base import QuantScheme

SCHEMES = Folder(
    package=__name__,
    constant="SCHEME",
    kind=QuantScheme,
    shared=frozenset({"base", "affine", "integers", "layouts", "oracle"}),
)
