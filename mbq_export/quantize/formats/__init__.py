"""Files of others: one file per format of quantized checkpoints that other projects read and write."""

from typing import Final

from mbq_export.quantize.formats.base import ForeignFormat
from mbq_export.registry import Folder

FORMATS: Final = Folder(package=__name__, constant="FORMAT", kind=ForeignFormat)
