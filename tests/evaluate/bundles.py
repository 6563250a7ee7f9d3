"""Good bundles that tests share and must not change: the tiny random model, and the shipped sample model."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from mbq_export.bundle import Bundle
from mbq_export.schemes.base import CHANNEL
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


@cache
def sample_bundle_of_rounded_activations(group_size: int) -> Bundle:
    """W4 with activations of 8 bits, rounded; in groups there is no form but the reference."""
    forms = (QDQ, REFERENCE) if group_size == CHANNEL else (REFERENCE,)
    root = _fresh(f"rounded-{group_size}")
    return rounded_bundle(root, sample_model(), scheme="w4a8", group_size=group_size, forms=forms)


def _fresh(name: str) -> Path:
    folder = TemporaryDirectory(prefix=f"{name}-bundle-")
    _KEPT.append(folder)
    return Path(folder.name) / name


_KEPT: list[TemporaryDirectory[str]] = []
