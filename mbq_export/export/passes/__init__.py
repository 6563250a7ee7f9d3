"""Rewrites of a graph in memory, one per file: each applies where it can and says why where it cannot."""

from mbq_export.export.passes.base import Pass
from mbq_export.registry import Folder

PASSES = Folder(package=__name__, constant="PASS", kind=Pass)
