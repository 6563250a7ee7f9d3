"""4  ONNX graphs -> Engines: one file per runtime, its ``BACKEND`` constant is the registration."""

from typing import Final

from mbq_export.backends.base import Backend
from mbq_export.registry import Folder

BACKENDS: Final = Folder(package=__name__, constant="BACKEND", kind=Backend)
