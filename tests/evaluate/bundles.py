"""Good bundles that tests share and must not change: the tiny random model, and the shipped sample model."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from mbq_export.bundle import Bundle
from tests.questions import sample_model, tiny_model
from tests.runtime.bundles import QDQ, REFERENCE, rounded_bundle

TINY_GROUP = 32
SAMPLE_GROUP = 128


@cache
def tiny_bundle() -> Bundle:
    """W3 in groups of 32: four and eight groups per row. Its answers make no sense."""
    return rounded_bundle(
        _fresh("tiny"), tiny_model(), group_size=TINY_GROUP, forms=(QDQ, REFERENCE)
    )


@cache
def sample_bundle() -> Bundle:
    """W3 in groups of 128, rounded: two and six groups per row."""
    return rounded_bundle(
        _fresh("sample"), sample_model(), group_size=SAMPLE_GROUP, forms=(QDQ, REFERENCE)
    )


def _fresh(name: str) -> Path:
    folder = TemporaryDirectory(prefix=f"{name}-bundle-")
    _KEPT.append(folder)
    return Path(folder.name) / name


_KEPT: list[TemporaryDirectory[str]] = []
