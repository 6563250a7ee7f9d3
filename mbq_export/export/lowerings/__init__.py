"""Forms of the decoder graph for one kind of runtime: one file each."""

from mbq_export.export.lowerings.base import Lowering
from mbq_export.registry import Folder

LOWERINGS = Folder(package=__name__, constant="LOWERING", kind=Lowering)
