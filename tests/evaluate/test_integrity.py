"""The structure tier: a good bundle is counted, a damaged one is an error with a code."""

import shutil
from pathlib import Path

import onnx
import pytest

from mbq_export.bundle import Bundle, seal
from mbq_export.errors import FormatError, IncompatibleError
from mbq_export.evaluate.integrity import check_structure
from mbq_export.export import GraphForm
from tests.evaluate.bundles import tiny_bundle
from tests.questions import tiny_model
from tests.runtime.bundles import rounded_bundle


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


def test_tiles_that_are_not_the_checkpoint_are_found_even_if_they_were_sealed(
    tmp_path: Path,
) -> None:
    """Every code is a good code, so nothing but the comparison can see it."""
    form = GraphForm(lowering="plugin", target="trt", dtype="fp16", kv="static", max_context=64)
    bundle = rounded_bundle(tmp_path / "bundle", tiny_model(), group_size=32, forms=(form,))
    checks, _ = check_structure(bundle)
    assert {check.name: check.value for check in checks}["plugins"] == 14
    path = bundle.onnx / form.file_name
    graph = onnx.load(path, load_external_data=False).graph
    tensor = next(
        each for each in graph.initializer if each.name == "layers.1.o_proj.qweight_tiles"
    )
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    data = path.with_name(f"{path.name}_data")
    content = bytearray(data.read_bytes())
    content[offset] ^= 1
    data.write_bytes(content)
    with pytest.raises(
        FormatError, match=r"other codes than .*layers\.1\.self_attn\.o_proj"
    ) as caught:
        check_structure(sealed_again(bundle.root))
    assert caught.value.code == "E4415"


def test_engines_without_the_plugins_they_were_built_with_are_refused(copied: Path) -> None:
    folder = copied / "engines" / "rtx-1.7.1" / "sm89"
    folder.mkdir(parents=True)
    (folder / "decoder.engine").write_bytes(b"plan")
    (folder / "layers.json").write_text("{}")
    (folder / "engine.json").write_text('{"plugin": {"abi": 1, "sha256": "' + "0" * 64 + '"}}')
    with pytest.raises(
        IncompatibleError, match="want a plugin library that is not there"
    ) as caught:
        check_structure(sealed_again(copied))
    assert caught.value.code == "E7003"
