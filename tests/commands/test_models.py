"""`models`: what is known, and where it is."""

from pathlib import Path

import pytest

from tests.command_line import run, tell


def test_shipped_model_is_listed_with_its_place() -> None:
    outcome = tell("models")
    assert outcome.status == 0
    row = next(line for line in outcome.out.splitlines() if line.startswith("tiny-llava-ov"))
    assert "shipped with mbq-export" in row
    assert outcome.out.splitlines()[-1] == "OK  models  4 models"


def test_result_names_alias_family_id_and_place() -> None:
    models = {m["alias"]: m for m in run("models").document["result"]["models"]}
    assert models["tiny-llava-ov"]["hub_id"] is None
    assert Path(models["tiny-llava-ov"]["local_path"], "config.json").is_file()
    assert models["llava-ov-7b"]["hub_id"] == "llava-hf/llava-onevision-qwen2-7b-ov-hf"


def test_one_name_is_resolved_with_the_rule(model: Path) -> None:
    assert tell("models", "tiny-llava-ov").out.splitlines()[0].split("  ")[:2] == [
        "tiny-llava-ov",
        "shipped",
    ]
    assert run("models", model).document["result"]["rule"] == "path"


def test_folder_of_models_is_searched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llava-ov-7b").symlink_to(model, target_is_directory=True)
    monkeypatch.setenv("MBQ_EXPORT_MODELS", str(tmp_path))
    result = run("models", "llava-ov-7b").document["result"]
    assert (result["rule"], result["folder"]) == (
        "MBQ_EXPORT_MODELS",
        str(tmp_path / "llava-ov-7b"),
    )


def test_known_model_that_is_not_here_names_the_command_that_fetches_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mbq_export.families.locate.HF_HUB_CACHE", str(tmp_path))
    outcome = run("models", "llava-ov-7b")
    assert (outcome.status, outcome.code) == (3, "E3014")
    assert (
        "hf download llava-hf/llava-onevision-qwen2-7b-ov-hf" in outcome.document["error"]["fix"][0]
    )


def test_misspelt_name_gets_the_nearest() -> None:
    outcome = run("models", "tiny-lava-ov")
    assert (outcome.status, outcome.code) == (2, "E2001")
    assert outcome.document["error"]["fix"][0] == "use tiny-llava-ov"
