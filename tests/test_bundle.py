"""A bundle is sealed: whatever changes afterwards is found."""

import json
from pathlib import Path

import pytest

from mbq_export.bundle import MANIFEST, Bundle, seal, unlisted_files
from mbq_export.errors import FormatError, IncompatibleError


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    (root / "onnx").mkdir(parents=True)
    (root / "reports").mkdir()
    (root / "onnx" / "a.onnx").write_bytes(b"graph")
    (root / "reports" / "validate.json").write_text("{}")
    seal(root, {"seed": 0}, {"seconds": 1.5})
    return root


def rewrite(root: Path, **changes: object) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    (root / MANIFEST).write_text(json.dumps({**manifest, **changes}))


def test_manifest_lists_deterministic_files_and_provenance_the_rest(sealed: Path) -> None:
    bundle = Bundle.open(sealed, verify=True)
    assert [record["path"] for record in bundle.manifest["files"]] == ["onnx/a.onnx"]
    provenance = json.loads((sealed / "provenance.json").read_text())
    assert [record["path"] for record in provenance["files"]] == ["reports/validate.json"]


def test_sealing_twice_gives_the_same_identity(sealed: Path) -> None:
    before = Bundle.open(sealed).sha256
    assert seal(sealed, {"seed": 0}, {"seconds": 99}) == before


def test_one_flipped_bit_is_found_when_verifying(sealed: Path) -> None:
    (sealed / "onnx" / "a.onnx").write_bytes(b"grapi")
    Bundle.open(sealed)
    with pytest.raises(FormatError, match=r"onnx/a\.onnx: content changed") as caught:
        Bundle.open(sealed, verify=True)
    assert caught.value.code == "E4602"


def test_truncated_file_is_found_at_once(sealed: Path) -> None:
    (sealed / "onnx" / "a.onnx").write_bytes(b"gra")
    with pytest.raises(FormatError, match="3 bytes, expected 5"):
        Bundle.open(sealed)


def test_missing_file_is_named(sealed: Path) -> None:
    (sealed / "onnx" / "a.onnx").unlink()
    with pytest.raises(FormatError, match=r"the first is onnx/a\.onnx") as caught:
        Bundle.open(sealed)
    assert caught.value.code == "E4601"


def test_extra_file_is_listed(sealed: Path) -> None:
    (sealed / "onnx" / "b.onnx").write_bytes(b"")
    assert unlisted_files(sealed, Bundle.open(sealed).manifest["files"]) == ["onnx/b.onnx"]


def test_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no manifest\.json") as caught:
        Bundle.open(tmp_path)
    assert caught.value.code == "E4604"


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "something/else@1"},
        {"schema": "mbq-export/bundle@x"},
        {"files": "all"},
        {"files": [{"path": "onnx/a.onnx", "bytes": -1, "sha256": ""}]},
        {"files": [{"path": 1, "bytes": 5, "sha256": ""}]},
    ],
)
def test_malformed_manifest_is_refused(sealed: Path, changes: dict[str, object]) -> None:
    rewrite(sealed, **changes)
    with pytest.raises(FormatError) as caught:
        Bundle.open(sealed)
    assert caught.value.code == "E4604"


def test_newer_schema_names_what_this_release_reads(sealed: Path) -> None:
    rewrite(sealed, schema="mbq-export/bundle@2")
    with pytest.raises(IncompatibleError, match="has schema 2") as caught:
        Bundle.open(sealed)
    assert caught.value.code == "E7004"


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "onnx/../../outside"])
def test_path_that_leaves_the_bundle_is_refused(sealed: Path, path: str) -> None:
    (sealed.parent / "outside").write_bytes(b"")
    rewrite(sealed, files=[{"path": path, "bytes": 0, "sha256": ""}])
    with pytest.raises(FormatError) as caught:
        Bundle.open(sealed)
    assert caught.value.code == "E4605"


def test_links_are_not_sealed(sealed: Path) -> None:
    (sealed / "onnx" / "b.onnx").symlink_to(sealed / "onnx" / "a.onnx")
    with pytest.raises(FormatError, match="is a link"):
        seal(sealed, {}, {})
