"""The structure tier: a good bundle is counted, a damaged one is an error with a code."""

import shutil
from pathlib import Path

import pytest

from mbq_export.bundle import Bundle, seal
from mbq_export.errors import FormatError
from mbq_export.evaluate.integrity import check_structure
from tests.evaluate.bundles import tiny_bundle


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle().root, tmp_path / "bundle"))


def sealed_again(root: Path) -> Bundle:
    facts = {k: v for k, v in tiny_bundle().manifest.items() if k not in {"schema", "files"}}
    seal(root, facts, {})
    return Bundle.open(root)


def test_everything_in_a_good_bundle_is_counted() -> None:
    bundle = tiny_bundle()
    checks, warnings = check_structure(bundle)
    assert {check.name: check.value for check in checks} == {
        "files": len(bundle.manifest["files"]),
        "checkpoint": 14,
        "graphs": 4,
        "engines": 0,
    }
    assert all(check.ok for check in checks)
    assert [warning["code"] for warning in warnings] == ["MBQ-W4010"]


def test_one_changed_bit_is_found(copied: Path) -> None:
    path = copied / "onnx" / "decoder_model_merged_qdq_ort.onnx_data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"qdq_ort\.onnx_data: content changed") as caught:
        check_structure(Bundle.open(copied))
    assert caught.value.code == "E4602"


def test_a_graph_that_is_none_is_found_even_if_it_was_sealed(copied: Path) -> None:
    (copied / "onnx" / "embed_tokens.onnx").write_bytes(b"<html>not found</html>")
    with pytest.raises(FormatError, match="it is a web page") as caught:
        check_structure(sealed_again(copied))
    assert caught.value.code == "E4404"


def test_files_that_nobody_listed_are_a_warning(copied: Path) -> None:
    (copied / "LICENSE.model").write_text("Apache-2.0")
    bundle = sealed_again(copied)
    (copied / "notes.txt").write_text("mine")
    _, warnings = check_structure(bundle)
    assert warnings == [{"code": "MBQ-W4603", "text": "1 files are not in the manifest: notes.txt"}]


def test_an_engine_without_its_description_is_refused(copied: Path) -> None:
    folder = copied / "engines" / "rtx-1.7.1" / "8.9"
    folder.mkdir(parents=True)
    (folder / "decoder.engine").write_bytes(b"plan")
    (folder / "layers.json").write_text("{}")
    with pytest.raises(
        FormatError, match=r"decoder\.engine is empty, or has no engine\.json"
    ) as caught:
        check_structure(sealed_again(copied))
    assert caught.value.code == "E4501"
    (folder / "engine.json").write_text("{}")
    checks, _ = check_structure(sealed_again(copied))
    assert checks[-1].value == 1
