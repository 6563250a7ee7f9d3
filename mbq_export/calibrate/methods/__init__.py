"""Named presets of switches and what each does with one unit: one file each."""

from mbq_export.calibrate.methods.base import Method
from mbq_export.registry import Folder

METHODS = Folder(package=__name__, constant="METHOD", kind=Method)
