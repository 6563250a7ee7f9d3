"""Finished work survives everything; unfinished, damaged or foreign work is never used."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mbq_export
from mbq_export.errors import FormatError, ResourceError, UsageError
from mbq_export.state import State, fingerprint_of, revision_of

MARK = {"scheme": "w3a16", "seed": 0, "switches": {"loss": "mae", "grid": "21"}}
TENSORS = {"q": np.arange(12, dtype=np.int32).reshape(3, 4), "s": np.ones(3, np.float16)}
RECORD: dict[str, Any] = {"loss": 0.25, "names": ["a", "b"]}


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """A work folder with one finished block and one finished stage."""
    folder = tmp_path / "out.partial"
    with State.open(folder, MARK) as state:
        state.save_block("search", 0, TENSORS, RECORD)
        state.stage("scales").mkdir()
        (state.stage("scales") / "calib.json").write_text("{}")
        state.finish("scales")
    return folder


def test_block_comes_back_as_it_was_saved(partial: Path) -> None:
    with State.open(partial, MARK) as state:
        saved = state.load_block("search", 0)
        assert saved is not None
        assert saved.record == RECORD
        assert saved.tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(saved.tensors[name], tensor)
            assert saved.tensors[name].dtype == tensor.dtype
        assert state.load_block("search", 1) is None
        assert state.load_block("other", 0) is None


def test_state_of_equal_work_has_equal_bytes(partial: Path, tmp_path: Path) -> None:
    other = tmp_path / "again.partial"
    with State.open(other, dict(reversed(MARK.items()))) as state:
        state.stage("scales").mkdir()
        (state.stage("scales") / "calib.json").write_text("{}")
        state.finish("scales")
        state.save_block("search", 0, TENSORS, dict(reversed(RECORD.items())))
    assert files_of(partial) == files_of(other)


def test_finished_stage_stays_finished(partial: Path) -> None:
    with State.open(partial, MARK) as state:
        assert state.done("scales")
        assert not state.done("weights")


def test_work_of_other_arguments_is_refused_with_every_difference(partial: Path) -> None:
    other = {"scheme": "w4a16", "switches": {"loss": "mae", "grid": "20"}, "model": "m"}
    with pytest.raises(UsageError, match="unfinished work for other arguments") as caught:
        State.open(partial, other)
    assert caught.value.code == "E2010"
    assert caught.value.context["differences"] == {
        "model": ["(absent)", "m"],
        "scheme": ["w3a16", "w4a16"],
        "seed": [0, "(absent)"],
        "switches.grid": ["21", "20"],
    }
    assert "scheme: w3a16 -> w4a16; seed: 0 -> (absent); switches.grid: 21 -> 20" in str(
        caught.value
    )
    assert "add --fresh to start over" in caught.value.fix


def test_refused_work_stays_and_its_lock_is_free(partial: Path) -> None:
    before = files_of(partial)
    with pytest.raises(UsageError):
        State.open(partial, {"scheme": "w4a16"})
    assert files_of(partial) == before
    State.open(partial, MARK).close()


def test_fresh_forgets_everything(partial: Path) -> None:
    (partial / "link").symlink_to(partial / "scales", target_is_directory=True)
    with State.open(partial, {"scheme": "w4a16"}, fresh=True) as state:
        assert state.load_block("search", 0) is None
        assert not state.done("scales")
        assert sorted(path.name for path in partial.iterdir()) == ["lock", "state.json"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p: p.with_suffix(".safetensors").unlink(), id="tensors gone"),
        pytest.param(lambda p: flip(p.with_suffix(".safetensors"), -1), id="one bit of a tensor"),
        pytest.param(lambda p: flip(p.with_suffix(".safetensors"), 9), id="one bit of the header"),
        pytest.param(lambda p: cut(p.with_suffix(".safetensors")), id="tensors torn"),
        pytest.param(lambda p: cut(p.with_suffix(".json")), id="record torn"),
        pytest.param(lambda p: p.with_suffix(".json").write_text("{}"), id="record empty"),
    ],
)
def test_damaged_block_is_done_again_with_a_warning(
    partial: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    damage(partial / "blocks/search/0000.json")
    with State.open(partial, MARK) as state, caplog.at_level(logging.WARNING):
        assert state.load_block("search", 0) is None
        assert "MBQ-W4801: finished block 0 of search is damaged" in caplog.text
        state.save_block("search", 0, TENSORS, RECORD)
        assert state.load_block("search", 0) is not None


def test_block_without_its_record_does_not_count(partial: Path) -> None:
    # Killed between the two renames: the tensors are there, the record is not.
    (partial / "blocks/search/0000.json").unlink()
    with State.open(partial, MARK) as state:
        assert state.load_block("search", 0) is None


@pytest.mark.parametrize("damage", ["{}1", ""])
def test_damaged_stage_is_done_again_with_a_warning(
    partial: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = partial / "scales/calib.json"
    path.write_text(damage) if damage else path.unlink()
    with State.open(partial, MARK) as state, caplog.at_level(logging.WARNING):
        assert not state.done("scales")
    assert "MBQ-W4801: 1 files of stage scales changed (calib.json)" in caplog.text
    with State.open(partial, MARK) as state:
        assert not state.done("scales")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"schema": "mbq-export/state@2", "fingerprint": {}, "stages": {}}',
        '{"schema": "mbq-export/state@1", "fingerprint": {}, "stages": {"a": 1}}',
        '{"schema": "mbq-export/state@1", "fingerprint": {}, "stages": {"a": {"b": 1}}}',
    ],
)  # fmt: skip
def test_unreadable_state_is_refused_until_fresh(partial: Path, text: str) -> None:
    (partial / "state.json").write_text(text)
    with pytest.raises(
        FormatError, match=r"The state of an earlier run in .* cannot be read"
    ) as caught:
        State.open(partial, MARK)
    assert caught.value.code == "E4802"
    assert "add --fresh to start over" in caught.value.fix
    State.open(partial, MARK, fresh=True).close()


def test_blocks_of_unknown_origin_are_refused(partial: Path) -> None:
    (partial / "state.json").unlink()
    with pytest.raises(FormatError, match=r"finished blocks, but no state\.json"):
        State.open(partial, MARK)


def test_second_build_in_the_same_place_is_refused(partial: Path) -> None:
    with State.open(partial, MARK), pytest.raises(ResourceError) as caught:
        State.open(partial, MARK)
    assert caught.value.code == "E5007"


def test_discard_leaves_nothing(partial: Path) -> None:
    with State.open(partial, MARK) as state:
        state.discard()
    assert not partial.exists()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Cannot write") as caught:
        State.open(tmp_path / "file/out.partial", MARK)
    assert caught.value.code == "E5008"


def test_fingerprint_depends_on_values_and_not_on_their_order() -> None:
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})


def test_revision_changes_with_any_source_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "mbq_export"
    shutil.copytree(Path(mbq_export.__file__).parent / "schemes", copy / "schemes")
    (copy / "state.py").write_text("")
    monkeypatch.setattr("mbq_export.state.__file__", str(copy / "state.py"))
    before, other = revision_of("schemes"), revision_of("state")
    assert revision_of("schemes", "state") == revision_of("state", "schemes")
    with (copy / "schemes/layouts/dense.py").open("a") as file:
        file.write("#")
    assert revision_of("schemes") != before
    assert revision_of("state") == other


WORK = """
import os, sys
from pathlib import Path
import numpy as np
import mbq_export.tensor_file, mbq_export.writing
from mbq_export.state import State

