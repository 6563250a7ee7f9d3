"""Names to folders, without a network, and folders that want to run code."""

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from mbq_export.errors import FormatError, MachineError, UsageError
from mbq_export.families import locate as module
from mbq_export.families.locate import aliases, family_of, locate, read_config, shipped_folder
from tests.families.random_models import SAMPLE, edit_json


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llava_onevision"}')
    return path


def hub_snapshot(
    cache: Path, *, commit: str = "abc", files: tuple[str, ...] = ("config.json",)
) -> Path:
    repository = cache / "models--llava-hf--llava-onevision-qwen2-7b-ov-hf"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    for name in files:
        (repository / "blobs" / name).write_text("{}")
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return snapshot


def test_shipped_alias_leads_to_the_sample_weights(tmp_path: Path) -> None:
    found = locate("tiny-llava-ov", cache=tmp_path)
    assert (found.folder, found.rule) == (shipped_folder(), "shipped")
    assert (found.folder / "model.safetensors").is_file()


def test_shipped_alias_prefers_the_packaged_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = folder(tmp_path / "mbq_export/_assets/tiny-llava-ov")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "mbq_export/families/locate.py"))
    assert shipped_folder() == packaged


def test_path_wins_over_an_alias_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "tiny-llava-ov")
    assert locate("tiny-llava-ov").rule == "path"


@pytest.mark.parametrize("name", ["llava-ov-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf"])
def test_local_models_are_found_by_alias_and_by_hub_id(tmp_path: Path, name: str) -> None:
    expected = folder(tmp_path / name)
    found = locate(name, models=tmp_path, cache=tmp_path / "cache")
    assert (found.folder, found.rule) == (expected, "MBQ_EXPORT_MODELS")


def test_names_of_the_config_file_are_found(tmp_path: Path) -> None:
    expected = folder(tmp_path / "m")
    assert locate("mine", configured={"mine": str(expected)}).folder == expected


@pytest.mark.parametrize("name", ["llava-ov-7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf@abc"])
def test_complete_snapshot_of_the_hub_cache_is_found(tmp_path: Path, name: str) -> None:
    expected = hub_snapshot(tmp_path)
    found = locate(name, cache=tmp_path)
    assert (found.folder, found.rule) == (expected, "hub cache")
    assert found.hub_id == "llava-hf/llava-onevision-qwen2-7b-ov-hf"


def test_unfinished_download_is_refused(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    (snapshot.parents[1] / "blobs/1234.incomplete").write_text("")
    with pytest.raises(FormatError, match=r"download of .* is not complete") as caught:
        locate("llava-ov-7b", cache=tmp_path)
    assert caught.value.code == "E4105"


def test_snapshot_with_a_missing_file_does_not_count(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(MachineError):
        locate("llava-ov-7b", cache=tmp_path)


@pytest.mark.parametrize("name", ["llava-ov-7b", "org/name", "org/name@v1"])
def test_known_model_that_is_not_here_names_the_command_that_fetches_it(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(MachineError, match=f"The model {name} is not on this machine") as caught:
        locate(name, models=tmp_path, cache=tmp_path)
    assert caught.value.code == "E3014"
    assert caught.value.fix[0].startswith(f"hf download {aliases().get(name, 'org/name')}")
    assert ("--revision v1" in caught.value.fix[0]) == name.endswith("@v1")
    assert "$MBQ_EXPORT_MODELS" in caught.value.why
    assert "the hub cache" in caught.value.why


@pytest.mark.parametrize(
    "name", ["llava-ov-8b", "no-such-model", "./missing", "a/b/c", "../x", "x\x00y", "-o/x"]
)
def test_unknown_name_lists_the_known_and_the_nearest(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="Unknown model") as caught:
        locate(name, cache=tmp_path)
    assert caught.value.code == "E2001"
    assert "tiny-llava-ov" in caught.value.why
    if name == "llava-ov-8b":
        assert caught.value.fix[0] == "use llava-ov-7b"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_path_without_config_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m"
    path.mkdir() if kind == "folder" else path.write_text("x")
    with pytest.raises(FormatError, match=r"There is no config\.json in m") as caught:
        locate(str(path))
    assert caught.value.code == "E4001"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_folder_that_wants_to_run_its_code_is_refused(tmp_path: Path, name: str) -> None:
    shutil.copytree(SAMPLE, tmp_path / "m")
    edit_json(tmp_path / "m" / name, auto_map={"AutoModel": "canary_of_this_test.Model"})
    (tmp_path / "m/canary_of_this_test.py").write_text("raise SystemExit('ran')")
    with pytest.raises(FormatError, match=f"{name} of m wants to run code") as caught:
        read_config(tmp_path / "m")
    assert caught.value.code == "E4008"
    assert "canary_of_this_test" not in sys.modules


def test_config_behind_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m/config.json").symlink_to("../config.json")
    with pytest.raises(FormatError, match="leaves the folder"):
        read_config(tmp_path / "m")


@pytest.mark.parametrize("kind", ["qwen2", "llava_next", None, 5, ["x"]])
def test_unknown_model_type_lists_the_supported(kind: object) -> None:
    with pytest.raises(FormatError, match="is not supported") as caught:
        family_of({"model_type": kind})
    assert caught.value.code == "E4004"
    assert "llava_onevision" in caught.value.why


def test_model_type_finds_its_family_and_a_near_miss_is_named() -> None:
    assert family_of(json.loads((SAMPLE / "config.json").read_text())).name == "llava_onevision"
    with pytest.raises(FormatError, match="nearest: llava_onevision"):
        family_of({"model_type": "llava_one_vision"})
