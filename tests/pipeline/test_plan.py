"""What can go wrong cheaply is found before anything is written."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.errors import MbqError
from mbq_export.families.base import linear_shapes
from mbq_export.pipeline import plan as plan_module
from mbq_export.pipeline.plan import BuildRequest, make_plan
from mbq_export.pipeline.stages import graph_forms
from mbq_export.schemes.base import CHANNEL


@pytest.fixture
def request_(tmp_path: Path) -> BuildRequest:
    return BuildRequest(model="tiny-llava-ov", out=tmp_path / "out", samples=4, targets=("cpu",))


def refused(request: BuildRequest, **changes: object) -> MbqError:
    with pytest.raises(MbqError) as caught:
        make_plan(replace(request, **changes))
    assert not request.out.exists()
    return caught.value


def test_default_request_becomes_a_plan(request_: BuildRequest) -> None:
    plan = make_plan(request_)
    assert plan.scheme_name == "w3a16"
    assert plan.switches.method == "mbq"
    assert plan.source.rule == "shipped"
    assert plan.quantized_weights == 5 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 768 * 256)
    assert plan.with_reference


def test_baseline_needs_no_data(request_: BuildRequest) -> None:
    plan = make_plan(replace(request_, weight_bits=16))
    assert plan.scheme is None
    assert plan.data is None


def test_fingerprint_ignores_the_place_and_follows_the_options(request_: BuildRequest) -> None:
    plan = make_plan(request_)
    elsewhere = make_plan(replace(request_, out=request_.out.with_name("other"), command="x"))
    assert elsewhere.fingerprint == plan.fingerprint
    for change in ({"group_size": 64}, {"method": "rtn"}, {"seed": 1}, {"samples": 5}):
        assert make_plan(replace(request_, **change)).fingerprint != plan.fingerprint


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"weight_bits": 5}, "E2005", "--wbits 5 is not a width of any scheme."),
        ({"group_size": 100}, "E2004", "w3a16 has no groups of 100."),
        ({"method": "mqb"}, "E2001", "Unknown method 'mqb'."),
        ({"scheme": "w5a16"}, "E2001", "Unknown scheme 'w5a16'."),
        ({"scheme": "w4a8", "group_size": 64}, "E2004", "w4a8 has no groups of 64."),
        ({"group_size": 0}, "E2004", "w3a16 has no groups of a whole channel."),
        (
            {"scheme": "w4a8", "group_size": 128, "targets": ("rtx4090:rtx",), "lowering": "qdq"},
            "E2006",
            "w4a8 in groups of 128 has no qdq form.",
        ),
        (
            {"scheme": "w4a8", "group_size": 128, "targets": ("rtx4090:rtx",)},
            "E3005",
            "There is no compiled plugin library for this release.",
        ),
        (
            {"scheme": "w4a16", "weight_bits": 3},
            "E2002",
            "--scheme w4a16 and --wbits 3 contradict each other.",
        ),
        ({"model": "llava-ov-8b"}, "E2001", "Unknown model 'llava-ov-8b'."),
        ({"model": "llava-ov-7b"}, "E3014", "The model llava-ov-7b is not on this machine."),
        ({"lm_head_bits": 5}, "E2001", "Unknown --lm-head-bits 5."),
        (
            {"weight_bits": 16, "lm_head_bits": 4},
            "E2002",
            "--lm-head-bits 4 contradicts --wbits 16.",
        ),
        ({"vision_bits": 4}, "E2001", "Unknown --vision-bits 4."),
        (
            {"weight_bits": 16, "vision_bits": 8},
            "E2002",
            "--vision-bits 8 contradicts --wbits 16.",
        ),
        ({"gate": "off"}, "E2002", "--gate off has no reason."),
        ({"gate": "maybe", "gate_reason": "x"}, "E2001", "Unknown gate 'maybe'."),
        ({"targets": ("orin:rtx",)}, "E2012", "rtx cannot build engines for orin (sm87)."),
        (
            {"targets": ("rtx4090",)},
            "E3003",
            "No engine for rtx4090:trt can be built here.",
        ),
        ({"targets": ("rtx5090",)}, "E2001", "Unknown target 'rtx5090'."),
        ({"max_context": 8}, "E2009", "A context of 8 tokens holds no picture."),
        (
            {"max_context": 10_000},
            "E2009",
            "A context of 10000 tokens is longer than the model's 512.",
        ),
    ],
)
def test_bad_option_is_refused_by_value(
    request_: BuildRequest, changes: dict[str, object], code: str, message: str
) -> None:
    error = refused(request_, **changes)
    assert (error.code, error.message) == (code, message)
    assert error.fix


def test_groups_are_those_of_the_scheme_unless_named(request_: BuildRequest) -> None:
    assert make_plan(replace(request_, group_size=None)).group_size == 128
    channels = make_plan(replace(request_, weight_bits=None, scheme="w4a8", group_size=None))
    assert (channels.group_size, channels.with_qdq) == (CHANNEL, True)
    assert channels.table()[0][2:] == ("4.000", "w4a8 channel, mbq")


def test_the_head_s_bytes_are_told_beside_those_of_a_token(request_: BuildRequest) -> None:
    plain, coded = (make_plan(replace(request_, lm_head_bits=bits)) for bits in (16, 4))
    text = plain.text
    head, blocks = (
        text.vocab * text.hidden,
        plain.quantized_weights * (3 + 20 / plain.group_size) / 8,
    )
    rows = [next(row for row in plan.table() if row[0] == "head") for plan in (plain, coded)]
    share = [size / (size + blocks) for size in (2 * head, head * (4 + 20 / 128) / 8)]
    assert rows[0][1:3] == (1, "16")
    assert f"{share[0]:.0%} of a token's bytes, {share[1]:.0%} with --lm-head-bits 4" in rows[0][3]
    assert rows[1][1:3] == (1, "4.156")
    assert rows[1][3].startswith("w4a16 g128, ")
    assert plain.fingerprint != coded.fingerprint


def test_a_tower_of_8_bits_is_told_and_decides_the_fingerprint(request_: BuildRequest) -> None:
    plain, rounded = (make_plan(replace(request_, vision_bits=bits)) for bits in (16, 8))
    assert plain.table()[1] == ("vision tower, projector", 1, "16", "policy: small, and sensitive")
    assert rounded.table()[1][:3] == ("vision tower", 1, "8.000")
    assert rounded.table()[1][3].startswith("w8a8 channel")
    assert plain.fingerprint != rounded.fingerprint


def test_groups_without_a_qdq_form_are_planned_for_the_reference_alone(
    request_: BuildRequest,
) -> None:
    plan = make_plan(replace(request_, weight_bits=None, scheme="w4a8", group_size=128))
    assert not plan.with_qdq
    assert [(form.lowering, form.target) for form in graph_forms(plan)] == [("reference", "ort")]


def test_a_model_too_large_for_the_reference_is_refused_such_groups(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "REFERENCE_LIMIT_WEIGHTS", 1)
    error = refused(request_, weight_bits=None, scheme="w4a8", group_size=128)
    assert error.code == "E2006"
    assert "needs the plugin lowering" in (error.why or "")


def test_existing_bundle_is_not_touched(request_: BuildRequest) -> None:
    request_.out.mkdir()
    (request_.out / "manifest.json").write_text('{"schema": "mbq-export/bundle@1"}')
    with pytest.raises(MbqError, match=r"exists\."):
        make_plan(request_)
    assert make_plan(replace(request_, force=True)).request.force


def test_model_folder_is_no_place_for_output(request_: BuildRequest, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(make_plan(request_).source.folder / "config.json", model)
    for out in (model, model / "out"):
        with pytest.raises(MbqError) as caught:
            make_plan(replace(request_, model=str(model), out=out, force=True))
        assert caught.value.code == "E2011"
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_another_model_needs_data(request_: BuildRequest, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.symlink_to(make_plan(request_).source.folder, target_is_directory=True)
    error = refused(request_, model=str(copy))
    assert error.code == "E2018"
    assert "--data calib.jsonl" in error.fix


def test_a_rounded_tower_of_another_model_needs_data_whatever_the_method(
    request_: BuildRequest, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    copy.symlink_to(make_plan(request_).source.folder, target_is_directory=True)
    blind = replace(request_, model=str(copy), method="rtn")
    assert make_plan(blind).data is not None
    error = refused(blind, vision_bits=8)
    assert error.code == "E2018"
    assert error.message.startswith("--vision-bits 8 needs calibration data")


def test_too_little_disk_is_said_before_work(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr("mbq_export.pipeline.plan.shutil.disk_usage", lambda _: Usage)
    error = refused(request_)
    assert error.code == "E5002"
    assert "1 MiB are free" in error.message


def test_too_little_memory_is_said_before_work(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbq_export.pipeline.plan.available_memory", lambda: 100 << 20)
    error = refused(request_)
    assert error.code == "E5003"
    assert "100 MiB are free" in error.message


def test_linear_shapes_are_those_of_the_checkpoint(request_: BuildRequest) -> None:
    shapes = linear_shapes(make_plan(request_).text)
    assert shapes["self_attn.k_proj"] == (64, 256)
    assert shapes["mlp.down_proj"] == (256, 768)


def test_table_says_whose_scales_are_used(request_: BuildRequest) -> None:
    theirs = request_.out.with_name("theirs.safetensors")
    theirs.write_bytes(b"")
    theirs.with_suffix(".json").write_text("{}")
    plan = make_plan(replace(request_, import_scales=theirs, data=None))
    assert plan.table()[0][3].endswith(", scales of others")
    assert plan.data is None
