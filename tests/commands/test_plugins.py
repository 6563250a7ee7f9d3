"""`plugins`: compile, find, list and check the plugin library."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export import cache
from mbq_export.native import source_root, sources_sha256
from mbq_export.plugin_library import (
    FILE_NAME,
    RECORD_NAME,
    build,
    find_plugin_library,
    machine_code,
)
from mbq_export.plugin_library.machine_code import CompiledCode, GpuCode
from mbq_export.reading import sha256_of
from mbq_export.writing import json_bytes
from tests.command_line import run, tell
from tests.plugin_library.libraries import stand_in
from tests.plugins import compiled


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBQ_EXPORT_CACHE", str(tmp_path / "cache"))


def keep_one() -> None:
    with cache.making("plugins", "key", wait_s=1) as staged:
        assert staged is not None
        stand_in(staged / FILE_NAME)
        record = {"sources_sha256": sources_sha256(source_root())}
        (staged / RECORD_NAME).write_bytes(json_bytes(record))


def test_an_empty_cache_lists_nothing_and_names_the_command() -> None:
    outcome = tell("plugins", "list")
    assert outcome.out == "OK  plugins  0 compiled from these sources\n"
    assert "hint: mbq-export plugins build" in outcome.err


def test_what_is_compiled_is_listed_and_found() -> None:
    keep_one()
    listed = run("plugins", "list").document["result"]["libraries"]
    assert [(each["abi"], each["trt_headers"]) for each in listed] == [(1, "10.14.1")]
    found = run("plugins", "path").document["result"]
    assert found["file"] == listed[0]["file"]
    assert tell("plugins", "path").out.splitlines() == [found["file"], "OK  plugins  cache"]


def test_path_without_a_library_ends_with_status_3_and_the_command() -> None:
    outcome = run("plugins", "path", "--target", "orin", "--target", "rtx4090:rtx")
    assert (outcome.status, outcome.code) == (3, "E3005")
    fix = outcome.document["error"]["fix"]
    assert fix[0] == "mbq-export plugins build --target sm87 --target sm89"


def test_path_for_another_gpu_ends_with_status_7() -> None:
    keep_one()
    outcome = run("plugins", "path", "--target", "orin")
    assert (outcome.status, outcome.code) == (7, "E7008")


def test_path_says_whether_a_named_library_would_do(tmp_path: Path) -> None:
    named = stand_in(tmp_path / "named.so")
    assert run("plugins", "path", "--plugin-lib", named).document["result"]["file"] == str(named)
    outcome = run("plugins", "path", "--plugin-lib", named, "--target", "orin")
    assert (outcome.status, outcome.code) == (7, "E7008")


def test_check_lists_plugins_abi_architectures_and_hash() -> None:
    outcome = run("plugins", "check", compiled.emulated_library())
    assert outcome.status == 0, outcome.err
    result = outcome.document["result"]
    assert [each["name"] for each in result["creators"]] == [
        "W3Linear",
        "W4A16Linear",
        "W4A8Linear",
    ]
    assert {each["namespace"] for each in result["creators"]} == {"mbq"}
    assert (result["abi"], result["archs"]) == (1, [])
    assert len(result["sha256"]) == 64


@pytest.mark.parametrize(
    ("defect", "status"),
    [("no-logger-finder", 3), ("crashes", 6), ("other-namespace", 7)],
)
def test_check_of_a_defective_library_ends_with_its_status(defect: str, status: int) -> None:
    assert run("plugins", "check", compiled.defective_library(defect)).status == status


def test_check_of_text_ends_with_status_4(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_text("text")
    outcome = run("plugins", "check", tmp_path / "x.so")
    assert (outcome.status, outcome.code) == (4, "E4701")


@pytest.mark.parametrize("words", [("check",), ("list", "file"), ("build", "file")])
def test_only_check_takes_a_file(words: tuple[str, ...]) -> None:
    outcome = run("plugins", *words)
    assert (outcome.status, outcome.code) == (2, "E2003")


def test_an_unknown_action_is_a_usage_error() -> None:
    assert run("plugins", "bild").status == 2


def test_build_without_a_compiler_ends_with_status_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    outcome = run("plugins", "build", "--target", "sm89")
    assert (outcome.status, outcome.code) == (3, "E3010")


def compile_into(code: CompiledCode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `plugins build` find a library in the cache, with this beside it."""
    with cache.making("plugins", "key", wait_s=1) as staged:
        assert staged is not None
        digest = sha256_of(stand_in(staged / FILE_NAME))
        record = {
            "sources_sha256": sources_sha256(source_root()),
            "sha256": digest,
            "code": code.as_json(),
        }
        (staged / RECORD_NAME).write_bytes(json_bytes(record))
    monkeypatch.setattr(build, "build_plugin_library", lambda *_, **__: find_plugin_library())


LEAN = GpuCode(gpu="sm_87", bytes=5_000_000, kernels=121, registers=255, widest="gemm<W3>")


def test_build_tells_kernels_registers_spills_and_bytes_of_every_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spilling = replace(LEAN, gpu="sm_89", spills={"skinny<W4, 2>": 48})
    code = CompiledCode(gpus=(LEAN, spilling))
    compile_into(code, monkeypatch)
    outcome = run("plugins", "build")
    assert outcome.document["result"]["code"] == code.as_json()
    warnings = outcome.document["warnings"]
    assert [(each["code"], each["text"]) for each in warnings] == [
        ("MBQ-W6014", "sm_89: skinny<W4, 2> spills 48 bytes per thread")
    ]
    told = tell("plugins", "build").out
    table = [line.split() for line in told.splitlines() if line.lstrip().startswith("sm_8")]
    assert table == [
        ["sm_87", "121", "255", "(gemm<W3>)", "none", "5,000,000"],
        ["sm_89", "121", "255", "(gemm<W3>)", "1", "5,000,000"],
    ]


def test_build_without_cuobjdump_says_what_it_did_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "find_cuobjdump", lambda: None)
    compile_into(CompiledCode(gpus=(), unread="no tool then"), monkeypatch)
    outcome = tell("plugins", "build")
    assert outcome.status == 0
    assert f"registers and spills were not read: {machine_code.NO_TOOL}" in outcome.out
