"""Byte orders: where each bit of a code lies, one file per layout."""

from mbq_export.registry import Folder
from mbq_export.schemes.layouts.base import Layout

LAYOUTS = Folder(
    package=__name__,
    constant="LAYOUT",
    kind=Layout,
    shared=frozenset({"base", "tiles", "header"}),
)
