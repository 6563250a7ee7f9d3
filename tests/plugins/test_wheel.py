"""A wheel carries everything that a device needs to compile the plugins, and compiles the same."""

import sys
import zipfile
from pathlib import Path

import pytest

from mbq_export.native import source_files, sources_sha256
from tests.plugins import compiled

pytest.importorskip("hatchling", reason="hatchling is not installed: pip install hatchling")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package inside a wheel of this checkout."""
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", place]
    built = compiled.run(command, cwd=compiled.ROOT, timeout=100)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        wheel.extractall(place)
    return place / "mbq_export"


def test_the_wheel_has_the_checkouts_native_sources(unpacked: Path) -> None:
    native = unpacked / "_native"
    found = {path.relative_to(native).as_posix() for path in source_files(native)}
    assert found == {p.relative_to(compiled.ROOT).as_posix() for p in source_files(compiled.ROOT)}
    assert {"plugins/CMakeLists.txt", "plugins/exports.map", "kernels/src/launch.cu"} <= found
    assert sources_sha256(native) == sources_sha256(compiled.ROOT)


def test_an_installed_package_compiles_its_own_sources(unpacked: Path) -> None:
    script = "from mbq_export.native import source_root; print(source_root())"
    asked = compiled.run([sys.executable, "-c", script], cwd=unpacked.parent, env={}, timeout=60)
    assert asked.stdout.strip() == str(unpacked / "_native")