partial, out, deadly = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
calls = 0

def die_at(name):
    real = getattr(os, name)
    def counted(*args, **kwargs):
        global calls
        calls += 1
        if calls == deadly:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    setattr(os, name, counted)

real_replace = Path.replace
def replace(self, target):
    global calls
    calls += 1
    if calls == deadly:
        os.kill(os.getpid(), 9)
    return real_replace(self, target)

die_at("fsync")
Path.replace = replace

with State.open(partial, {"seed": 1}) as state:
    done = []
    for index in range(2):
        saved = state.load_block("work", index)
        if saved is None:
            rng = np.random.default_rng(index)
            state.save_block("work", index, {"w": rng.random((8, 8))}, {"index": index})
            saved = state.load_block("work", index)
        else:
            print("kept", index)
        done.append(saved.tensors["w"])
    if not state.done("sum"):
        state.stage("sum").mkdir(exist_ok=True)
        (state.stage("sum") / "w.bin").write_bytes(np.sum(done, axis=0).tobytes())
        state.finish("sum")
    out.write_bytes((state.stage("sum") / "w.bin").read_bytes())
print("calls", calls)
"""


def work(partial: Path, out: Path, *, deadly: int) -> "subprocess.CompletedProcess[str]":
    """Do three blocks and a stage in a child that kills itself at a given sync or rename."""
    return subprocess.run(
        [sys.executable, "-c", WORK, str(partial), str(out), str(deadly)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_run_killed_at_any_sync_or_rename_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = work(tmp_path / "whole.partial", tmp_path / "whole", deadly=0)
    assert whole.returncode == 0, whole.stderr
    count = int(whole.stdout.split()[-1])
    assert count == 13, "lock, state, two blocks of four, state"
    for deadly in range(1, count + 1):
        partial, out = tmp_path / f"{deadly}.partial", tmp_path / f"{deadly}"
        killed = work(partial, out, deadly=deadly)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        resumed = work(partial, out, deadly=0)
        assert resumed.returncode == 0, resumed.stderr
        assert out.read_bytes() == (tmp_path / "whole").read_bytes()
        assert files_of(partial) == files_of(tmp_path / "whole.partial")
        if deadly == count:
            assert resumed.stdout.count("kept") == 2


def test_full_disk_keeps_finished_blocks_and_the_next_run_goes_on(partial: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with State.open(partial, MARK) as state:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
        try:
            with pytest.raises(ResourceError, match="No space left while writing") as caught:
                state.save_block("search", 1, {"q": np.ones(1 << 15, np.float32)}, RECORD)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "E5001"
    assert "run the same command again" in caught.value.fix[0]
    with State.open(partial, MARK) as state:
        assert state.load_block("search", 0) is not None
        assert state.load_block("search", 1) is None
        assert state.done("scales")


def test_disk_full_at_any_write_leaves_a_state_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    for failing in range(1, 9):
        calls = 0

        def full(descriptor: int, *, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            real(descriptor)

        partial = tmp_path / f"{failing}.partial"
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError) as caught:
            save_three_blocks(partial)
        assert caught.value.code == "E5001"
        monkeypatch.setattr(os, "fsync", real)
        with State.open(partial, MARK) as state:
            # The lock, then state.json, then two syncs per block.
            kept = [state.load_block("search", index) is not None for index in range(3)]
            assert kept == [index < (failing - 3) // 2 for index in range(3)]


def save_three_blocks(partial: Path) -> None:
    with State.open(partial, MARK) as state:
        for index in range(3):
            state.save_block("search", index, TENSORS, {"index": index})


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".partial"
    }


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
