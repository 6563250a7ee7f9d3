"""The package's logger as it was, whatever a console does to it."""

from collections.abc import Iterator

import pytest

from tests.command_line import own_logging


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    with own_logging():
        yield
