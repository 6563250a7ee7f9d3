"""Rows that wait in memory or on disk: the same numbers, and nothing left behind."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.memory import MemoryPlan
from mbq_export.blocks.room import FOLDER, Room, RowsOnDisk, drop
from mbq_export.errors import FormatError, ResourceError

PLAN = MemoryPlan(now=100, rows=50, gradients=10, search=30)


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, 4, generator=generator),
        torch.randn(5, generator=generator).bfloat16(),
        torch.randn(3, 2, generator=generator).half().T,
        torch.empty(0, 4),
    ]


def on_disk(folder: Path) -> Room:
    room = Room(folder, limit=0)
    room.settle(PLAN)
    return room


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk that is full after so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    found = on_disk(tmp_path).rows(tensors())
    assert isinstance(found, RowsOnDisk)
    for read, wanted in zip(found, tensors(), strict=True):
        assert read.dtype == wanted.dtype
        assert torch.equal(read, wanted)
    assert torch.equal(found[-2], tensors()[2])


def test_a_row_can_be_replaced_by_one_of_another_shape(tmp_path: Path) -> None:
    found = on_disk(tmp_path).rows(tensors())
    found[0] = torch.arange(3.0)
    assert found[0].tolist() == [0, 1, 2]
    assert torch.equal(found[1], tensors()[1])


def test_rows_that_were_read_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    found = on_disk(tmp_path).rows(tensors())
    found[0].zero_()
    assert torch.equal(found[0], tensors()[0])


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with on_disk(tmp_path) as room:
        first, second = room.rows(tensors()), room.rows(tensors())
        drop(first)
        assert len(list((tmp_path / FOLDER).iterdir())) == 1
        assert torch.equal(second[0], tensors()[0])
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_deleted(tmp_path: Path) -> None:
    on_disk(tmp_path).rows(tensors())
    with Room(tmp_path):
        assert not (tmp_path / FOLDER).exists()


def test_the_plan_decides_where_rows_lie(tmp_path: Path) -> None:
    told: list[str] = []
    for limit, expected in ((None, False), (160, False), (159, True)):
        room = Room(tmp_path, limit=limit, tell=told.append)
        room.settle(PLAN)
        assert room.on_disk is expected
        found = room.as_json()
        assert found is not None
        assert found["peak"] == (130 if expected else 160)
    assert ["on disk" in line for line in told] == [False, False, True]


def test_without_a_folder_rows_stay_in_memory() -> None:
    room = Room(limit=0)
    room.settle(PLAN)
    assert isinstance(room.rows(tensors()), list)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError) as caught,
        largest_file(64),
        on_disk(tmp_path) as room,
    ):
        room.rows(tensors())
    assert caught.value.code == "E5001"
    assert not list(tmp_path.iterdir())


def test_rows_that_somebody_cut_are_told(tmp_path: Path) -> None:
    found = on_disk(tmp_path).rows(tensors())
    for path in (tmp_path / FOLDER).rglob("*.rows"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError) as caught:
        found[0]
    assert caught.value.code == "E4802"
