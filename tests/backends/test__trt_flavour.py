"""What is found of TensorRT, on machines with and without it."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mbq_export
from mbq_export.backends import _trt_flavour
from mbq_export.backends._trt_flavour import FLAVOURS, Installed

ROOT = Path(mbq_export.__file__).parents[1]


def fake(tmp_path: Path) -> Installed:
    library = tmp_path / "site" / "libtensorrt_rtx.so.1"
    library.parent.mkdir()
    library.write_bytes(b"")
    return Installed(flavour=FLAVOURS["rtx"], module="m", version="1.7.1.116", library=library)


def without_tensorrt(tmp_path: Path) -> list[str]:
    """A module path with everything of this environment but TensorRT."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("tensorrt") and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return [str(ROOT), str(site)]


def run(code: str, path: list[str]) -> str:
    """Run code in an interpreter that sees nothing but ``path``."""
    command = [sys.executable, "-S", "-c", code]
    environment = {"PYTHONPATH": os.pathsep.join(path), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.trt
def test_installed_wheel_is_found_without_importing_it() -> None:
    code = (
        "import sys; from mbq_export.backends import rtx; a = rtx.available(); "
        "print(a.ok, a.found, a.version, any(m.startswith('tensorrt') for m in sys.modules))"
    )
    found = run(code, [str(ROOT), sysconfig.get_path("purelib")])
    version = _trt_flavour.find("rtx").version
    assert found.split() == ["True", "rtx", version, version, "False"]


@pytest.mark.trt
def test_library_is_the_real_file_behind_the_versioned_name() -> None:
    library = _trt_flavour.find("rtx").library
    assert library.is_file()
    assert library.name.startswith("libtensorrt_rtx.so.")
    assert not library.is_symlink()


def test_missing_wheel_is_not_available_and_says_what_installs_it(tmp_path: Path) -> None:
    code = (
        "from mbq_export.backends import rtx; a = rtx.available(); "
        "print(a.ok, a.found, a.needed, a.fix, sep='|')"
    )
    assert run(code, without_tensorrt(tmp_path)).strip() == (
        "False|searched: tensorrt_rtx_bindings, tensorrt_rtx|TensorRT for RTX|"
        'pip install "mbq-export[rtx]"'
    )


def test_build_without_the_wheel_is_an_error_that_says_what_works_instead(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from mbq_export.backends import rtx
from mbq_export.backends.base import EngineRequest
from mbq_export.errors import MbqError
from mbq_export.progress import silent
from mbq_export.target import Target
try:
    rtx.build(
        EngineRequest(graphs=(), target=Target.parse("sm89:rtx"), out=Path({str(tmp_path)!r}, "out")),
        silent,
    )
except MbqError as error:
    print(error)
"""
    assert run(code, without_tensorrt(tmp_path)).splitlines() == [
        "MBQ-E3003: TensorRT for RTX is not installed.",
        "  why     searched: tensorrt_rtx_bindings, tensorrt_rtx",
        '  fix     pip install "mbq-export[rtx]"',
        "  fix     leave --target out: the bundle runs on ONNX Runtime without an engine",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"]


def test_bindings_without_their_libraries_are_not_enough(tmp_path: Path) -> None:
    path = without_tensorrt(tmp_path)
    (tmp_path / "site" / "tensorrt_rtx_bindings").mkdir()
    code = "from mbq_export.backends import rtx; a = rtx.available(); print(a.ok, a.found)"
    assert run(code, path).strip() == (
        "False tensorrt_rtx_bindings is there, libtensorrt_rtx.so.* of tensorrt_rtx_libs is not"
    )


def test_child_finds_the_library_by_its_plain_name(tmp_path: Path) -> None:
    installed = fake(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    environment = _trt_flavour.child_environment(installed, work)
    assert environment["LD_LIBRARY_PATH"].split(":")[0] == "lib"
    assert (work / "lib" / "libtensorrt_rtx.so").resolve() == installed.library
    assert (work / "lib").stat().st_mode & 0o777 == 0o700


def test_nothing_beside_the_library_is_changed(tmp_path: Path) -> None:
    installed = fake(tmp_path)
    (tmp_path / "work").mkdir()
    _trt_flavour.child_environment(installed, tmp_path / "work")
    assert [path.name for path in installed.library.parent.iterdir()] == [installed.library.name]


def test_childs_environment_holds_what_it_needs_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/cuda/lib")
    monkeypatch.setenv("PYTHONPATH", "/opt/python")
    monkeypatch.setenv("SECRET_TOKEN", "s")
    environment = _trt_flavour.child_environment(fake(tmp_path), tmp_path)
    assert environment["LD_LIBRARY_PATH"] == "lib:/opt/cuda/lib"
    assert environment["PYTHONPATH"] == f"{ROOT}:/opt/python"
    assert "SECRET_TOKEN" not in environment


@pytest.mark.trt
def test_copy_without_package_data_is_asked_for_its_version(tmp_path: Path) -> None:
    """As on systems whose package manager installed it; the library itself tells, in a child."""
    path = without_tensorrt(tmp_path)
    for package in ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (tmp_path / "site" / package).symlink_to(spec.submodule_search_locations[0])
    code = "from mbq_export.backends import rtx; a = rtx.available(); print(a.ok, a.found)"
    assert run(code, path).strip() == f"True rtx {_trt_flavour.find('rtx').version}"


def test_copy_that_does_not_load_is_not_available(tmp_path: Path) -> None:
    path = without_tensorrt(tmp_path)
    for package in ("tensorrt_rtx_bindings", "tensorrt_rtx_libs"):
        (tmp_path / "site" / package).mkdir()
        (tmp_path / "site" / package / "__init__.py").touch()
    (tmp_path / "site" / "tensorrt_rtx_libs" / "libtensorrt_rtx.so.1").touch()
    code = "from mbq_export.backends import rtx; a = rtx.available(); print(a.ok)"
    assert run(code, path).strip() == "False"
