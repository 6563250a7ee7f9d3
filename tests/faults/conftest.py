"""Copies of the tiny model, to be damaged."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model to damage."""
    return shutil.copytree(model, tmp_path / "model")
