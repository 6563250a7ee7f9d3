"""Bad models: found in the plan, named with the place and the cure, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.command_line import run, tell

WEIGHTS = "model.safetensors"


def refused(model: Path, *line: object) -> dict[str, Any]:
    """Build, expect a refusal without a traceback, and that nothing new lies beside the model."""
    out = model.parent / "out"
    shown = tell("build", "--model", model, "--data", "builtin:shapes", *line, "-o", out)
    assert shown.out == ""
    assert "Traceback" not in shown.err
    outcome = run("build", "--model", model, "--data", "builtin:shapes", *line, "-o", out)
    error: dict[str, Any] = outcome.document["error"]
    assert shown.status == outcome.status == error["exit"]
    assert shown.err.splitlines()[-1] == f"FAILED  build  {error['code']}  {error['message'][:400]}"
    assert error["where"][0] == "plan"
    assert error["fix"], "an error says what to do"
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    return error


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "E4105", "There are no weights in model/."),
        (lambda f: cut(f / WEIGHTS, 5000), "E4101", WEIGHTS),
        (lambda f: cut(f / WEIGHTS, -100), "E4101", WEIGHTS),
        (lambda f: cut(f / WEIGHTS, 0), "E4101", WEIGHTS),
        (
            lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
            "E4107",
            "Git-LFS pointer",
        ),
        (lambda f: (f / WEIGHTS).write_text("<!DOCTYPE html>"), "E4107", "a web page"),
        (
            lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
            "E4108",
            "only pickled weights: pytorch_model.bin",
        ),
    ],
    ids=["missing", "half", "tail", "empty", "pointer", "page", "pickle"],
)
def test_bad_weights_are_named(
    copy: Path, damage: Callable[[Path], object], code: str, words: str
) -> None:
    damage(copy)
    error = refused(copy)
    assert (error["code"], error["exit"]) == (f"MBQ-{code}", 4)
    assert words in error["message"]


def test_index_that_names_a_missing_shard_is_refused(copy: Path) -> None:
    names = list(load_file(copy / WEIGHTS))
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    error = refused(copy)
    assert error["code"] == "MBQ-E4105"
    assert "model-00001-of-00002.safetensors" in error["message"]


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda c: c.pop("text_config"), "E4003", "text_config is None"),
        (lambda c: c.pop("vision_config"), "E4003", "vision_config is None"),
        (lambda c: c["text_config"].pop("hidden_size"), "E4003", "text_config.hidden_size"),
        (lambda c: c["text_config"].pop("num_hidden_layers"), "E4003", "num_hidden_layers"),
        (lambda c: c["text_config"].update(vocab_size=-1), "E4003", "vocab_size is -1"),
        (lambda c: c["text_config"].update(hidden_size="128"), "E4003", "hidden_size is '128'"),
        (lambda c: c["text_config"].update(num_attention_heads=3), "E4003", "num_"),
        (lambda c: c.pop("model_type"), "E4004", "The model type None is not supported"),
        (lambda c: c.update(auto_map={"AutoModel": "evil.Model"}), "E4008", "wants to run code"),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "E4005", "hidden_act = 'gelu'"),
        (lambda c: c["text_config"].update(use_sliding_window=True), "E4005", "sliding_window"),
    ],
    ids=[
        *("no text", "no vision", "no width", "no depth", "negative", "text for a number", "heads"),
        *("no type", "code", "variant", "window"),
    ],
)
def test_bad_config_names_the_field(
    copy: Path, change: Callable[[dict[str, Any]], object], code: str, words: str
) -> None:
    edit(copy / "config.json", change)
    error = refused(copy)
    assert (error["code"], error["exit"]) == (f"MBQ-{code}", 4)
    assert words in error["message"]


@pytest.mark.parametrize("kind", ["llava", "qwen2", "qwen2_vl", "bert"])
def test_unsupported_model_type_lists_the_supported(copy: Path, kind: str) -> None:
    edit(copy / "config.json", lambda config: config.update(model_type=kind))
    error = refused(copy)
    assert error["code"] == "MBQ-E4004"
    assert f"'{kind}'" in error["message"]
    assert error["why"] == "supported: llava_onevision"


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1, "a": 2}', "[1]", '{"a": NaN}', "\ufeff\x00"], ids=repr
)
def test_config_that_is_no_json_object_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    error = refused(copy)
    assert error["code"] == "MBQ-E4002"
    assert "config.json" in error["message"]


def test_weights_of_another_size_are_refused(copy: Path) -> None:
    edit(
        copy / "config.json",
        lambda c: c["text_config"].update(num_hidden_layers=3, layer_types=None),
    )
    error = refused(copy)
    assert error["code"] == "MBQ-E4103"
    assert "layers.2." in error["message"]


def test_tensor_that_belongs_nowhere_is_refused_or_left_out_by_name(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    save_file({**tensors, "adapter.weight": np.zeros((2, 2), np.float16)}, copy / WEIGHTS)
    error = refused(copy)
    assert error["code"] == "MBQ-E4103"
    assert "adapter.weight" in error["message"]
    line = ("--ignore-extra", r"^adapter\.", "--dry-run", "-o", copy.parent / "out")
    assert run("build", "--model", copy, "--data", "builtin:shapes", *line).status == 0


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("tokenizer.json", "E4201"),
        ("processor_config.json", "E4203"),
    ],
)
def test_missing_companion_is_named(copy: Path, name: str, code: str) -> None:
    (copy / name).unlink()
    error = refused(copy)
    assert error["code"] == f"MBQ-{code}"
    assert error["exit"] == 4


@pytest.mark.parametrize("kind", ["empty", "file", "bundle"])
def test_folder_without_a_config_is_no_model(bundle: Path, tmp_path: Path, kind: str) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("")
    path = {"empty": empty, "file": file, "bundle": bundle}[kind]
    outcome = run("build", "--model", path, "--data", "builtin:shapes", "-o", tmp_path / "out")
    assert (outcome.status, outcome.code) == (4, "E4001")
    assert outcome.document["error"]["message"] == f"There is no config.json in {path.name}."
    assert not (tmp_path / "out").exists()


def test_quantized_model_is_not_quantized_again(bundle: Path, tmp_path: Path) -> None:
    line = ("--model", bundle / "weights", "--data", "builtin:shapes", "-o", tmp_path / "out")
    outcome = run("build", *line)
    assert (outcome.status, outcome.code) == (4, "E4009")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weight_that_is_no_number_stops_the_build_without_a_bundle(
    copy: Path, value: float
) -> None:
    """Values are not read in the plan, so finished work may lie beside; a bundle may not."""
    tensors = load_file(copy / WEIGHTS)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    out = copy.parent / "out"
    line = ("--data", "builtin:shapes", "--samples", "2", "--target", "cpu")
    for method in ("mbq", "rtn"):
        outcome = run("build", "--model", copy, *line, "--method", method, "-o", out, "--fresh")
        assert outcome.code in {"E1103", "E4110"}
        assert outcome.status == int(outcome.code[1])
        assert not out.exists()
