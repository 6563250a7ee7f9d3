"""One tiny model and one bundle of it for all tests that need any, made when first asked for."""

import functools
import importlib
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.command_line import Outcome, run
from tests.tiny import Tiny, write_tiny

SHORT_BUILD = (
    *("--group-size", "64", "--data", "builtin:shapes", "--samples", "4", "--target", "cpu"),
    *("--gate", "off", "--gate-reason", "random weights"),
)
"""Options of a short build; its gates are tested where they are the point."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder to read, not to change."""
    return write_tiny(tmp_path_factory.mktemp("model"), Tiny(tied=False, walks=True))


@pytest.fixture(scope="session")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A bundle with both lowerings, and what the command said."""
    out = tmp_path_factory.mktemp("built") / "bundle"
    return out, run("build", "--model", model, *SHORT_BUILD, "-o", out)


@pytest.fixture(scope="session")
def bundle(built: tuple[Path, Outcome]) -> Path:
    """A bundle folder to read, not to change."""
    folder, outcome = built
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture(autouse=True)
def _shared_models_stay(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that changes a model which others read fails itself, not they."""
    yield
    _refuse_change(request, "touched")


@pytest.fixture(autouse=True, scope="module")
def _shared_bytes_stay(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for what no tensor notices, once per module: it reads all bytes."""
    yield
    _refuse_change(request, "rewritten")


def _refuse_change(request: pytest.FixtureRequest, how: str) -> None:
    shared = sys.modules.get("tests.questions")
    found = [] if shared is None else getattr(shared, how)()
    if found:
        pytest.fail(
            f"{request.node.nodeid} changed {', '.join(found[:3])} of a shared model; clone it"
        )


@functools.cache
def has_gpu() -> bool:
    """Whether torch can use a GPU here."""
    return importlib.import_module("torch").cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs a GPU is skipped where there is none, and says so."""
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On a machine with a GPU a skipped GPU test is a failure: nobody would run it anywhere else."""
    report = yield
    if report.skipped and item.get_closest_marker("gpu") and has_gpu():
        report.outcome = "failed"
        report.longrepr = f"a GPU is here, yet the test was skipped: {report.longrepr}"
    return report
