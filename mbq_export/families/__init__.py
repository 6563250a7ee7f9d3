"""Which vision-language models we know: one file per family."""

from mbq_export.families.base import ModelFamily
from mbq_export.registry import Folder

FAMILIES = Folder(
    package=__name__,
    constant="FAMILY",
    kind=ModelFamily,
    shared=frozenset(
        {
            "anyres",
            "base",
            "chat",
            "tower",
            "fields",
            "inputs",
            "loading",
            "locate",
            "pictures",
            "processor_files",
            "weights",
        }
    ),
)
