"""Where a plugin library is looked for, and what is refused on the way."""

import json
import os
from pathlib import Path

import pytest

from mbq_export import cache, native
from mbq_export.errors import FormatError, IncompatibleError, MachineError
from mbq_export.export import ops
from mbq_export.plugin_library import (
    FILE_NAME,
    PLUGIN_ABI,
    RECORD_NAME,
    PluginLibrary,
    bundle_folder,
    find_plugin_library,
)
from mbq_export.reading import sha256_of
from tests.plugin_library.libraries import compiled, stand_in


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBQ_EXPORT_CACHE", str(tmp_path / "cache"))


def library(*archs: str) -> PluginLibrary:
    return PluginLibrary(
        path=Path("/x"), sha256="0", abi=1, archs=archs, headers="10.14.1", found="cache"
    )


def packed(root: Path) -> Path:
    """A bundle folder with a library and its record."""
    file = stand_in(root / bundle_folder() / FILE_NAME)
    file.with_name(RECORD_NAME).write_text(json.dumps({"sha256": sha256_of(file)}))
    return root


def cached(key: str, sources: str) -> None:
    with cache.making("plugins", key, wait_s=1) as staged:
        assert staged is not None
        stand_in(staged / FILE_NAME, trt_headers=key)
        (staged / RECORD_NAME).write_text(json.dumps({"sources_sha256": sources}))


def test_graphs_and_libraries_have_one_abi_number() -> None:
    assert PLUGIN_ABI == ops.PLUGIN_ABI


@pytest.mark.parametrize(
    ("archs", "sm", "serves"),
    [
        (("sm_89",), 89, True),
        (("sm_80",), 86, True),
        (("sm_86",), 80, False),
        (("sm_89",), 90, False),
        (("compute_80",), 90, True),
        (("sm_80", "compute_120"), 110, False),
        (("compute_120",), 121, True),
        ((), 89, False),
    ],
)
def test_machine_code_serves_its_generation_and_ptx_everything_newer(
    archs: tuple[str, ...], sm: int, serves: bool
) -> None:
    assert library(*archs).serves(sm) is serves


def test_a_library_says_what_it_is_without_being_loaded(tmp_path: Path) -> None:
    file = compiled(
        "__attribute__((constructor)) static void die(void) { __builtin_trap(); }\n"
        '__attribute__((used, section(".mbq_plugin"))) const char r[] ='
        + json.dumps(json.dumps({"abi": 1, "trt_headers": "11.4.0"}))
        + ";\n",
        tmp_path / "deadly.so",
    )
    found = find_plugin_library(named=file)
    assert (found.abi, found.headers, found.archs) == (1, "11.4.0", ())
    assert (found.sha256, found.found) == (sha256_of(file), "--plugin-lib")


def test_the_named_file_wins_over_the_bundle_and_the_bundle_over_the_cache(tmp_path: Path) -> None:
    cached("key", native.sources_sha256(native.source_root()))
    bundle = packed(tmp_path / "bundle")
    named = stand_in(tmp_path / "named.so")
    assert find_plugin_library(named=named, bundle=bundle).found == "--plugin-lib"
    assert find_plugin_library(bundle=bundle).found == "bundle"
    assert find_plugin_library().found == "cache"


def test_without_a_library_the_error_is_the_command_that_builds_one() -> None:
    with pytest.raises(MachineError, match=r"no compiled plugin library") as caught:
        find_plugin_library(sms=(89, 120))
    assert caught.value.code == "E3005"
    assert caught.value.fix[0] == "mbq-export plugins build --target sm89 --target sm120"


def test_a_library_of_older_sources_is_not_used() -> None:
    cached("old", "another hash")
    with pytest.raises(MachineError, match="no compiled plugin library"):
        find_plugin_library()


def test_of_several_the_one_with_the_wanted_hash_is_taken() -> None:
    for key in ("first", "second"):
        cached(key, native.sources_sha256(native.source_root()))
    for entry in cache.entries("plugins"):
        wanted = sha256_of(entry / FILE_NAME)
        assert find_plugin_library(sha256=wanted).path == entry / FILE_NAME


def test_a_hash_that_no_library_in_the_cache_has_is_named() -> None:
    cached("key", native.sources_sha256(native.source_root()))
    with pytest.raises(IncompatibleError, match="another plugin library") as caught:
        find_plugin_library(sha256="f" * 64)
    assert "the manifest says ffffffffffffffff..." in caught.value.why


def test_a_library_of_another_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="plugins of this release") as caught:
        find_plugin_library(named=stand_in(tmp_path / "x.so", abi=2))
    assert caught.value.code == "E7003"
    assert "its plugin ABI is 2; wanted: plugin ABI 1" in caught.value.why


def test_a_library_of_somebody_else_is_refused(tmp_path: Path) -> None:
    other = compiled("int x;", tmp_path / "x.so")
    with pytest.raises(IncompatibleError, match="plugins of this release") as caught:
        find_plugin_library(named=other)
    assert caught.value.why.startswith("it has no section .mbq_plugin")


def test_a_library_without_code_for_the_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"no code for sm89\.") as caught:
        find_plugin_library(named=stand_in(tmp_path / "x.so"), sms=(89,))
    assert caught.value.code == "E7008"
    assert caught.value.why == "it holds no device code"


def test_another_hash_than_the_manifests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="another plugin library") as caught:
        find_plugin_library(named=stand_in(tmp_path / "x.so"), sha256="0" * 64)
    assert caught.value.code == "E7003"


def test_a_changed_library_in_a_bundle_is_refused(tmp_path: Path) -> None:
    bundle = packed(tmp_path / "bundle")
    stand_in(bundle / bundle_folder() / FILE_NAME, trt_headers="changed")
    with pytest.raises(FormatError, match=r"is not what plugin\.json") as caught:
        find_plugin_library(bundle=bundle)
    assert caught.value.code == "E4602"


@pytest.mark.parametrize("part", ["file", "folder"])
def test_a_library_that_others_may_replace_is_refused(tmp_path: Path, part: str) -> None:
    bundle = packed(tmp_path / "bundle")
    file = bundle / bundle_folder() / FILE_NAME
    (file if part == "file" else file.parent).chmod(0o777)
    with pytest.raises(FormatError, match=r"others may write to") as caught:
        find_plugin_library(bundle=bundle)
    assert caught.value.code == "E4703"
    assert find_plugin_library(named=file).path == file


def test_a_library_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    bundle = packed(tmp_path / "bundle")
    os.chown(bundle / bundle_folder() / FILE_NAME, 65534, -1)
    with pytest.raises(FormatError, match=r"others may write to"):
        find_plugin_library(bundle=bundle)
