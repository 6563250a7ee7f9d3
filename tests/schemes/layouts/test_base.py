"""A layout's version is checked before its bits are read."""

import pytest

from mbq_export.errors import IncompatibleError
from mbq_export.schemes.layouts import LAYOUTS


def test_dense_is_registered() -> None:
    assert "dense" in LAYOUTS.names()


def test_a_newer_version_is_refused_with_the_one_that_is_known() -> None:
    LAYOUTS["dense"].check_version(1)
    with pytest.raises(IncompatibleError, match="Layout dense version 2 is unknown here") as caught:
        LAYOUTS["dense"].check_version(2)
    assert caught.value.code == "E7005"
    assert caught.value.why == "this release reads version 1"
