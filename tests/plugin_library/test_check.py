"""Loading a plugin library in a child: the plugins of this release are listed, everything else is one clear error."""

from pathlib import Path

import pytest

from mbq_export.errors import FormatError, MbqError
from mbq_export.export import ops
from mbq_export.plugin_library import FILE_NAME, RECORD_NAME, bundle_folder
from mbq_export.plugin_library.check import NAMESPACE as PLUGIN_NAMESPACE
from mbq_export.plugin_library.check import PLUGINS, VERSION, check_plugin_library
from mbq_export.reading import sha256_of
from mbq_export.writing import json_bytes
from tests.plugin_library.libraries import stand_in
from tests.plugins import compiled

EXPECTED = {
    "no-logger-finder": ("E3005", "undefined symbol: setLoggerFinder"),
    "undefined-symbol": ("E3005", "undefined symbol: nobody_defines_this"),
    "throws": ("E6003", "terminate called after throwing"),
    "crashes": ("E6003", "it said nothing"),
    "hangs": ("E5006", "it said nothing"),
    "exits": ("E6003", "it said nothing"),
    "null-creators": ("E7003", "getCreators returned 3 creators at False"),
    "countless-creators": ("E7003", "getCreators returned 1000000000 creators at True"),
    "other-namespace": ("E7003", "it offers ::W3Linear 1"),
}
"""Defect of ``tests/plugins/host/defective.cpp`` -> code, and words of the reason."""


def test_the_names_are_those_of_the_graphs() -> None:
    assert {ops.OPS[scheme].name for scheme in ops.PLUGINS} == set(PLUGINS)
    assert (ops.PLUGIN_NAMESPACE, ops.PLUGIN_VERSION) == (PLUGIN_NAMESPACE, VERSION)


def test_plugins_of_this_release_are_listed() -> None:
    offered = check_plugin_library(compiled.emulated_library())
    assert offered.creators == tuple((name, "1", "mbq") for name in PLUGINS)
    assert offered.library.abi == 1


@pytest.mark.parametrize("defect", EXPECTED)
def test_a_defect_is_one_clear_error_and_this_process_goes_on(defect: str) -> None:
    library = compiled.defective_library(defect)
    with pytest.raises(MbqError, match=r"(cannot be loaded|ended|does not offer)") as caught:
        check_plugin_library(library, timeout_s=1.0 if defect == "hangs" else 30.0)
    code, words = EXPECTED[defect]
    assert caught.value.code == code
    assert words in caught.value.why
    assert "mbq-export plugins build" in caught.value.fix


def test_a_signal_is_named() -> None:
    with pytest.raises(MbqError, match="with SIGSEGV"):
        check_plugin_library(compiled.defective_library("crashes"))


def test_a_library_without_defect_is_fine() -> None:
    assert len(check_plugin_library(compiled.defective_library("none")).creators) == 3


def test_a_bundles_library_is_found_in_its_folder(tmp_path: Path) -> None:
    source = compiled.defective_library("none")
    file = tmp_path / bundle_folder() / FILE_NAME
    file.parent.mkdir(parents=True)
    file.write_bytes(source.read_bytes())
    file.with_name(RECORD_NAME).write_bytes(json_bytes({"sha256": sha256_of(file)}))
    assert check_plugin_library(tmp_path).library.found == "bundle"
    assert check_plugin_library(file.parent).library.path == file


def test_a_folder_without_a_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no plugin library") as caught:
        check_plugin_library(tmp_path)
    assert caught.value.code == "E4001"


def test_a_file_that_is_no_library_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    path = stand_in(tmp_path / "x.so")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="is no shared library") as caught:
        check_plugin_library(path)
    assert caught.value.code == "E4701"
