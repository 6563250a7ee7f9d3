"""What a result says of the machine and the sources it was made from."""

from pathlib import Path

import pytest
import torch

from mbq_kernels.bench.machine import NO_GPU, Device, Sensors, revision, software, sources_sha256
from tests.kernels.emulated import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_folder(root: Path, head: str, **files: str) -> Path:
    (root / ".git").mkdir()
    (root / ".git" / "HEAD").write_text(head)
    for name, text in files.items():
        path = root / ".git" / name.replace("__", "/").replace("_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("head", "files"),
    [
        (f"{COMMIT}\n", {}),
        ("ref: refs/heads/main\n", {"refs__heads__main": f"{COMMIT}\n"}),
        ("ref: refs/heads/main\n", {"packed_refs": f"# pack-refs\n{COMMIT} refs/heads/main\n"}),
    ],
    ids=["detached", "loose", "packed"],
)
def test_the_commit_is_read_from_the_checkout(
    tmp_path: Path, head: str, files: dict[str, str]
) -> None:
    assert revision(git_folder(tmp_path, head, **files)) == COMMIT


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert revision(tmp_path) is None
    assert revision(git_folder(tmp_path, "ref: refs/heads/main\n")) is None


def test_sources_have_one_hash_that_every_byte_and_name_changes(tmp_path: Path) -> None:
    assert sources_sha256(tmp_path) is None
    (tmp_path / "include").mkdir()
    header = tmp_path / "include" / "a.cuh"
    seen = set()
    for name, text in (("a.cuh", "1"), ("a.cuh", "2"), ("b.cuh", "2")):
        header.unlink(missing_ok=True)
        header = header.with_name(name)
        header.write_text(text)
        seen.add(sources_sha256(tmp_path))
    assert len(seen) == 3
    (tmp_path / "include" / "a.o").write_bytes(b"object")
    assert sources_sha256(tmp_path) in seen


def test_versions_and_hashes_are_there_for_a_checkout() -> None:
    found = software(ROOT / "kernels" / "NOTES.md")
    assert found["torch"] == torch.__version__.partition(" ")[0]
    assert len(str(found["sources_sha256"])) == len(str(found["library_sha256"])) == 64


def test_on_a_cpu_sensors_are_null_beside_a_reason() -> None:
    assert Sensors(torch.device("cpu")).read() == {
        "sensors": None,
        "sensors_why": "no GPU is timed",
    }
    assert Device.of(torch.device("cpu")).as_json()["name"] == NO_GPU
