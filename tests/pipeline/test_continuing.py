"""Builds that begin with a bundle: what it decides, what it refuses, and the same engines as in one go."""

import json
import shutil
from pathlib import Path

import pytest

from mbq_export.bundle import Bundle
from mbq_export.errors import MbqError
from mbq_export.pipeline.continuing import first_stage, take
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.stages import build, planned
from mbq_export.progress import silent
from mbq_export.reading import sha256_of
from mbq_export.schemes.base import CHANNEL
from mbq_export.writing import partial_path
from tests.pipeline.test_stages import Ear, request_for
from tests.tiny import Tiny, write_tiny

CARD = ("sm89:rtx",)
UNCHECKED = {"gate": "off", "gate_reason": "engines are compared, not answers"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"), Tiny(tied=False, walks=True))


@pytest.fixture(scope="module")
def kept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for ONNX Runtime that also has the graph for plugins."""
    out = tmp_path_factory.mktemp("kept") / "bundle"
    build(request_for(model, out, method="rtn", lowering="plugin", seed=7, **UNCHECKED), Ear())
    return out


def going_on(kept: Path, out: Path, **changes: object) -> BuildRequest:
    fixed = {"model": "", "bundle": kept, "out": out, "targets": CARD, **UNCHECKED}
    return BuildRequest(**{**fixed, **changes})  # type: ignore[arg-type]


def refusal(request: BuildRequest) -> MbqError:
    with pytest.raises(MbqError) as error:
        build(request, Ear())
    assert not request.out.exists()
    assert not partial_path(request.out).exists()
    return error.value


@pytest.mark.parametrize("text", ["engine", "engine..seal", "..", "calibrate..", "..engine", ""])
def test_only_the_two_late_stages_can_be_gone_on_from(text: str) -> None:
    with pytest.raises(MbqError, match="Unknown stages") as error:
        first_stage(text)
    assert (error.value.code, error.value.exit_status) == ("E2001", 2)


@pytest.mark.trt
def test_bundle_decides_what_its_weights_are(kept: Path, tmp_path: Path) -> None:
    request = going_on(kept, tmp_path / "out", first="export", lowering="qdq")
    plan = planned(request)
    manifest = Bundle.open(kept).manifest
    assert (plan.scheme_name, plan.group_size, plan.data) == ("w3a16", 64, None)
    assert (plan.source.name, plan.request.seed) == (manifest["source"]["model"], 7)
    assert plan.max_context == manifest["limits"]["max_context"]
    assert plan.switches.method == "rtn"
    assert plan.fingerprint["model"] == {
        name: manifest["source"][name] for name in ("config", "shards")
    }
    assert plan.fingerprint["from"] == {
        "bundle": sha256_of(kept / "manifest.json"),
        "stages": "export..",
    }
    assert [str(target) for target in plan.targets] == ["sm89:rtx"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.trt
def test_graphs_of_the_bundle_decide_the_lowering(kept: Path, tmp_path: Path) -> None:
    """It has one for plugins, so that one is meant, and the library for it is missing."""
    error = refusal(going_on(kept, tmp_path / "out"))
    assert (error.code, error.exit_status) == ("E3005", 3)
    assert error.fix[0] == "mbq-export plugins build --target sm89"


@pytest.mark.trt
def test_graph_that_the_bundle_lacks_is_named_with_the_stage_that_writes_it(
    kept: Path, tmp_path: Path
) -> None:
    error = refusal(going_on(kept, tmp_path / "out", lowering="qdq"))
    assert (error.code, error.exit_status) == ("E2002", 2)
    assert "bundle has no graph decoder_model_merged_qdq_trt_fp16.onnx" in error.message
    assert "decoder_model_merged_plugin_fp16.onnx" in error.why
    assert error.fix == ("--stages export.. writes it from the weights of the bundle",)


def test_bundle_without_a_target_for_engines_is_already_complete(
    kept: Path, tmp_path: Path
) -> None:
    error = refusal(going_on(kept, tmp_path / "out", targets=("cpu",)))
    assert (error.code, error.message) == ("E2002", "There is no engine to build.")


def test_changed_bundle_is_refused_before_anything_is_written(kept: Path, tmp_path: Path) -> None:
    """One byte of the weights, the size unchanged: only the hash can tell."""
    damaged = shutil.copytree(kept, tmp_path / "damaged")
    shard = next((damaged / "weights").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    error = refusal(going_on(damaged, tmp_path / "out"))
    assert (error.code, error.exit_status) == ("E4602", 4)
    assert shard.name in error.message


def test_folder_that_is_no_bundle_is_refused(model: Path, tmp_path: Path) -> None:
    assert refusal(going_on(model, tmp_path / "out")).code == "E4604"


def test_bundle_is_not_written_into_itself(kept: Path) -> None:
    assert refusal(going_on(kept, kept / "engines-for-another")).code == "E2011"


def test_file_that_changes_while_it_is_copied_is_noticed(kept: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(kept, tmp_path / "copy")
    bundle = Bundle.open(copy, verify=True)
    (copy / "weights" / "config.json").write_text("{}")
    with pytest.raises(
        MbqError, match=r"weights/config\.json changed while it was copied"
    ) as error:
        take(bundle, "weights", tmp_path / "out", silent)
    assert error.value.code == "E4602"


def engines(bundle: Path) -> dict[str, str]:
    return {
        path.relative_to(bundle).as_posix(): sha256_of(path)
        for path in sorted((bundle / "engines").rglob("*"))
        if path.is_file()
    }


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_from_a_bundle_are_those_of_one_go_byte_for_byte(
    model: Path, kept: Path, tmp_path: Path
) -> None:
    wanted = {"method": "rtn", "lowering": "qdq", "seed": 7, "targets": CARD, **UNCHECKED}
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    build(request_for(model, whole, **wanted), Ear())
    build(going_on(kept, first, first="export", lowering="qdq"), Ear())
    assert engines(first) == engines(whole)
    assert any(name.endswith("decoder.engine") for name in engines(whole))
    # The graphs are now there, so the next one needs no export.

    build(going_on(first, second), Ear())
    assert engines(second) == engines(whole)
    manifests = [
        json.loads((each / "manifest.json").read_text()) for each in (whole, first, second)
    ]
    for name in (
        "source",
        "quant",
        "calibration",
        "seed",
        "limits",
        "targets",
        "engines",
        "lowering",
    ):
        assert manifests[1][name] == manifests[0][name], name
        assert manifests[2][name] == manifests[0][name], name
    hashes = [sha256_of(each / "manifest.json") for each in (kept, first)]
    assert "from" not in manifests[0]
    assert manifests[1]["from"] == {"bundle": hashes[0], "stages": "export.."}
    assert manifests[2]["from"] == {"bundle": hashes[1], "stages": "engine.."}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_graphs_written_anew_may_have_another_type_which_later_engines_keep(
    model: Path, tmp_path: Path
) -> None:
    how = {"method": "rtn", "scheme": "w4a8", "group_size": CHANNEL, "lowering": "qdq"}
    build(request_for(model, tmp_path / "half", targets=CARD, **how, **UNCHECKED), Ear())
    anew = {"first": "export", "engines": EngineOptions(dtype="bf16")}
    build(going_on(tmp_path / "half", tmp_path / "brain", **anew), Ear())
    build(going_on(tmp_path / "brain", tmp_path / "again"), Ear())
    for name, dtype in (("half", "fp16"), ("brain", "bf16"), ("again", "bf16")):
        manifest = Bundle.open(tmp_path / name).manifest
        assert manifest["engine_dtype"]["name"] == dtype
        (folder,) = manifest["engines"]
        assert {engine["dtype"] for engine in folder["engines"].values()} == {dtype}
    assert engines(tmp_path / "again") == engines(tmp_path / "brain")
